"""Row 25: what is dropped is freed at once, by its reference count, without the cyclic collector."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import nn

from .table import Impl, row

pytestmark = pytest.mark.usefixtures("no_collector")


def normed(impl: Impl) -> nn.Module:
    return impl.N.weight_norm(nn.Linear(3, 3))


def stacked(impl: Impl) -> nn.Module:
    return impl.N.spectral_norm(impl.N.orthogonal(nn.Linear(3, 3)))


def recurrent(impl: Impl) -> nn.Module:
    return impl.N.weight_norm(nn.GRU(3, 3), "weight_hh_l0")


def run(layer: nn.Module) -> None:
    output = layer(torch.ones(2, 1, 3))
    (output[0] if isinstance(output, tuple) else output).sum().backward()


HELD = "the class that torch makes for each module refers to the module"


@pytest.mark.parametrize("make", [normed, stacked, recurrent])
@row(25, "reproduced on torch 2.13", torch=HELD)
def test_25_a_dropped_module_is_freed(impl: Impl, make: Callable[[Impl], nn.Module]) -> None:
    layer = make(impl)
    run(layer)
    alive = [weakref.ref(layer), *(weakref.ref(tensor) for tensor in layer.parameters())]
    del layer
    assert [reference() for reference in alive] == [None] * len(alive)


@pytest.mark.parametrize("leave", [True, False], ids=["baked", "restored"])
@row(25, "reproduced on torch 2.13")
def test_25_a_removed_step_is_freed(impl: Impl, leave: bool) -> None:
    layer = stacked(impl)
    run(layer)
    alive = [weakref.ref(module) for module in layer.parametrizations.modules()]
    impl.P.remove_parametrizations(layer, "weight", leave_parametrized=leave)
    assert [reference() for reference in alive] == [None] * len(alive)


@row(25, "reproduced on torch 2.13", torch=HELD)
def test_25_the_cache_keeps_no_module(impl: Impl) -> None:
    with impl.P.cached():
        layer = normed(impl)
        run(layer)
        alive = weakref.ref(layer)
        del layer
        assert alive() is None


@row(25, "reproduced on torch 2.13", torch="each module leaves a class behind until the collector runs")
def test_25_classes_do_not_pile_up(impl: Impl) -> None:
    class Layer(nn.Linear):
        """A base of this test's own."""

    for _ in range(10):
        impl.N.spectral_norm(Layer(3, 3))
    assert len(Layer.__subclasses__()) <= 1


@row(25, "reproduced on torch 2.13")
def test_25_a_users_class_is_freed_by_the_collector(impl: Impl) -> None:
    class Layer(nn.Linear):
        """A base of this test's own."""

    impl.N.weight_norm(Layer(3, 3))
    alive = weakref.ref(Layer)
    del Layer
    gc.collect()
    assert alive() is None
