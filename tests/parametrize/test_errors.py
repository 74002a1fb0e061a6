"""Every misuse raises torch's error, type and text, and leaves the module exactly as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from .oracle import Impl, anatomy, beyond_torch, differential, raised
from .steps import Halves, Invertible, Lambda, Refusing, Scale, Shift, linear


@dataclass
class Misuse:
    """Something that raises: ``prepare`` gives the module, ``call`` fails on it."""

    name: str
    call: Callable[[Impl, nn.Module], Any]
    prepare: Callable[[Impl], nn.Module] = lambda impl: linear()
    torch_is_atomic: bool = True

    def __str__(self) -> str:
        return self.name


def registers(step: Callable[[], nn.Module], tensor: str = "weight") -> Callable[[Impl, nn.Module], Any]:
    """A call that registers ``step``."""
    return lambda impl, module: impl.P.register_parametrization(module, tensor, step())


def prepared(*steps: Callable[[], nn.Module]) -> Callable[[Impl], nn.Module]:
    """A layer with ``steps`` on its weight."""

    def build(impl: Impl) -> nn.Module:
        layer = linear()
        for step in steps:
            impl.P.register_parametrization(layer, "weight", step())
        return layer

    return build


def assigns(value: Any = None) -> Callable[[Impl, nn.Module], Any]:
    """A call that assigns to the weight."""
    given = torch.full((3, 4), 0.5, dtype=torch.float64) if value is None else value
    return lambda impl, module: setattr(module, "weight", given)


class Turncoat(nn.Module):
    """Registers as the identity; afterwards its right inverse returns what the test says."""

    def __init__(self, later: Callable[[Tensor], Any], *, originals: int = 1) -> None:
        super().__init__()
        self.later = later
        self.originals = originals
        self.registered = False

    def forward(self, *originals: Tensor) -> Tensor:
        return torch.stack(originals).sum(0)

    def right_inverse(self, X: Tensor) -> Any:
        if self.registered:
            return self.later(X)
        self.registered = True
        return X if self.originals == 1 else (X / 2, X / 2)


def fails(X: Tensor) -> Any:
    raise ArithmeticError("of the user")


def double(X: Tensor) -> Tensor:
    return X * 2


def half(X: Tensor) -> Tensor:
    return X / 2


def same(X: Tensor) -> Tensor:
    return X


FIRST = [
    Misuse("unknown tensor", registers(Scale, "missing")),
    Misuse("empty name", registers(Scale, "")),
    Misuse("dotted name", registers(Scale, "parametrizations.weight")),
    Misuse("a name that is no tensor", registers(Scale, "in_features")),
    Misuse("forward gives no tensor", registers(lambda: Lambda(lambda X: None))),
    Misuse("forward gives a tuple", registers(lambda: Lambda(lambda X: (X,)))),
    Misuse("forward changes the dtype", registers(lambda: Lambda(lambda X: X.float()))),
    Misuse("forward changes the shape", registers(lambda: Lambda(lambda X: X[:2]))),
    Misuse("forward raises", registers(lambda: Lambda(fails))),
    Misuse("forward takes too few", registers(lambda: Invertible(lambda X: X, lambda X: (X, X)))),
    Misuse("inverse gives None", registers(lambda: Invertible(same, lambda X: None))),
    Misuse("inverse gives a number", registers(lambda: Invertible(same, lambda X: 3))),
    Misuse("inverse gives a set", registers(lambda: Invertible(same, lambda X: {X}))),
    Misuse("inverse gives a generator", registers(lambda: Invertible(same, lambda X: (t for t in (X, X))))),
    Misuse("inverse changes the dtype", registers(lambda: Invertible(same, lambda X: X.float()))),
    Misuse("inverse changes the device", registers(lambda: Invertible(same, lambda X: X.to("meta")))),
    Misuse("inverse gives strings", registers(lambda: Invertible(same, lambda X: "ab"))),
    Misuse("inverse gives a tensor and None", registers(lambda: Invertible(same, lambda X: (X, None)))),
    Misuse("inverse raises", registers(lambda: Invertible(same, fails))),
    Misuse("inverse gives nothing", registers(lambda: Invertible(same, lambda X: ()))),
    Misuse(
        "forward after inverse changes the dtype",
        registers(lambda: Invertible(lambda X: X.float(), double)),
        torch_is_atomic=False,
    ),
    Misuse(
        "forward after inverse changes the shape",
        registers(lambda: Invertible(lambda X: X.flatten(), double)),
        torch_is_atomic=False,
    ),
    Misuse(
        "forward after inverse gives no tensor",
        registers(lambda: Invertible(lambda X: None, double)),
        torch_is_atomic=False,
    ),
    Misuse(
        "forward after inverse raises", registers(lambda: Invertible(fails, double)), torch_is_atomic=False
    ),
    Misuse(
        "inverse changes the shape",
        registers(lambda: Invertible(same, lambda X: X[:2])),
        torch_is_atomic=False,
    ),
    Misuse(
        "forward of two changes the shape",
        registers(lambda: Invertible(lambda X, Y: X, lambda X: (X[0], X))),
    ),
    Misuse(
        "forward of two changes the dtype",
        registers(lambda: Invertible(lambda X, Y: X.float(), lambda X: (X, X))),
    ),
]

CHAINED = [
    Misuse("chained: unknown tensor", registers(Scale, "missing"), prepared(Scale)),
    Misuse("chained: forward gives no tensor", registers(lambda: Lambda(lambda X: 1)), prepared(Scale)),
    Misuse(
        "chained: forward changes the dtype", registers(lambda: Lambda(lambda X: X.float())), prepared(Scale)
    ),
    Misuse("chained: forward changes the shape", registers(lambda: Lambda(lambda X: X[0])), prepared(Halves)),
    Misuse("chained: forward raises", registers(lambda: Lambda(fails)), prepared(Scale)),
    Misuse(
        "chained: inverse gives no tensor",
        registers(lambda: Invertible(same, lambda X: (X,))),
        prepared(Scale),
    ),
    Misuse(
        "chained: inverse changes the dtype",
        registers(lambda: Invertible(same, lambda X: X.float())),
        prepared(Scale),
    ),
    Misuse(
        "chained: inverse changes the shape",
        registers(lambda: Invertible(same, lambda X: X[0])),
        prepared(Scale),
    ),
    Misuse("chained: inverse raises", registers(lambda: Invertible(same, fails)), prepared(Scale)),
]

ASSIGNED = [
    Misuse("assign: no inverse", assigns(), prepared(Shift)),
    Misuse("assign: no inverse in the chain", assigns(), prepared(Scale, Shift)),
    Misuse("assign: no inverse below", assigns(), prepared(Shift, Scale)),
    Misuse("assign: inverse refuses", assigns(), prepared(Refusing)),
    Misuse("assign: inverse raises", assigns(), prepared(lambda: Turncoat(fails))),
    Misuse("assign: not a tensor", assigns("text"), prepared(lambda: Turncoat(same))),
    Misuse("assign: another dtype", assigns(torch.zeros(3, 4)), prepared(Scale)),
    Misuse("assign: inverse gives no tensor", assigns(), prepared(lambda: Turncoat(lambda X: [X]))),
    Misuse("assign: inverse changes dtype", assigns(), prepared(lambda: Turncoat(lambda X: X.half()))),
    Misuse(
        "assign: inverse gives no sequence",
        assigns(),
        prepared(lambda: Turncoat(lambda X: X.sum, originals=2)),
    ),
    Misuse(
        "assign: inverse gives one tensor for two",
        assigns(),
        prepared(lambda: Turncoat(same, originals=2)),
    ),
    Misuse(
        "assign: inverse gives three for two",
        assigns(),
        prepared(lambda: Turncoat(lambda X: (X, X, X), originals=2)),
    ),
    Misuse(
        "assign: first of two has another dtype",
        assigns(),
        prepared(lambda: Turncoat(lambda X: (X.float(), X), originals=2)),
    ),
    Misuse(
        "assign: second of two has another dtype",
        assigns(),
        prepared(lambda: Turncoat(lambda X: (X, X.float()), originals=2)),
        torch_is_atomic=False,
    ),
    Misuse(
        "assign: second of two is no tensor",
        assigns(),
        prepared(lambda: Turncoat(lambda X: [X, None], originals=2)),
        torch_is_atomic=False,
    ),
]


def removes(tensor: str = "weight", *, leave_parametrized: bool = True) -> Callable[[Impl, nn.Module], Any]:
    """A call that removes."""
    return lambda impl, module: impl.P.remove_parametrizations(
        module, tensor, leave_parametrized=leave_parametrized
    )


REMOVED = [
    Misuse("remove: plain module", removes()),
    Misuse("remove: another tensor", removes("bias"), prepared(Scale)),
    Misuse("remove: unknown tensor", removes("missing"), prepared(Scale)),
    Misuse("remove: several originals", removes(leave_parametrized=False), prepared(Halves)),
    Misuse(
        "transfer: unknown tensor",
        lambda impl, module: impl.P.transfer_parametrizations_and_params(module, linear(), "missing"),
        prepared(Scale),
    ),
    Misuse(
        "transfer: a tensor without parametrization",
        lambda impl, module: impl.P.transfer_parametrizations_and_params(module, linear(), "bias"),
        prepared(Scale),
    ),
]

NEIGHBOURS = [
    Misuse(
        "a parameter of the same name",
        lambda impl, module: module.register_parameter("weight", None),
        prepared(Scale),
    ),
    Misuse(
        "a buffer of the same name",
        lambda impl, module: module.register_buffer("weight", torch.zeros(1)),
        prepared(Scale),
    ),
    Misuse("an empty list", lambda impl, module: impl.P.ParametrizationList([], module.weight)),
    Misuse(
        "a strange key",
        lambda impl, module: module.load_state_dict({"parametrizations.weight.other": torch.zeros(1)}),
        prepared(Scale),
    ),
    Misuse(
        "a state dict of another shape",
        lambda impl, module: module.load_state_dict({"parametrizations.weight.original": torch.zeros(2, 2)}),
        prepared(Scale),
    ),
]

MISUSES = FIRST + CHAINED + ASSIGNED + REMOVED + NEIGHBOURS


@pytest.mark.parametrize("misuse", MISUSES, ids=str)
@differential
def test_error(impl: Impl, misuse: Misuse) -> Iterator[Any]:
    module = misuse.prepare(impl)
    yield raised(lambda: misuse.call(impl, module))


@pytest.mark.parametrize("misuse", [misuse for misuse in MISUSES if misuse.torch_is_atomic], ids=str)
def test_nothing_changes(impl: Impl, misuse: Misuse) -> None:
    module = misuse.prepare(impl)
    before = anatomy(module)
    raised(lambda: misuse.call(impl, module))
    assert anatomy(module) == before


@pytest.mark.parametrize("misuse", [misuse for misuse in MISUSES if not misuse.torch_is_atomic], ids=str)
@beyond_torch("torch has already written the original")
def test_nothing_changes_where_torch_is_half_done(impl: Impl, misuse: Misuse) -> None:
    module = misuse.prepare(impl)
    before = anatomy(module)
    raised(lambda: misuse.call(impl, module))
    assert anatomy(module) == before


def test_a_parameter_that_is_none(impl: Impl) -> None:
    layer = nn.Linear(4, 3, bias=False)
    before = anatomy(layer)
    with pytest.raises((AttributeError, ValueError), match=r"NoneType|None|bias"):
        impl.P.register_parametrization(layer, "bias", Scale())
    assert anatomy(layer) == before


def test_an_uninitialized_parameter(impl: Impl) -> None:
    layer = nn.LazyLinear(3)
    weight = layer.weight
    with pytest.raises((RuntimeError, ValueError)):
        impl.P.register_parametrization(layer, "weight", Scale())
    assert layer.weight is weight
    assert type(layer) is nn.LazyLinear


@beyond_torch("torch has moved the first step when the second fails")
def test_a_failed_transfer_changes_nothing(impl: Impl) -> None:
    source, target = linear(), nn.Linear(4, 3, dtype=torch.float64)
    impl.P.register_parametrization(source, "weight", Scale())
    impl.P.register_parametrization(source, "weight", Scale())
    impl.P.register_parametrization(source, "bias", Lambda(lambda X: X[:3].clone()))
    target.bias = nn.Parameter(torch.zeros(5, dtype=torch.float64))
    before = anatomy(target)
    with pytest.raises(ValueError, match="may not change the shape"):
        impl.P.transfer_parametrizations_and_params(source, target)
    assert anatomy(target) == before


@differential
def test_deletion(impl: Impl) -> Iterator[Any]:
    layer = prepared(Scale)(impl)
    yield isinstance(raised(lambda: delattr(layer, "weight")), AttributeError)
    yield layer


@beyond_torch("torch reports that the module has no attribute 'weight'")
def test_an_attribute_error_of_the_step_surfaces_as_itself(impl: Impl) -> None:
    layer = linear()
    impl.P.register_parametrization(layer, "weight", Lambda(lambda X: X.no_such_thing), unsafe=True)
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = layer.weight


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
@pytest.mark.parametrize("step", [Scale, Halves])
def test_scripting_is_refused(impl: Impl, step: type[nn.Module]) -> None:
    layer = prepared(step)(impl)
    with pytest.raises((RuntimeError, torch.jit.Error), match="not working with scripting"):
        torch.jit.script(layer)(torch.ones(1, 4, dtype=torch.float64))


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*:DeprecationWarning")
@differential
def test_tracing(impl: Impl) -> Iterator[Any]:
    layer = prepared(Scale)(impl)
    x = torch.ones(1, 4, dtype=torch.float64)
    yield torch.jit.trace(layer, x)(x)
    with impl.P.cached():
        yield raised(lambda: torch.jit.trace(layer, x))
