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
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["any_scope_open", "cached", "cached_value", "current_scope", "get_count", "set_count"]

Key = tuple[int, str]


class _Proof:
    """What an entry was computed from, and whether all of it is still so."""

    __slots__ = ("chain", "modes", "modules", "tensors", "value")

    def __init__(self, value: Tensor, chain: nn.Module, forget: _Forget) -> None:
        self.value = value
        self.chain = weakref.ref(chain, forget)
        self.modes = _modes()
        # Where each tensor and module was found, what was found there, and in which state.
        self.tensors: list[tuple[dict[str, Any], str, Tensor, int, int, bool]] = []
        self.modules: list[tuple[nn.Module, bool, tuple[nn.Module | None, ...]]] = []
        self._collect(chain)

    def _collect(self, module: nn.Module) -> None:
        children = tuple(module._modules.values())
        self.modules.append((module, module.training, children))
        for place in (module._parameters, module._buffers):
            for name, tensor in place.items():
                if tensor is not None:
                    state = (tensor._version, tensor.data_ptr(), tensor.requires_grad)
                    self.tensors.append((place, name, tensor, *state))
        for child in children:
            if child is not None:
                self._collect(child)

    def holds(self, chain: nn.Module) -> bool:
        if self.chain() is not chain or self.modes != _modes():
            return False
        for place, name, tensor, version, address, requires_grad in self.tensors:
            if place.get(name) is not tensor or tensor._version != version or tensor.data_ptr() != address:
                return False
            if tensor.requires_grad is not requires_grad:
                return False
        for module, training, children in self.modules:
            if module.training is not training or tuple(module._modules.values()) != children:
                return False
        return True


def _modes() -> tuple[Any, ...]:
    """Return the modes that decide what a computation returns."""
    if not torch._C._is_any_autocast_enabled():
        return (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
    devices = [device for device in ("cpu", "cuda", "xpu", "mps") if torch.is_autocast_enabled(device)]
    dtypes = [torch.get_autocast_dtype(device) for device in devices]
    return (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), devices, dtypes)


class Scope(dict[Key, Tensor]):
    """The values computed since the outermost ``cached()`` of a thread or task was entered.

    As a dict from ``(id(module), tensor_name)`` to tensors it is what torch has as ``parametrize._cache``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.proofs: dict[Key, _Proof] = {}
        self.depth = 0

    def value(self, key: Key, chain: nn.Module) -> Tensor:
        """Return the usable entry of ``key``, else ``chain()``, remembered."""
        known = self.get(key)
        if known is not None:
            proof = self.proofs.get(key)
            # Without a proof of its own the value was put in by outside code, and is used as it is.
            if proof is None or proof.value is not known or proof.holds(chain):
                return known
        value: Tensor = chain()
        try:
            # Taken after the evaluation, which may have advanced the state of a step.
            proof = _Proof(value, chain, _Forget(self, key))
        except RuntimeError:  # an inference tensor has no version counter, a functorch wrapper no address
            return value
        self[key] = value
        self.proofs[key] = proof
        return value

    def clear(self) -> None:
        super().clear()
        self.proofs.clear()


class _Forget:
    """Drop an entry when its chain dies, unless another chain has taken its key."""

    def __init__(self, scope: Scope, key: Key) -> None:
        self.scope = scope
        self.key = key

    def __call__(self, chain: weakref.ref[nn.Module]) -> None:
        proof = self.scope.proofs.get(self.key)
        if proof is not None and proof.chain is chain:
            del self.scope.proofs[self.key]
            if self.scope.get(self.key) is proof.value:
                del self.scope[self.key]


class _OpenScopes:
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


any_scope_open = _OpenScopes()
_scope: ContextVar[Scope | None] = ContextVar("torchkiln_cached", default=None)
# Outside code (bitsandbytes, axolotl) counts parametrize._cache_enabled up and down, and replaces or fills
# parametrize._cache. Such writes keep torch's effect: while the count is up, every thread reads through this scope.
_process_scope = Scope()


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
    scope = _scope.get()
    if scope is None:
        scope = _process_scope if _process_scope.depth else Scope()
        scope.update(_process_scope)
    token = _scope.set(scope)
    _change_depth(scope, +1)
    try:
        yield
    finally:
        _change_depth(scope, -1)
        _scope.reset(token)
        if not _process_scope.depth:
            _process_scope.clear()


def _change_depth(scope: Scope, change: int) -> None:
    scope.depth += change
    any_scope_open.add(change)


def current_scope() -> Scope:
    """Return the scope that reads here go through, or would if outside code turned the cache on."""
    scope = _scope.get()
    return _process_scope if scope is None else scope


def get_count() -> int:
    """Return how many scopes are open here: torch's ``parametrize._cache_enabled``."""
    return current_scope().depth


def set_count(count: int) -> None:
    """Open or close scopes by number, as outside code does by writing ``parametrize._cache_enabled``."""
    scope = current_scope()
    _change_depth(scope, count - scope.depth)
    if count <= 0:
        scope.clear()


def cached_value(module: nn.Module, name: str, chain: nn.Module) -> Tensor:
    """Return ``chain()``, from the open scope where there is one; ``chain`` makes ``module``'s tensor ``name``."""
    if torch.compiler.is_compiling():
        return chain()  # type: ignore[no-any-return]  # nn.Module.__call__ returns Any; one graph evaluates once anyway
    scope = current_scope()
    if not scope.depth:
        return chain()  # type: ignore[no-any-return]  # nn.Module.__call__ returns Any
    if torch._C._get_tracing_state() is not None:
        raise RuntimeError("Cannot trace a model while caching parametrizations.")
    return scope.value((id(module), name), chain)
