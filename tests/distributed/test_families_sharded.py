"""Every family of the catalogue computes on a sharded tensor what it computes on the whole one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from distributed.ranks import Ranks
from distributed.sharding import full, line
from torchkiln import parametrize
from torchkiln.testing._catalogue import rows

pytestmark = pytest.mark.slow

ROWS = [row for row in rows() if row.example.ndim]


class Holder(nn.Module):
    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


def agrees(index: int, dim: int) -> None:
    family, example = copy.deepcopy(ROWS[index])
    twin = copy.deepcopy(family)
    mesh = line()
    one, many = Holder(example.clone()), Holder(distribute_tensor(example.clone(), mesh, [Shard(dim)]))
    G = torch.linspace(-1, 1, example.numel(), dtype=torch.float64).view(example.shape).to(example.dtype)
    for holder, step, weight in ((one, family, G), (many, twin, distribute_tensor(G, mesh, [Shard(dim)]))):
        torch.manual_seed(0)
        parametrize.register_parametrization(holder, "weight", step)
        (holder.weight * weight).real.sum().backward() if example.is_complex() else (
            holder.weight * weight
        ).sum().backward()
    assert isinstance(many.weight, DTensor)
    assert many.weight.placements == (Shard(dim),)
    torch.testing.assert_close(full(many.weight), full(one.weight))
    for mine, other in zip(many.parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(full(mine.grad), full(other.grad))


@pytest.mark.parametrize("index", range(len(ROWS)), ids=[row.label for row in ROWS])
def test_a_family_agrees_with_one_process(ranks: Ranks, index: int) -> None:
    dim = ROWS[index].example.ndim - 1 - index % 2 if ROWS[index].example.ndim > 1 else 0
    ranks.run(agrees, index=index, dim=dim)
