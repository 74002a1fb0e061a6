"""FSDP2: registering, removing, baking and restoring before and after ``fully_shard``, as on one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard

import torchkiln
from distributed.ranks import Ranks
from torchkiln import parametrizations, parametrize

BUILT_INS = ["weight_norm", "spectral_norm", "orthogonal"]
every_built_in = pytest.mark.parametrize("norm", BUILT_INS)


def build() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))  # 5 and 3 rows do not divide by two


def register(model: nn.Sequential, norm: str) -> None:
    torch.manual_seed(1)
    getattr(parametrizations, norm)(model[0])


def shard(model: nn.Sequential, **options: Any) -> nn.Sequential:
    for layer in (model[0], model[2]):
        fully_shard(layer, **options)
    fully_shard(model, **options)
    return model


def train(model: nn.Sequential, optimizer: torch.optim.Optimizer, *, seed: int) -> None:
    """Three steps on one batch for all; each rank takes its part of it."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(3):
        batch = torch.randn(8, 6, generator=generator)
        if isinstance(model, FSDPModule):
            batch = batch.chunk(dist.get_world_size())[dist.get_rank()]
        model(batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), 0.05)


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    state = model.state_dict()
    return {key: one.full_tensor() if isinstance(one, DTensor) else one for key, one in state.items()}


def assert_same_state(model: nn.Module, expected: nn.Module) -> None:
    state = whole_state(model)
    assert list(state) == list(expected.state_dict())
    torch.testing.assert_close(state, dict(expected.state_dict()), rtol=1e-5, atol=1e-6)


def trains_as_on_one_process(norm: str, order: str) -> None:
    expected, model = build(), build()
    register(expected, norm)
    if order == "before":
        register(model, norm)
    shard(model)
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
    expected, model = build(), build()
    for one in (expected, model):
        register(one, norm)
    shard(model)
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
