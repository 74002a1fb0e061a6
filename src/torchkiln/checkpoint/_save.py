"""Saving a model so that the file describes itself, and restoring it from such a file."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from torchkiln._core.atomic import all_or_nothing
from torchkiln._core.chain import ParametrizationList, chains_of, is_parametrized, steps_of
from torchkiln._core.errors import CheckpointError, ParametrizationError
from torchkiln._core.register import register_parametrization
from torchkiln._core.spellings.entries import Entry
from torchkiln._core.state import value_at_rest
from torchkiln.checkpoint._atomic import replacing
from torchkiln.checkpoint._description import KEY, Description, read_descriptions, text_of
from torchkiln.checkpoint._inspect import inspect
from torchkiln.checkpoint._io import CheckpointFile, Made
from torchkiln.checkpoint._open import open_checkpoint
from torchkiln.checkpoint._report import Inspection
from torchkiln.checkpoint._safetensors_sink import SafetensorsSink, check_directory
from torchkiln.checkpoint._specs import Also, build_step, spec_of
from torchkiln.checkpoint._team import ALONE

__all__ = ["load", "save"]

ModelT = TypeVar("ModelT", bound=nn.Module)


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    force: bool = False,
    max_shard_size: int | None = None,
) -> Inspection:
    """Write a model's state dict as safetensors, with a description of every parametrization in its metadata.

    The keys are torch's, so anything that reads safetensors reads the file; :func:`bake`, :func:`inspect`,
    :func:`convert` and :func:`verify` then need neither options nor the model's code, whichever family of the
    catalogue it is. The description holds names and numbers, never code. A tensor that several keys share is written
    under each.

    Args:
        model: Parametrized by torchkiln or by torch; parts of it may be plain.
        path: The new file, or the new directory where there are shards.
        force: Replace an existing file.
        max_shard_size: Write a directory of shards with at most so many bytes of tensors each, and their index.

    Returns:
        What the file holds, as :func:`inspect` says it.

    Raises:
        ParametrizationError: A step does not say what it is: a class of your own without ``spec()``, or a function.
        CheckpointError: The state dict holds something else than tensors, or the file cannot be written.
        OutputExistsError: It exists, and `force` is false.

    Example:
        >>> import tempfile, torch, torchkiln
        >>> from torch import nn
        >>> from torchkiln import checkpoint
        >>> from torchkiln.families import Orthogonal
        >>> folder = tempfile.mkdtemp()
        >>> model = nn.Sequential(nn.Linear(3, 3))
        >>> _ = torchkiln.parametrize.register_parametrization(model[0], "weight", Orthogonal())
        >>> print(checkpoint.save(model, folder + "/model.safetensors").rows[0].spelling)
        torch Orthogonal
        >>> report = checkpoint.bake(folder + "/model.safetensors", folder + "/plain.safetensors")
        >>> plain = nn.Sequential(nn.Linear(3, 3))
        >>> again = checkpoint.load(plain, folder + "/model.safetensors")  # registers what the file says
        >>> torch.equal(again[0].weight, model[0].weight)
        True
    """
    descriptions = dict(_descriptions(model))
    metadata = {"format": "pt"} | ({KEY: text_of(descriptions)} if descriptions else {})
    tensors = {key: (_entry(value), _made(key, value)) for key, value in _tensors(model)}
    target = Path(path)
    if max_shard_size is not None:
        check_directory(target)
    sink = SafetensorsSink(tensors, metadata, max_shard_size=max_shard_size)
    with replacing(target, sources=[], force=force, directory=max_shard_size is not None) as temporary:
        sink.write(temporary, lambda _size, _name: None, ALONE)
    return inspect(target, also=_own_classes(model))


def load(model: ModelT, path: str | os.PathLike[str], *, also: Also | None = None) -> ModelT:
    """Restore a model from a file that :func:`save` wrote, parametrizations included.

    Where the model has a plain tensor and the file a computed one, what the file says is registered; where both are
    computed, they must be so alike. Every tensor of either must be in the other, with one shape. The model is
    unchanged after an error.

    Args:
        model: To load into; its tensors keep their dtype and device.
        path: The file, or the directory of its shards.
        also: Your own classes, by the names in the file.

    Returns:
        `model`.

    Raises:
        CheckpointError: The file cannot be read, or does not fit the model.
        ParametrizationError: A name or a version in the file is not known.
    """
    with open_checkpoint(path) as file, ExitStack() as undo:
        if len(file.groups) != 1:
            raise CheckpointError(f"{path}: expected one state dict, as save writes it.")
        descriptions = read_descriptions(file.metadata, where=str(path))
        for module in model.modules():
            own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
            undo.enter_context(all_or_nothing(module, *own))
        for name, description in descriptions.items():
            _restore(model, name, description, file, also)
        _check_alike(model, descriptions, file)
        (group,) = file.groups
        state = {key: file.read(group, key) for key in group.entries}
        model.load_state_dict(state, strict=True)
    return model


# Writing --------------------------------------------------------------------------------------------------------------


def _chains(model: nn.Module) -> Iterator[tuple[str, ParametrizationList]]:
    """Yield every chain of a model with its tensor's name, those that modules share under each name."""
    for path, module in model.named_modules(remove_duplicate=False):
        if is_parametrized(module):
            for tensor, chain in chains_of(module).items():
                yield f"{path}.{tensor}" if path else tensor, chain


def _descriptions(model: nn.Module) -> Iterator[tuple[str, Description]]:
    for name, chain in _chains(model):
        if getattr(chain, "_disabled_steps", ()):
            raise ParametrizationError(
                f"{name}: has steps that are disabled, which no file says. Enable them first."
            )
        with torch.no_grad():
            value = value_at_rest(chain)
        steps = tuple(spec_of(step, where=name) for step in steps_of(chain))
        yield name, Description(_entry(value), steps, chain.unsafe)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for key, value in model.state_dict().items():
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_quantized:
            raise CheckpointError(f"{key}: safetensors holds plain tensors, got a {type(value).__name__}.")
        yield key, value


def _entry(value: Tensor) -> Entry:
    return Entry(tuple(value.shape), value.dtype)


def _made(key: str, value: Tensor) -> Made:
    return Made(_entry(value), lambda: value.detach().cpu().contiguous().resolve_conj(), name=key)


def _own_classes(model: nn.Module) -> dict[str, Any]:
    """Return the classes of a model's steps that are not torchkiln's, by name."""
    steps = [type(step) for _, chain in _chains(model) for step in chain.modules()]
    return {cls.__name__: cls for cls in steps if hasattr(cls, "spec") and "torchkiln" not in cls.__module__}


# Restoring ------------------------------------------------------------------------------------------------------------


def _restore(model: nn.Module, name: str, said: Description, file: CheckpointFile, also: Also | None) -> None:
    """Register what the file says of a tensor, unless it is there already."""
    path, _, tensor = name.rpartition(".")
    module = _owner(model, path, name, where=file.path)
    if is_parametrized(module, tensor):
        _check_same(name, chains_of(module)[tensor], said, where=file.path)
        return
    plain = getattr(module, tensor, None)
    shape = tuple(plain.shape) if isinstance(plain, Tensor) else None
    if shape != said.entry.shape or isinstance(module, ParametrizationList):
        raise CheckpointError(
            f"{file.path}: {name} has shape {said.entry.shape} and {'+'.join(_names(said.steps))} in the file, and "
            f"{'no tensor' if shape is None else f'shape {shape}'} in the model.\n"
            "Load into a model of the same shapes; originals that are computed themselves must be so already."
        )
    del plain  # or it would look as if somebody else held it
    for index, spec in enumerate(said.steps):
        start = f"{path}{'.' if path else ''}parametrizations.{tensor}.{index}."
        buffers = {
            key.removeprefix(start): file.read(group, key)
            for group in file.groups
            for key in group.entries
            if key.startswith(start)
        }
        step = build_step(spec, said.entry, also=also, buffers=buffers)
        step.to(getattr(module, tensor).device).train(module.training)
        register_parametrization(module, tensor, step, unsafe=True, tied_in=model)
        # Registering asked for the right inverse of what was there before, which noted something else.
        for key, value in spec.get("state", {}).items():
            setattr(step, key, tuple(value) if isinstance(value, list) else value)
    chains_of(module)[tensor].unsafe = said.unsafe


def _owner(model: nn.Module, path: str, name: str, *, where: Path) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise CheckpointError(f"{where}: describes {name}, and the model has no module {path!r}.") from None


def _names(specs: Sequence[Mapping[str, Any]]) -> list[str]:
    return [str(spec["name"]) for spec in specs]


def _check_same(name: str, chain: ParametrizationList, said: Description, *, where: Path) -> None:
    mine = [_without_state(spec_of(step, where=name)) for step in steps_of(chain)]
    theirs = [_without_state(spec) for spec in said.steps]
    if mine != theirs:
        have, has = (" + ".join(_names(specs)) for specs in (mine, theirs))
        raise CheckpointError(
            f"{where}: {name} is {has} in the file and {have} in the model, or their arguments differ.\n"
            "Load into a model that has the same, or a plain tensor there."
        )


def _without_state(spec: Any) -> Any:
    """Return a spec without what right inverses noted, at every depth."""
    if isinstance(spec, Mapping):
        return {key: _without_state(value) for key, value in spec.items() if key != "state"}
    return [_without_state(value) for value in spec] if isinstance(spec, (list, tuple)) else spec


def _check_alike(model: nn.Module, descriptions: Mapping[str, Description], file: CheckpointFile) -> None:
    """Raise unless file and model have the same keys, with the same shapes."""
    where = file.path
    for name, _ in _chains(model):
        if name not in descriptions:
            raise CheckpointError(
                f"{where}: does not say that {name} is computed, as it is in the model.\n"
                "torchkiln.load_state_dict converts between spellings."
            )
    (group,) = file.groups
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    for key, shape in shapes.items():
        if key not in group.entries:
            raise CheckpointError(f"{where}: has no {key}, which the model has.")
        if group.entries[key].shape != shape:
            raise CheckpointError(
                f"{where}: {key} has shape {group.entries[key].shape} in the file and {shape} in the model."
            )
    for key in group.entries:
        if key not in shapes:
            raise CheckpointError(f"{where}: has {key}, which the model has not.")
