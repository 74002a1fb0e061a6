"""Evaluate a parametrization once: the ``cached()`` scope and what makes an entry usable.

A scope belongs to the thread or task that opened it. An entry is used only while everything it was computed
from is as it was then: the tensors, attributes and submodules of the chain, the grad and autocast modes, and the
graph behind the value. Otherwise the value is computed again, so it is never stale and never without the gradient
that is due. See ``README.md`` beside this file, "The cache".
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Lock, get_ident
from typing import Any

import torch
from torch import Tensor, nn

from torchkiln._core.proof import Graph, Proof
from torchkiln._core.tracing import is_recorded

__all__ = [
    "Key",
    "Scope",
    "any_scope_open",
    "cached",
    "cached_value",
    "entered",
    "evaluate_once",
    "get_count",
    "set_count",
    "shared_scope",
]

# Looked up once: each read in a scope calls them.
_is_traced = torch._C._is_tracing
_transform_level = torch._C._functorch.maybe_current_level
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_saved_tensors_hooks = torch._C._autograd._top_saved_tensors_default_hooks
_backward_pass = torch._C._current_graph_task_id

Key = tuple[int, str]
Frame = tuple[int, int | None, int, int, object, int]


def _frame() -> Frame:
    """Return in which thread, transform, mode, checkpointed segment and backward pass this code runs.

    A scope is used only where it was opened. A value made within a transform must not be seen outside, and one from
    outside not be used within a checkpointed segment, which has to do the same in its first run and in its second.
    A copied context even takes a scope into another thread (``asyncio.to_thread``).
    """
    return (
        get_ident(),
        _transform_level(),
        _dispatch_modes(),
        _function_modes(),
        _saved_tensors_hooks(True),
        _backward_pass(),
    )


class Scope(dict[Key, Tensor]):
    """The values computed since a scope was entered.

    As a dict from ``(id(module), tensor_name)`` to tensors it is what torch has as ``parametrize._cache``.

    Args:
        members: The ``id`` of each module whose tensors are kept; None for those of every module. That an id may pass
            to another module is harmless: its values are proven like any other.
        is_forward: Whether it is that of one forward, and so does not outlive what FSDP gathers for that.
    """

    def __init__(self, members: frozenset[int] | None = None, *, is_forward: bool = False) -> None:
        super().__init__()
        self.members = members
        self.is_forward = is_forward
        self.proofs: dict[Key, Proof] = {}
        # The proofs of values that were used, by the id of the chain; emptied when outside code writes to the dict.
        self.at_hand: dict[int, Proof] = {}
        self.is_open = False
        self.outer: Scope | None = None
        # Where it may be used; None while it is closed, and during an evaluation: what a step reads then would share
        # its graph with the value.
        self.frame: Frame | None = None
        # The thread in which it may be used where nothing else is going on; None where there is more to ask.
        self.thread: int | None = None

    def holds(self, key: Key, chain: nn.Module) -> bool:
        """Return whether the entry of ``key`` may be used."""
        proof = self.proofs.get(key)
        return proof is not None and proof.value is self.get(key) and proof.holds(chain)

    def evaluate(self, key: Key, chain: nn.Module) -> dict[Key, tuple[nn.Module, Tensor]]:
        """Return the value of ``chain``, and any that were computed with it, each with its chain."""
        return {key: (chain, _evaluate(chain))}

    def evaluated(self, key: Key, chain: nn.Module) -> Tensor:
        """Return the value of ``chain``, computed now and kept as that of ``key``."""
        frame, thread = self.frame, self.thread
        self.frame = self.thread = None
        try:
            found = self.evaluate(key, chain)
        finally:
            self.frame, self.thread = frame, thread
        graphs: dict[Any, Graph] = {}  # values computed together share one
        # In an export the modes of tracing are part of the frame, so that no entry from outside is used there.
        for other, (owner, value) in () if torch.compiler.is_compiling() else found.items():
            # Taken after the evaluation, which may have advanced the state of a step.
            try:
                if (node := value.grad_fn) not in graphs:
                    graphs[node] = Graph(node)
                proof = self.proofs.get(other)
                if proof is None or not proof.renew(value, owner, graph=graphs[node]):
                    proof = Proof(value, owner, graph=graphs[node], forget=_Forget(self, other))
            # No version counter (inference), or no memory of its own (meta, subclasses).
            except (RuntimeError, TypeError):
                continue
            dict.__setitem__(self, other, value)
            self.proofs[other] = proof
            self.at_hand[id(owner)] = proof
        return found[key][1]

    def used(self, key: Key, chain: nn.Module) -> Tensor:
        """Return the value of ``chain``, kept as that of ``key`` or computed now."""
        known, proof = self.get(key), self.proofs.get(key)
        # A value without a proof of its own was put in by outside code, and is used as it is.
        if known is not None and (proof is None or proof.value is not known):
            return known
        if known is None or proof is None or not proof.holds(chain):
            known, proof = self.evaluated(key, chain), self.proofs.get(key)
        if proof is not None and proof.value is known:
            self.at_hand[id(chain)] = proof
        return known

    def clear(self) -> None:
        super().clear()
        self.proofs.clear()
        self.at_hand.clear()


def _unsettling(name: str) -> Callable[..., Any]:
    """Return the method ``name`` of a dict, by which outside code writes to a scope."""
    method = getattr(dict, name)

    @functools.wraps(method)
    def write(self: Scope, *arguments: Any, **keywords: Any) -> Any:
        self.at_hand.clear()
        return method(self, *arguments, **keywords)

    return write


for _name in ("__delitem__", "__ior__", "__setitem__", "pop", "popitem", "setdefault", "update"):
    setattr(Scope, _name, _unsettling(_name))


def _evaluate(chain: nn.Module) -> Tensor:
    """Return ``chain()``; in inference mode as a tensor with a version counter, which can be kept."""
    if not torch.is_inference_mode_enabled() or any(
        tensor.is_inference() for tensor in (*chain.parameters(), *chain.buffers())
    ):
        return chain()  # type: ignore[no-any-return]  # nn.Module.__call__ returns Any
    with torch.inference_mode(False), torch.no_grad():
        return chain()  # type: ignore[no-any-return]  # as above


class _Forget:
    """Drop an entry when its chain dies, unless another chain has taken its key."""

    def __init__(self, scope: Scope, key: Key) -> None:
        self.scope = scope
        self.key = key

    def __call__(self, chain: weakref.ref[nn.Module]) -> None:
        self.scope.at_hand.clear()
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
        self.lock = Lock()

    def add(self, change: int) -> None:
        with self.lock:
            self.count += change
            self.flag = self.count > 0


any_scope_open = _OpenScopes()
# The innermost scope here; each knows the one around it. Tasks inherit it from the code that creates them.
_scope: ContextVar[Scope | None] = ContextVar("torchkiln_cached", default=None)


class _ProcessScope(Scope):
    """The scope of outside code, which every thread reads through while it is open.

    bitsandbytes and axolotl count ``parametrize._cache_enabled`` up and down, and replace or fill
    ``parametrize._cache``. Such writes keep torch's effect.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def set_count(self, count: int) -> None:
        self.count = max(count, 0)
        if self.is_open != (self.count > 0):
            self.is_open = not self.is_open
            any_scope_open.add(+1 if self.is_open else -1)

    def serves(self, frame: Frame) -> bool:
        # Every thread, and no transform or segment: that is where it would have been opened.
        return self.is_open and frame[1:] == _PLAIN


_PLAIN = (None, 0, 0, None, -1)
_process_scope = _ProcessScope()


@contextmanager
def cached(model: nn.Module | None = None) -> Iterator[None]:
    """Compute each parametrized tensor once while the context is open.

    Useful where a forward pass reads a tensor several times: a recurrent kernel, a shared weight. With ``model`` only
    the tensors of the modules it has on entry are kept; such a scope may stay open as long as the model serves, which
    then costs little more than a baked one.

    **Never stale.** A value is used again only while all it was computed from is as it was: the tensors, attributes,
    training mode and submodules of the steps, the grad and autocast modes, and the graph behind it, which a backward
    pass uses up. Otherwise the tensor is computed again. So an optimizer step, ``load_state_dict``, ``.to()``, an
    assignment, a step that is added or removed, and a write to the value itself are all seen, and no value lacks the
    gradient that is due.

    **Whose.** A scope holds for the thread or asyncio task that opened it. A task created inside inherits it, another
    thread never does. Where scopes nest, the outermost one that keeps a tensor serves it. Inside ``torch.func``
    transforms, dispatch modes, checkpointed segments and backward passes, only scopes opened there are used.

    **Not kept.** Entries hold modules weakly, one value for each tensor. Tensors without a version counter (made in
    inference mode) or without memory of their own (meta, sparse, ``DTensor``) are computed at each read; those of a
    module under FSDP are kept within one forward of the module at most.

    **Not seen.** Writes that PyTorch itself does not count: in place through ``tensor.data`` or ``tensor.numpy()``, by
    a collective or a kernel of your own. Tell it so by ``torch.autograd.graph.increment_version(tensor)``, or close the
    scope. (``tensor.data = other`` is seen, and so is a step of any ``torch.optim.Optimizer``.) Neither is what a step
    takes from elsewhere: a global, the contents of a list, a hook on it, a module that is no submodule of it.
    ``torch.compile`` and export evaluate once for each read in the graph, whatever scope is open.

    Args:
        model: Whose tensors to keep; those of every module where it is None.

    Raises:
        TypeError: ``model`` is no module.

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
        >>> with parametrize.cached(layer), torch.no_grad():
        ...     outputs = [layer(torch.ones(1, 3)) for _ in range(3)]  # one evaluation
    """
    if not (model is None or isinstance(model, nn.Module)):
        raise TypeError(f"cached() expected a module or nothing, got {type(model).__name__}.")
    scope = Scope(None if model is None else frozenset(map(id, model.modules())))
    if model is None and shared_scope() is _process_scope:
        scope.update(_process_scope)
    try:
        with entered(scope):
            yield
    finally:
        if not get_count():
            _process_scope.clear()  # as on torch, what outside code put in goes with the last scope


@contextmanager
def entered(scope: Scope) -> Iterator[None]:
    """Open ``scope`` for the context, inside of those that are open here."""
    scope.outer = _innermost_open()
    scope.is_open = True
    scope.frame = _frame()
    scope.thread = scope.frame[0] if scope.outer is None and scope.frame[1:] == _PLAIN else None
    _scope.set(scope)
    any_scope_open.add(+1)
    try:
        yield
    finally:
        any_scope_open.add(-1)
        scope.is_open = False
        scope.frame = scope.thread = None
        scope.clear()  # its proofs refer to it: without a cycle it is freed at once
        # Not to what was there on entry: generators close in any order, and in other contexts.
        _scope.set(_innermost_open())


def _innermost_open() -> Scope | None:
    scope = _scope.get()
    while scope is not None and not scope.is_open:
        scope = scope.outer
    return scope


def evaluate_once(base: type[nn.Module]) -> Callable[..., Any]:
    """Return a ``forward`` that runs ``base``'s and evaluates each computed tensor of the module at most once.

    A recurrent layer or an attention layer reads its weights several times in a forward. The scope is the
    module's own: what other modules compute meanwhile is not kept.
    """

    @functools.wraps(base.forward)
    def forward_once(self: nn.Module, *arguments: Any, **keywords: Any) -> Any:
        # Graphs evaluate once anyway, and torch.compile cannot read a ContextVar.
        if is_recorded() or _scope_for(self) is not None:
            return base.forward(self, *arguments, **keywords)  # looked up now: it may have been patched
        with entered(Scope(frozenset((id(self),)), is_forward=True)):
            return base.forward(self, *arguments, **keywords)

    return forward_once


def _scope_for(module: nn.Module) -> Scope | None:
    """Return the outermost scope that keeps ``module``'s tensors and may be used here."""
    frame, key, found = _frame(), id(module), None
    # FSDP frees a parameter after the forward, and fills it anew for the next one, which no version counter shows.
    may_outlive_forward = "_is_fsdp_managed_module" not in module.__dict__
    if _process_scope.is_open and may_outlive_forward and _process_scope.serves(frame):
        return _process_scope
    scope = _scope.get()
    while scope is not None:
        if (
            (scope.members is None or key in scope.members)
            and scope.frame == frame
            and (may_outlive_forward or scope.is_forward)
        ):
            found = scope
        scope = scope.outer
    return found


def _scopes_of_cached() -> list[Scope]:
    """Return the open scopes of ``cached()`` here, the outermost first."""
    found = []
    scope = _scope.get()
    while scope is not None:
        if scope.frame is not None and scope.members is None and scope.frame[0] == get_ident():
            found.append(scope)
        scope = scope.outer
    return found[::-1]


def shared_scope() -> Scope:
    """Return the scope of ``cached()`` here, or the one that outside code has turned on, or may."""
    return _process_scope if _process_scope.is_open else next(iter(_scopes_of_cached()), _process_scope)


def get_count() -> int:
    """Return how many scopes are open here: torch's ``parametrize._cache_enabled``."""
    return _process_scope.count + len(_scopes_of_cached())


def set_count(count: int) -> None:
    """Open or close scopes by number, as outside code does by writing ``parametrize._cache_enabled``."""
    _process_scope.set_count(count - len(_scopes_of_cached()))
    if count <= 0:
        _process_scope.clear()


def cached_value(module: nn.Module, name: str, chain: nn.Module) -> Tensor | None:
    """Return the value of ``module``'s tensor ``name`` from the scope that keeps it; None where none does."""
    scope = _scope.get()
    if (
        # Nearly always there is one scope, in the thread and with nothing of all that a frame tells apart: asked for
        # here one by one, that costs a third of what it does to look for the scope and the entry.
        scope is not None
        and scope.thread == get_ident()
        and (proof := scope.at_hand.get(id(chain))) is not None
        and _transform_level() is None
        and not _dispatch_modes()
        and not _function_modes()
        and _saved_tensors_hooks(True) is None
        and _backward_pass() == -1
        and not _is_traced()
        and not _process_scope.is_open
        and proof.holds(chain)
    ):
        return proof.value
    scope = _scope_for(module)
    if scope is None:
        return None
    if _is_traced():
        raise RuntimeError("Cannot trace a model while caching parametrizations.")
    return scope.used((id(module), name), chain)
