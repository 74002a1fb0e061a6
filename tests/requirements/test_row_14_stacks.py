"""Row 14: one step of a stack is removed, disabled or exchanged, by index or name, and the others never notice."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchkiln
from core.stacks import Scale, Shift

from .table import Impl, row


class Abs(nn.Module):
    """A step with nothing."""

    def forward(self, X: Tensor) -> Tensor:
        return X.abs()


def stacked(impl: Impl) -> Any:
    """w -> 2 w -> 2 w + 1 -> |2 w + 1|."""
    layer: Any = nn.Linear(3, 3)
    for step in (Scale(2.0), Shift(1.0), Abs()):
        impl.P.register_parametrization(layer, "weight", step)
    return layer


def original(layer: Any) -> Tensor:
    tensor: Tensor = layer.parametrizations.weight.original
    return tensor


def stack_of(impl: Impl, layer: nn.Module) -> Any:
    owner: Any = torchkiln if impl.name == "torchkiln" else impl.P
    return owner.stack(layer, "weight")


def remove(impl: Impl, layer: Any, index: int) -> None:
    """Remove a step by index; on torch as from any ModuleList."""
    if impl.name == "torchkiln":
        stack_of(impl, layer).remove(index)
    else:
        del layer.parametrizations.weight[index]


RESULTS: dict[int, Callable[[Tensor], Tensor]] = {
    0: lambda w: (w + 1).abs(),
    1: lambda w: (2 * w).abs(),
    2: lambda w: 2 * w + 1,
}
NO_STACK = "there is no way to name, disable or exchange a step"


@pytest.mark.parametrize("index", RESULTS)
@row(14, "PEFT 2665")
def test_14_removing_one_step_leaves_the_others(impl: Impl, index: int) -> None:
    layer = stacked(impl)
    start, others = (
        original(layer),
        [step for i, step in enumerate(layer.parametrizations.weight) if i != index],
    )
    remove(impl, layer, index)
    assert torch.equal(layer.weight, RESULTS[index](start))
    assert original(layer) is start
    assert list(layer.parametrizations.weight) == others


@row(14, "PEFT 2665", torch="the next step gets both originals", raises=TypeError)
def test_14_removing_a_first_step_with_several_originals_keeps_its_value(impl: Impl) -> None:
    layer = impl.N.weight_norm(nn.Linear(3, 3))
    impl.P.register_parametrization(layer, "weight", Scale(2.0))
    before = layer.weight.detach()
    remove(impl, layer, 0)
    assert torch.equal(layer.weight, before)


@row(14, "PEFT 2665", torch="a list without steps is left, which cannot be read", raises=IndexError)
def test_14_removing_every_step_leaves_the_plain_module(impl: Impl) -> None:
    layer = stacked(impl)
    start = original(layer)
    for _ in range(3):
        remove(impl, layer, 0)
    assert layer.weight is start
    assert type(layer) is nn.Linear


@row(14, "PEFT 2710", torch=NO_STACK, raises=AttributeError)
def test_14_steps_have_names(impl: Impl) -> None:
    layer = stacked(impl)
    steps = stack_of(impl, layer)
    assert steps.names == ("Scale", "Shift", "Abs")
    steps.insert("Abs", Scale(3.0), name="adapter")
    assert torch.equal(layer.weight, (3 * (2 * original(layer) + 1)).abs())
    steps.remove("adapter")
    assert torch.equal(layer.weight, (2 * original(layer) + 1).abs())


@row(14, "PEFT 3304", torch=NO_STACK, raises=AttributeError)
def test_14_exchanging_one_step_changes_what_it_does_and_nothing_else(impl: Impl) -> None:
    layer = stacked(impl)
    steps, start = stack_of(impl, layer), original(layer)
    first, _, last = steps
    old = steps.replace("Shift", Shift(5.0))
    assert torch.equal(layer.weight, (2 * start + 5).abs())
    assert (steps[0], steps[2], original(layer)) == (first, last, start)
    steps.replace("Shift", old)
    assert torch.equal(layer.weight, (2 * start + 1).abs())


@row(14, "PEFT 3340", torch=NO_STACK, raises=AttributeError)
def test_14_disabling_keeps_tensors_and_keys(impl: Impl) -> None:
    layer = stacked(impl)
    keys, parameters = list(layer.state_dict()), [id(p) for p in layer.parameters()]
    with stack_of(impl, layer).disabled("Shift"):
        assert torch.equal(layer.weight, (2 * original(layer)).abs())
        assert list(layer.state_dict()) == keys
        assert [id(p) for p in layer.parameters()] == parameters
    assert torch.equal(layer.weight, (2 * original(layer) + 1).abs())


@row(14, "PEFT 2665", torch=NO_STACK, raises=AttributeError)
def test_14_a_copy_is_switched_alone(impl: Impl) -> None:
    layer = stacked(impl)
    twin = copy.deepcopy(layer)
    stack_of(impl, twin).disable("Shift")
    assert torch.equal(layer.weight, (2 * original(layer) + 1).abs())
    assert torch.equal(twin.weight, (2 * original(twin)).abs())


class SwitchesInside(nn.Module):
    """With the step and, in the same forward, without."""

    def __init__(self, impl: Impl) -> None:
        super().__init__()
        self.impl = impl
        self.layer = stacked(impl)

    def forward(self, x: Tensor) -> Tensor:
        full: Tensor = self.layer(x)
        with stack_of(self.impl, self.layer).disabled("Shift"):
            return full - self.layer(x)


def compiled(model: nn.Module) -> tuple[Any, Any]:
    from torch._dynamo.testing import CompileCounter

    torch.compiler.reset()
    counter = CompileCounter()
    return torch.compile(model, backend=counter, fullgraph=True), counter


@row(14, "PEFT 3340", torch=NO_STACK, raises=Exception)
def test_14_switching_inside_a_compiled_forward_is_one_graph(impl: Impl) -> None:
    model = SwitchesInside(impl)
    run, counter = compiled(model)
    for x in torch.randn(3, 2, 3):
        torch.testing.assert_close(run(x), model(x))
    assert counter.frame_count == 1


@row(14, "PEFT 3340", torch=NO_STACK, raises=AttributeError)
def test_14_each_setting_is_compiled_once(impl: Impl) -> None:
    layer = stacked(impl)
    steps, x = stack_of(impl, layer), torch.randn(2, 3)
    run, counter = compiled(layer)
    for switch in (steps.enable, steps.disable) * 3:
        switch("Shift")
        torch.testing.assert_close(run(x), layer(x))
    assert counter.frame_count == 2


class Block(nn.Module):
    """What is compiled one by one in a large model."""

    def __init__(self, impl: Impl) -> None:
        super().__init__()
        self.layer = stacked(impl)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(x)  # type: ignore[no-any-return]  # nn.Module.__call__ returns Any


@row(14, "PEFT 3340", torch=NO_STACK, raises=AttributeError)
def test_14_equal_blocks_share_the_graph_of_a_setting(impl: Impl) -> None:
    from torch._dynamo.testing import CompileCounter

    torch.compiler.reset()
    counter, x = CompileCounter(), torch.randn(2, 3)
    blocks = [Block(impl) for _ in range(12)]
    for block in blocks:
        block.compile(backend=counter, fullgraph=True)
    for switch in ("disable", "enable", "disable"):
        for block in blocks:
            getattr(stack_of(impl, block.layer), switch)("Shift")
            torch.testing.assert_close(block(x), block.forward(x))
    assert counter.frame_count == 2
