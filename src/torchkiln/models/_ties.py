"""Who else holds what a computed tensor is stored in, inside the model and out of it."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from torchkiln._core.optimizers import Replacement
from torchkiln._core.ties import Place, other_holders
from torchkiln.models._find import Found, walk

__all__ = ["held_outside", "replacements", "tied_paths"]


def tied_paths(model: nn.Module, everything: list[Found], found: list[Found]) -> list[tuple[str, ...]]:
    """Return, for each of ``found``, the other tensors of ``model`` stored in one of its parameters, by path."""
    computed = {
        f"{prefix}{key}" for one in everything for prefix in _prefixes(one) for key in one.fold.stored_keys
    }
    holders: dict[int, dict[str, None]] = {}
    for one in everything:
        for parameter in one.fold.parameters():
            holders.setdefault(id(parameter), {})[one.path] = None
    for path, parameter in _plain(model):
        if path not in computed:
            holders.setdefault(id(parameter), {})[path] = None
    tied = []
    for one in found:
        paths = {path: None for parameter in one.fold.parameters() for path in holders[id(parameter)]}
        tied.append(tuple(path for path in paths if path not in one.paths))
    return tied


def _prefixes(one: Found) -> Iterator[str]:
    return (path[: len(path) - len(one.fold.name)] for path in one.paths)


def _plain(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for prefix, module in walk(model, "", frozenset()):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield f"{prefix}{name}", parameter


def held_outside(model: nn.Module, found: list[Found]) -> set[int]:
    """Return the ids of originals of ``found`` that modules outside of ``model`` have as well."""
    inside = set(map(id, model.modules()))
    outside = set()
    for fold in (nested for one in found for nested in one.fold.nested()):
        tensors = fold.holder._parameters
        for name in fold.originals:
            # What a hook computes from is a parameter of the module itself.
            place = Place(fold.module, name if fold.holder is fold.module else fold.name)
            if other_holders((tensors, name), place, known=inside):
                outside.add(id(tensors[name]))
    return outside


def replacements(model: nn.Module, found: list[Found]) -> list[Replacement]:
    """Return what is to be replaced in optimizers, with the parameters of before."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    made = []
    for one in found:
        originals = {id(leaf) for leaf in one.fold.leaves()}
        stored = {names[id(p)]: p for p in one.fold.parameters()}
        before = {name: p for name, p in stored.items() if id(p) in originals}
        extra = {name: p for name, p in stored.items() if name not in before}
        made.append(Replacement(one.fold.module, one.fold.name, one.path, before, extra))
    return made
