"""Call a model with other tensors in the place of its own, computed ones included."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from torchkiln._core.chain import ParametrizationList, chains_of, is_parametrized
from torchkiln._core.errors import ParametrizationError
from torchkiln._core.stand_in import standing_in

__all__ = ["functional_call"]

Tensors = Mapping[str, Tensor]


def functional_call(
    module: nn.Module,
    parameters_and_buffers: Tensors | Sequence[Tensors],
    args: Any = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    tie_weights: bool = True,
    strict: bool = False,
) -> Any:
    """Call ``module`` with the given tensors in the place of its own, by plain names too.

    It is ``torch.func.functional_call`` for parametrized models.

    A computed tensor goes by its plain name (``layer.weight``) or by those of its originals
    (``layer.parametrizations.weight.original``). Under the plain name the tensor is used as it is, without the
    parametrization's steps, and gradients reach it. ``torch.func.functional_call`` does the same on a module that
    torchkiln parametrized, except with ``strict=True``, where it knows the originals' names alone.

    Args:
        module: The module to call.
        parameters_and_buffers: The tensors by name; or several such mappings.
        args: The arguments; one that is no tuple is the only one.
        kwargs: The keyword arguments.
        tie_weights: Whether a tensor given for one of two tied parameters counts for both.
        strict: Whether just all parameters and buffers must be given. The plain name of a computed tensor stands for
            all that its chain holds.

    Returns:
        What ``module`` returns.

    Raises:
        ParametrizationError: A computed tensor is given by its plain name and by its originals' as well.
        RuntimeError: ``strict``, and names are missing or unexpected.

    Example:
        >>> import torch, torchkiln
        >>> from torch import nn
        >>> layer = torchkiln.parametrizations.weight_norm(nn.Linear(2, 1, bias=False))
        >>> torchkiln.functional_call(layer, {"weight": torch.tensor([[3.0, 4.0]])}, torch.ones(1, 2), strict=True)
        tensor([[7.]])
    """
    tensors = _merged(parameters_and_buffers)
    chains = {name: chain for name, chain in _named_chains(module) if name in tensors}
    _check_names(module, tensors, chains, strict=strict)
    rest = {name: tensor for name, tensor in tensors.items() if name not in chains}
    with ExitStack() as stack:
        for name, chain in chains.items():
            stack.enter_context(standing_in(chain, tensors[name]))
        return torch.func.functional_call(module, rest, args, dict(kwargs or {}), tie_weights=tie_weights)


def _merged(given: Tensors | Sequence[Tensors]) -> dict[str, Tensor]:
    mappings = [given] if isinstance(given, Mapping) else given
    merged: dict[str, Tensor] = {}
    for mapping in mappings:
        if twice := sorted(merged.keys() & mapping.keys()):
            raise ValueError(f"{twice[0]!r} is in two of the given dictionaries.")
        merged.update(mapping)
    return merged


def _named_chains(module: nn.Module) -> Iterator[tuple[str, ParametrizationList]]:
    for prefix, owner in module.named_modules(remove_duplicate=False):
        if is_parametrized(owner):
            for name, chain in chains_of(owner).items():
                if isinstance(chain, ParametrizationList):
                    yield f"{prefix}.{name}" if prefix else name, chain


def _check_names(
    module: nn.Module, tensors: Tensors, chains: Mapping[str, ParametrizationList], *, strict: bool
) -> None:
    """Refuse a tensor that is given twice, and where ``strict`` any name that is missing or unexpected."""
    own = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    own |= {name for name, _ in module.named_buffers(remove_duplicate=False)}
    behind = {inner: name for name in chains for inner in own if inner.startswith(_path_of_chain(name))}
    if twice := sorted(behind.keys() & tensors.keys()):
        raise ParametrizationError(
            f"{behind[twice[0]]} is given by its plain name and by {twice[0]}.\nGive the one or the others."
        )
    unexpected, missing = tensors.keys() - own - chains.keys(), own - behind.keys() - tensors.keys()
    said = {"Unexpected": unexpected, "Missing": missing}
    errors = [
        f"{what} key(s): {', '.join(map(repr, sorted(names)))}." for what, names in said.items() if names
    ]
    if strict and errors:
        raise RuntimeError(
            f"Error(s) in reparametrizing for {type(module).__name__}:\n\t" + "\n\t".join(errors)
        )


def _path_of_chain(name: str) -> str:
    """Return what the names of all that the chain of the tensor ``name`` holds begin with."""
    prefix, _, tensor_name = name.rpartition(".")
    return f"{prefix}.parametrizations.{tensor_name}.".lstrip(".")
