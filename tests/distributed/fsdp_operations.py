"""What people do under FSDP2 (``fully_shard``); each must come to the same as on one process, on every rank."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
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

from distributed.training import (
    Operation,
    adam,
    assert_same_state,
    batches,
    build,
    in_each_order,
    loss,
    normed,
    register,
    shard,
    take_out,
    train,
    trains,
)
from parametrize.oracle import Impl

__all__ = ["OPERATIONS"]

WHOLE = StateDictOptions(full_state_dict=True)
HALF = MixedPrecisionPolicy(torch.bfloat16, torch.float32)


def _sharded(impl: Impl, norm: str, *, after: bool, **options: Any) -> nn.Sequential:
    model = shard(build() if after else normed(norm, impl), **options)
    if after:
        register(model, norm, impl=impl)
    return model


def _trains(impl: Impl, norm: str, **options: Any) -> None:
    trains(impl, norm, make=_sharded, **options)


def keeps_gathered(impl: Impl, norm: str) -> None:
    _trains(impl, norm, removes=True, reshard_after_forward=False)


def offloads(impl: Impl, norm: str) -> None:
    _trains(impl, norm, removes=True, offload_policy=CPUOffloadPolicy(pin_memory=False))


def mixes_precision(impl: Impl, norm: str) -> None:
    _trains(impl, norm, removes=True, atol=0.01, mp_policy=HALF)


def restores(impl: Impl, norm: str) -> None:
    model = _sharded(impl, norm, after=False)
    if norm == "weight_norm":
        chain = model[0].parametrizations.weight
        assert not chain.is_tensor  # there is no original to restore, and that is the answer
        return
    original = model[0].parametrizations.weight.original
    impl.P.remove_parametrizations(model[0], "weight", leave_parametrized=False)
    assert model[0].weight is original
    train(model, adam(model))
    assert isinstance(model[0].weight, DTensor)


def _optimizes(impl: Impl, norm: str, **options: bool) -> None:
    expected, model = normed(norm, impl), _sharded(impl, norm, after=False)
    for one in (expected, model):
        train(one, adam(one, **options))
    assert_same_state(model, expected)


def foreach(impl: Impl, norm: str) -> None:
    _optimizes(impl, norm, foreach=True)


def fused(impl: Impl, norm: str) -> None:
    _optimizes(impl, norm, fused=True)


def recomputes(impl: Impl, norm: str) -> None:
    expected, model = normed(norm, impl), normed(norm, impl)
    for layer in (model[0], model[2]):
        checkpoint(layer)
    shard(model)
    for one in (expected, model):
        train(one, adam(one))
    assert_same_state(model, expected)


def _starts_on_meta(impl: Impl, norm: str, *, after: bool) -> None:
    expected = normed(norm, impl)
    with torch.device("meta"):
        model = _sharded(impl, norm, after=after)
    model.to_empty(device="cpu")
    set_model_state_dict(model, expected.state_dict(), options=WHOLE)
    for one in (expected, model):
        train(one, adam(one))
    assert_same_state(model, expected)


def meta(impl: Impl, norm: str) -> None:
    _starts_on_meta(impl, norm, after=False)


def meta_after(impl: Impl, norm: str) -> None:
    _starts_on_meta(impl, norm, after=True)


def names_its_state(impl: Impl, norm: str) -> None:
    model, plain = _sharded(impl, norm, after=False), build()
    assert list(get_model_state_dict(model)) == list(normed(norm, impl).state_dict())
    whole = get_model_state_dict(model, options=WHOLE)
    if dist.get_rank() == 0:
        torch.testing.assert_close(whole, dict(normed(norm, impl).state_dict()))
    optimizer = adam(model)
    train(model, optimizer)
    optimizer = take_out(impl, model, optimizer)
    train(model, optimizer)
    assert set(get_model_state_dict(model)) == set(plain.state_dict())
    assert set(get_optimizer_state_dict(model, optimizer)["state"]) == set(plain.state_dict())


def clips(impl: Impl, norm: str) -> None:
    expected, model = normed(norm, impl), _sharded(impl, norm, after=False)
    lengths = []
    for one in (expected, model):
        loss(one, next(batches(one))).backward()
        lengths.append(torch.nn.utils.clip_grad_norm_(one.parameters(), 0.01))
    assert isinstance(lengths[1], DTensor)
    torch.testing.assert_close(lengths[1].full_tensor(), lengths[0])


def averages(impl: Impl, norm: str) -> None:
    expected, model = normed(norm, impl), normed(norm, impl)
    averaging = get_ema_multi_avg_fn(0.9)
    followers = [AveragedModel(one, multi_avg_fn=averaging) for one in (expected, model)]
    shard(model)
    shard(followers[1].module)
    for one, follower in zip((expected, model), followers, strict=True):
        optimizer = adam(one)
        for seed in range(3):
            train(one, optimizer, steps=1, seed=seed)
            follower.update_parameters(one)
    assert_same_state(followers[1].module, followers[0].module)


def takes_a_value(impl: Impl, norm: str) -> None:
    expected, model = normed(norm, impl), _sharded(impl, norm, after=False)
    generator = torch.Generator().manual_seed(7)
    value = torch.linalg.qr(torch.randn(6, 5, generator=generator))[0].mT.contiguous()
    optimizers = adam(expected), adam(model)
    for one, optimizer in zip((expected, model), optimizers, strict=True):
        train(one, optimizer)
    expected[0].weight = value
    model[0].weight = distribute_tensor(value, model[2].weight.device_mesh, [Shard(0)])
    torch.testing.assert_close(model[0].weight.full_tensor(), expected[0].weight.detach())
    with torch.no_grad():
        torch.testing.assert_close(model(torch.eye(6)), expected(torch.eye(6)))


def recurs(impl: Impl, norm: str) -> None:
    models: list[nn.LSTM] = []
    for is_sharded in (False, True):
        torch.manual_seed(0)
        layer = nn.LSTM(4, 6, batch_first=True)
        torch.manual_seed(1)
        getattr(impl.N, norm)(layer, "weight_hh_l0")
        if is_sharded:
            fully_shard(layer)
        optimizer = adam(layer)
        for seed in range(3):
            batch = torch.randn(4, 3, 4, generator=torch.Generator().manual_seed(seed))
            output, _ = layer(batch.chunk(2)[dist.get_rank()] if is_sharded else batch)
            output.clone().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        models.append(layer)
    assert_same_state(models[1], models[0])


OPERATIONS: dict[str, Operation] = {
    **in_each_order("shard", _trains),
    "return the original, train on": restores,
    "remove with `reshard_after_forward=False`": keeps_gathered,
    "remove with CPU offload": offloads,
    "remove under mixed precision (bfloat16)": mixes_precision,
    "optimizer with `foreach`": foreach,
    "optimizer with `fused`": fused,
    "activation checkpointing": recomputes,
    "meta device, register, shard, `to_empty`, load": meta,
    "meta device, shard, register, `to_empty`, load": meta_after,
    "state dicts of `torch.distributed.checkpoint`": names_its_state,
    "`clip_grad_norm_`": clips,
    "`AveragedModel`": averages,
    "assign a value": takes_a_value,
    "recurrent layer": recurs,
}
