"""Assignment goes through the right inverses to the originals, which keep their identity."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from .oracle import Impl, beyond_torch, differential, raised
from .steps import (
    Based,
    Gain,
    Halves,
    HalvesAsList,
    Pair,
    Polar,
    Scale,
    Single,
    Symmetric,
    Tanh,
    Transpose,
    Triangular,
    linear,
    square,
)

INVERTIBLE = [Scale, Tanh, Gain, Based, Triangular, Halves, HalvesAsList, Polar, Single]


def value(*shape: int) -> Tensor:
    """A value inside every constraint's range."""
    return torch.rand(*(shape or (3, 4)), dtype=torch.float64) / 2


@pytest.mark.parametrize("step", INVERTIBLE)
@differential
def test_one_step(impl: Impl, step: type[nn.Module]) -> Iterator[Any]:
    layer = linear()
    impl.P.register_parametrization(layer, "weight", step())
    originals = list(layer.parametrizations.weight.parameters())
    layer.weight = value()
    yield layer
    yield layer.weight
    yield [a is b for a, b in zip(layer.parametrizations.weight.parameters(), originals, strict=True)]


@pytest.mark.parametrize(
    "steps",
    [(Scale, Tanh), (Halves, Scale), (Based, Gain), (Polar, Scale, Scale), (Triangular, Scale)],
    ids=lambda steps: "-".join(step.__name__ for step in steps),
)
@differential
def test_chain(impl: Impl, steps: tuple[type[nn.Module], ...]) -> Iterator[Any]:
    layer = linear()
    for step in steps:
        impl.P.register_parametrization(layer, "weight", step())
    layer.weight = value()
    yield layer
    yield layer.weight


@pytest.mark.parametrize("step", [Scale, Based, Halves])
@differential
def test_buffer(impl: Impl, step: type[nn.Module]) -> Iterator[Any]:
    pair = Pair()
    impl.P.register_parametrization(pair, "mean", step())
    pair.mean = torch.ones(4)
    yield pair
    yield pair.mean


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tensor: tensor.requires_grad_(),
        lambda tensor: tensor.requires_grad_() * 1,
        lambda tensor: tensor.T.contiguous().T,
        lambda tensor: tensor[:, :1].expand(3, 4),
    ],
    ids=["leaf", "graph", "strided", "expanded"],
)
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("step", [Scale, Halves])
@differential
def test_what_is_assigned(
    impl: Impl, step: type[nn.Module], frozen: bool, wrap: Callable[[Tensor], Tensor]
) -> Iterator[Any]:
    layer = linear().requires_grad_(not frozen)
    impl.P.register_parametrization(layer, "weight", step())
    layer.weight = wrap(value())
    yield layer
    yield layer.weight


@pytest.mark.parametrize("requires_grad", [True, False])
@differential
def test_a_parameter_is_refused(impl: Impl, requires_grad: bool) -> Iterator[Any]:
    layer = linear()
    impl.P.register_parametrization(layer, "weight", Scale())
    given = nn.Parameter(value(), requires_grad=requires_grad)
    yield raised(lambda: setattr(layer, "weight", given))
    yield layer
    yield layer.weight


@pytest.mark.parametrize("step", [Scale, Halves, nn.Identity])
@differential
def test_another_shape(impl: Impl, step: type[nn.Module]) -> Iterator[Any]:
    layer = linear()
    impl.P.register_parametrization(layer, "weight", step())
    if step is nn.Identity:
        layer.parametrizations.weight[0].right_inverse = lambda X: X
    layer.weight = value(2, 4)
    yield layer.weight
    yield layer.parametrizations.weight.state_dict()


@differential
def test_unsafe(impl: Impl) -> Iterator[Any]:
    layer = linear()
    impl.P.register_parametrization(layer, "weight", Transpose(), unsafe=True)
    layer.weight = value(4, 3)
    yield layer
    yield layer.weight


@differential
def test_the_projection_is_what_remains(impl: Impl) -> Iterator[Any]:
    layer = square()
    impl.P.register_parametrization(layer, "weight", Symmetric())
    layer.weight = value(3, 3)
    yield layer.weight
    layer.weight = layer.weight
    yield layer.weight


@differential
def test_between_training_steps(impl: Impl) -> Iterator[Any]:
    layer = linear()
    impl.P.register_parametrization(layer, "weight", Halves())
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        layer(value(2, 4)).square().sum().backward()
        optimizer.step()
        yield layer
        layer.weight = layer.weight.detach().clamp(-0.25, 0.25)
        yield layer
        yield layer.weight


@differential
def test_through_the_list(impl: Impl) -> Iterator[Any]:
    layer = linear()
    impl.P.register_parametrization(layer, "weight", Scale())
    yield layer.parametrizations.weight.right_inverse(value())
    yield layer.weight
    yield layer.parametrizations.weight()


@differential
def test_inside_forward(impl: Impl) -> Iterator[Any]:
    class Clipping(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            self.weight = self.weight.detach().clamp(-0.25, 0.25)
            return super().forward(x)

    layer = Clipping(4, 3)
    impl.P.register_parametrization(layer, "weight", Scale())
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    for _ in range(3):
        optimizer.zero_grad()
        out = layer(torch.ones(2, 4))
        yield out
        out.sum().backward()
        optimizer.step()
        yield layer


@differential
def test_under_grad_modes(impl: Impl) -> Iterator[Any]:
    layer = linear()
    impl.P.register_parametrization(layer, "weight", Scale())
    with torch.no_grad():
        layer.weight = value()
        yield layer.weight
    yield layer.weight
    with torch.inference_mode():
        yield layer.weight


def test_a_graph_is_not_kept(impl: Impl) -> None:
    layer = linear()
    impl.P.register_parametrization(layer, "weight", Scale())
    source = value().requires_grad_()
    layer.weight = source * 2
    layer.weight.sum().backward()
    assert source.grad is None
    assert layer.parametrizations.weight.original.is_leaf


@beyond_torch("torch's original shares the storage of what was assigned")
@pytest.mark.parametrize("name", ["weight_norm", "spectral_norm"])
def test_what_was_assigned_is_not_trained(impl: Impl, name: str) -> None:
    layer = getattr(impl.N, name)(linear())
    given = value()
    kept = given.clone()
    layer.weight = given
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(1.0)
    assert torch.equal(given, kept)


@differential
def test_state_after_assignment_in_place_of_a_parameter_list(impl: Impl) -> Iterator[Any]:
    layer = linear()
    impl.P.register_parametrization(layer, "weight", Halves())
    yield layer.parametrizations.weight.is_tensor, layer.parametrizations.weight.ntensors
    layer.parametrizations.weight.original0 = nn.Parameter(value())
    yield layer.weight
    with torch.no_grad():
        layer.parametrizations.weight.original1.zero_()
    yield layer.weight
