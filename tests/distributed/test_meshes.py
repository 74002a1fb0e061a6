"""Meshes of two dimensions: FSDP2 around tensor parallelism, and sharding within groups of replicas (HSDP)."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import torchkiln
from distributed.ranks import Ranks
from distributed.sharding import STEPS, assert_near

pytestmark = pytest.mark.slow

LAYERS = ("0", "2")
Action = Callable[[nn.Module], None]


class Setting:
    """A mesh, and what the processes of one row of it share: their part of the data."""

    def __init__(self, kind: str) -> None:
        names = ("data", "tensor") if kind == "2d" else ("replica", "shard")
        self.mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=names)
        self.fsdp: DeviceMesh = self.mesh["data"] if kind == "2d" else self.mesh
        self.parts = 2 if kind == "2d" else 4
        self.part = self.mesh["data"].get_local_rank() if kind == "2d" else dist.get_rank()

    def parallelize(self, model: nn.Module) -> None:
        parallelize_module(model, self.mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})

    def shard(self, model: nn.Module) -> None:
        for name in LAYERS:
            fully_shard(model.get_submodule(name), mesh=self.fsdp)
        fully_shard(model, mesh=self.fsdp)


def register(model: nn.Module, step: str) -> None:
    for index, name in enumerate(LAYERS):
        torch.manual_seed(index)
        STEPS[step](model.get_submodule(name))


def train(
    models: tuple[nn.Module, nn.Module], optimizers: list[torch.optim.Optimizer], setting: Setting
) -> None:
    one, many = models
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(3))
    for _ in range(2):
        for optimizer in optimizers:
            optimizer.zero_grad()
        one(x).square().sum().backward()
        # FSDP averages over the parts, of which each is a share of the sum.
        (many(x.chunk(setting.parts)[setting.part]).square().sum() * setting.parts).backward()
        for mine, other in zip(many.parameters(), one.parameters(), strict=True):
            assert mine.grad is not None
            assert_near(mine.grad, other.grad)
        for optimizer in optimizers:
            optimizer.step()
    with torch.no_grad():
        assert_near(many(x), one(x))


def works(step: str, kind: str, order: str) -> None:
    setting = Setting(kind)
    one = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6))
    many = copy.deepcopy(one)
    register(one, step)
    actions: dict[str, Action] = {
        "register": lambda model: register(model, step),
        "parallelize": setting.parallelize,
        "shard": setting.shard,
    }
    for action in order.split():
        actions[action](many)
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Adam(model.parameters(), lr=0.01) for model in (one, many)
    ]
    train((one, many), optimizers, setting)
    for name in LAYERS:
        assert_near(many.get_submodule(name).weight, one.get_submodule(name).weight)
    for model, optimizer in zip((one, many), optimizers, strict=True):
        assert torchkiln.bake(model, optimizer=optimizer)
    last = many.get_submodule("2").weight
    assert last.placements == ((Shard(0), Shard(1)) if kind == "2d" else (Replicate(), Shard(0)))
    train((one, many), optimizers, setting)


EVERY_ORDER = ("register parallelize shard", "parallelize register shard", "parallelize shard register")
LAST = EVERY_ORDER[-1]


@pytest.mark.parametrize(
    ("step", "order"),
    [
        *(("weight norm", order) for order in EVERY_ORDER),
        *((step, LAST) for step in ("weight norm of columns", "spectral norm", "exponential", "elementwise")),
        ("spectral norm", EVERY_ORDER[0]),
    ],
)
def test_fsdp_around_tensor_parallelism(ranks: Ranks, step: str, order: str) -> None:
    ranks.run(works, world=4, step=step, kind="2d", order=order)


@pytest.mark.parametrize(
    ("step", "order"),
    [
        ("weight norm", "register shard"),
        *(
            (step, "shard register")
            for step in ("weight norm of columns", "spectral norm", "householder", "rows")
        ),
    ],
)
def test_shards_within_replicas(ranks: Ranks, step: str, order: str) -> None:
    ranks.run(works, world=4, step=step, kind="hsdp", order=order)
