"""Odd moments to register and odd parametrizations: other people's models work as they do on torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from .oracle import Impl, beyond_torch, differential
from .steps import (
    Counted,
    Gain,
    Halves,
    Lambda,
    Masked,
    Ordered,
    Pair,
    Scale,
    linear,
)

# Odd moments.


@differential
def test_register_and_remove_in_every_forward(impl: Impl) -> Iterator[Any]:
    class Adapted(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            impl.P.register_parametrization(self, "weight", step, unsafe=True)
            try:
                return super().forward(x)
            finally:
                impl.P.remove_parametrizations(self, "weight", leave_parametrized=False)

    step = Gain()
    layer = Adapted(4, 3)
    for _ in range(3):
        out = layer(torch.ones(2, 4))
        yield out
        out.sum().backward()
        yield step.gain.grad, layer.weight.grad
        yield type(layer) is Adapted, sorted(layer.state_dict())


@beyond_torch("torch makes a class at every registration")
def test_register_and_remove_leave_no_classes_behind(impl: Impl) -> None:
    layer = linear()
    seen = set()
    for _ in range(3):
        impl.P.register_parametrization(layer, "weight", Scale())
        seen.add(type(layer))
        impl.P.remove_parametrizations(layer, "weight")
    assert len(seen) == 1


def test_a_user_class_is_not_kept_alive(impl: Impl) -> None:
    import gc
    import weakref

    class Local(nn.Linear):
        pass

    layer = impl.P.register_parametrization(Local(4, 3), "weight", Scale())
    impl.P.remove_parametrizations(layer, "weight")
    dead = weakref.ref(Local)
    del layer, Local
    gc.collect()
    assert dead() is None


# What a parametrization may be.


@differential
def test_it_owns_parameters(impl: Impl) -> Iterator[Any]:
    layer = linear()
    impl.P.register_parametrization(layer, "weight", Gain())
    yield [name for name, _ in layer.named_parameters()]
    layer(torch.ones(1, 4, dtype=torch.float64)).sum().backward()
    yield [parameter.grad for parameter in layer.parameters()]
    yield repr(layer.load_state_dict(layer.state_dict()))


@differential
def test_it_is_shared_between_tensors(impl: Impl) -> Iterator[Any]:
    pair, step = Pair(), Gain()
    impl.P.register_parametrization(pair, "first", step)
    impl.P.register_parametrization(pair, "second", step)
    yield pair
    pair(torch.ones(1, 4)).sum().backward()
    yield step.gain.grad
    impl.P.remove_parametrizations(pair, "first")
    yield pair.first, pair.second
    yield pair.parametrizations.second[0] is step


@differential
def test_it_is_shared_between_modules(impl: Impl) -> Iterator[Any]:
    step = Gain()
    model = nn.Sequential(linear(), linear())
    for layer in model:
        impl.P.register_parametrization(layer, "weight", step)
    yield model
    model.eval()
    yield step.training
    yield [layer.weight for layer in model]


@differential
def test_it_drops_its_state(impl: Impl) -> Iterator[Any]:
    class Stateless(Masked):
        def state_dict(self, *arguments: Any, destination: Any = None, **options: Any) -> Any:
            return {} if destination is None else destination

    layer = linear()
    impl.P.register_parametrization(layer, "weight", Stateless((3, 4)))
    yield list(layer.state_dict())
    yield layer.weight
    yield repr(layer.load_state_dict(layer.state_dict(), strict=False))


@differential
def test_it_rewrites_keys_in_hooks(impl: Impl) -> Iterator[Any]:
    def save(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        state[f"{prefix}renamed"] = state.pop(f"{prefix}gain")

    def load(state: dict[str, Any], prefix: str, *rest: Any) -> None:
        state[f"{prefix}gain"] = state.pop(f"{prefix}renamed")

    source, target = linear(), linear()
    for layer in (source, target):
        step = Gain()
        step._register_state_dict_hook(save)
        step._register_load_state_dict_pre_hook(load)
        impl.P.register_parametrization(layer, "weight", step)
    with torch.no_grad():
        source.parametrizations.weight[0].gain.fill_(3.0)
    yield source.state_dict()
    yield repr(target.load_state_dict(source.state_dict()))
    yield target.weight


@differential
def test_it_has_extra_state(impl: Impl) -> Iterator[Any]:
    class Remembering(Counted):
        def get_extra_state(self) -> Tensor:
            return torch.tensor(self.calls)

        def set_extra_state(self, state: Tensor) -> None:
            self.calls = int(state)

    layer = linear()
    impl.P.register_parametrization(layer, "weight", Remembering())
    state = layer.state_dict()
    yield state
    yield layer.weight
    yield repr(layer.load_state_dict(state)), layer.parametrizations.weight[0].calls


@differential
def test_it_is_a_module_with_buffers_updated_in_forward(impl: Impl) -> Iterator[Any]:
    layer = linear()
    impl.P.register_parametrization(layer, "weight", nn.BatchNorm1d(4, dtype=torch.float64))
    for _ in range(3):
        layer(torch.ones(2, 4, dtype=torch.float64)).sum().backward()
    yield layer.parametrizations.weight[0].running_mean
    yield layer.eval().weight


@differential
def test_it_reads_another_tensor_of_the_module(impl: Impl) -> Iterator[Any]:
    layer = linear()
    impl.P.register_parametrization(layer, "bias", Scale())
    impl.P.register_parametrization(layer, "weight", Lambda(lambda X: X + layer.bias[:, None]))
    yield layer.weight
    layer.weight.sum().backward()
    yield [parameter.grad for parameter in layer.parameters()]


@pytest.mark.parametrize("names", ["a", "ba", "cab"])
@pytest.mark.parametrize("step", [Scale, Halves, Gain])
@differential
def test_the_order_of_parameters(impl: Impl, step: type[nn.Module], names: str) -> Iterator[Any]:
    module = Ordered("abc")
    for name in names:
        impl.P.register_parametrization(module, name, step())
    yield [name for name, _ in module.named_parameters()]
    yield [list(parameter.shape) for parameter in module.parameters()]
    yield list(module.state_dict())


# torch.func and friends.


@differential
def test_functional_call(impl: Impl) -> Iterator[Any]:
    layer = linear()
    impl.P.register_parametrization(layer, "weight", Scale())
    x = torch.ones(1, 4, dtype=torch.float64)
    parameters = {name: value * 2 for name, value in layer.named_parameters()}
    yield torch.func.functional_call(layer, parameters, (x,))
    yield layer(x)
    yield torch.func.grad(lambda p: torch.func.functional_call(layer, p, (x,)).sum())(
        {name: value.detach() for name, value in parameters.items()}
    )


@differential
def test_fold_by_hand(impl: Impl) -> Iterator[Any]:
    """Libraries read the value, delete the list and write a Parameter."""
    layer = linear()
    impl.P.register_parametrization(layer, "weight", Scale())
    weight = layer.weight.detach().clone()
    while impl.P.is_parametrized(layer, "weight"):
        impl.P.remove_parametrizations(layer, "weight", leave_parametrized=False)
    layer.weight = nn.Parameter(weight)
    yield dict(sorted(layer.state_dict().items()))
