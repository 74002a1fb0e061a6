"""What people do under tensor parallelism (``parallelize_module``); each must come to the same as on one process."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from distributed.sharding import full, line
from distributed.training import (
    Operation,
    adam,
    assert_same_state,
    build,
    in_each_order,
    normed,
    register,
    train,
    trains,
)
from parametrize.oracle import Impl

__all__ = ["OPERATIONS"]


def _parallel(impl: Impl, norm: str, *, after: bool) -> nn.Sequential:
    model = build() if after else normed(norm, impl)
    # The widths do not divide by two, which only a DTensor between the layers tells.
    parallelize_module(model, line(), {"0": ColwiseParallel(use_local_output=False), "2": RowwiseParallel()})
    if after:
        register(model, norm, impl=impl)
    return model


def _trains(impl: Impl, norm: str, **options: Any) -> None:
    weight = trains(impl, norm, make=_parallel, **options)[0].weight
    assert isinstance(weight, DTensor)
    assert weight.placements == (Shard(0),)
    assert isinstance(weight, nn.Parameter) == options.get("removes", False)


def assigned(impl: Impl, norm: str) -> None:
    expected, model = normed(norm, impl), _parallel(impl, norm, after=True)
    value, same = (
        full(one[0].weight).flip(0) for one in (expected, model)
    )  # both, as a read may advance state
    torch.testing.assert_close(same, value)
    for one, new in ((expected, value), (model, distribute_tensor(value, line(), [Shard(0)]))):
        torch.manual_seed(4)  # of what an orthogonal base lacks
        one[0].weight = new
        train(one, adam(one))
    assert_same_state(model, expected)


OPERATIONS: dict[str, Operation] = {
    **in_each_order("parallelize", _trains),
    "assign a value": assigned,
}
