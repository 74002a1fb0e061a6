"""Loading the weights of a checkpoint into a live model, sharded or not, in whichever spelling each of the two is."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from torchkiln._core.errors import CheckpointError
from torchkiln._core.sharded import empty_like_sharded, is_sharded
from torchkiln.checkpoint._io import CheckpointFile, Group
from torchkiln.checkpoint._open import open_checkpoint
from torchkiln.models import load_state_dict

__all__ = ["load_weights"]


def load_weights(
    model: nn.Module,
    source: str | os.PathLike[str],
    *,
    at: str | None = None,
    strict: bool = True,
    assume: Mapping[str, str] | None = None,
    dims: Mapping[str, int | None] | None = None,
) -> Any:
    """Load the weights of a checkpoint into a model, in any spelling of either.

    The model may be plain, parametrized or under the older hooks, and its parameters may be ``DTensor`` (FSDP2, tensor
    parallelism): all its processes call this then. Of a distributed checkpoint each process reads its part, however
    many processes wrote it; a tensor that is spelled in another way is gathered while it is converted, one at a time.

    Args:
        model: The model to load into.
        source: Any checkpoint that :func:`bake` reads.
        at: Where the state dict is in it, such as ``"model"``; needed where there are several.
        strict: As in ``model.load_state_dict``.
        assume: As for :func:`torchkiln.load_state_dict`.
        dims: As for :func:`torchkiln.load_state_dict`.

    Returns:
        What ``model.load_state_dict`` returns: the missing and the unexpected keys.

    Raises:
        CheckpointError: The file cannot be read, or ``at`` names no state dict in it.
        ParametrizationError: A tensor cannot be converted; the model is unchanged.

    Example:
        >>> import tempfile, torch, torchkiln
        >>> from torch import nn
        >>> from torchkiln import checkpoint
        >>> normed = torchkiln.parametrizations.weight_norm(nn.Linear(4, 2))
        >>> file = tempfile.mkdtemp() + "/normed.pt"
        >>> torch.save({"model": normed.state_dict(), "step": 3}, file)
        >>> plain = nn.Linear(4, 2)
        >>> checkpoint.load_weights(plain, file)
        <All keys matched successfully>
        >>> torch.equal(plain.weight, normed.weight)
        True
    """
    with open_checkpoint(source) as file:
        group = _group(file, at)
        if file.container == "dcp" and dist.is_initialized():
            state = _room_for(group, model)
            _read_parts(source, group, state)
        else:
            state = {key: file.read(group, key) for key in group.entries}
    return load_state_dict(model, state, strict=strict, assume=assume, dims=dims)


def _group(file: CheckpointFile, at: str | None) -> Group:
    groups = {".".join(group.path): group for group in file.groups}
    if at is not None and at in groups:
        return groups[at]
    if at is None and len(groups) == 1:
        return next(iter(groups.values()))
    found = ", ".join(repr(name) for name in groups) or "none"
    raise CheckpointError(
        f"{file.path}: expected at={at!r} to be one of its state dicts, found {found}.\nName one of them."
    )


def _room_for(group: Group, model: nn.Module) -> dict[str, Tensor]:
    """Return tensors without values for those of the checkpoint, sharded where the model's are."""
    own = model.state_dict()
    like = next((tensor for tensor in own.values() if is_sharded(tensor)), None)
    return {
        key: torch.empty(entry.shape, dtype=entry.dtype)
        if like is None
        else empty_like_sharded(own.get(key, like), like, torch.Size(entry.shape), entry.dtype)
        for key, entry in group.entries.items()
    }


def _read_parts(source: str | os.PathLike[str], group: Group, state: dict[str, Tensor]) -> None:
    from torch.distributed.checkpoint.state_dict_loader import load

    nested: dict[str, Any] = state
    for name in reversed(group.path):
        nested = {name: nested}
    # Its metadata is a pickle, of which opening the checkpoint has seen that it is data.
    load(nested, checkpoint_id=source)
