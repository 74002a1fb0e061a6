"""``parallelize_module`` before and after registering: outputs, gradients and training are those of one process."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from distributed.ranks import Ranks
from distributed.sharding import BUILT_IN, STEPS, assert_near, line
from torchkiln import parametrizations, parametrize

pytestmark = pytest.mark.slow

every_order = pytest.mark.parametrize("registered", ["before", "after"])


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6))


def register(model: nn.Module, step: str) -> None:
    for index, name in enumerate(("0", "2")):
        torch.manual_seed(index)
        STEPS[step](model.get_submodule(name))


def parallelize(model: nn.Module) -> None:
    plan: dict[str, ParallelStyle] = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    parallelize_module(model, line(), plan)


def trains(step: str, registered: str) -> None:
    one = network()
    many = copy.deepcopy(one)
    register(one, step)
    for action in (register, parallelize) if registered == "before" else (parallelize, register):
        action(many, step) if action is register else action(many)
    optimizers = [torch.optim.Adam(model.parameters(), lr=0.01) for model in (one, many)]
    x = torch.randn(4, 6)
    for _ in range(3):
        for model, optimizer in zip((one, many), optimizers, strict=True):
            optimizer.zero_grad()
            model(x).square().sum().backward()
        for (name, mine), other in zip(many.named_parameters(), one.parameters(), strict=True):
            assert mine.grad is not None, name
            assert_near(mine.grad, other.grad)
        for optimizer in optimizers:
            optimizer.step()
    assert_near(many(x), one(x))
    assert many[0].weight.placements == (Shard(0),)
    assert many[2].weight.placements == (Shard(1),)
    assert list(dict(many.named_parameters())) == list(dict(one.named_parameters()))


@every_order
@pytest.mark.parametrize("step", [*BUILT_IN, "weight norm of all", "elementwise"])
def test_a_parallel_network_trains_as_one_process_does(ranks: Ranks, step: str, registered: str) -> None:
    ranks.run(trains, step=step, registered=registered)


def lays_out(step: str) -> dict[str, tuple[object, ...]]:
    layer = STEPS[step](nn.Linear(4, 4))
    parallelize_module(layer, line(), RowwiseParallel())
    assert type(layer).__name__ == "ParametrizedLinear"
    return {name: p.placements for name, p in layer.named_parameters() if isinstance(p, DTensor)}


def test_originals_lie_as_the_weight_where_they_have_its_dimension(ranks: Ranks) -> None:
    prefix, bias = "parametrizations.weight.", {"bias": (Replicate(),)}
    rowwise = {prefix + "original0": (Replicate(),), prefix + "original1": (Shard(1),)}
    assert ranks.run(lays_out, step="weight norm")[1] == {**bias, **rowwise}
    rowwise[prefix + "original0"] = (Shard(1),)
    assert ranks.run(lays_out, step="weight norm of columns")[1] == {**bias, **rowwise}


def steps_keep_state() -> None:
    layer = STEPS["user with parameters"](nn.Linear(4, 4))
    weight = layer.weight.detach()
    parallelize_module(layer, line(), ColwiseParallel())
    assert layer.parametrizations.weight[0].A.placements == (Replicate(),)
    assert_near(layer.weight, weight)
    layer.weight.sum().backward()
    assert all(p.grad is not None for name, p in layer.named_parameters() if name != "bias")


def test_the_parameters_of_a_step_are_replicated(ranks: Ranks) -> None:
    ranks.run(steps_keep_state)


def sequence_parallel() -> None:
    norm = nn.LayerNorm(4)
    parametrize.register_parametrization(norm, "weight", nn.Softplus())
    weight = norm.weight.detach()
    parallelize_module(norm, line(), SequenceParallel())
    assert norm.weight.placements == (Replicate(),)
    assert_near(norm.weight, weight)


def test_other_styles_find_a_plain_weight_too(ranks: Ranks) -> None:
    ranks.run(sequence_parallel)


def replicated_model() -> None:
    model = nn.Sequential(
        parametrizations.weight_norm(nn.Linear(4, 4)), parametrizations.spectral_norm(nn.Linear(4, 4))
    )
    x = torch.randn(2, 4)
    one = copy.deepcopy(model)
    distribute_module(model, line())
    for layer, other in zip(model, one, strict=True):
        out, expected = layer(beside(x)), other(x)
        assert_near(out, expected)
        assert_near(layer.weight, other.weight)


def beside(x: Tensor) -> DTensor:
    return DTensor.from_local(x, line(), [Replicate()])


def test_a_whole_model_may_be_replicated(ranks: Ranks) -> None:
    ranks.run(replicated_model)


def refuses_twice() -> None:
    layer = parametrizations.weight_norm(nn.Linear(4, 4))
    parallelize_module(layer, line(), ColwiseParallel())
    with pytest.raises(RuntimeError, match="should only be called once"):
        parallelize_module(layer, line(), ColwiseParallel())
    assert isinstance(layer.parametrizations.weight.original1, DTensor)
    assert parametrize.is_parametrized(layer, "weight")


def test_torchs_refusal_of_a_second_time_changes_nothing(ranks: Ranks) -> None:
    ranks.run(refuses_twice)


def test_a_module_that_was_never_distributed_has_no_mark() -> None:
    layer = parametrizations.weight_norm(nn.Linear(4, 4))
    assert not hasattr(layer, "_distribute_module_applied")
    assert not dist.is_initialized()
