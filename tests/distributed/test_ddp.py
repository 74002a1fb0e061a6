"""DistributedDataParallel: registering and removing before and after wrapping, as on one process."""

from __future__ import annotations

import itertools
from contextlib import ExitStack
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import torchkiln
from distributed.ranks import Ranks
from distributed.training import (
    adam,
    assert_same_state,
    batches,
    build,
    every_built_in,
    loss,
    normed,
    register,
    train,
)
from torchkiln import parametrizations


def trains(norm: str, order: str, options: dict[str, Any]) -> None:
    expected, model = normed(norm), normed(norm) if order == "before" else build()
    wrapped = DistributedDataParallel(model, **options)
    if order == "after":  # what is drawn differs, and the first rank's counts
        register(model, norm, seed=1 + dist.get_rank())
    for one in (expected, wrapped):
        train(one, adam(one))
    assert_same_state(wrapped, expected)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"forward_sync_buffers": False}, {"static_graph": True}], ids=str)
@pytest.mark.parametrize("order", ["before", "after"])
@every_built_in
def test_a_wrapped_model_trains_as_on_one_process(
    ranks: Ranks, norm: str, order: str, options: dict[str, Any]
) -> None:
    ranks.run(trains, norm=norm, order=order, options=options)


def goes_on(norm: str, how: str) -> None:
    expected, model = normed(norm), normed(norm)
    wrapped = DistributedDataParallel(model)
    for one, inner in ((expected, expected), (wrapped, model)):
        optimizer = adam(one)
        train(one, optimizer)
        getattr(torchkiln, how)(inner, optimizer=optimizer)
        train(one, optimizer)
    assert_same_state(wrapped, expected)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["bake", "restore"])
@every_built_in
def test_a_model_that_was_baked_under_the_wrapper_trains_on(ranks: Ranks, norm: str, how: str) -> None:
    if (norm, how) == ("weight_norm", "restore"):
        pytest.skip("weight norm has no original to restore")
    ranks.run(goes_on, norm=norm, how=how)


def two_forwards(norm: str) -> None:
    expected, model = normed(norm), normed(norm)
    wrapped = DistributedDataParallel(model)
    for one in (expected, wrapped):
        optimizer, stream = adam(one), batches(one)
        for _ in range(3):
            (loss(one, next(stream)) + loss(one, next(stream))).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_same_state(wrapped, expected)


@pytest.mark.slow
@every_built_in
def test_two_forwards_and_one_backward(ranks: Ranks, norm: str) -> None:
    ranks.run(two_forwards, norm=norm)


def accumulates(norm: str) -> None:
    expected, model = normed(norm), normed(norm)
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


@pytest.mark.slow
@every_built_in
def test_gradients_accumulate_without_synchronization(ranks: Ranks, norm: str) -> None:
    ranks.run(accumulates, norm=norm)


class Branches(nn.Module):
    """Two layers, one of which a forward uses."""

    def __init__(self, norm: str) -> None:
        super().__init__()
        make = getattr(parametrizations, norm)
        self.layers = nn.ModuleList(make(nn.Linear(6, 5)) for _ in range(2))

    def forward(self, batch: Tensor, which: int) -> Tensor:
        value: Tensor = self.layers[which](batch)
        return value


def leaves_parameters_unused(norm: str) -> None:
    torch.manual_seed(1)
    expected = Branches(norm)
    torch.manual_seed(1)
    wrapped = DistributedDataParallel(Branches(norm), find_unused_parameters=True)
    for one in (expected, wrapped):
        optimizer = adam(one)
        for which, batch in zip((0, 1, 1, 0), batches(one), strict=False):
            one(batch, which).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_same_state(wrapped, expected)


@pytest.mark.slow
@every_built_in
def test_unused_parameters_are_found(ranks: Ranks, norm: str) -> None:
    ranks.run(leaves_parameters_unused, norm=norm)


def compiles(norm: str) -> None:
    expected, model = normed(norm), normed(norm)
    wrapped = DistributedDataParallel(model)
    compiled = torch.compile(wrapped, backend="eager")
    for one, called in ((expected, expected), (wrapped, compiled)):
        optimizer = adam(one)
        for batch in itertools.islice(batches(one), 3):
            loss(called, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_same_state(wrapped, expected)


@pytest.mark.slow
@every_built_in
def test_a_compiled_wrapper_trains_as_on_one_process(ranks: Ranks, norm: str) -> None:
    ranks.run(compiles, norm=norm)
