"""Warn at an optimizer's step when it still holds parameters that were replaced.

A parameter does not know its optimizers, and folding a model for inference must not warn of any. Whether one still
holds a dead parameter is known for certain when it steps, and ``torch.optim`` calls a global hook then. It is
installed with the first parameter that is replaced, and costs a step nothing once all of them are gone.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook
from torch.utils.weak import TensorWeakRef

from torchkiln._core.layout import lay_out_state
from torchkiln._core.warn import warn

__all__ = ["note"]


@dataclass(frozen=True)
class _Entry:
    """A tensor whose parameters were replaced, or laid out anew.

    The parameters in use are looked up when they are needed: they may have been replaced again, and a tensor with a
    weak reference could not be swapped.
    """

    module: weakref.ref[nn.Module]
    name: str
    path: str
    gone: tuple[TensorWeakRef, ...]
    relaid: bool

    def dead(self) -> list[Tensor]:
        """Return the replaced parameters that somebody still holds."""
        return [tensor for ref in self.gone if (tensor := ref()) is not None]

    def current(self) -> list[nn.Parameter]:
        """Return the parameters that store the tensor now."""
        module = self.module()
        if module is None:
            return []
        chains = module._modules.get("parametrizations")
        chain = None if chains is None else chains._modules.get(self.name)
        if chain is not None:
            return list(chain.parameters())
        plain = module._parameters.get(self.name)
        return [] if plain is None else [plain]

    def is_over(self) -> bool:
        return self.module() is None or not (self.relaid or self.dead())


class _Watch:
    """What was replaced lately, and the hook that compares it with what an optimizer holds."""

    def __init__(self) -> None:
        self.entries: dict[tuple[weakref.ref[nn.Module], str], _Entry] = {}
        self.limit = 64
        self.installed = False

    def add(self, entry: _Entry) -> None:
        if not self.installed:
            register_optimizer_step_pre_hook(self)
            self.installed = True
        if len(self.entries) >= self.limit:
            self.entries = {key: one for key, one in self.entries.items() if not one.is_over()}
            self.limit = max(64, 2 * len(self.entries))
        key = (entry.module, entry.name)
        earlier = self.entries.get(key)
        if earlier is not None:
            gone = (*(ref for ref in earlier.gone if ref() is not None), *entry.gone)
            relaid = earlier.relaid or entry.relaid
            entry = _Entry(entry.module, entry.name, entry.path, gone, relaid)
        self.entries[key] = entry

    def __call__(self, optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        if not self.entries:
            return
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        left_behind = []
        for key, entry in list(self.entries.items()):
            current = entry.current()
            holds_dead = any(id(tensor) in held for tensor in entry.dead())
            in_use = [p for p in current if id(p) in held]
            if entry.relaid:
                lay_out_state(optimizer, in_use)
            if holds_dead and not in_use and any(p.requires_grad for p in current):
                left_behind.append(entry.path)
            if holds_dead or in_use or entry.is_over():
                self.entries.pop(key, None)
        if left_behind:
            _warn(optimizer, left_behind)


def _warn(optimizer: Optimizer, paths: list[str]) -> None:
    shown = ", ".join(paths[:5]) + (f" and {len(paths) - 5} more" if len(paths) > 5 else "")
    warn(
        f"{type(optimizer).__name__}: holds parameters that are no longer in use, so it does not train {shown}.\n"
        "Registering or removing a parametrization replaced them after the optimizer was made.\n"
        "Pass optimizer=... to that call, or make the optimizer after it."
    )


_watch = _Watch()


def note(
    module: nn.Module, name: str, *, path: str, gone: Sequence[nn.Parameter], relaid: bool = False
) -> None:
    """Note that the tensor ``name`` of ``module`` is no longer stored in ``gone``, or that its layout has changed.

    Args:
        module: The module that has the tensor.
        name: Its name there.
        path: What to call it in a warning.
        gone: The parameters that nothing in the model uses any more.
        relaid: Whether a parameter that stayed has other strides than before.
    """
    if gone or relaid:
        _watch.add(_Entry(weakref.ref(module), name, path, tuple(map(TensorWeakRef, gone)), relaid))
