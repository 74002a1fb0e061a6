"""``cached()`` evaluates once in its scope, and the module's cache variables act as torch's do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from .oracle import Impl, beyond_torch, differential
from .steps import Counted, Halves, Scale, linear


def counted(impl: Impl) -> tuple[nn.Linear, Counted]:
    """A layer and the step on its weight, which has not been counted yet."""
    layer, step = linear(), Counted()
    impl.P.register_parametrization(layer, "weight", step, unsafe=True)
    return layer, step


@pytest.fixture(autouse=True)
def _no_scope_left(impl: Impl) -> Iterator[None]:
    """Check that a test leaves the cache off and empty."""
    yield
    assert impl.P._cache_enabled == 0
    assert len(impl.P._cache) == 0


def test_one_object_within(impl: Impl) -> None:
    layer, step = counted(impl)
    with impl.P.cached():
        first = layer.weight
        assert layer.weight is first
        layer(torch.ones(1, 4, dtype=torch.float64))
    assert step.calls == 1


def test_new_objects_outside(impl: Impl) -> None:
    layer, step = counted(impl)
    assert layer.weight is not layer.weight
    assert step.calls == 2


def test_discarded_after(impl: Impl) -> None:
    layer, step = counted(impl)
    with impl.P.cached():
        first = layer.weight
    with impl.P.cached():
        assert layer.weight is not first
    assert step.calls == 2


def test_nested_scopes_share(impl: Impl) -> None:
    layer, step = counted(impl)
    with impl.P.cached():
        first = layer.weight
        with impl.P.cached():
            assert layer.weight is first
        assert layer.weight is first
    assert step.calls == 1


def test_an_inner_scope_fills_the_outer(impl: Impl) -> None:
    layer, step = counted(impl)
    with impl.P.cached():
        with impl.P.cached():
            first = layer.weight
        assert layer.weight is first
    assert step.calls == 1


def test_an_exception_closes_the_scope(impl: Impl) -> None:
    layer, step = counted(impl)

    def fail() -> None:
        with impl.P.cached():
            assert layer.weight is layer.weight
            raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        fail()
    assert layer.weight is not layer.weight
    assert step.calls == 3


def test_a_failed_evaluation_is_not_kept(impl: Impl) -> None:
    layer, step = counted(impl)
    step.forward = lambda X: 1 / 0
    with impl.P.cached():
        with pytest.raises(ZeroDivisionError):
            _ = layer.weight
        del step.forward
        assert layer.weight.shape == (3, 4)


def test_as_a_decorator(impl: Impl) -> None:
    layer, step = counted(impl)

    @impl.P.cached()
    def run() -> bool:
        return layer.weight is layer.weight

    assert run()
    assert run()
    assert step.calls == 2


def test_each_tensor_of_each_module_has_its_entry(impl: Impl) -> None:
    one, other = counted(impl)[0], counted(impl)[0]
    impl.P.register_parametrization(one, "bias", Scale())
    with impl.P.cached():
        tensors = [one.weight, one.bias, other.weight]
        assert len({id(tensor) for tensor in tensors}) == 3
        assert [one.weight is tensors[0], one.bias is tensors[1], other.weight is tensors[2]] == [True] * 3


@differential
def test_gradients_through_one_value(impl: Impl) -> Iterator[Any]:
    layer = linear()
    impl.P.register_parametrization(layer, "weight", Halves())
    x = torch.ones(2, 4, dtype=torch.float64)
    with impl.P.cached():
        (layer(x) * layer(2 * x)).sum().backward()
    yield [parameter.grad for parameter in layer.parameters()]


@differential
def test_recurrent_layer(impl: Impl) -> Iterator[Any]:
    layer = nn.GRU(4, 3, dtype=torch.float64)
    impl.P.register_parametrization(layer, "weight_hh_l0", Scale())
    with impl.P.cached():
        yield layer(torch.ones(3, 1, 4, dtype=torch.float64))[0]


def test_counter_of_the_module_opens_a_scope(impl: Impl) -> None:
    layer, step = counted(impl)
    impl.P._cache_enabled += 1
    try:
        first = layer.weight
        assert layer.weight is first
    finally:
        impl.P._cache_enabled -= 1
        impl.P._cache = {}
    assert layer.weight is not first
    assert step.calls == 2


def test_counter_of_the_module_nests_with_the_scope(impl: Impl) -> None:
    layer, step = counted(impl)
    impl.P._cache_enabled += 1
    try:
        with impl.P.cached():
            first = layer.weight
        assert layer.weight is first
    finally:
        impl.P._cache_enabled -= 1
        impl.P._cache = {}
    assert step.calls == 1


def test_the_counter_shows_the_scope(impl: Impl) -> None:
    assert impl.P._cache_enabled == 0
    with impl.P.cached():
        assert impl.P._cache_enabled == 1
        with impl.P.cached():
            assert impl.P._cache_enabled
        assert impl.P._cache_enabled == 1
    assert impl.P._cache_enabled == 0


def test_a_new_dictionary_empties_the_cache(impl: Impl) -> None:
    layer, step = counted(impl)
    with impl.P.cached():
        first = layer.weight
        impl.P._cache = {}
        second = layer.weight
        assert second is not first
        assert layer.weight is second
    assert step.calls == 2


def test_clearing_the_dictionary_empties_the_cache(impl: Impl) -> None:
    layer, step = counted(impl)
    with impl.P.cached():
        first = layer.weight
        impl.P._cache.clear()
        assert layer.weight is not first
    assert step.calls == 2


def test_an_inserted_value_is_read(impl: Impl) -> None:
    layer, step = counted(impl)
    given = torch.full((3, 4), 7.0, dtype=torch.float64)
    with impl.P.cached():
        impl.P._cache[id(layer), "weight"] = given
        assert layer.weight is given
    assert layer.weight is not given
    assert step.calls == 1


def test_an_inserted_value_replaces_the_cached_one(impl: Impl) -> None:
    layer, _ = counted(impl)
    given = torch.full((3, 4), 7.0, dtype=torch.float64)
    with impl.P.cached():
        _ = layer.weight
        impl.P._cache[id(layer), "weight"] = given
        assert layer.weight is given


def test_an_inserted_none_means_not_cached(impl: Impl) -> None:
    layer, step = counted(impl)
    with impl.P.cached():
        impl.P._cache[id(layer), "weight"] = None
        assert layer.weight is layer.weight
    assert step.calls == 1


@pytest.mark.parametrize("name", ["_cache", "_cache_enabled"])
def test_the_variables_are_attributes_of_the_module(impl: Impl, name: str) -> None:
    assert hasattr(impl.P, name)
    assert isinstance(getattr(impl.P, name), dict if name == "_cache" else int)


def test_a_patched_counter_is_restored(impl: Impl, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, _ = counted(impl)
    with monkeypatch.context() as patch:
        patch.setattr(impl.P, "_cache_enabled", 1)
        patch.setattr(impl.P, "_cache", {})
        assert layer.weight is layer.weight
    assert layer.weight is not layer.weight


@beyond_torch("torch returns the value from before the step")
def test_an_optimizer_step_inside_is_seen(impl: Impl) -> None:
    layer, _ = counted(impl)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    with impl.P.cached():
        layer.weight.sum().backward()
        optimizer.step()
        assert torch.equal(layer.weight, layer.parametrizations.weight.original * 2)


@beyond_torch("torch returns the value from before the assignment")
def test_an_assignment_inside_is_seen(impl: Impl) -> None:
    layer = linear()
    impl.P.register_parametrization(layer, "weight", Scale())
    given = torch.ones(3, 4, dtype=torch.float64)
    with impl.P.cached():
        _ = layer.weight
        layer.weight = given
        assert torch.equal(layer.weight, given)


@beyond_torch("torch returns the value from before the registration")
def test_a_registration_inside_is_seen(impl: Impl) -> None:
    layer, _ = counted(impl)
    with impl.P.cached():
        before = layer.weight
        impl.P.register_parametrization(layer, "weight", Scale(0.5))
        assert torch.equal(layer.weight, before * 0.5)


@beyond_torch("torch keeps the value without a graph")
def test_a_read_under_no_grad_does_not_cut_the_graph(impl: Impl) -> None:
    layer, _ = counted(impl)
    with impl.P.cached():
        with torch.no_grad():
            assert not layer.weight.requires_grad
        assert layer.weight.requires_grad


def test_a_removal_inside(impl: Impl) -> None:
    layer, _ = counted(impl)
    with impl.P.cached():
        read = layer.weight
        impl.P.remove_parametrizations(layer, "weight")
        assert torch.equal(layer.weight, read)
        assert isinstance(layer.weight, nn.Parameter)
    assert torch.equal(layer.weight, read)
