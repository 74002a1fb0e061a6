"""What a kept value was computed from, and whether all of it is still so.

Whatever has no such proof is not kept. See ``README.md`` beside this file, "The cache".
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from torchkiln._core.chain import within
from torchkiln._core.sharded import is_sharded

__all__ = ["Graph", "Proof"]

Attributes = dict[str, Any]


# Looked up once: each read in a scope calls them.
_grad_enabled = torch._C.is_grad_enabled
_autocast_enabled = torch._C._is_any_autocast_enabled


class _OptimizerSteps:
    """The last optimizer step in this process, as an object of its own.

    Fused kernels, and many optimizers outside of torch, write to parameters without moving the version counters. Not a
    number: torch.compile, which runs this hook with a compiled step, would compile the next one anew.
    """

    def __init__(self) -> None:
        self.last: list[None] = []

    def __call__(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self.last = []
        if torch.compiler.is_compiling():
            return
        for group in optimizer.param_groups:
            # So that everything that goes by versions sees the step: state that advances, too. Operations on a list
            # of sharded tensors do not count as writes to them either.
            unseen = [p for p in group["params"] if group.get("fused") or is_sharded(p)]
            torch.autograd.graph.increment_version(unseen)


_optimizer_steps = _OptimizerSteps()
register_optimizer_step_post_hook(_optimizer_steps)


class Graph:
    """Whether a backward pass has gone through the graph behind values, and so may have freed it.

    Args:
        node: Their ``grad_fn``. What it refers to must not be the values: no collector would see that cycle.
    """

    def __init__(self, node: Any) -> None:
        self.spent = False
        if node is not None:
            node.register_prehook(self)

    def __call__(self, *_: Any) -> None:
        self.spent = True


# Plain tuples: Python takes them apart in half the time of named ones.
# A tensor: where it was found, by which name, the tensor, its version, requires_grad and dtype, and a second tensor on
# the same memory, held so that no other can come to lie there.
TensorState = tuple[Attributes, str, Tensor, int, bool, torch.dtype, Tensor]
# A module: its attributes, how many, what to pick of them, and what that was.
ModuleState = tuple[Attributes, int, Callable[[Attributes], tuple[Any, ...]], tuple[Any, ...]]

# What is gone, or says so when it is compared, has changed.
_INCOMPARABLE = (KeyError, RuntimeError, TypeError, ValueError)
# What every module has, hooks and the like, and what a chain has beside that no value depends on.
_BOOKKEEPING = {*vars(nn.Module()), "__module__", "followers", "unsafe", "_step_names"}
_PLACES = ("_parameters", "_buffers", "_modules")
# Of what is picked, which are those, and what the module has beside them and the training mode.
_HELD, _FREE = slice(1, 1 + len(_PLACES)), slice(1 + len(_PLACES), None)


class Proof:
    """What an entry was computed from, and whether all of it is still so.

    It holds modules by their ``__dict__``, so that the chain itself is held weakly. ``holds`` is what a read in a scope
    costs, and is therefore one flat function.

    Args:
        value: The value.
        chain: What it was computed by.
        graph: The graph behind it.
        forget: Called when the chain dies.
    """

    __slots__ = ("casts", "chain", "grad", "graph", "modules", "step", "tensors", "value", "version")

    def __init__(
        self,
        value: Tensor,
        chain: nn.Module,
        *,
        graph: Graph,
        forget: Callable[[weakref.ref[nn.Module]], None],
    ) -> None:
        self.chain = weakref.ref(chain, forget)
        self.tensors: list[TensorState] = []
        self.modules: list[ModuleState] = []
        for module in within(chain):
            self._collect(module.__dict__)
        self._take(value, graph)

    def renew(self, value: Tensor, chain: nn.Module, *, graph: Graph) -> bool:
        """Prove ``value``, computed now, instead; return whether it was computed from the same tensors and modules.

        That takes half of the time of a new proof.
        """
        if self.chain() is not chain:
            return False
        try:
            tensors = [_state_now(state) for state in self.tensors]
            modules = [_module_now(state) for state in self.modules]
            self._take(value, graph)
        except _INCOMPARABLE:
            return False
        self.tensors, self.modules = tensors, modules
        return True

    def _take(self, value: Tensor, graph: Graph) -> None:
        self.version = value._version  # somebody may write to what a read returned
        self.value = value
        self.graph = graph
        self.step = _optimizer_steps.last
        self.grad = _grad_enabled()
        self.casts = self._casts() if _autocast_enabled() else None

    def _collect(self, attributes: Attributes) -> None:
        names = [name for name in attributes if name not in _BOOKKEEPING]
        places = [attributes[place] for place in _PLACES]
        for place, among in ((places[0], places[0]), (places[1], places[1]), (attributes, names)):
            for name in among:
                if isinstance(tensor := place[name], Tensor):
                    self.tensors.append(_tensor_state(place, name, tensor))
        # Of the dicts, copies: what is added, exchanged or gone makes them differ.
        picked = (attributes["training"], *[place.copy() for place in places], *map(attributes.get, names))
        self.modules.append((attributes, len(attributes), itemgetter("training", *_PLACES, *names), picked))

    def _casts(self) -> list[Any]:
        """Return in which dtypes autocast lets operations on these kinds of devices run."""
        kinds = {tensor.device.type for tensor in (self.value, *[state[2] for state in self.tensors])}
        kinds = {kind for kind in kinds if torch.amp.is_autocast_available(kind)}
        return [
            (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in sorted(kinds)
        ]

    def holds(self, chain: nn.Module) -> bool:
        grad = _grad_enabled()
        if (
            self.grad is not grad
            or self.chain() is not chain
            or self.graph.spent
            or self.value._version != self.version
            or self.step is not _optimizer_steps.last
            or self.casts != (self._casts() if _autocast_enabled() else None)
        ):
            return False
        try:
            for place, name, tensor, version, requires_grad, dtype, memory in self.tensors:
                if (
                    place[name] is not tensor
                    or tensor._version != version
                    or (grad and tensor.requires_grad is not requires_grad)
                    or tensor.dtype is not dtype
                    or not tensor.is_set_to(memory)
                ):
                    return False
            for attributes, size, pick, picked in self.modules:
                if len(attributes) != size or pick(attributes) != picked:
                    return False
        except _INCOMPARABLE:
            return False
        return True


def _tensor_state(place: Attributes, name: str, tensor: Tensor) -> TensorState:
    memory = tensor.data
    if not tensor.is_set_to(memory):  # it may as well raise
        raise RuntimeError("the memory of this tensor cannot be compared")
    return (place, name, tensor, tensor._version, tensor.requires_grad, tensor.dtype, memory)


def _state_now(state: TensorState) -> TensorState:
    place, name, tensor, _, _, _, memory = state
    if place[name] is not tensor or not tensor.is_set_to(memory):
        raise ValueError("another tensor, or elsewhere")
    return (place, name, tensor, tensor._version, tensor.requires_grad, tensor.dtype, memory)


def _module_now(state: ModuleState) -> ModuleState:
    attributes, size, pick, before = state
    now = pick(attributes)
    if len(attributes) != size or now[_HELD] != before[_HELD]:
        raise ValueError("other tensors or modules")
    for new, old in zip(now[_FREE], before[_FREE], strict=True):
        if new is not old and isinstance(new, Tensor):
            raise ValueError("another tensor")
    return (attributes, size, pick, (now[0], *before[_HELD], *now[_FREE]))
