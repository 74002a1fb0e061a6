"""Surgery on the class, the list and the originals of a parametrized module works as it does on torch's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._library.opaque_object import register_opaque_type
from torch._opaque_base import OpaqueBase
from torch.testing._internal.two_tensor import TwoTensor

from .oracle import Impl, anatomy, beyond_torch, differential, raised
from .steps import (
    Based,
    Gain,
    Halves,
    HalvesAsList,
    Invertible,
    Pair,
    Scale,
    Shift,
    Tanh,
    Transpose,
    linear,
)


class Recipe(OpaqueBase):
    """An object that is no tensor."""

    def __init__(self, shift: float) -> None:
        self.shift = shift


register_opaque_type(Recipe, typ="reference")


class Shifted(nn.Module):
    """A tensor and an opaque object."""

    def forward(self, X: Tensor, recipe: Recipe) -> Tensor:
        return X + recipe.shift

    def right_inverse(self, X: Tensor) -> tuple[Tensor, Recipe]:
        shift = float(X.flatten()[0].round())
        return X - shift, Recipe(shift)


class Unregistered(OpaqueBase):
    """An opaque object of a type that nobody registered."""


# The injected class.


@pytest.mark.parametrize("module_class", [nn.Linear, nn.Conv1d, nn.Bilinear])
@differential
def test_printed_class(impl: Impl, module_class: type[nn.Module]) -> Iterator[Any]:
    arguments = {nn.Linear: (4, 3), nn.Conv1d: (4, 3, 1), nn.Bilinear: (4, 2, 3)}[module_class]
    module = impl.P.register_parametrization(module_class(*arguments), "weight", Scale())
    yield str(type(module))
    yield type(module).__name__, type(module).__qualname__, type(module).__module__


def test_the_module_of_the_class_says_parametrize(impl: Impl) -> None:
    layer = impl.P.register_parametrization(nn.Linear(4, 3), "weight", Scale())
    assert str(type(layer)) == "<class 'torch.nn.utils.parametrize.ParametrizedLinear'>"


@differential
def test_the_class_is_made_by_inheritance(impl: Impl) -> Iterator[Any]:
    layer = impl.P.register_parametrization(linear(), "weight", Scale())
    yield type(layer).__bases__ == (nn.Linear,)
    yield isinstance(vars(type(layer))["weight"], property)
    yield isinstance(layer, nn.Linear), issubclass(type(layer), nn.Linear)
    yield "weight" in dir(layer), hasattr(layer, "weight"), "weight" in vars(layer)
    yield "weight" in layer._parameters


# Surgery on the list.


@differential
def test_the_list_is_a_module_list(impl: Impl) -> Iterator[Any]:
    layer = linear()
    steps = [Scale(), Shift(), Tanh()]
    for step in steps:
        impl.P.register_parametrization(layer, "weight", step)
    chain = layer.parametrizations["weight"]
    yield (
        type(chain).__name__,
        isinstance(chain, nn.ModuleList),
        isinstance(layer.parametrizations, nn.ModuleDict),
    )
    yield len(chain), [step is own for step, own in zip(chain, steps, strict=True)]
    yield chain[0] is steps[0], chain[-1] is steps[-1], steps[1] in chain
    yield [type(step).__name__ for step in reversed(chain)]
    yield list(chain._modules), list(chain._parameters), list(chain._buffers)
    yield list(layer.parametrizations.keys()), list(layer.parametrizations)
    yield chain is layer.parametrizations.weight, "weight" in layer.parametrizations


def test_the_list_is_of_the_public_class(impl: Impl) -> None:
    layer = impl.P.register_parametrization(linear(), "weight", Scale())
    assert isinstance(layer.parametrizations.weight, impl.P.ParametrizationList)


@differential
def test_attributes_of_the_list(impl: Impl) -> Iterator[Any]:
    pair = Pair()
    impl.P.register_parametrization(pair, "first", Scale())
    impl.P.register_parametrization(pair, "second", HalvesAsList())
    impl.P.register_parametrization(pair, "third", nn.Flatten(0), unsafe=True)
    for name in ("first", "second", "third"):
        chain = pair.parametrizations[name]
        yield chain.is_tensor, chain.ntensors, chain.unsafe
        yield [(key, tensor) for key, tensor in chain.named_parameters()]
        yield hasattr(chain, "original"), hasattr(chain, "original0"), hasattr(chain, "original1")


@pytest.mark.parametrize("index", [0, 1, 2, -1])
@differential
def test_a_step_is_deleted(impl: Impl, index: int) -> Iterator[Any]:
    layer = linear()
    for step in (Scale(), Shift(), Tanh()):
        impl.P.register_parametrization(layer, "weight", step)
    del layer.parametrizations.weight[index]
    yield layer
    yield layer.weight
    impl.P.register_parametrization(layer, "weight", Scale(0.5))
    yield layer
    yield layer.weight


@differential
def test_a_step_is_deleted_by_its_key(impl: Impl) -> Iterator[Any]:
    layer = linear()
    for step in (Scale(), Shift(), Tanh()):
        impl.P.register_parametrization(layer, "weight", step)
    chain = layer.parametrizations.weight
    chain._modules.pop("2")
    yield layer.weight
    chain._modules["2"] = Scale(3.0)
    yield layer.weight
    chain._modules["0"] = Scale(5.0)
    yield layer.weight
    yield layer


@differential
def test_a_step_is_replaced(impl: Impl) -> Iterator[Any]:
    layer = linear()
    impl.P.register_parametrization(layer, "weight", Scale())
    layer.parametrizations.weight[0] = Scale(5.0)
    yield layer
    yield layer.weight
    layer.parametrizations.weight.append(Shift())
    yield layer.weight
    layer.parametrizations.weight.insert(0, Tanh())
    yield layer
    yield layer.weight
    layer.parametrizations.weight.extend([Scale()])
    yield layer.weight


@differential
def test_a_submodule_that_is_no_step_is_ignored(impl: Impl) -> Iterator[Any]:
    layer = linear()
    impl.P.register_parametrization(layer, "weight", Scale())
    layer.parametrizations.weight.add_module("observer", nn.Identity())
    yield layer.weight
    yield layer


@differential
def test_the_list_is_deleted_and_the_parameter_put_back(impl: Impl) -> Iterator[Any]:
    pair = Pair()
    impl.P.register_parametrization(pair, "first", Scale())
    impl.P.register_parametrization(pair, "mean", Scale())
    original = pair.parametrizations.first.original
    del pair.parametrizations["first"]
    yield impl.P.is_parametrized(pair, "first"), impl.P.is_parametrized(pair, "mean")
    pair._parameters["first"] = original
    yield [name for name, _ in pair.named_parameters()]
    yield pair.mean


@differential
def test_the_original_is_replaced(impl: Impl) -> Iterator[Any]:
    layer = linear()
    impl.P.register_parametrization(layer, "weight", Scale())
    layer.parametrizations.weight.original = nn.Parameter(torch.ones(3, 4, dtype=torch.float64))
    yield layer.weight
    layer.parametrizations.weight.original.data = torch.zeros(3, 4, dtype=torch.float64)
    yield layer.weight
    with torch.no_grad():
        layer.parametrizations.weight.original.add_(3.0)
    yield layer.weight
    del layer.parametrizations.weight.original
    layer.parametrizations.weight.register_buffer("original", torch.ones(3, 4))
    yield layer.weight
    yield layer


@differential
def test_the_list_is_called(impl: Impl) -> Iterator[Any]:
    layer = linear()
    impl.P.register_parametrization(layer, "weight", Halves())
    impl.P.register_parametrization(layer, "weight", Scale())
    yield layer.parametrizations.weight()
    yield layer.parametrizations.weight.forward()


@differential
def test_the_list_is_made_by_hand(impl: Impl) -> Iterator[Any]:
    weight = nn.Parameter(torch.ones(3, 4))
    chain = impl.P.ParametrizationList([Scale(), Shift()], weight)
    yield chain, chain()
    yield chain.original is weight
    yield impl.P.ParametrizationList([Transpose()], weight, True).unsafe
    yield impl.P.ParametrizationList([Transpose()], original=weight, unsafe=True)


@differential
def test_hooks_on_the_steps_run(impl: Impl) -> Iterator[Any]:
    layer = linear()
    step = Scale()
    impl.P.register_parametrization(layer, "weight", step)
    seen: list[str] = []
    step.register_forward_hook(lambda module, inputs, output: seen.append("step"))
    layer.parametrizations.weight.register_forward_hook(lambda *arguments: seen.append("list"))
    yield layer.weight
    yield seen


@differential
def test_apply_and_children_reach_the_steps(impl: Impl) -> Iterator[Any]:
    layer = linear()
    impl.P.register_parametrization(layer, "weight", Gain())
    seen: list[str] = []
    layer.apply(lambda module: seen.append(type(module).__name__))
    yield seen
    yield [name for name, _ in layer.named_modules()], [name for name, _ in layer.named_children()]


# What a right inverse does.


@differential
def test_a_base_moves(impl: Impl) -> Iterator[Any]:
    layer = linear()
    impl.P.register_parametrization(layer, "weight", Based())
    yield layer, layer.weight
    layer.weight = torch.full((3, 4), 0.5, dtype=torch.float64)
    yield layer, layer.weight
    impl.P.remove_parametrizations(layer, "weight")
    yield layer.weight


@differential
def test_a_list_of_originals(impl: Impl) -> Iterator[Any]:
    layer = linear()
    impl.P.register_parametrization(layer, "weight", HalvesAsList())
    layer.weight = torch.ones(3, 4, dtype=torch.float64)
    yield layer, layer.weight


@differential
def test_a_class_of_originals(impl: Impl) -> Iterator[Any]:
    from collections import UserList

    layer = linear()
    step = Invertible(lambda X, Y: X + Y, lambda X: UserList([X, X * 0]))
    impl.P.register_parametrization(layer, "weight", step)
    layer.weight = torch.ones(3, 4, dtype=torch.float64)
    yield layer.state_dict(), layer.weight


@differential
def test_an_opaque_object_beside_a_tensor(impl: Impl) -> Iterator[Any]:
    layer = linear()
    impl.P.register_parametrization(layer, "weight", Shifted())
    yield layer, layer.weight
    yield type(layer.parametrizations.weight.original1).__name__, layer.parametrizations.weight.ntensors
    layer.weight = torch.full((3, 4), 5.25, dtype=torch.float64)
    yield layer, layer.weight
    yield layer.parametrizations.weight.original1.shift
    impl.P.remove_parametrizations(layer, "weight")
    yield layer.weight


@differential
def test_an_opaque_object_of_an_unknown_type(impl: Impl) -> Iterator[Any]:
    layer = linear()
    step = Invertible(lambda X, Y: X, lambda X: (X, Unregistered()))
    yield raised(lambda: impl.P.register_parametrization(layer, "weight", step))
    yield layer


def twice(tensor: Tensor) -> TwoTensor:
    """A tensor subclass around two copies."""
    return TwoTensor(tensor.clone(), tensor.clone())


@differential
def test_a_tensor_subclass_of_several_originals(impl: Impl) -> Iterator[Any]:
    layer = linear()
    step = Invertible(lambda X, Y: X.a + X.b + Y, lambda X: (twice(X / 4), X / 2))
    impl.P.register_parametrization(layer, "weight", step)
    original = layer.parametrizations.weight.original0
    yield type(original).__name__, isinstance(original, nn.Parameter), original.requires_grad
    yield layer.weight
    layer.weight = torch.ones(3, 4, dtype=torch.float64)
    yield type(layer.parametrizations.weight.original0).__name__
    yield layer.parametrizations.weight.original0 is original
    yield layer.weight
    impl.P.remove_parametrizations(layer, "weight")
    yield layer.weight


@differential
def test_a_parameter_of_a_tensor_subclass(impl: Impl) -> Iterator[Any]:
    layer = linear()
    layer.weight = nn.Parameter(twice(layer.weight.detach()))
    weight = layer.weight
    impl.P.register_parametrization(layer, "weight", Scale())
    original = layer.parametrizations.weight.original
    yield original is weight, type(original).__name__, isinstance(original, nn.Parameter)
    yield original.a.detach(), layer.weight.b.detach()
    layer.weight = twice(torch.ones(3, 4, dtype=torch.float64))
    yield original is layer.parametrizations.weight.original, original.a.detach()
    impl.P.remove_parametrizations(layer, "weight")
    yield layer.weight is weight, type(layer.weight).__name__, layer.weight.a.detach()
    yield layer.weight.requires_grad


class Tagged(nn.Parameter):
    """A subclass of Parameter without behaviour of its own."""


@pytest.mark.parametrize("leave_parametrized", [True, False])
@differential
def test_a_subclass_of_parameter(impl: Impl, leave_parametrized: bool) -> Iterator[Any]:
    layer = linear()
    layer.weight = Tagged(layer.weight.detach())
    layer.weight.tag = "kept"
    impl.P.register_parametrization(layer, "weight", Scale())
    yield type(layer.parametrizations.weight.original).__name__
    yield layer.weight.detach()
    impl.P.remove_parametrizations(layer, "weight", leave_parametrized=leave_parametrized)
    yield type(layer.weight).__name__, layer.weight.tag
    yield layer.weight.detach()


@differential
def test_swapping_instead_of_setting(impl: Impl) -> Iterator[Any]:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        layer = linear()
        weight = layer.weight
        impl.P.register_parametrization(layer, "weight", Scale())
        yield layer, layer.parametrizations.weight.original is weight
        layer.weight = torch.ones(3, 4, dtype=torch.float64)
        yield layer, layer.parametrizations.weight.original is weight
        impl.P.remove_parametrizations(layer, "weight")
        yield layer.weight, layer.weight is weight
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


# NotImplementedError.


@differential
def test_a_right_inverse_that_says_it_does_not_exist(impl: Impl) -> Iterator[Any]:
    def refuse(X: Tensor) -> Tensor:
        raise NotImplementedError("not today")

    layer = linear()
    impl.P.register_parametrization(layer, "weight", Invertible(lambda X: X + 1, refuse))
    impl.P.register_parametrization(layer, "weight", Invertible(lambda X: X + 1, refuse))
    yield layer.weight
    yield raised(lambda: setattr(layer, "weight", torch.ones(3, 4, dtype=torch.float64)))
    yield layer


class HalfQR(nn.Module):
    """Calls a kernel that does not exist for half precision on the CPU."""

    def forward(self, X: Tensor) -> Tensor:
        return X

    def right_inverse(self, X: Tensor) -> Tensor:
        return torch.linalg.qr(X).Q


@beyond_torch("torch takes a missing kernel for a missing inverse", raises=pytest.fail.Exception)
@pytest.mark.parametrize("chained", [False, True])
def test_a_missing_kernel_is_an_error(impl: Impl, chained: bool) -> None:
    layer = nn.Linear(3, 3, dtype=torch.float16)
    if chained:
        impl.P.register_parametrization(layer, "weight", Scale())
    before = anatomy(layer)
    with pytest.raises(NotImplementedError, match="not implemented for 'Half'"):
        impl.P.register_parametrization(layer, "weight", HalfQR())
    assert anatomy(layer) == before
