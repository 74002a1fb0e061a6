"""What people do under DistributedDataParallel; each must come to the same as on one process, on every rank."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distributed.training import (
    adam,
    assert_same_state,
    batches,
    build,
    loss,
    normed,
    register,
    take_out,
    train,
)
from parametrize.oracle import OURS, Impl

__all__ = ["OPERATIONS"]


def _trains(impl: Impl, norm: str, *, after: bool = False, **options: Any) -> None:
    expected, model = normed(norm, impl), build() if after else normed(norm, impl)
    wrapped = DistributedDataParallel(model, **options)
    if after:  # what ranks draw differs, and the first one's counts; torch's cannot know of it
        register(model, norm, impl=impl, seed=1 + (dist.get_rank() if impl.name == OURS.name else 0))
    for one in (expected, wrapped):
        train(one, adam(one))
    assert_same_state(wrapped, expected)


def before(impl: Impl, norm: str) -> None:
    _trains(impl, norm)


def after(impl: Impl, norm: str) -> None:
    _trains(impl, norm, after=True)


def after_without_broadcasts(impl: Impl, norm: str) -> None:
    _trains(impl, norm, after=True, forward_sync_buffers=False)


def without_broadcasts(impl: Impl, norm: str) -> None:
    _trains(impl, norm, forward_sync_buffers=False)


def static_graph(impl: Impl, norm: str) -> None:
    _trains(impl, norm, static_graph=True)


def after_with_static_graph(impl: Impl, norm: str) -> None:
    _trains(impl, norm, after=True, static_graph=True)


def goes_on_after_removal(impl: Impl, norm: str) -> None:
    expected, model = normed(norm, impl), normed(norm, impl)
    wrapped = DistributedDataParallel(model)
    for one, inner in ((expected, expected), (wrapped, model)):
        optimizer = adam(one)
        train(one, optimizer)
        optimizer = take_out(impl, inner, optimizer)
        train(one, optimizer, seed=3)
    assert_same_state(wrapped, expected)


def two_forwards(impl: Impl, norm: str) -> None:
    expected, model = normed(norm, impl), normed(norm, impl)
    wrapped = DistributedDataParallel(model)
    for one in (expected, wrapped):
        optimizer, stream = adam(one), batches(one)
        for _ in range(3):
            (loss(one, next(stream)) + loss(one, next(stream))).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_same_state(wrapped, expected)


def accumulates(impl: Impl, norm: str) -> None:
    expected, model = normed(norm, impl), normed(norm, impl)
    wrapped = DistributedDataParallel(model)
    for one in (expected, wrapped):
        optimizer, stream = adam(one), batches(one)
        for _, is_last in itertools.product(range(3), (False, False, True)):
            with ExitStack() as stack:
                if one is wrapped and not is_last:
                    stack.enter_context(wrapped.no_sync())
                loss(one, next(stream)).backward()
            if is_last:
                optimizer.step()
                optimizer.zero_grad()
    assert_same_state(wrapped, expected)


class Branches(nn.Module):
    """Two layers, one of which a forward uses."""

    def __init__(self, make: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(make(nn.Linear(6, 5)) for _ in range(2))

    def forward(self, batch: Tensor, which: int) -> Tensor:
        value: Tensor = self.layers[which](batch)
        return value


def finds_unused_parameters(impl: Impl, norm: str) -> None:
    torch.manual_seed(1)
    expected = Branches(getattr(impl.N, norm))
    torch.manual_seed(1)
    wrapped = DistributedDataParallel(Branches(getattr(impl.N, norm)), find_unused_parameters=True)
    for one in (expected, wrapped):
        optimizer = adam(one)
        for which, batch in zip((0, 1, 1, 0), batches(one), strict=False):
            one(batch, which).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_same_state(wrapped, expected)


def compiles(impl: Impl, norm: str) -> None:
    expected, model = normed(norm, impl), normed(norm, impl)
    wrapped = DistributedDataParallel(model)
    compiled = torch.compile(wrapped, backend="eager")
    for one, called in ((expected, expected), (wrapped, compiled)):
        optimizer = adam(one)
        for batch in itertools.islice(batches(one), 3):
            loss(called, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_same_state(wrapped, expected)


OPERATIONS: dict[str, Callable[[Impl, str], None]] = {
    "register, wrap, train": before,
    "wrap, register, train": after,
    "remove under the wrapper, train on": goes_on_after_removal,
    "buffers not broadcast": without_broadcasts,
    "buffers not broadcast, registered after wrapping": after_without_broadcasts,
    "two forwards, one backward": two_forwards,
    "gradient accumulation with `no_sync`": accumulates,
    "`static_graph`": static_graph,
    "`static_graph`, registered after wrapping": after_with_static_graph,
    "`find_unused_parameters`": finds_unused_parameters,
    "`torch.compile` of the wrapper": compiles,
}
