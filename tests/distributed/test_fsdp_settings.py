"""FSDP2's settings, and what people do around it, on parametrized models: all as on one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._composable import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

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
    shard,
    train,
    whole_state,
)
from torchkiln import ParametrizationError, TorchkilnWarning, parametrizations, parametrize

pytestmark = pytest.mark.slow
orders = pytest.mark.parametrize("order", ["before", "after"])
WHOLE = StateDictOptions(full_state_dict=True)

SETTINGS: dict[str, dict[str, Any]] = {
    "reshard": {"reshard_after_forward": True},
    "keep gathered": {"reshard_after_forward": False},
    "offload": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
    "bfloat16": {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32)},
}


def sharded(norm: str, order: str = "before", **options: Any) -> nn.Sequential:
    model = shard(normed(norm) if order == "before" else build(), **options)
    if order == "after":
        register(model, norm)
    return model


def works_with(norm: str, order: str, setting: str) -> None:
    expected, model = normed(norm), sharded(norm, order, **SETTINGS[setting])
    for one in (expected, model):
        optimizer = adam(one)
        train(one, optimizer)
        torchkiln.bake(one, optimizer=optimizer)
        train(one, optimizer, seed=3)
    assert_same_state(model, expected, atol=0.01 if setting == "bfloat16" else 1e-6)


@pytest.mark.parametrize("setting", SETTINGS)
@orders
@every_built_in
def test_a_setting(ranks: Ranks, norm: str, order: str, setting: str) -> None:
    ranks.run(works_with, norm=norm, order=order, setting=setting)


def optimizes(norm: str, options: dict[str, bool]) -> None:
    expected, model = normed(norm), sharded(norm, "after")
    for one in (expected, model):
        train(one, adam(one, **options))
    assert_same_state(model, expected)


@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": True}], ids=str)
@every_built_in
def test_kernels_of_optimizers(ranks: Ranks, norm: str, options: dict[str, bool]) -> None:
    ranks.run(optimizes, norm=norm, options=options)


def recomputes(norm: str) -> None:
    expected, model = normed(norm), normed(norm)
    for layer in (model[0], model[2]):
        checkpoint(layer)
    shard(model)
    for one in (expected, model):
        train(one, adam(one))
    assert_same_state(model, expected)


@every_built_in
def test_activation_checkpointing(ranks: Ranks, norm: str) -> None:
    ranks.run(recomputes, norm=norm)


def starts_on_meta(norm: str, order: str) -> None:
    expected = normed(norm)
    with torch.device("meta"):
        model = sharded(norm, order)
    model.to_empty(device="cpu")
    set_model_state_dict(model, expected.state_dict(), options=WHOLE)
    for one in (expected, model):
        train(one, adam(one))
    assert_same_state(model, expected)


@orders
@every_built_in
def test_a_model_built_without_memory(ranks: Ranks, norm: str, order: str) -> None:
    ranks.run(starts_on_meta, norm=norm, order=order)


def names_its_state(norm: str) -> None:
    model, plain = sharded(norm, "after"), build()
    assert list(get_model_state_dict(model)) == list(normed(norm).state_dict())
    whole = get_model_state_dict(model, options=WHOLE)
    torch.testing.assert_close(whole, dict(normed(norm).state_dict()))
    optimizer = adam(model)
    train(model, optimizer)
    torchkiln.bake(model, optimizer=optimizer)
    train(model, optimizer)
    assert list(get_model_state_dict(model)) == list(plain.state_dict())
    moments = get_optimizer_state_dict(model, optimizer)["state"]
    assert set(moments) == set(plain.state_dict())


@every_built_in
def test_state_dicts_of_checkpoints_name_what_there_is(ranks: Ranks, norm: str) -> None:
    ranks.run(names_its_state, norm=norm)


def clips(norm: str) -> None:
    expected, model = normed(norm), sharded(norm, "after")
    norms = []
    for one in (expected, model):
        loss(one, next(batches(one))).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(one.parameters(), 0.01))
    assert isinstance(norms[1], DTensor)
    torch.testing.assert_close(norms[1].full_tensor(), norms[0])


@every_built_in
def test_gradients_are_clipped_by_their_norm_over_all_ranks(ranks: Ranks, norm: str) -> None:
    ranks.run(clips, norm=norm)


def averages(norm: str) -> None:
    expected, model = normed(norm), normed(norm)
    followers = [AveragedModel(one, multi_avg_fn=get_ema_multi_avg_fn(0.9)) for one in (expected, model)]
    shard(model)
    shard(followers[1].module)
    for one, follower in zip((expected, model), followers, strict=True):
        optimizer = adam(one)
        for seed in range(3):
            train(one, optimizer, steps=1, seed=seed)
            follower.update_parameters(one)
    assert_same_state(followers[1].module, followers[0].module)
    torchkiln.bake(followers[1].module)


@every_built_in
def test_an_averaged_model_is_sharded_like_its_source(ranks: Ranks, norm: str) -> None:
    ranks.run(averages, norm=norm)


def steps_aside(norm: str) -> None:
    model = sharded(norm, "after").eval()
    x = torch.ones(2, 6)
    with torch.no_grad():
        before = model(x)
        with torchkiln.baked(model):
            assert list(model.state_dict()) == list(build().state_dict())
            torch.testing.assert_close(model(x), before)
        assert torch.equal(model(x), before)
    train(model.train(), adam(model))


@every_built_in
def test_a_model_on_plain_weights_for_a_while(ranks: Ranks, norm: str) -> None:
    ranks.run(steps_aside, norm=norm)


def takes_a_value(norm: str) -> None:
    expected, model = normed(norm), sharded(norm)
    value = torch.linalg.qr(torch.randn(6, 5, generator=torch.Generator().manual_seed(7)))[0].mT.contiguous()
    mesh = model[2].weight.device_mesh
    expected[0].weight = value
    model[0].weight = distribute_tensor(value, mesh, [Shard(0)])
    torch.testing.assert_close(model[0].weight.full_tensor(), expected[0].weight)
    with pytest.warns(TorchkilnWarning, match="'weight', which is sharded, is lost"):
        nn.init.zeros_(model[0].weight)


@every_built_in
def test_assigning_takes_effect_and_a_write_in_place_warns(ranks: Ranks, norm: str) -> None:
    ranks.run(takes_a_value, norm=norm)


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
    model, optimizer = shard(build()), None
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


def refuses_numbers() -> None:
    model = shard(build())
    with pytest.raises(
        ParametrizationError, match="FSDP shards parameters along a dimension, and a number has none"
    ):
        parametrizations.weight_norm(model[0], dim=None)
    assert type(model[0]).__name__ == "FSDPLinear"
    train(model, adam(model))


def test_a_number_cannot_be_sharded_and_nothing_changes(ranks: Ranks) -> None:
    ranks.run(refuses_numbers)


def refuses_in_a_forward() -> None:
    model = shard(build())

    def interfere(*_: object) -> None:
        parametrizations.weight_norm(model[0])

    model[0].register_forward_pre_hook(interfere)
    with pytest.raises(ParametrizationError, match="FSDP is in the forward pass of 0:"):
        model(torch.ones(2, 6))


def test_a_change_within_a_forward_is_refused(ranks: Ranks) -> None:
    ranks.run(refuses_in_a_forward)


def reads_once(norm: str) -> None:
    models = []
    for is_sharded in (False, True):
        torch.manual_seed(0)
        layer = nn.LSTM(4, 6, batch_first=True)
        torch.manual_seed(1)
        getattr(parametrizations, norm)(layer, "weight_hh_l0")
        if is_sharded:
            fully_shard(layer)
        optimizer = adam(layer)
        for seed in range(4):
            if seed == 2:
                torchkiln.bake(layer, optimizer=optimizer)
            batch = torch.randn(4, 3, 4, generator=torch.Generator().manual_seed(seed))
            output, _ = layer(batch.chunk(2)[dist.get_rank()] if is_sharded else batch)
            output.clone().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        models.append(layer)
    assert_same_state(models[1], models[0])


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
@every_built_in
def test_a_recurrent_layer(ranks: Ranks, norm: str) -> None:
    ranks.run(reads_once, norm=norm)
