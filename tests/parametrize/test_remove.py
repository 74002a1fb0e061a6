"""Removal gives back the class, the object, the place and the value that the tensor had."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from .oracle import Impl, anatomy, beyond_torch, differential
from .steps import (
    Based,
    Counted,
    Gain,
    Halves,
    HalvesAsList,
    Lambda,
    Ordered,
    Pair,
    Polar,
    Refusing,
    Scale,
    Shift,
    Single,
    Tanh,
    Transpose,
    Widen,
    linear,
)

ONE_ORIGINAL = [Scale, Shift, Refusing, Tanh, Gain, Based, nn.Identity]
SEVERAL_ORIGINALS = [Halves, HalvesAsList, Polar, Single]


@pytest.mark.parametrize("leave_parametrized", [True, False])
@pytest.mark.parametrize("step", ONE_ORIGINAL)
@differential
def test_parameter(impl: Impl, step: type[nn.Module], leave_parametrized: bool) -> Iterator[Any]:
    layer = linear()
    weight = layer.weight
    impl.P.register_parametrization(layer, "weight", step())
    yield impl.P.remove_parametrizations(layer, "weight", leave_parametrized=leave_parametrized) is layer
    yield layer.weight
    yield layer.weight is weight
    yield dict(sorted(layer.state_dict().items()))
    yield type(layer) is nn.Linear
    yield hasattr(layer, "parametrizations")
    yield layer(torch.ones(1, 4, dtype=torch.float64))


@pytest.mark.parametrize("step", SEVERAL_ORIGINALS)
@differential
def test_several_originals(impl: Impl, step: type[nn.Module]) -> Iterator[Any]:
    layer = linear()
    impl.P.register_parametrization(layer, "weight", step())
    impl.P.register_parametrization(layer, "weight", Scale())
    impl.P.remove_parametrizations(layer, "weight")
    yield layer.weight
    yield layer.weight.is_leaf
    yield type(layer) is nn.Linear


@pytest.mark.parametrize("leave_parametrized", [True, False])
@differential
def test_positional_flag(impl: Impl, leave_parametrized: bool) -> Iterator[Any]:
    layer = linear()
    impl.P.register_parametrization(layer, "weight", Scale())
    impl.P.remove_parametrizations(layer, "weight", leave_parametrized)
    yield layer.weight


@pytest.mark.parametrize("leave_parametrized", [True, False])
@pytest.mark.parametrize("step", ONE_ORIGINAL)
@differential
def test_buffer(impl: Impl, step: type[nn.Module], leave_parametrized: bool) -> Iterator[Any]:
    pair = Pair()
    scale = pair.scale
    impl.P.register_parametrization(pair, "scale", step())
    impl.P.remove_parametrizations(pair, "scale", leave_parametrized=leave_parametrized)
    yield pair
    yield pair.scale is scale
    yield pair.scale


@pytest.mark.parametrize("step", SEVERAL_ORIGINALS)
@differential
def test_buffer_with_several_originals(impl: Impl, step: type[nn.Module]) -> Iterator[Any]:
    pair = Pair()
    impl.P.register_parametrization(pair, "scale", step())
    impl.P.remove_parametrizations(pair, "scale")
    yield pair


@beyond_torch("torch makes it a parameter, because the gain requires a gradient")
def test_a_buffer_stays_a_buffer(impl: Impl) -> None:
    pair = Pair()
    impl.P.register_parametrization(pair, "scale", Halves())
    impl.P.register_parametrization(pair, "scale", Gain())
    read = pair.scale.detach()
    impl.P.remove_parametrizations(pair, "scale")
    assert list(pair._buffers) == ["mean", "scale"]
    assert torch.equal(pair.scale, read)
    assert not pair.scale.requires_grad


@pytest.mark.parametrize("leave_parametrized", [True, False])
@pytest.mark.parametrize("step", ONE_ORIGINAL)
@differential
def test_frozen_parameter(impl: Impl, step: type[nn.Module], leave_parametrized: bool) -> Iterator[Any]:
    layer = linear().requires_grad_(False)
    impl.P.register_parametrization(layer, "weight", step())
    impl.P.remove_parametrizations(layer, "weight", leave_parametrized=leave_parametrized)
    yield layer.weight


@beyond_torch("torch leaves a buffer")
@pytest.mark.parametrize("step", SEVERAL_ORIGINALS)
def test_a_frozen_tensor_with_several_originals_stays_a_parameter(impl: Impl, step: type[nn.Module]) -> None:
    layer = linear().requires_grad_(False)
    impl.P.register_parametrization(layer, "weight", step())
    read = layer.weight
    impl.P.remove_parametrizations(layer, "weight")
    assert list(dict(layer.named_parameters())) == ["weight", "bias"]
    assert torch.equal(layer.weight, read)
    assert not layer.weight.requires_grad


@beyond_torch("torch leaves a buffer")
@pytest.mark.parametrize("step", SEVERAL_ORIGINALS)
def test_removal_under_no_grad_leaves_a_trainable_parameter(impl: Impl, step: type[nn.Module]) -> None:
    layer = linear()
    impl.P.register_parametrization(layer, "weight", step())
    with torch.no_grad():
        impl.P.remove_parametrizations(layer, "weight")
    assert isinstance(layer.weight, nn.Parameter)
    assert layer.weight.requires_grad


@pytest.mark.parametrize("leave_parametrized", [True, False])
@pytest.mark.parametrize(
    "steps",
    [(Scale, Shift), (Shift, Tanh, Gain), (Based, Scale)],
    ids=lambda s: "-".join(c.__name__ for c in s),
)
@differential
def test_chain(impl: Impl, steps: tuple[type[nn.Module], ...], leave_parametrized: bool) -> Iterator[Any]:
    layer = linear()
    for step in steps:
        impl.P.register_parametrization(layer, "weight", step())
    impl.P.remove_parametrizations(layer, "weight", leave_parametrized=leave_parametrized)
    yield layer.weight


@pytest.mark.parametrize("leave_parametrized", [True, False])
@differential
def test_one_of_two(impl: Impl, leave_parametrized: bool) -> Iterator[Any]:
    layer = linear()
    impl.P.register_parametrization(layer, "weight", Scale())
    impl.P.register_parametrization(layer, "bias", Shift())
    impl.P.remove_parametrizations(layer, "weight", leave_parametrized=leave_parametrized)
    yield layer
    yield layer.weight, layer.bias
    impl.P.register_parametrization(layer, "weight", Tanh())
    yield sorted(layer.state_dict())
    yield layer.weight, layer.bias


@pytest.mark.parametrize("names", ["a", "b", "ab", "ba", "adc"])
@pytest.mark.parametrize("step", [Scale, Halves])
@beyond_torch("torch appends the tensor at the end")
def test_the_order_of_parameters_is_restored(impl: Impl, step: type[nn.Module], names: str) -> None:
    module = Ordered("abcd")
    for name in names:
        impl.P.register_parametrization(module, name, step())
    for name in reversed(names):
        impl.P.remove_parametrizations(module, name)
    assert list(module._parameters) == list("abcd")
    assert [name for name, _ in module.named_parameters()] == list("abcd")
    assert list(module.state_dict()) == list("abcd")


@pytest.mark.parametrize("names", ["d", "dcba"])
def test_the_last_parameters_stay_last(impl: Impl, names: str) -> None:
    module = Ordered("abcd")
    for name in names:
        impl.P.register_parametrization(module, name, Scale())
    for name in reversed(names):
        impl.P.remove_parametrizations(module, name)
    assert list(module._parameters) == list("abcd")


@pytest.mark.parametrize("order", ["abc", "bca", "cab"])
@beyond_torch("torch appends the tensor at the end")
def test_the_order_is_restored_whatever_the_order_of_removal(impl: Impl, order: str) -> None:
    module = Ordered("abcd")
    for name in "abc":
        impl.P.register_parametrization(module, name, Scale())
    for name in order:
        impl.P.remove_parametrizations(module, name)
    assert list(module._parameters) == list("abcd")


@pytest.mark.parametrize("registered", ["abc", "bca", "cba"])
@pytest.mark.parametrize("removed", ["ab", "ba", "acb", "cba"])
@beyond_torch("torch appends the tensor at the end")
def test_the_order_is_restored_whatever_the_order_of_both(impl: Impl, registered: str, removed: str) -> None:
    module = Ordered("abcd")
    for name in registered:
        if name in removed:
            impl.P.register_parametrization(module, name, Scale())
    for name in removed:
        impl.P.remove_parametrizations(module, name)
    assert list(module._parameters) == list("abcd")


@pytest.mark.parametrize("removed", ["ab", "ba"])
@beyond_torch("torch appends the tensor at the end")
def test_the_order_of_buffers_is_restored(impl: Impl, removed: str) -> None:
    module = Ordered("abc", buffers=True)
    for name in "ba":
        impl.P.register_parametrization(module, name, Scale())
    for name in removed:
        impl.P.remove_parametrizations(module, name)
    assert list(module._buffers) == list("abc")
    assert list(module.state_dict()) == list("abc")


@beyond_torch("torch appends the tensor at the end")
def test_a_tensor_that_appeared_meanwhile_comes_last(impl: Impl) -> None:
    module = Ordered("ab")
    impl.P.register_parametrization(module, "a", Scale())
    module.late = nn.Parameter(torch.zeros(1))
    impl.P.remove_parametrizations(module, "a")
    assert list(module._parameters) == ["a", "b", "late"]


def test_a_tensor_that_disappeared_meanwhile_is_no_obstacle(impl: Impl) -> None:
    module = Ordered("abc")
    impl.P.register_parametrization(module, "b", Scale())
    del module.a, module.c
    impl.P.remove_parametrizations(module, "b")
    assert list(module._parameters) == ["b"]


@beyond_torch("torch appends the tensor at the end")
def test_optimizer_state_still_matches_by_position(impl: Impl) -> None:
    module, plain = Ordered("abc"), Ordered("abc")
    for parameter, size in zip(plain.parameters(), (1.0, 2.0, 3.0), strict=True):
        parameter.grad = torch.full_like(parameter, size)
    saved = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    saved.step()
    impl.P.register_parametrization(module, "a", Scale())
    impl.P.remove_parametrizations(module, "a")
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    optimizer.load_state_dict(saved.state_dict())
    momenta = [optimizer.state[getattr(module, name)]["momentum_buffer"][0, 0].item() for name in "abc"]
    assert momenta == [1.0, 2.0, 3.0]


@differential
def test_the_optimizer_keeps_working(impl: Impl) -> Iterator[Any]:
    layer = linear()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    impl.P.register_parametrization(layer, "weight", Scale())
    x = torch.ones(1, 4, dtype=torch.float64)
    for _ in range(3):
        optimizer.zero_grad()
        layer(x).square().sum().backward()
        optimizer.step()
        yield layer.weight
        if impl.P.is_parametrized(layer):
            impl.P.remove_parametrizations(layer, "weight")


@pytest.mark.parametrize("leave_parametrized", [True, False])
@differential
def test_gradient_after_removal(impl: Impl, leave_parametrized: bool) -> Iterator[Any]:
    layer = linear()
    impl.P.register_parametrization(layer, "weight", Scale())
    layer.weight.sum().backward()
    impl.P.remove_parametrizations(layer, "weight", leave_parametrized=leave_parametrized)
    yield layer.weight.grad


@differential
def test_unsafe_shape(impl: Impl) -> Iterator[Any]:
    layer = linear()
    weight = layer.weight
    impl.P.register_parametrization(layer, "weight", nn.Flatten(0), unsafe=True)
    impl.P.remove_parametrizations(layer, "weight")
    yield layer.weight
    yield layer.weight is weight


@differential
def test_unsafe_round_trip(impl: Impl) -> Iterator[Any]:
    layer = linear()
    impl.P.register_parametrization(layer, "weight", Transpose(), unsafe=True)
    impl.P.remove_parametrizations(layer, "weight", leave_parametrized=True)
    yield layer.weight


@differential
def test_unsafe_dtype_without_the_value(impl: Impl) -> Iterator[Any]:
    layer = nn.Linear(4, 3)
    impl.P.register_parametrization(layer, "weight", Widen(), unsafe=True)
    impl.P.remove_parametrizations(layer, "weight", leave_parametrized=False)
    yield layer.weight


@beyond_torch("torch cannot set data of another dtype, and blames a tensor subclass", raises=RuntimeError)
def test_unsafe_dtype(impl: Impl) -> None:
    layer = nn.Linear(4, 3)
    impl.P.register_parametrization(layer, "weight", Widen(), unsafe=True)
    read = layer.weight
    impl.P.remove_parametrizations(layer, "weight")
    assert torch.equal(layer.weight, read)
    assert layer.weight.dtype is torch.float64
    assert isinstance(layer.weight, nn.Parameter)
    assert layer.weight.requires_grad


@beyond_torch("torch evaluates once more, which advances the power iteration")
def test_the_value_is_the_last_read_in_training(impl: Impl) -> None:
    layer = impl.N.spectral_norm(linear())
    read = layer.weight
    impl.P.remove_parametrizations(layer, "weight")
    assert torch.equal(layer.weight, read)


@pytest.mark.parametrize("step", [Scale, Based, nn.Identity])
def test_registered_and_removed_again_and_again(impl: Impl, step: type[nn.Module]) -> None:
    layer = linear()
    weight, value = layer.weight, layer.weight.detach().clone()
    for _ in range(3):
        impl.P.register_parametrization(layer, "weight", step())
        assert layer.parametrizations.weight.original is weight
        impl.P.remove_parametrizations(layer, "weight")
    assert layer.weight is weight
    assert torch.equal(weight, value)


def test_removal_without_the_value_does_not_evaluate(impl: Impl) -> None:
    step = Counted()
    layer = linear()
    impl.P.register_parametrization(layer, "weight", step, unsafe=True)
    impl.P.remove_parametrizations(layer, "weight", leave_parametrized=False)
    assert step.calls == 0


def test_removal_does_not_touch_the_other_layer(impl: Impl) -> None:
    layers = [linear() for _ in range(3)]
    for layer in layers:
        impl.P.register_parametrization(layer, "weight", Scale())
    others = [anatomy(layer) for layer in layers[1:]]
    impl.P.remove_parametrizations(layers[0], "weight")
    assert [anatomy(layer) for layer in layers[1:]] == others
    assert all(impl.P.is_parametrized(layer, "weight") for layer in layers[1:])
    assert layers[1].weight.shape == (3, 4)


@beyond_torch("torch's weight shares the storage of the step's buffer")
def test_the_weight_shares_no_storage_with_the_step(impl: Impl) -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("value", torch.ones(3, 4, dtype=torch.float64))

        def forward(self, X: torch.Tensor) -> torch.Tensor:
            return self.value

    step = Constant()
    layer = linear()
    impl.P.register_parametrization(layer, "weight", step)
    impl.P.remove_parametrizations(layer, "weight")
    with torch.no_grad():
        layer.weight.fill_(7.0)
    assert torch.equal(step.value, torch.ones(3, 4, dtype=torch.float64))


def test_a_failed_evaluation_leaves_the_module_as_it_was(impl: Impl) -> None:
    broken = []

    def forward(X: torch.Tensor) -> torch.Tensor:
        if broken:
            raise RuntimeError("broken meanwhile")
        return X * 2

    layer = linear()
    impl.P.register_parametrization(layer, "weight", Lambda(forward))
    broken.append(True)
    before = anatomy(layer)
    with pytest.raises(RuntimeError, match="broken meanwhile"):
        impl.P.remove_parametrizations(layer, "weight")
    assert anatomy(layer) == before
    broken.clear()
    assert torch.equal(layer.weight, layer.parametrizations.weight.original * 2)
