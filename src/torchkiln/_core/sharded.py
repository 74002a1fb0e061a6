"""A step on tensors that are sharded over processes: on each shard, with reductions, or on the gathered tensor.

A sharded tensor is a ``DTensor``: tensor parallelism makes weights of that kind, and FSDP2 between two forwards. How a
step runs on one is said in one place, the attribute ``sharding`` of its class:

``"local"``
    On each shard by itself, where no dimension that is cut is one that it acts along (``event_dims``); else gathered.
``"reduced"``
    Likewise on each shard where it can; else on the sharded tensors themselves, with :func:`settled`, :func:`whole` and
    :func:`beside` where it reduces.
``"gathered"``
    On the full tensors, on every process, which is always right: what a step runs as that says nothing.
anything else
    Not at all: the text is the reason.

Whatever the way, the result has the placements of the plain tensor.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from torchkiln._core.errors import ParametrizationError

__all__ = [
    "beside",
    "distributed_like",
    "empty_like_sharded",
    "evaluate",
    "gather_module",
    "holds_everywhere",
    "invert",
    "is_sharded",
    "laid_out_as",
    "placements_of",
    "replicated_like",
    "settled",
    "shard_of",
    "share",
    "whole",
]

Placements = tuple[Any, ...]
_PLAIN = frozenset((Tensor, nn.Parameter))


def is_sharded(value: object) -> bool:
    """Return whether ``value`` is a ``DTensor``; without importing what makes them."""
    if type(value) in _PLAIN:  # most are, and reads ask
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def placements_of(tensor: object) -> Placements | None:
    """Return how ``tensor`` lies on the processes; None for a plain tensor."""
    return tuple(cast(Any, tensor).placements) if is_sharded(tensor) else None


# --- what a step needs that reduces ---------------------------------------------------------------------------------


def settled(tensor: Tensor) -> Tensor:
    """Return ``tensor`` with the sums that are still due over processes made; a plain tensor as it is."""
    placements = placements_of(tensor)
    if placements is None or not any(one.is_partial() for one in placements):
        return tensor
    return _redistributed(tensor, tuple(_replicate() if one.is_partial() else one for one in placements))


def whole(tensor: Tensor) -> Tensor:
    """Return all of ``tensor`` as a plain tensor, the same on every process."""
    return cast(Any, tensor).full_tensor() if is_sharded(tensor) else tensor


def beside(tensor: Tensor, other: Tensor) -> Tensor:
    """Return ``tensor``, which every process has, as one that operations with ``other`` take."""
    if not is_sharded(other) or is_sharded(tensor):
        return tensor
    from torch.distributed.tensor import DTensor

    mesh = cast(Any, other).device_mesh
    return cast(Tensor, DTensor.from_local(tensor, mesh, [_replicate()] * mesh.ndim, run_check=False))


def shard_of(tensor: Tensor) -> Tensor:
    """Return what this process has of ``tensor``."""
    return cast(Any, tensor).to_local() if is_sharded(tensor) else tensor


def share(tensor: Tensor, like: Tensor) -> Tensor:
    """Give ``tensor`` the value of the first of the processes that ``like`` is sharded over, in place."""
    if is_sharded(like) and not is_sharded(tensor):
        mesh = cast(Any, like).device_mesh
        for group in map(mesh.get_group, range(mesh.ndim)):
            torch.distributed.broadcast(tensor, torch.distributed.get_global_rank(group, 0), group=group)
    return tensor


def distributed_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Return the first process's ``tensor``, distributed as ``like`` is along the dimensions that both have."""
    from torch.distributed.tensor import distribute_tensor

    placements = _fit(placements_of(like) or (), tensor, like.shape)
    return distribute_tensor(tensor.contiguous(), cast(Any, like).device_mesh, placements)


def replicated_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Return the first process's ``tensor`` on every process that ``like`` is distributed over."""
    from torch.distributed.tensor import distribute_tensor

    mesh = cast(Any, like).device_mesh
    return distribute_tensor(tensor.contiguous(), mesh, [_replicate()] * mesh.ndim)


def empty_like_sharded(own: Tensor, like: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Return a tensor without values, laid out as ``own`` is if that has its shape, else shared out along dimension 0.

    Args:
        own: What is going to take its values, if nothing has to be converted.
        like: A tensor that is sharded over the processes in question.
        shape: Its shape.
        dtype: Its dtype.
    """
    from torch.distributed.tensor import Shard, empty

    if own.shape == shape and not is_sharded(own):
        return torch.empty(shape, dtype=dtype, device=own.device)
    mesh, placements = cast(Any, like).device_mesh, [Shard(0)] * (cast(Any, like).device_mesh.ndim)
    if is_sharded(own) and own.shape == shape:
        mesh, placements = cast(Any, own).device_mesh, list(placements_of(own) or ())
    return empty(shape, dtype=dtype, device_mesh=mesh, placements=placements if shape else None)


def laid_out_as(tensor: Tensor, like: Tensor) -> Tensor:
    """Return ``tensor``, which every process has in full, as ``like`` is laid out; nothing is communicated."""
    if not is_sharded(like) or is_sharded(tensor):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = cast(Any, like).device_mesh, placements_of(like) or ()
    tensor = tensor.to(shard_of(like).device)
    return distribute_tensor(tensor, mesh, _fit(placements, tensor, like.shape), src_data_rank=None)


def gather_module(module: nn.Module) -> None:
    """Let ``module`` and what is in it have full tensors in the place of its sharded ones."""
    for holder in module.modules():
        tables: tuple[dict[str, Any], ...] = (holder._parameters, holder._buffers)
        for held in tables:
            for name, tensor in held.items():
                if is_sharded(tensor):
                    full = whole(tensor.detach())
                    is_parameter = isinstance(tensor, nn.Parameter)
                    held[name] = nn.Parameter(full, tensor.requires_grad) if is_parameter else full


def holds_everywhere(condition: bool, tensor: Tensor) -> bool:
    """Return whether a condition on its own shard of ``tensor`` holds on each process."""
    if not is_sharded(tensor):
        return condition
    mesh = cast(Any, tensor).device_mesh
    vote = torch.tensor(int(condition), device=shard_of(tensor).device)
    for group in map(mesh.get_group, range(mesh.ndim)):
        torch.distributed.all_reduce(vote, torch.distributed.ReduceOp.MIN, group=group)
    return bool(vote)


def _replicate() -> Any:
    from torch.distributed.tensor import Replicate

    return Replicate()


def _redistributed(tensor: Tensor, placements: Sequence[Any]) -> Tensor:
    return cast(Tensor, cast(Any, tensor).redistribute(placements=tuple(placements)))


# --- forward --------------------------------------------------------------------------------------------------------


def evaluate(step: nn.Module, inputs: Sequence[Tensor], placements: Placements | None) -> Tensor:
    """Return ``step(*inputs)`` where some of the inputs are sharded.

    Args:
        step: The step.
        inputs: What it takes.
        placements: How the result is to lie on the processes, where no input of its shape says so.
    """
    way = _way(step)
    tried = _on_shards(step, inputs) if way != "gathered" and _runs_on_shards(step, inputs) else None
    if tried is not None:
        value = tried
    elif way == "reduced":
        value = settled(_tensor(step(*inputs)))
    else:
        value = _on_whole(step, inputs)
    mesh_tensor = _like(inputs, value)
    wanted = _fit(_wanted(mesh_tensor, value, placements), value)
    if not is_sharded(value):
        value = beside(value, mesh_tensor)
    return value if placements_of(value) == wanted else _redistributed(value, wanted)


def _way(step: nn.Module) -> str:
    way: str = getattr(type(step), "sharding", "gathered")
    if way not in ("local", "reduced", "gathered"):
        raise ParametrizationError(f"{type(step).__name__} does not run on a sharded tensor: {way}")
    return way


def _runs_on_shards(step: nn.Module, inputs: Sequence[Tensor]) -> bool:
    """Return whether no dimension that is cut is one that ``step`` acts along, and it has no tensors of its own."""
    last, placements = inputs[-1], placements_of(inputs[-1])
    if any(placements_of(one) != placements or one.ndim != last.ndim for one in inputs) or placements is None:
        return False
    if next(step.parameters(), None) is not None or next(step.buffers(), None) is not None:
        return False
    by_number = range(0 if _way(step) == "local" else last.ndim)  # what a step is that does not say more
    acts_along: Callable[[int], Sequence[int]] = getattr(step, "event_dims", lambda _: by_number)
    cut = {one.dim % last.ndim for one in placements if hasattr(one, "dim")}
    return cut.isdisjoint(dim % last.ndim for dim in acts_along(last.ndim))


def _on_shards(step: nn.Module, inputs: Sequence[Tensor]) -> Tensor | None:
    """Return the value, None where its dimensions are not those of the inputs, and what is a batch thus not known."""
    shard = _tensor(step(*map(shard_of, map(settled, inputs))))
    return _sharded_as(inputs[-1], shard) if shard.ndim == inputs[-1].ndim else None


def _sharded_as(x: Tensor, shard: Tensor) -> Tensor:
    """Return the tensor that has ``shard`` here, cut as ``x`` is; along other dimensions it may have another size."""
    from torch.distributed.tensor import DTensor

    mesh, placements = cast(Any, x).device_mesh, placements_of(x) or ()
    cut = {one.dim % x.ndim for one in placements if hasattr(one, "dim")}
    shape = torch.Size(x.shape[dim] if dim in cut else size for dim, size in enumerate(shard.shape))
    stride = torch.empty(shape, device="meta").stride()
    return cast(
        Tensor, DTensor.from_local(shard, mesh, placements, run_check=False, shape=shape, stride=stride)
    )


def _on_whole(step: nn.Module, inputs: Sequence[Tensor]) -> Tensor:
    with _own_tensors_whole(step):
        return _tensor(step(*(whole(one) for one in inputs)))


@contextmanager
def _own_tensors_whole(step: nn.Module) -> Iterator[None]:
    """Let the tensors of ``step`` itself be whole tensors while the context is open, for computing with them."""
    exchanged: list[tuple[dict[str, Any], str, Tensor]] = [
        (held, name, tensor)
        for holder in step.modules()
        for held in (holder._parameters, holder._buffers)
        for name, tensor in held.items()
        if tensor is not None and is_sharded(tensor)
    ]
    try:
        for held, name, tensor in exchanged:
            held[name] = whole(tensor)
        yield
    finally:
        for held, name, tensor in exchanged:
            held[name] = tensor


def _tensor(value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise ParametrizationError(f"A parametrization must return a tensor. Got {type(value).__name__}.")
    return value


def _like(inputs: Sequence[Tensor], value: Tensor) -> Tensor:
    """Return the input that tells where the value lies: the last one of its shape, else the last that is sharded."""
    sharded = [one for one in inputs if is_sharded(one)]
    return next((one for one in reversed(sharded) if one.shape == value.shape), sharded[-1])


def _wanted(like: Tensor, value: Tensor, placements: Placements | None) -> Placements:
    own = placements_of(settled(like)) or ()
    if placements is None or like.shape == value.shape:
        return own
    # An engine around that shards in a further way puts its axis before the ones there were.
    return (*own[: len(own) - len(placements)], *placements)


def _fit(placements: Placements, tensor: Tensor, shape: torch.Size | None = None) -> Placements:
    """Return the placements for ``tensor``, replicated where it has not the dimension that is cut.

    With ``shape``, that of the tensor which the placements are from, the dimension must also have its size.
    """

    def fits(dim: int) -> bool:
        in_range = -tensor.ndim <= dim < tensor.ndim
        return in_range and (shape is None or (dim < len(shape) and shape[dim] == tensor.shape[dim]))

    return tuple(one if not hasattr(one, "dim") or fits(one.dim) else _replicate() for one in placements)


# --- right inverse --------------------------------------------------------------------------------------------------


def invert(step: nn.Module, value: Tensor) -> Any:
    """Return ``step.right_inverse(value)``; for a sharded ``value`` originals that lie as it does.

    What is computed on the full tensor is the first process's, which may have drawn random numbers, and so are the
    buffers of the step afterwards.
    """
    right_inverse: Callable[[Tensor], Any] = step.right_inverse  # type: ignore[assignment]  # mypy: Tensor | Module
    if not is_sharded(value):
        return right_inverse(value)
    way = _way(step)
    if way == "reduced":
        return _each(right_inverse(value), settled)
    if way == "local" and not getattr(step, "remembers", ()) and _runs_on_shards(step, (value,)):
        shard = right_inverse(shard_of(value))
        if isinstance(shard, Tensor) and shard.ndim == value.ndim:
            return _sharded_as(value, shard)
    return _inverse_of_whole(step, right_inverse, value)


def _inverse_of_whole(step: nn.Module, right_inverse: Callable[[Tensor], Any], value: Tensor) -> Any:
    with _own_tensors_whole(step):
        result = right_inverse(whole(value))
    for buffer in step.buffers():
        share(buffer, value)
    return _each(result, lambda one: distributed_like(one, value))


def _each(result: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(result, Tensor):
        return change(result)
    if isinstance(result, Sequence):
        return [change(one) if isinstance(one, Tensor) else one for one in result]
    return result
