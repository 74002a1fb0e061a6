"""Registration leaves the same module behind as torch's, for every kind of tensor, chain and module."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from .oracle import Impl, beyond_torch, differential
from .steps import (
    Based,
    Concrete,
    Gain,
    Halves,
    HalvesAsList,
    Masked,
    Noisy,
    Ordered,
    Pair,
    Polar,
    Refusing,
    Scale,
    Shift,
    Single,
    Symmetric,
    Tanh,
    Transpose,
    Triangular,
    Widen,
    WithDeepcopy,
    WithGetattr,
    WithMetaclass,
    WithProperty,
    WithSlots,
    linear,
    square,
)

ONE_ORIGINAL = [Scale, Shift, Refusing, Tanh, Gain, Noisy, Based, nn.Identity]
SEVERAL_ORIGINALS = [Halves, HalvesAsList, Polar, Single]
USER_MODULES = [WithDeepcopy, WithSlots, WithProperty, WithGetattr, Concrete, WithMetaclass]


def build(module_class: type[nn.Module]) -> nn.Module:
    """Make one of the user modules, each of which has a 3 x 4 weight."""
    return module_class(4, 3) if issubclass(module_class, nn.Linear) else module_class()


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("step", ONE_ORIGINAL + SEVERAL_ORIGINALS)
@differential
def test_parameter(impl: Impl, step: type[nn.Module], name: str) -> Iterator[Any]:
    layer = linear()
    yield impl.P.register_parametrization(layer, name, step()) is layer
    yield layer
    yield getattr(layer, name)
    yield layer(torch.ones(2, 4, dtype=torch.float64))


@pytest.mark.parametrize("step", ONE_ORIGINAL + SEVERAL_ORIGINALS)
@differential
def test_buffer(impl: Impl, step: type[nn.Module]) -> Iterator[Any]:
    pair = Pair()
    impl.P.register_parametrization(pair, "scale", step())
    yield pair
    yield pair.scale
    yield pair(torch.ones(2, 4))


@differential
def test_buffer_outside_the_state_dict(impl: Impl) -> Iterator[Any]:
    layer = linear()
    layer.register_buffer("mask", torch.ones(3), persistent=False)
    impl.P.register_parametrization(layer, "mask", Scale())
    yield layer.mask
    yield list(dict(layer.named_buffers()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.complex64], ids=str)
@pytest.mark.parametrize("step", [Scale, Halves])
@differential
def test_dtype(impl: Impl, step: type[nn.Module], dtype: torch.dtype) -> Iterator[Any]:
    layer = nn.Linear(4, 3, dtype=dtype)
    impl.P.register_parametrization(layer, "weight", step())
    yield layer
    yield layer.weight


@differential
def test_integer_buffer(impl: Impl) -> Iterator[Any]:
    layer = linear()
    layer.register_buffer("steps", torch.arange(3))
    impl.P.register_parametrization(layer, "steps", nn.Identity())
    yield layer
    yield layer.steps


@pytest.mark.parametrize(
    "steps",
    [
        (Scale, Shift),
        (Shift, Scale),
        (Halves, Scale),
        (Polar, Tanh, Scale),
        (Gain, Gain),
        (Based, Scale),
        (Scale, Refusing, Noisy),
        (Single, nn.Identity, Triangular),
    ],
    ids=lambda steps: "-".join(step.__name__ for step in steps),
)
@differential
def test_chain(impl: Impl, steps: tuple[type[nn.Module], ...]) -> Iterator[Any]:
    layer = linear()
    for step in steps:
        impl.P.register_parametrization(layer, "weight", step())
        yield layer
        yield layer.weight


@differential
def test_several_tensors(impl: Impl) -> Iterator[Any]:
    pair = Pair()
    for name, step in [("second", Scale()), ("mean", Shift()), ("first", Halves()), ("third", Polar())]:
        impl.P.register_parametrization(pair, name, step)
        yield pair
    yield pair(torch.ones(2, 4))


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("step", [Scale, Shift, Halves, Polar, Single])
@differential
def test_requires_grad_is_carried(impl: Impl, step: type[nn.Module], frozen: bool) -> Iterator[Any]:
    layer = linear()
    layer.weight.requires_grad_(not frozen)
    impl.P.register_parametrization(layer, "weight", step())
    yield layer
    yield layer.weight.requires_grad


@pytest.mark.parametrize("step", ONE_ORIGINAL)
def test_the_parameter_object_is_kept(impl: Impl, step: type[nn.Module]) -> None:
    layer = linear()
    weight, bias = layer.weight, layer.bias
    impl.P.register_parametrization(layer, "weight", step())
    assert layer.parametrizations.weight.original is weight
    assert layer.bias is bias


@pytest.mark.parametrize("training", [True, False])
@differential
def test_training_mode_reaches_the_step(impl: Impl, training: bool) -> Iterator[Any]:
    layer = linear().train(training)
    impl.P.register_parametrization(layer, "weight", Noisy().train(not training))
    impl.P.register_parametrization(layer, "weight", Noisy().train(not training))
    impl.P.register_parametrization(layer, "bias", Noisy())
    yield layer
    yield layer.train(not training)
    yield layer.weight


@pytest.mark.parametrize(
    ("steps", "flags"),
    [
        ((Transpose,), (True,)),
        ((Widen,), (True,)),
        ((Transpose, Scale), (True, False)),
        ((Scale, Transpose), (False, True)),
        ((Widen, Scale, Transpose), (True, False, True)),
        ((Halves, Transpose), (True, True)),
    ],
    ids=str,
)
@differential
def test_unsafe_steps_change_shape_and_dtype(
    impl: Impl, steps: tuple[type[nn.Module], ...], flags: tuple[bool, ...]
) -> Iterator[Any]:
    layer = nn.Linear(4, 3)
    for step, unsafe in zip(steps, flags, strict=True):
        impl.P.register_parametrization(layer, "weight", step(), unsafe=unsafe)
        yield layer
        yield layer.weight
        yield layer.parametrizations.weight.unsafe


@pytest.mark.parametrize(("unsafe", "first", "second"), [(True, 0, 0), (False, 1, 2)])
def test_a_safe_registration_evaluates_to_check(impl: Impl, unsafe: bool, first: int, second: int) -> None:
    inner, outer = (CountedCalls() for _ in range(2))
    layer = linear()
    impl.P.register_parametrization(layer, "weight", inner, unsafe=unsafe)
    assert inner.calls == first
    impl.P.register_parametrization(layer, "weight", outer, unsafe=unsafe)
    assert (inner.calls, outer.calls) == (second, first)


class CountedCalls(Scale):
    """Counts its evaluations."""

    calls = 0

    def forward(self, X: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return super().forward(X)


NESTED = pytest.mark.parametrize(
    ("outer", "inner_name"), [(Scale, "original"), (Halves, "original0"), (Halves, "original1")]
)


@NESTED
@differential
def test_the_original_can_be_parametrized_too(
    impl: Impl, outer: type[nn.Module], inner_name: str
) -> Iterator[Any]:
    layer = linear()
    impl.P.register_parametrization(layer, "weight", outer())
    impl.P.register_parametrization(layer.parametrizations.weight, inner_name, Tanh())
    yield layer
    yield layer.weight
    layer(torch.ones(1, 4, dtype=torch.float64)).sum().backward()
    yield [parameter.grad for parameter in layer.parameters()]
    yield repr(layer.load_state_dict(layer.state_dict()))
    impl.P.remove_parametrizations(layer.parametrizations.weight, inner_name)
    yield dict(sorted(layer.state_dict().items()))
    yield layer.weight
    impl.P.remove_parametrizations(layer, "weight")
    yield layer.weight
    yield type(layer) is nn.Linear


@NESTED
@beyond_torch("torch counts the inner dictionary as a step", raises=KeyError)
def test_a_nested_parametrization_can_be_assigned_to(
    impl: Impl, outer: type[nn.Module], inner_name: str
) -> None:
    layer = linear()
    impl.P.register_parametrization(layer, "weight", outer())
    impl.P.register_parametrization(layer.parametrizations.weight, inner_name, Tanh())
    value = torch.full((3, 4), 0.125, dtype=torch.float64)
    layer.weight = value
    torch.testing.assert_close(layer.weight, value)


@beyond_torch("torch counts the inner dictionary as a step, and never runs the one registered after it")
def test_a_step_registered_after_a_nested_one_runs(impl: Impl) -> None:
    layer = square()
    impl.P.register_parametrization(layer, "weight", Symmetric())
    impl.P.register_parametrization(layer.parametrizations.weight, "original", Scale())
    before = layer.weight
    impl.P.register_parametrization(layer, "weight", Scale(0.5))
    assert torch.equal(layer.weight, before * 0.5)


@pytest.mark.parametrize("step", [Scale, Halves, lambda: Masked((3, 4))])
@pytest.mark.parametrize("module_class", USER_MODULES)
@differential
def test_user_modules(
    impl: Impl, module_class: type[nn.Module], step: Callable[[], nn.Module]
) -> Iterator[Any]:
    module = build(module_class)
    impl.P.register_parametrization(module, "weight", step())
    yield module
    yield module.weight
    yield isinstance(module, module_class)
    yield issubclass(type(type(module)), type(module_class))
    yield type(module).__mro__[1] is module_class
    impl.P.remove_parametrizations(module, "weight")
    yield repr(module), dict(sorted(module.state_dict().items()))
    yield type(module) is module_class


def test_slots_stay_where_they_are(impl: Impl) -> None:
    module = WithSlots()
    impl.P.register_parametrization(module, "weight", Scale())
    assert module.extra == [1, 2]
    assert "extra" not in module.__dict__
    assert not hasattr(module, "unset")


def test_a_property_of_the_user_reads_and_writes_through(impl: Impl) -> None:
    layer = WithProperty(4, 3)
    impl.P.register_parametrization(layer, "weight", Scale())
    assert torch.equal(layer.kernel, layer.weight.T)
    layer.kernel = torch.ones(4, 3)
    assert torch.equal(layer.weight, torch.ones(3, 4))


def test_a_getattr_of_the_user_still_answers(impl: Impl) -> None:
    module = WithGetattr()
    impl.P.register_parametrization(module, "weight", Scale())
    assert module.start_dim == 1
    with pytest.raises(AttributeError):
        _ = module.missing


def test_an_abstract_class_stays_abstract(impl: Impl) -> None:
    module = Concrete()
    impl.P.register_parametrization(module, "weight", Scale())
    assert module.width() == 3


@pytest.mark.parametrize("step", [Scale, Halves, Polar, Gain, Tanh, lambda: nn.Sequential(Scale(), Shift())])
@differential
def test_training(impl: Impl, step: Callable[[], nn.Module]) -> Iterator[Any]:
    layer = linear()
    impl.P.register_parametrization(layer, "weight", step())
    impl.P.register_parametrization(layer, "bias", Shift())
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    x = torch.randn(5, 4, dtype=torch.float64)
    for _ in range(3):
        optimizer.zero_grad()
        layer(x).square().sum().backward()
        yield [parameter.grad for parameter in layer.parameters()]
        optimizer.step()
    yield layer
    yield layer.weight


@differential
def test_gradient_accumulates_where_it_did(impl: Impl) -> Iterator[Any]:
    layer = linear()
    layer.weight.grad = torch.ones_like(layer.weight)
    impl.P.register_parametrization(layer, "weight", Scale())
    layer.weight.sum().backward()
    yield layer.parametrizations.weight.original.grad


@differential
def test_order_of_names(impl: Impl) -> Iterator[Any]:
    module = Ordered("abc")
    for name in "bca":
        impl.P.register_parametrization(module, name, Halves())
        yield list(dict(module.named_parameters())), list(module.state_dict())


@differential
def test_state_dict_round_trip(impl: Impl) -> Iterator[Any]:
    source, target = Pair(), Pair()
    for module in (source, target):
        impl.P.register_parametrization(module, "first", Halves())
        impl.P.register_parametrization(module, "first", Gain())
        impl.P.register_parametrization(module, "second", Masked((3, 4)))
        impl.P.register_parametrization(module, "mean", Scale())
    yield repr(target.load_state_dict(source.state_dict()))
    yield target
    yield target.first
    yield target(torch.ones(1, 4))


@differential
def test_containers_and_moves(impl: Impl) -> Iterator[Any]:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    for layer in model:
        impl.P.register_parametrization(layer, "weight", Scale())
    yield model
    yield model.double()
    yield model(torch.ones(1, 4, dtype=torch.float64))
    yield model.requires_grad_(False)
    yield model[0].weight.requires_grad


@pytest.mark.parametrize("name", [None, "weight", "bias", "missing"])
@differential
def test_is_parametrized(impl: Impl, name: str | None) -> Iterator[Any]:
    layer = linear()
    yield impl.P.is_parametrized(layer, name)
    impl.P.register_parametrization(layer, "weight", Scale())
    yield impl.P.is_parametrized(layer, name)
    impl.P.register_parametrization(layer, "bias", Scale())
    yield impl.P.is_parametrized(layer, name)
    impl.P.remove_parametrizations(layer, "weight")
    yield impl.P.is_parametrized(layer, name)
    impl.P.remove_parametrizations(layer, "bias")
    yield impl.P.is_parametrized(layer, name)


@pytest.mark.parametrize("value", [None, 3, {}, nn.ModuleList()], ids=["none", "int", "dict", "list"])
def test_an_unrelated_attribute_called_parametrizations(impl: Impl, value: Any) -> None:
    layer = linear()
    layer.parametrizations = value
    assert not impl.P.is_parametrized(layer)
    assert impl.P.type_before_parametrizations(layer) is nn.Linear


def test_type_before_parametrizations(impl: Impl) -> None:
    layer = linear()
    assert impl.P.type_before_parametrizations(layer) is nn.Linear
    impl.P.register_parametrization(layer, "weight", Scale())
    assert type(layer) is not nn.Linear
    assert impl.P.type_before_parametrizations(layer) is nn.Linear
    impl.P.remove_parametrizations(layer, "weight")
    assert impl.P.type_before_parametrizations(layer) is nn.Linear


@pytest.mark.parametrize("name", [None, "weight"])
@pytest.mark.parametrize("step", [Scale, Halves, Gain])
@differential
def test_transfer(impl: Impl, step: type[nn.Module], name: str | None) -> Iterator[Any]:
    source, target = linear(), linear()
    impl.P.register_parametrization(source, "weight", step())
    impl.P.register_parametrization(source, "weight", Scale())
    impl.P.register_parametrization(source, "bias", Shift())
    yield impl.P.transfer_parametrizations_and_params(source, target, name) is target
    yield target
    yield target.weight
    yield source
    yield target.parametrizations.weight[0] is source.parametrizations.weight[0]
    yield [
        (key, dict(source.named_parameters())[key] is value)
        for key, value in target.named_parameters()
        if key.startswith("parametrizations")
    ]


@differential
def test_transfer_creates_the_tensor(impl: Impl) -> Iterator[Any]:
    source, target = linear(), nn.Module()
    impl.P.register_parametrization(source, "weight", Scale())
    impl.P.transfer_parametrizations_and_params(source, target)
    yield target
    yield target.weight


@differential
def test_transfer_from_a_plain_module_does_nothing(impl: Impl) -> Iterator[Any]:
    source, target = linear(), linear()
    yield impl.P.transfer_parametrizations_and_params(source, target) is target
    yield target
    yield type(target) is nn.Linear


@pytest.mark.parametrize(
    "name",
    [
        "cached",
        "ParametrizationList",
        "register_parametrization",
        "is_parametrized",
        "remove_parametrizations",
        "type_before_parametrizations",
        "transfer_parametrizations_and_params",
    ],
)
@differential
def test_signature(impl: Impl, name: str) -> Iterator[Any]:
    import inspect

    parameters = inspect.signature(getattr(impl.P, name)).parameters.values()
    ours = ("optimizer", "tied_in", "model")  # last, and with a default
    yield [(one.name, one.kind, one.default) for one in parameters if one.name not in ours]


@differential
def test_public_names(impl: Impl) -> Iterator[Any]:
    yield sorted(impl.P.__all__)
    yield sorted(impl.N.__all__)


def test_lazily_initialized_layers_keep_torchs_order(impl: Impl) -> None:
    layer = nn.LazyLinear(3)
    layer(torch.ones(2, 4))
    impl.P.register_parametrization(layer, "weight", Scale())
    assert layer(torch.ones(2, 4)).shape == (2, 3)


@pytest.mark.parametrize("step", [Scale, Halves])
@differential
def test_recurrent_layer(impl: Impl, step: type[nn.Module]) -> Iterator[Any]:
    layer = nn.LSTM(4, 3, dtype=torch.float64)
    impl.P.register_parametrization(layer, "weight_hh_l0", step())
    yield layer
    output, _ = layer(torch.ones(2, 1, 4, dtype=torch.float64))
    yield output
    output.sum().backward()
    yield [parameter.grad for parameter in layer.parameters()]
