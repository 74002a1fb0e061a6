"""Evaluate a parametrization once: the ``cached()`` scope and what makes an entry usable.

A scope belongs to the thread or task that opened it. An entry is used only while everything it was computed
from is as it was then: the identity and version of each tensor of the chain, the training mode of its steps, and
the grad, inference and autocast modes. Otherwise the value is computed again, so it is never stale and never
without the gradient that is due. See ``README.md`` beside this file, "The cache".
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["Legacy", "any_scope_open", "cached", "cached_value", "legacy"]


class _Entry(NamedTuple):
    owner: weakref.ref[nn.Module]
    fingerprint: tuple[Any, ...]
    value: Tensor


class _Scope:
    """The values computed since the outermost ``cached()`` of this context was entered."""

    def __init__(self) -> None:
        self.entries: dict[int, _Entry] = {}

    def value(self, chain: nn.Module) -> Tensor:
        entry = self.entries.get(id(chain))
        if entry is not None and entry.owner() is chain and entry.fingerprint == _fingerprint(chain):
            return entry.value
        value: Tensor = chain()
        # Taken after the evaluation: it may have advanced the state of a step.
        fingerprint = _fingerprint(chain)
        if fingerprint is not None:
            forget = self.entries.pop
            owner = weakref.ref(chain, lambda _, key=id(chain): forget(key, None))  # type: ignore[misc]  # mypy: default argument
            self.entries[id(chain)] = _Entry(owner, fingerprint, value)
        return value


class _Open:
    """Whether any thread has a scope open: one attribute read on the way to every parametrized tensor.

    A plain attribute, because ``torch.compile`` cannot read a ``ContextVar``.
    """

    def __init__(self) -> None:
        self.flag = False
        self.count = 0
        self.lock = threading.Lock()

    def add(self, change: int) -> None:
        with self.lock:
            self.count += change
            self.flag = self.count > 0


any_scope_open = _Open()
_scope: ContextVar[_Scope | None] = ContextVar("torchkiln_cached", default=None)


class Legacy:
    """The process-wide switch that outside code turns by writing ``parametrize._cache_enabled`` and ``._cache``.

    bitsandbytes and axolotl count ``_cache_enabled`` up and down and replace ``_cache``; others insert values under
    ``(id(module), tensor_name)``. Such writes keep torch's effect: while the switch is on, every thread reads
    through one scope, and an inserted value is returned as it is.
    """

    def __init__(self) -> None:
        self.count = 0
        self.scope = _Scope()
        self.values: dict[tuple[int, str], Tensor] = {}

    def set_count(self, count: int) -> None:
        any_scope_open.add((count > 0) - (self.count > 0))
        self.count = count
        if count <= 0:
            self.scope = _Scope()

    def replace(self, values: dict[tuple[int, str], Tensor]) -> None:
        self.values = values
        self.scope = _Scope()


legacy = Legacy()


@contextmanager
def cached() -> Iterator[None]:
    """Compute each parametrized tensor once while the context is open.

    Useful where a forward pass reads a tensor several times: a recurrent kernel, a shared weight. The scope holds
    for the thread or asyncio task that opened it, nests, and forgets its values when the outermost one closes. A
    value is computed again when an original, a mode (grad, inference, autocast, train/eval) or the state of a step
    has changed since, so an optimizer step or a ``load_state_dict`` inside the scope is seen. Writes that move no
    version counter (``tensor.data.add_(...)``) are the exception.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from torchkiln import parametrize, parametrizations
        >>> layer = parametrizations.weight_norm(nn.Linear(3, 3))
        >>> with parametrize.cached():
        ...     layer.weight is layer.weight
        True
        >>> layer.weight is layer.weight
        False
    """
    token = _scope.set(_scope.get() or _Scope())
    any_scope_open.add(+1)
    try:
        yield
    finally:
        any_scope_open.add(-1)
        _scope.reset(token)
        if _scope.get() is None and not legacy.count:
            legacy.values = {}


def scope_depth() -> int:
    """Return 1 inside ``cached()`` of this thread or task, else 0."""
    return int(_scope.get() is not None)


def cached_value(module: nn.Module, name: str, chain: nn.Module) -> Tensor:
    """Return ``chain()``, from the open scope where there is one; ``chain`` makes ``module``'s tensor ``name``."""
    if torch.compiler.is_compiling():
        return chain()  # type: ignore[no-any-return]  # nn.Module.__call__ returns Any; one graph evaluates once anyway
    scope = _scope.get() or (legacy.scope if legacy.count else None)
    if scope is None:
        return chain()  # type: ignore[no-any-return]  # nn.Module.__call__ returns Any
    if torch._C._get_tracing_state() is not None:
        raise RuntimeError("Cannot trace a model while caching parametrizations.")
    inserted = legacy.values.get((id(module), name))
    return scope.value(chain) if inserted is None else inserted


def _fingerprint(chain: nn.Module) -> tuple[Any, ...] | None:
    """Return what a value of ``chain`` depends on besides the numbers, or None where changes cannot be seen."""
    found: list[Any] = [
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"),
        torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda"),
    ]
    try:
        _collect(chain, found)
    except RuntimeError:  # an inference tensor has no version counter, a functorch wrapper no pointer
        return None
    return tuple(found)


def _collect(module: nn.Module, found: list[Any]) -> None:
    found.append(module.training)
    for tensors in (module._parameters, module._buffers):
        for tensor in tensors.values():
            if tensor is not None:
                found += (id(tensor), tensor._version, tensor.data_ptr(), tensor.requires_grad)
    for child in module._modules.values():
        if child is not None:
            _collect(child, found)
