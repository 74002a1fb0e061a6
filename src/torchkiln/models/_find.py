"""Find the computed tensors of a model, and choose among them by pattern."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from torchkiln._core.chain import chains_of, is_parametrized
from torchkiln._core.engine import prepare
from torchkiln._core.errors import TorchkilnWarning
from torchkiln.models._fold import ChainFold, Fold
from torchkiln.models._hooks import HookFold, hook_folds

__all__ = ["Found", "Patterns", "computed_tensors", "folds_of", "select", "walk"]

Patterns = str | Iterable[str] | None


@dataclass(frozen=True)
class Found:
    """A computed tensor and every path that leads to it; several where a module is shared."""

    fold: Fold
    paths: tuple[str, ...]

    @property
    def path(self) -> str:
        return self.paths[0]

    @property
    def prefix(self) -> str:
        return self.path[: len(self.path) - len(self.fold.name)]

    def matches(self, pattern: str) -> bool:
        return any(fnmatchcase(path, pattern) for path in self.paths)


def computed_tensors(model: nn.Module) -> list[Found]:
    """Return the computed tensors of ``model``, each once, in the order of its modules.

    What computes a stored tensor of another computed tensor belongs to that one: a pruned ``weight_v``, a
    parametrized original.
    """
    prepare(model.modules())
    paths: dict[int, tuple[nn.Module, list[str]]] = {}
    for prefix, module in walk(model, "", frozenset()):
        paths.setdefault(id(module), (module, []))[1].append(prefix)
    return [
        Found(fold, tuple(f"{prefix}{name}" for prefix in prefixes))
        for module, prefixes in paths.values()
        for name, fold in folds_of(module).items()
    ]


def walk(module: nn.Module, prefix: str, above: frozenset[int]) -> Iterator[tuple[str, nn.Module]]:
    """Yield each path and its module; a shared module comes several times, the inside of a chain never."""
    yield prefix, module
    above |= {id(module)}
    chains = module._modules.get("parametrizations") if _chains(module) else None
    for name, child in module._modules.items():
        if child is not None and child is not chains and id(child) not in above:
            yield from walk(child, f"{prefix}{name}.", above)


def _chains(module: nn.Module) -> dict[str, Any]:
    """Return the chains of ``module``; not what a user's own ``parametrizations`` attribute holds."""
    if not is_parametrized(module):
        return {}
    return {name: chain for name, chain in chains_of(module).items() if hasattr(chain, "is_tensor")}


def folds_of(module: nn.Module) -> dict[str, Fold]:
    """Return the computed tensors of ``module`` itself, those that only others are computed from put inside them."""
    found: dict[str, Fold] = {
        name: ChainFold(module, name, inner=folds_of(chain)) for name, chain in _chains(module).items()
    }
    hooked = list(hook_folds(module))
    found |= {fold.name: fold for fold in hooked}
    for fold in hooked:
        _nest(fold, found)
    return found


def _nest(fold: HookFold, found: dict[str, Fold]) -> None:
    for part in fold.parts:
        if part in found:
            fold.inner[part] = found.pop(part)


def select(found: list[Found], include: Patterns, exclude: Patterns) -> list[Found]:
    """Return those that some ``include`` pattern matches (all for None) and no ``exclude`` pattern does."""
    included, excluded = _patterns(include), _patterns(exclude)
    for pattern in (*(included or ()), *(excluded or ())):
        if not any(one.matches(pattern) for one in found):
            warnings.warn(
                f"the pattern {pattern!r} matches no computed tensor.\n"
                "Patterns match whole paths, such as 'encoder.layers.*.weight'; summary(model) lists them.",
                TorchkilnWarning,
                stacklevel=3,
            )
    return [
        one
        for one in found
        if (included is None or any(map(one.matches, included))) and not any(map(one.matches, excluded or ()))
    ]


def _patterns(patterns: Patterns) -> tuple[str, ...] | None:
    if patterns is None:
        return None
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)
