"""FSDP2 beyond the table of operations: whole models, errors, steps with parameters, and how much memory it takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

import torchkiln
from distributed.memory import peak_bytes
from distributed.ranks import Ranks
from distributed.training import (
    adam,
    assert_same_state,
    build,
    every_built_in,
    normed,
    shard,
    train,
    whole_state,
)
from torchkiln import ParametrizationError, TorchkilnWarning, families, parametrizations, parametrize

pytestmark = pytest.mark.slow


def sharded(norm: str) -> nn.Sequential:
    return shard(normed(norm))


def goes_on(norm: str, verb: str) -> None:
    expected, model = normed(norm), sharded(norm)
    for one in (expected, model):
        optimizer = adam(one)
        train(one, optimizer)
        getattr(torchkiln, verb)(one, optimizer=optimizer)
        train(one, optimizer, seed=3)
    assert_same_state(model, expected)
    assert type(model[0]) is type(model[2])


@pytest.mark.parametrize(
    ("norm", "verb"),
    [
        *(("weight_norm", "bake"), ("spectral_norm", "bake"), ("orthogonal", "bake")),
        *(("spectral_norm", "restore"), ("orthogonal", "restore")),
    ],
)
def test_a_whole_model_is_baked_or_restored_and_its_optimizer_follows(
    ranks: Ranks, norm: str, verb: str
) -> None:
    ranks.run(goes_on, norm=norm, verb=verb)


def steps_aside(norm: str, settings: dict[str, bool]) -> None:
    expected, model = normed(norm), shard(normed(norm), **settings).eval()
    optimizers = adam(expected), adam(model)  # now: a forward may leave gathered parameters in the model
    x = torch.ones(2, 6)
    with torch.no_grad():
        before = model(x)
        with torchkiln.baked(model):
            assert list(model.state_dict()) == list(build().state_dict())
            torch.testing.assert_close(model(x), before)
        assert torch.equal(model(x), before)
    for one, optimizer in zip((expected, model.train()), optimizers, strict=True):
        train(one, optimizer)
    assert_same_state(model, expected)


@pytest.mark.parametrize("settings", [{}, {"reshard_after_forward": False}], ids=str)
@every_built_in
def test_a_model_on_plain_weights_for_a_while(ranks: Ranks, norm: str, settings: dict[str, bool]) -> None:
    ranks.run(steps_aside, norm=norm, settings=settings)


def loses_a_write(norm: str) -> None:
    model = sharded(norm)
    with pytest.warns(TorchkilnWarning, match="'weight', which is sharded, is lost"):
        nn.init.zeros_(model[0].weight)


@every_built_in
def test_a_write_into_a_sharded_value_warns(ranks: Ranks, norm: str) -> None:
    ranks.run(loses_a_write, norm=norm)


def takes_a_plain_value(norm: str) -> None:
    model = shard(normed(norm), reshard_after_forward=False).eval()
    value = torch.eye(6)[:5].contiguous()
    with torch.no_grad():
        model(torch.eye(6))  # what the model holds now is gathered, and a copy
        model[0].weight = value
        model[0].bias.zero_()
        torch.testing.assert_close(model[0](torch.eye(6)), value.mT.contiguous())


@pytest.mark.parametrize("norm", ["weight_norm", "orthogonal"])
def test_a_value_is_assigned_where_the_model_is_gathered(ranks: Ranks, norm: str) -> None:
    ranks.run(takes_a_plain_value, norm=norm)


class Adapter(nn.Module):
    """A step with parameters of its own, which each rank draws differently."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(dist.get_rank())
        self.up, self.down = nn.Parameter(torch.randn(5, 2)), nn.Parameter(torch.randn(2, 6))

    def forward(self, X: Tensor) -> Tensor:
        return X + self.up @ self.down

    def right_inverse(self, X: Tensor) -> Tensor:
        return X - self.up @ self.down


def shards_the_step() -> None:
    model = shard(build())
    optimizer = adam(model)
    parametrize.register_parametrization(model[0], "weight", Adapter(), optimizer=optimizer)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    before = whole_state(model)
    train(model, optimizer)
    after = whole_state(model)
    states: list[Any] = [None] * 2
    dist.all_gather_object(states, after)
    assert all(torch.equal(states[0][key], states[1][key]) for key in after)
    assert not any(torch.equal(before[key], after[key]) for key in after)


def test_the_parameters_of_a_step_are_sharded_and_averaged_too(ranks: Ranks) -> None:
    ranks.run(shards_the_step)


class Broken(Adapter):
    def forward(self, X: Tensor) -> Tensor:
        raise RuntimeError("this step is broken")


def leaves_no_trace() -> None:
    model, step = shard(build()), Broken()
    before, state = dict(model.named_parameters()), whole_state(model)
    with pytest.raises(RuntimeError, match="this step is broken"):
        parametrize.register_parametrization(model[0], "weight", step)
    assert all(one is before[name] for name, one in model.named_parameters())
    assert all(type(parameter) is nn.Parameter for parameter in step.parameters())
    torch.testing.assert_close(whole_state(model), state)
    train(model, adam(model))


def test_a_failed_registration_leaves_no_trace(ranks: Ranks) -> None:
    ranks.run(leaves_no_trace)


def refuses_numbers() -> None:
    model = shard(build())
    with pytest.raises(
        ParametrizationError, match="shards parameters along a dimension, and a number has none"
    ):
        parametrizations.weight_norm(model[0], dim=None)
    assert type(model[0]).__name__ == "FSDPLinear"
    train(model, adam(model))


def test_a_number_cannot_be_sharded_and_nothing_changes(ranks: Ranks) -> None:
    ranks.run(refuses_numbers)


def refuses_within_a_forward() -> None:
    model = shard(build())

    def interfere(*_: object) -> None:
        parametrizations.weight_norm(model[0])

    model[0].register_forward_pre_hook(interfere)
    with pytest.raises(ParametrizationError, match="FSDP is in the forward pass of 0:"):
        model(torch.ones(2, 6))


def test_a_change_within_a_forward_is_refused(ranks: Ranks) -> None:
    ranks.run(refuses_within_a_forward)


def refuses_what_is_not_finite() -> str:
    model = sharded("weight_norm")
    with torch.no_grad():
        model[0].parametrizations.weight.original0.to_local()[:1] = torch.nan if dist.get_rank() else 1.0
    with pytest.raises(ParametrizationError, match=r"0\.weight: 6 of 30 values.* are not finite") as caught:
        torchkiln.bake(model)
    assert parametrize.is_parametrized(model[0])
    return str(caught.value)


def test_a_value_that_is_not_finite_on_one_rank_is_refused_by_all(ranks: Ranks) -> None:
    first, second = ranks.run(refuses_what_is_not_finite)
    assert first == second


def keeps_a_tie() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 4, bias=False))
    model[2].weight = model[0].weight
    fully_shard(model)
    parametrizations.weight_norm(model[0], tied_in=model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for baked in (False, True):
        if baked:
            torchkiln.bake(model, optimizer=optimizer)
            assert model[0].weight is model[2].weight
        model(torch.ones(2, 4) * (1 + dist.get_rank())).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(model[0].weight.full_tensor(), model[2].weight.full_tensor())


def test_a_tie_is_kept(ranks: Ranks) -> None:
    ranks.run(keeps_a_tie)


def shares_a_class() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(3)))
    for layer in model:
        fully_shard(layer)
    plain = {type(layer) for layer in model}
    for layer in model:
        parametrizations.weight_norm(layer)
    assert len({type(layer) for layer in model}) == 1
    torchkiln.bake(model)
    assert {type(layer) for layer in model} == plain
    for layer in model:  # without a bias, what is new is all that there is
        layer(torch.ones(2, 4)).sum().backward()


def test_equal_layers_have_equal_types_all_along(ranks: Ranks) -> None:
    ranks.run(shares_a_class)


# --- memory -------------------------------------------------------------------------------------------------------

SIDE, LAYERS = 256, 8


def local_tensors(model: nn.Module) -> list[Tensor]:
    tensors = (*model.parameters(), *model.buffers())
    return [one.to_local() if isinstance(one, DTensor) else one for one in tensors]


def size(tensors: list[Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def measures(norm: str) -> dict[str, int]:
    make = getattr(parametrizations, norm)
    model = nn.Sequential(*(make(nn.Linear(SIDE, SIDE, bias=False)) for _ in range(LAYERS)))
    for layer in (*model, model):
        fully_shard(layer)
    held = local_tensors(model)
    peak = peak_bytes(lambda: torchkiln.bake(model), held)
    return {"held": size(held), "peak": peak, "after": size(local_tensors(model))}


@every_built_in
def test_baking_never_holds_the_whole_model(ranks: Ranks, norm: str, record_property: Any) -> None:
    world, layer = 4, SIDE * SIDE * 4
    figures = ranks.run(measures, norm=norm, world=world)
    whole = LAYERS * layer
    for one in figures:
        assert one["after"] == whole // world
        assert one["peak"] < whole // world + 3.5 * layer < whole  # this rank's part, and work on one layer
    shown = [
        f"{one / 2**20:.2f}" for one in (whole, figures[0]["held"], figures[0]["peak"], figures[0]["after"])
    ]
    record_property("memory", f"| {norm} | " + " | ".join(shown) + " |")


def counts() -> int:
    kept = [torch.ones(1000) for _ in range(3)]
    del kept
    torch.ones(500)
    return 0


def test_the_meter_counts_what_lives_at_one_time() -> None:
    assert peak_bytes(counts, []) == 12_000


# --- communication ------------------------------------------------------------------------------------------------


class Counted(nn.Module):
    """A step that counts its evaluations."""

    calls = 0

    def forward(self, X: Tensor) -> Tensor:
        self.calls += 1
        return X * 2


def gathers_once() -> tuple[int, int, int]:
    counts = []
    step = Counted()
    for is_normed in (False, True):
        layer = nn.LSTM(4, 6, num_layers=1)
        if is_normed:
            parametrize.register_parametrization(layer, "weight_hh_l0", step)
        fully_shard(layer)
        step.calls = 0
        with CommDebugMode() as counter:
            layer(torch.ones(3, 2, 4))
        counts.append(counter.get_total_counts())
    return counts[0], counts[1], step.calls


def test_all_reads_of_a_forward_share_one_gather_and_one_evaluation(ranks: Ranks) -> None:
    for plain, normed_, evaluations in ranks.run(gathers_once):
        assert plain == normed_ == 1
        assert evaluations == 1


def stays_on_the_shards(step: nn.Module) -> int:
    model = nn.Sequential(nn.Linear(6, 5))
    fully_shard(model)
    with CommDebugMode() as registering:
        parametrize.register_parametrization(model[0], "weight", step, unsafe=True)
    with CommDebugMode() as reading:
        _ = model[0].weight
    return int(registering.get_total_counts() + reading.get_total_counts())


@pytest.mark.parametrize(
    "step", [parametrizations._WeightNorm(), families.Positive()], ids=["norm", "elementwise"]
)
def test_what_runs_on_shards_gathers_nothing(ranks: Ranks, step: nn.Module) -> None:
    assert ranks.run(stays_on_the_shards, step=step) == [0, 0]
