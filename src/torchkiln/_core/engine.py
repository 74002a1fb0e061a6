"""The hook for torch's distributed engines, which keep books on the parameters that modules have.

The mechanism knows no engine. ``torchkiln.distributed`` attaches what does, and is asked only where a process group
exists. See ``distributed/README.md``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch.distributed as dist
from torch import nn

__all__ = ["Engine", "attach", "balance", "prepare", "versions"]


class Engine(Protocol):
    """What the engines need to do when a parametrization comes, goes or is evaluated."""

    def prepare(self, modules: Sequence[nn.Module], step: nn.Module | None) -> None:
        """Bring the parameters of ``modules`` into the state in which they can be exchanged.

        ``step`` is about to be registered: its tensors become the same on all ranks.
        """

    def balance(self, modules: Sequence[nn.Module]) -> None:
        """Bring the engines' books up to what ``modules`` have now."""

    def versions(self, chain: nn.Module) -> tuple[Any, ...] | None:
        """Return what changes with every write to the parameters of ``chain``; None where their own versions do."""


class _Hook:
    engine: Engine | None = None


_hook = _Hook()


def attach(engine: Engine) -> None:
    """Let ``engine`` take part in every change from now on."""
    _hook.engine = engine


def prepare(modules: Iterable[nn.Module], step: nn.Module | None = None) -> None:
    """Announce a change of ``modules``, before their tensors are looked at."""
    if _hook.engine is not None and dist.is_available() and dist.is_initialized():
        _hook.engine.prepare(list(modules), step)


def balance(modules: Iterable[nn.Module]) -> None:
    """Announce that ``modules`` have changed, or that a change was undone."""
    if _hook.engine is not None and dist.is_available() and dist.is_initialized():
        _hook.engine.balance(list(modules))


def versions(chain: nn.Module) -> tuple[Any, ...] | None:
    """Return what changes with every write to the parameters of ``chain``; None where their own versions do."""
    # FSDP refills what it has gathered, at the same version.
    is_gathered = "_is_fsdp_managed_module" in chain.__dict__
    return _hook.engine.versions(chain) if is_gathered and _hook.engine is not None else None
