"""Each implementation's functions accept the modules that the other one parametrized."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from .oracle import OURS, TORCH, Impl, anatomy, assert_same, snapshot
from .steps import Counted, Halves, Ordered, Pair, Scale, Shift, Tanh, linear

MAKER_AND_USER = pytest.mark.parametrize(
    ("maker", "user"),
    [(TORCH, OURS), (OURS, TORCH), (TORCH, TORCH), (OURS, OURS)],
    ids=["ours on torch's", "torch's on ours", "torch's on torch's", "ours on ours"],
)


def made(maker: Impl, *steps: nn.Module, name: str = "weight") -> nn.Linear:
    """A layer that ``maker`` parametrized."""
    layer = linear()
    for step in steps or (Scale(),):
        maker.P.register_parametrization(layer, name, step)
    return layer


@MAKER_AND_USER
def test_is_parametrized(maker: Impl, user: Impl) -> None:
    layer = made(maker)
    assert user.P.is_parametrized(layer)
    assert user.P.is_parametrized(layer, "weight")
    assert not user.P.is_parametrized(layer, "bias")


@MAKER_AND_USER
def test_type_before_parametrizations(maker: Impl, user: Impl) -> None:
    assert user.P.type_before_parametrizations(made(maker)) is nn.Linear


@pytest.mark.parametrize("leave_parametrized", [True, False])
@MAKER_AND_USER
def test_remove(maker: Impl, user: Impl, leave_parametrized: bool) -> None:
    layer = made(maker, Scale(), Tanh())
    original, value = layer.parametrizations.weight.original, layer.weight.detach()
    expected = value if leave_parametrized else original.detach().clone()
    user.P.remove_parametrizations(layer, "weight", leave_parametrized=leave_parametrized)
    assert type(layer) is nn.Linear
    assert layer.weight is original
    assert torch.equal(layer.weight, expected)
    assert sorted(layer.state_dict()) == ["bias", "weight"]
    assert layer(torch.ones(1, 4, dtype=torch.float64)).shape == (1, 3)


@MAKER_AND_USER
def test_remove_several_originals(maker: Impl, user: Impl) -> None:
    layer = made(maker, Halves())
    value = layer.weight.detach()
    user.P.remove_parametrizations(layer, "weight")
    assert isinstance(layer.weight, nn.Parameter)
    assert torch.equal(layer.weight, value)
    assert type(layer) is nn.Linear


@MAKER_AND_USER
def test_remove_one_of_two(maker: Impl, user: Impl) -> None:
    layer = made(maker)
    maker.P.register_parametrization(layer, "bias", Shift())
    bias = layer.bias
    user.P.remove_parametrizations(layer, "weight")
    assert user.P.is_parametrized(layer, "bias")
    assert torch.equal(layer.bias, bias)
    assert isinstance(layer.weight, nn.Parameter)
    maker.P.remove_parametrizations(layer, "bias")
    assert type(layer) is nn.Linear


@MAKER_AND_USER
def test_register_a_further_step(maker: Impl, user: Impl) -> None:
    layer = made(maker)
    value = layer.weight
    user.P.register_parametrization(layer, "weight", Shift())
    assert torch.equal(layer.weight, value + 1.5)
    assert len(layer.parametrizations.weight) == 2
    maker.P.remove_parametrizations(layer, "weight")
    assert torch.equal(layer.weight, value + 1.5)
    assert type(layer) is nn.Linear


@pytest.mark.parametrize("first_removed", ["weight", "bias"])
@pytest.mark.parametrize("step", [Scale, Halves])
@MAKER_AND_USER
def test_register_another_tensor(maker: Impl, user: Impl, step: type[nn.Module], first_removed: str) -> None:
    layer = made(maker)
    plain = layer.bias.detach().clone()
    user.P.register_parametrization(layer, "bias", step())
    assert type(layer).__name__ == "ParametrizedLinear"
    assert torch.allclose(layer.bias, plain)
    assert layer.weight.shape == (3, 4)
    for name in ("weight", "bias") if first_removed == "weight" else ("bias", "weight"):
        expected = getattr(layer, name).detach()
        maker.P.remove_parametrizations(layer, name)
        assert torch.equal(getattr(layer, name), expected)
    assert type(layer) is nn.Linear
    assert user.P.is_parametrized(layer) is False


@MAKER_AND_USER
def test_assign(maker: Impl, user: Impl) -> None:
    layer = made(maker)
    user.P.register_parametrization(layer, "weight", Scale(4.0))
    value = torch.ones(3, 4, dtype=torch.float64)
    layer.weight = value
    assert torch.equal(layer.weight, value)


@MAKER_AND_USER
def test_cached(maker: Impl, user: Impl) -> None:
    layer = linear()
    step = Counted()
    maker.P.register_parametrization(layer, "weight", step, unsafe=True)
    user.P.register_parametrization(layer, "bias", Shift())
    # One function of ours on the module makes its class ours, and with it the cache.
    with (OURS if OURS in (maker, user) else TORCH).P.cached():
        assert layer.weight is layer.weight
    assert step.calls == 1


@MAKER_AND_USER
def test_the_cache_of_the_other_is_harmless(maker: Impl, user: Impl) -> None:
    layer = made(maker)
    value = layer.weight
    with user.P.cached():
        assert torch.equal(layer.weight, value)
        with torch.no_grad():
            assert torch.equal(layer.weight, value)
        layer.weight.sum().backward()
    assert torch.equal(layer.weight, value)


@MAKER_AND_USER
def test_transfer(maker: Impl, user: Impl) -> None:
    source, target = made(maker, Scale(), Tanh()), linear()
    user.P.transfer_parametrizations_and_params(source, target)
    assert torch.equal(target.weight, source.weight)
    assert target.parametrizations.weight.original is source.parametrizations.weight.original
    assert target.parametrizations.weight[1] is source.parametrizations.weight[1]


@MAKER_AND_USER
def test_transfer_to_a_parametrized_module(maker: Impl, user: Impl) -> None:
    source, target = made(user, Halves()), made(maker, Shift(), name="bias")
    bias = target.bias
    user.P.transfer_parametrizations_and_params(source, target)
    assert torch.equal(target.weight, source.weight)
    assert torch.equal(target.bias, bias)


@MAKER_AND_USER
def test_state_dicts_move(maker: Impl, user: Impl) -> None:
    source, target = made(maker, Halves(), Scale()), made(user, Halves(), Scale())
    assert list(source.state_dict()) == list(target.state_dict())
    target.load_state_dict(source.state_dict())
    assert_same(snapshot(target), snapshot(source))
    assert torch.equal(target.weight, source.weight)


@MAKER_AND_USER
def test_deepcopy_then_remove(maker: Impl, user: Impl) -> None:
    layer = copy.deepcopy(made(maker))
    value = layer.weight
    user.P.remove_parametrizations(layer, "weight")
    assert torch.equal(layer.weight, value)
    assert type(layer) is nn.Linear


def torch_removes(layer: nn.Module) -> None:
    TORCH.P.remove_parametrizations(layer, "weight")


def torch_restores(layer: nn.Module) -> None:
    TORCH.P.remove_parametrizations(layer, "weight", leave_parametrized=False)


def torch_registers_another(layer: nn.Module) -> None:
    TORCH.P.register_parametrization(layer, "bias", Shift())


def torch_registers_and_removes_another(layer: nn.Module) -> None:
    TORCH.P.register_parametrization(layer, "bias", Shift())
    TORCH.P.remove_parametrizations(layer, "bias")


def torch_appends(layer: nn.Module) -> None:
    TORCH.P.register_parametrization(layer, "weight", Shift())


def torch_transfers(layer: nn.Module) -> None:
    TORCH.P.transfer_parametrizations_and_params(made(TORCH, Shift(), name="bias"), layer)


@pytest.mark.parametrize(
    "change",
    [
        torch_removes,
        torch_restores,
        torch_registers_another,
        torch_registers_and_removes_another,
        torch_appends,
        torch_transfers,
    ],
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_torch_does_not_reach_an_equal_layer(change: Callable[[nn.Module], None], when: str) -> None:
    changed, kept = made(OURS), made(OURS)
    assert type(changed) is type(kept)
    if when == "after":
        change(changed)
    before, value, bias = anatomy(kept), kept.weight, kept.bias
    if when == "before":
        change(changed)
    assert anatomy(kept) == before
    assert torch.equal(kept.weight, value)
    assert kept.bias is bias
    assert isinstance(kept.bias, nn.Parameter)
    for user in (TORCH, OURS):
        clone = copy.deepcopy(kept)
        user.P.register_parametrization(clone, "bias", Scale())
        user.P.remove_parametrizations(clone, "weight")
        user.P.remove_parametrizations(clone, "bias")
        assert type(clone) is nn.Linear
        assert torch.equal(clone.weight, value)
    assert torch.equal(made(OURS).weight.isnan(), torch.zeros(3, 4, dtype=torch.bool))


@pytest.mark.parametrize("name", ["a", "b"])
def test_a_plain_tensor_under_a_shared_class_still_works(name: str) -> None:
    """After torch removed one of two, the class may still carry its property."""
    module = Ordered("abc")
    OURS.P.register_parametrization(module, "a", Scale())
    OURS.P.register_parametrization(module, "b", Scale())
    TORCH.P.remove_parametrizations(module, name)
    fresh = nn.Parameter(torch.ones(2, 3))
    setattr(module, name, fresh)
    assert getattr(module, name) is fresh
    assert module._parameters[name] is fresh
    delattr(module, name)
    assert not hasattr(module, name)
    setattr(module, name, 3)
    assert getattr(module, name) == 3


def test_one_model_parametrized_by_both() -> None:
    pair = Pair()
    for index, name in enumerate(("first", "second", "third", "mean")):
        (TORCH, OURS)[index % 2].P.register_parametrization(pair, name, Scale())
    values: dict[str, Any] = {name: getattr(pair, name) for name in ("first", "second", "third", "mean")}
    state = pair.state_dict()
    pair.load_state_dict(state)
    for index, name in enumerate(("first", "second", "third", "mean")):
        (OURS, TORCH)[index // 2].P.remove_parametrizations(pair, name)
        assert torch.equal(getattr(pair, name), values[name])
    assert type(pair) is Pair


@pytest.mark.parametrize("name", ["orthogonal", "weight_norm", "spectral_norm"])
@MAKER_AND_USER
def test_built_ins(maker: Impl, user: Impl, name: str) -> None:
    layer = getattr(maker.N, name)(linear()).eval()
    value = layer.weight.detach()
    user.P.register_parametrization(layer, "weight", Scale())
    assert torch.equal(layer.weight, value * 2)
    user.P.remove_parametrizations(layer, "weight")
    assert torch.equal(layer.weight, value * 2)
    assert type(layer) is nn.Linear
