"""A step on a sharded weight computes what it computes on the whole one: values, gradients, training, removal."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import torchkiln
from distributed.ranks import RankError, Ranks
from distributed.sharding import STEPS, assert_near, full, line, shard_weight
from torchkiln import families, parametrize

pytestmark = pytest.mark.slow

every_step = pytest.mark.parametrize("step", STEPS)
every_dim = pytest.mark.parametrize("dim", [0, 1])
SIZES = {"user": (5, 5), "several originals": (5, 7)}  # neither 2 nor 4 divides them


class Pair:
    """One layer whole, and the same one with its weight sharded; both get the step, and are trained alike."""

    def __init__(self, step: str, dim: int) -> None:
        self.one = nn.Linear(*SIZES.get(step, (5, 7)), bias=False)
        self.many = copy.deepcopy(self.one)
        self.dim, self.mesh = dim, line()
        shard_weight(self.many, self.mesh, dim)
        for layer in (self.one, self.many):
            torch.manual_seed(1)
            STEPS[step](layer)
        self.layers = (self.one, self.many)
        self.optimizers = [torch.optim.Adam(layer.parameters(), lr=0.01) for layer in self.layers]
        self.G = torch.linspace(-1, 1, self.one.weight.numel()).view(self.one.weight.shape).sin()

    def train(self) -> None:
        for layer, optimizer, G in zip(
            self.layers, self.optimizers, (self.G, self.shard(self.G)), strict=True
        ):
            optimizer.zero_grad()
            (layer.weight * G).sum().backward()
            for p in layer.parameters():
                assert p.grad is not None
        for mine, other in zip(self.many.parameters(), self.one.parameters(), strict=True):
            assert_near(mine.grad, other.grad)
        for optimizer in self.optimizers:
            optimizer.step()

    def shard(self, tensor: Tensor) -> DTensor:
        return distribute_tensor(tensor, self.mesh, [Shard(self.dim)])

    def check(self) -> None:
        assert isinstance(self.many.weight, DTensor)
        assert self.many.weight.placements == (Shard(self.dim),)
        assert_near(self.many.weight, self.one.weight)


def trains(step: str, dim: int) -> None:
    pair = Pair(step, dim)
    for _ in range(3):
        pair.check()
        pair.train()
    pair.check()


@every_dim
@every_step
def test_values_and_gradients_are_those_of_one_process(ranks: Ranks, step: str, dim: int) -> None:
    ranks.run(trains, step=step, dim=dim)


@pytest.mark.parametrize("step", ["weight norm", "spectral norm", "elementwise", "exponential"])
def test_shards_may_be_empty(ranks: Ranks, step: str) -> None:
    ranks.run(trains, world=4, step=step, dim=0)


def remove(layer: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    parametrize.remove_parametrizations(layer, "weight", optimizer=optimizer)


def bake(layer: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    assert torchkiln.bake(layer, optimizer=optimizer)


def is_taken_out(verb: Callable[[nn.Module, torch.optim.Optimizer], None], step: str, dim: int) -> None:
    pair = Pair(step, dim)
    pair.train()
    pair.check()  # reads both, and so advances the state of both
    before = full(pair.many.weight)
    for layer, optimizer in zip(pair.layers, pair.optimizers, strict=True):
        verb(layer, optimizer)
    assert torch.equal(full(pair.many.weight), before)
    assert type(pair.many) is nn.Linear
    assert isinstance(pair.many.weight, nn.Parameter)
    shard = pair.many.weight.to_local()
    # No more memory is held than that of the shard.
    assert shard.untyped_storage().nbytes() == shard.numel() * shard.element_size()
    pair.check()
    pair.train()
    pair.check()


@every_step
@pytest.mark.parametrize(("verb", "dim"), [(remove, 0), (bake, 1)], ids=["remove", "bake"])
def test_removal_leaves_a_sharded_parameter_that_goes_on_training(
    ranks: Ranks, verb: Callable[..., None], step: str, dim: int
) -> None:
    ranks.run(is_taken_out, verb=verb, step=step, dim=dim)


def is_restored(step: str, dim: int) -> None:
    pair = Pair(step, dim)
    original = pair.many.parametrizations.weight.original
    torchkiln.restore(pair.many)
    assert pair.many.weight is original
    assert original.placements == (Shard(dim),)


@pytest.mark.parametrize("step", ["spectral norm", "exponential", "elementwise", "user"])
def test_restoring_returns_the_sharded_original(ranks: Ranks, step: str) -> None:
    ranks.run(is_restored, step=step, dim=1)


def is_assigned(step: str, dim: int) -> None:
    pair = Pair(step, dim)
    before = [(p, p.placements) for p in pair.many.parameters()]
    value = full(pair.one.weight) * 0.5
    for layer, assigned in zip(pair.layers, (value, pair.shard(value)), strict=True):
        torch.manual_seed(2)  # what the base of an orthogonal matrix lacks is drawn
        layer.weight = assigned
    assert [(p, p.placements) for p in pair.many.parameters()] == before
    pair.check()
    pair.train()


@pytest.mark.parametrize("step", [step for step in STEPS if step != "user with parameters"])
def test_assignment_keeps_the_parameters_and_their_placements(ranks: Ranks, step: str) -> None:
    ranks.run(is_assigned, step=step, dim=1)


def draws_apart() -> list[Tensor]:
    """Draw other random numbers on each rank, as a program does that seeds by rank."""
    layer = nn.Linear(3, 8, bias=False)
    shard_weight(layer, line(), 0)
    torch.manual_seed(torch.distributed.get_rank())
    STEPS["householder"](layer)
    STEPS["spectral norm"](layer)
    return [buffer.clone() for buffer in layer.buffers()]


def test_random_numbers_are_those_of_the_first_process(ranks: Ranks) -> None:
    first, second = ranks.run(draws_apart)
    assert len(first) == 3
    assert all(map(torch.equal, first, second))


class Refusing(nn.Module):
    sharding = "it draws random numbers in its forward."

    def forward(self, X: Tensor) -> Tensor:
        return X


def is_refused() -> None:
    layer = nn.Linear(4, 4)
    shard_weight(layer, line(), 0)
    with pytest.raises(
        torchkiln.ParametrizationError, match="Refusing does not run on a sharded tensor: it draws"
    ):
        parametrize.register_parametrization(layer, "weight", Refusing())
    assert type(layer) is nn.Linear


def test_a_step_may_refuse_and_gives_its_reason(ranks: Ranks) -> None:
    ranks.run(is_refused)


def runs_on_shards(family: str, dim: int) -> list[tuple[int, ...]]:
    step = getattr(families, family)()
    seen: list[tuple[int, ...]] = []
    step.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape)))
    layer = nn.Linear(4, 4)
    shard_weight(layer, line(), dim)
    parametrize.register_parametrization(layer, "weight", step)
    return seen


@pytest.mark.parametrize(
    ("family", "dim", "shape"),
    [
        ("Positive", 0, (2, 4)),
        ("Positive", 1, (4, 2)),
        ("Sphere", 0, (2, 4)),
        ("Sphere", 1, (4, 4)),
        ("Orthogonal", 0, (4, 4)),
    ],
)
def test_a_family_sees_a_shard_where_it_acts_along_no_cut(
    ranks: Ranks, family: str, dim: int, shape: tuple[int, ...]
) -> None:
    assert set(ranks.run(runs_on_shards, family=family, dim=dim)[0]) == {shape}


def is_not_finite() -> None:
    layer = nn.Linear(4, 4)
    shard_weight(layer, line(), 0)
    STEPS["spectral norm"](layer.eval())
    with torch.no_grad():
        shard = layer.parametrizations.weight.original.to_local()
        shard[0, 0] = torch.inf if torch.distributed.get_rank() == 1 else 1.0
    with pytest.raises(torchkiln.ParametrizationError, match="are not finite; nothing was changed"):
        torchkiln.bake(layer)
    assert parametrize.is_parametrized(layer)


def test_every_process_refuses_to_bake_what_is_not_finite_on_one(ranks: Ranks) -> None:
    ranks.run(is_not_finite)


def replicates() -> None:
    layer, other = nn.Linear(4, 4), nn.Linear(4, 4)
    other.load_state_dict(layer.state_dict())
    layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), line(), [Replicate()]))
    for one in (layer, other):
        torch.manual_seed(1)
        STEPS["weight norm of columns"](one)
    assert_near(layer.weight, other.weight)
    assert {p.placements for name, p in layer.named_parameters() if name != "bias"} == {(Replicate(),)}


def test_a_replicated_weight_stays_replicated(ranks: Ranks) -> None:
    ranks.run(replicates)


def test_a_wrong_value_would_be_seen(ranks: Ranks) -> None:
    with pytest.raises(RankError, match="not close"):
        ranks.run(differs)


def differs() -> None:
    pair = Pair("weight norm", 0)
    pair.train()
    with torch.no_grad():
        pair.one.parametrizations.weight.original0.add_(1)
    pair.check()
