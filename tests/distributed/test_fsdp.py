"""FSDP2: registering, removing, baking and restoring before and after ``fully_shard``, as on one process."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard

import torchkiln
from distributed.ranks import Ranks
from distributed.training import (
    adam,
    assert_same_state,
    build,
    every_built_in,
    normed,
    register,
    shard,
    train,
)
from torchkiln import parametrize


def trains_as_on_one_process(norm: str, order: str) -> None:
    expected, model = normed(norm), shard(normed(norm) if order == "before" else build())
    if order == "after":
        register(model, norm)
    for one in (expected, model):
        train(one, adam(one), seed=2)
    assert_same_state(model, expected)


@pytest.mark.slow
@pytest.mark.parametrize("order", ["before", "after"])
@every_built_in
def test_a_sharded_model_trains_as_on_one_process(ranks: Ranks, norm: str, order: str) -> None:
    ranks.run(trains_as_on_one_process, norm=norm, order=order)


def take_out(model: nn.Sequential, how: str, optimizer: torch.optim.Optimizer) -> None:
    if how == "bake":
        torchkiln.bake(model, optimizer=optimizer)
    elif how == "restore":
        torchkiln.restore(model, optimizer=optimizer)
    else:
        parametrize.remove_parametrizations(model[0], "weight", optimizer=optimizer)


def goes_on_after_removal(norm: str, how: str) -> None:
    expected, model = normed(norm), shard(normed(norm))
    for one in (expected, model):
        optimizer = adam(one)
        train(one, optimizer, seed=2)
        take_out(one, how, optimizer)
        train(one, optimizer, seed=3)
    assert_same_state(model, expected)
    weight = model[0].weight
    assert isinstance(weight, nn.Parameter)
    assert isinstance(weight, DTensor)
    assert weight.placements == (Shard(0),)
    assert type(model[0]).__name__ == "FSDPLinear"


@pytest.mark.slow
@pytest.mark.parametrize("how", ["remove", "bake", "restore"])
@every_built_in
def test_what_is_taken_out_stays_sharded_and_trains_on(ranks: Ranks, norm: str, how: str) -> None:
    if (norm, how) == ("weight_norm", "restore"):
        pytest.skip("weight norm has no original to restore")
    ranks.run(goes_on_after_removal, norm=norm, how=how)
