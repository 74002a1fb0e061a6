"""The hook for torch's distributed engines, which keep books on the parameters that modules have.

The mechanism knows no engine. ``torchkiln.distributed`` attaches what does, and is asked only where a process group
exists. See ``distributed/README.md``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch.distributed as dist
from torch import nn

__all__ = ["Engine", "attach", "balance", "prepare", "spread", "take_in", "versions"]


class Engine(Protocol):
    """What the engines need to do when a parametrization comes, goes or is evaluated."""

    def prepare(self, modules: Sequence[nn.Module], intent: str | None) -> None:
        """Bring the parameters of ``modules`` into the state in which they can be exchanged.

        With an ``intent``, a text of what is about to be done, see that all ranks have the same.
        """

    def take_in(self, module: nn.Module, step: nn.Module) -> Callable[[], None]:
        """Shard ``step``, about to be registered on ``module``, as that is sharded; return how to undo it."""

    def balance(self, modules: Sequence[nn.Module]) -> None:
        """Bring the engines' books up to what ``modules`` have now."""

    def spread(self, modules: Sequence[nn.Module]) -> None:
        """Let what was just registered on ``modules`` be the same on all ranks."""

    def versions(self, chain: nn.Module) -> tuple[Any, ...] | None:
        """Return what changes with every write to the parameters of ``chain``; None where their own versions do."""


class _Hook:
    engine: Engine | None = None


_hook = _Hook()
_available = dist.is_available()


def attach(engine: Engine) -> None:
    """Let ``engine`` take part in every change from now on."""
    _hook.engine = engine


def prepare(modules: Iterable[nn.Module], intent: str | Callable[[], str] | None = None) -> None:
    """Announce a change of ``modules``, before their tensors are looked at.

    Args:
        modules: The modules.
        intent: What is about to be done, or what says so; None for a look only.
    """
    if (engine := _engine_in_use()) is not None:
        engine.prepare(list(modules), intent() if callable(intent) else intent)


def take_in(module: nn.Module, step: nn.Module) -> Callable[[], None]:
    """Announce that ``step`` is about to be registered on ``module``; return what to call if it is not."""
    engine = _engine_in_use()
    return _nothing if engine is None else engine.take_in(module, step)


def _nothing() -> None:
    pass


def balance(modules: Iterable[nn.Module]) -> None:
    """Announce that ``modules`` have changed, or that a change was undone."""
    if (engine := _engine_in_use()) is not None:
        engine.balance(list(modules))


def spread(modules: Iterable[nn.Module]) -> None:
    """Announce that something was registered on ``modules``."""
    if (engine := _engine_in_use()) is not None:
        engine.spread(list(modules))


def _engine_in_use() -> Engine | None:
    return _hook.engine if _available and dist.is_initialized() else None


def versions(chain: nn.Module) -> tuple[Any, ...] | None:
    """Return what changes with every write to the parameters of ``chain``; None where their own versions do."""
    # FSDP refills what it has gathered, at the same version.
    is_gathered = "_is_fsdp_managed_module" in chain.__dict__
    return _hook.engine.versions(chain) if is_gathered and _hook.engine is not None else None
