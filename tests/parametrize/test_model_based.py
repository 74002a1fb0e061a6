"""Random sequences of operations leave a torch module and a torchkiln module in the same state.

The two modules go in lockstep: each rule runs on both, and after each rule their values, keys and modes are compared.
What torchkiln does otherwise on purpose (order after a removal, independence of copies) is checked against the plain
module instead.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor, nn

from .oracle import OURS, TORCH, Impl, assert_same, assert_same_error, fingerprint, freeze
from .steps import Based, Gain, Halves, HalvesAsList, Masked, Polar, Refusing, Scale, Shift, Single, Tanh

FIRST = [Scale, Shift, Refusing, Tanh, Gain, Based, Halves, HalvesAsList, Polar, Single, nn.Identity]
LATER = [Scale, Shift, Refusing, Tanh, Gain, nn.Identity]
NAMES = ["weight", "bias", "mean"]


class Subject(nn.Module):
    """Two parameters and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(3, 4))
        self.bias = nn.Parameter(torch.linspace(0.1, 0.3, 3, dtype=torch.float64))
        self.register_buffer("mean", torch.linspace(0.5, -0.5, 4, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) @ self.weight.T + self.bias


SHAPES = {name: tuple(value.shape) for name, value in Subject().state_dict().items()}


class Lockstep(RuleBasedStateMachine):
    """A torch module and a torchkiln module to which the same things happen."""

    @initialize()
    def start(self) -> None:
        self.subjects: dict[Impl, nn.Module] = {TORCH: Subject(), OURS: Subject()}
        self.parked: list[tuple[nn.Module, Any]] = []
        self.removed = False

    def both(self, act: Callable[[Impl, nn.Module], Any]) -> None:
        """Run ``act`` on both modules and compare what it returns or raises."""
        outcomes: dict[Impl, Any] = {}
        for impl, subject in self.subjects.items():
            torch.manual_seed(0)
            try:
                outcomes[impl] = freeze(act(impl, subject))
            except Exception as error:  # noqa: BLE001  compared below, whatever it is
                outcomes[impl] = error
        if isinstance(outcomes[TORCH], Exception):
            assert_same_error(outcomes[OURS], outcomes[TORCH])
        else:
            assert_same(outcomes[OURS], outcomes[TORCH])

    def chain(self, name: str) -> Any:
        """Torch's chain for ``name``, or None."""
        subject = self.subjects[TORCH]
        return subject.parametrizations[name] if TORCH.P.is_parametrized(subject, name) else None

    @rule(name=st.sampled_from(NAMES), first=st.sampled_from(FIRST), later=st.sampled_from(LATER))
    def register(self, name: str, first: type[nn.Module], later: type[nn.Module]) -> None:
        chain = self.chain(name)
        if chain is not None and len(chain) >= 3:
            return
        step = first if chain is None else later
        if name == "mean" and step is Gain:
            return  # torch turns such a buffer into a parameter; see test_remove
        self.both(lambda impl, subject: impl.P.register_parametrization(subject, name, step()) is subject)

    @rule(name=st.sampled_from(NAMES))
    def register_mask(self, name: str) -> None:
        if self.chain(name) is None:
            step = Masked(SHAPES[name])
            self.both(
                lambda impl, subject: (
                    impl.P.register_parametrization(subject, name, copy.deepcopy(step)) is subject
                )
            )

    @rule(name=st.sampled_from([*NAMES, "missing"]), leave_parametrized=st.booleans())
    def remove(self, name: str, leave_parametrized: bool) -> None:
        self.removed = True
        self.both(
            lambda impl, subject: (
                type(
                    impl.P.remove_parametrizations(subject, name, leave_parametrized=leave_parametrized)
                ).__name__
            )
        )

    @rule(
        name=st.sampled_from(NAMES), low=st.floats(-0.5, 0.5, width=16), high=st.floats(-0.5, 0.5, width=16)
    )
    def assign(self, name: str, low: float, high: float) -> None:
        if self.chain(name) is None:
            return
        size = int(torch.Size(SHAPES[name]).numel())

        def act(impl: Impl, subject: nn.Module) -> None:
            value = torch.linspace(low, high + 0.25, size, dtype=torch.float64).reshape(SHAPES[name])
            setattr(subject, name, value)

        self.both(act)

    @rule(name=st.sampled_from(NAMES))
    def assign_another_dtype(self, name: str) -> None:
        chain = self.chain(name)
        if chain is None or not chain.is_tensor:
            return
        # Based has moved its base by the time torch refuses, on both sides.
        if any(isinstance(step, (Based, Gain)) for step in chain):
            return
        self.both(
            lambda impl, subject: setattr(subject, name, torch.zeros(SHAPES[name], dtype=torch.float32))
        )

    @rule()
    def train_step(self) -> None:
        def act(impl: Impl, subject: nn.Module) -> list[Any]:
            optimizer = torch.optim.SGD(subject.parameters(), lr=0.05)
            subject(torch.ones(2, 4, dtype=torch.float64)).square().sum().backward()
            gradients = {key: value.grad for key, value in sorted(subject.named_parameters())}
            optimizer.step()
            return [gradients, subject.zero_grad()]

        self.both(act)

    @rule(name=st.sampled_from(NAMES))
    def read_cached(self, name: str) -> None:
        def act(impl: Impl, subject: nn.Module) -> list[Any]:
            with impl.P.cached():
                value = getattr(subject, name)
                return [value, value is getattr(subject, name)]

        self.both(act)

    @rule(mode=st.booleans())
    def train(self, mode: bool) -> None:
        self.both(lambda impl, subject: subject.train(mode).training)

    @rule()
    def copy(self) -> None:
        """Go on with copies; the sources of ours must stay as they are (torch's share a class with their copies)."""
        source = self.subjects[OURS]
        self.parked.append((source, self.observed(source)))
        self.subjects = {impl: copy.deepcopy(subject) for impl, subject in self.subjects.items()}

    @rule()
    def state_dict_round_trip(self) -> None:
        for impl, subject in self.subjects.items():
            file = io.BytesIO()
            torch.save(subject.state_dict(), file)
            file.seek(0)
            other = self.subjects[TORCH if impl is OURS else OURS]
            assert repr(other.load_state_dict(torch.load(file))) == "<All keys matched successfully>"

    @precondition(lambda self: OURS.P.is_parametrized(self.subjects[OURS]))
    @rule()
    def transfer(self) -> None:
        self.both(
            lambda impl, subject: sorted(
                impl.P.transfer_parametrizations_and_params(subject, Subject()).state_dict()
            )
        )

    @staticmethod
    def observed(subject: nn.Module) -> Any:
        """Everything of a subject but the order of its names."""
        return {
            "class": type(subject).__name__,
            "state": {key: fingerprint(value) for key, value in sorted(subject.state_dict().items())},
            "parameters": {key: fingerprint(value) for key, value in sorted(subject.named_parameters())},
            "buffers": sorted(key for key, _ in subject.named_buffers()),
            "values": {name: fingerprint(getattr(subject, name).detach()) for name in NAMES},
            "gradients": {name: getattr(subject, name).requires_grad for name in NAMES},
            "training": {key: module.training for key, module in sorted(subject.named_modules())},
        }

    @invariant()
    def the_modules_are_equal(self) -> None:
        ours, torchs = (self.subjects[impl] for impl in (OURS, TORCH))
        assert_same(self.observed(ours), self.observed(torchs))
        if not self.removed:
            assert list(ours.state_dict()) == list(torchs.state_dict())
            assert repr(ours) == repr(torchs)

    @invariant()
    def the_order_is_that_of_the_plain_module(self) -> None:
        subject = self.subjects[OURS]
        assert list(subject._parameters) == [
            name for name in ("weight", "bias") if name in subject._parameters
        ]
        if not OURS.P.is_parametrized(subject):
            assert type(subject) is Subject
            assert list(subject.state_dict()) == NAMES

    @invariant()
    def the_sources_of_copies_are_untouched(self) -> None:
        for source, before in self.parked:
            assert_same(self.observed(source), before)


FAST = settings(max_examples=25, stateful_step_count=15, suppress_health_check=list(HealthCheck))
THOROUGH = settings(FAST, max_examples=150, stateful_step_count=40)


def test_random_operations() -> None:
    run_state_machine_as_test(Lockstep, settings=FAST)


@pytest.mark.slow
def test_many_random_operations() -> None:
    run_state_machine_as_test(Lockstep, settings=THOROUGH)


SHAPE = st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple)
CHAIN = st.tuples(st.sampled_from(FIRST), st.lists(st.sampled_from(LATER), max_size=3))


def chained(
    impl: Impl, shape: tuple[int, ...], chain: tuple[type[nn.Module], list[type[nn.Module]]], *, buffer: bool
) -> list[Any]:
    """Register a chain on a tensor of ``shape``, read it, send a gradient, assign to it, and remove it."""
    value = torch.linspace(-0.75, 0.75, torch.Size(shape).numel(), dtype=torch.float64).reshape(shape)
    module = nn.Module()
    if buffer:
        module.register_buffer("tensor", value)
    else:
        module.tensor = nn.Parameter(value)
    seen: list[Any] = []
    for step in (chain[0], *chain[1]):
        if buffer and step is Gain:
            continue  # torch turns such a buffer into a parameter; see test_remove
        impl.P.register_parametrization(module, "tensor", step())
        seen.append(freeze([module, module.tensor]))
    if module.tensor.requires_grad:
        module.tensor.square().sum().backward()
        seen.append(freeze([parameter.grad for parameter in module.parameters()]))
    try:
        module.tensor = value.abs() / 2
    except (RuntimeError, NotImplementedError) as error:
        seen.append(error)
    seen.append(freeze([module, module.tensor]))
    if not impl.P.is_parametrized(module):
        return seen
    impl.P.remove_parametrizations(module, "tensor")
    seen.append(freeze([module, module.tensor]))
    return seen


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(shape=SHAPE, chain=CHAIN, buffer=st.booleans())
def test_shapes_and_chains(
    shape: tuple[int, ...], chain: tuple[type[nn.Module], list[type[nn.Module]]], buffer: bool
) -> None:
    assert_same(chained(OURS, shape, chain, buffer=buffer), chained(TORCH, shape, chain, buffer=buffer))


@pytest.mark.slow
@settings(max_examples=2000, suppress_health_check=[HealthCheck.too_slow])
@given(shape=SHAPE, chain=CHAIN, buffer=st.booleans())
def test_many_shapes_and_chains(
    shape: tuple[int, ...], chain: tuple[type[nn.Module], list[type[nn.Module]]], buffer: bool
) -> None:
    assert_same(chained(OURS, shape, chain, buffer=buffer), chained(TORCH, shape, chain, buffer=buffer))


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(
    names=st.permutations("abcde"),
    several=st.sets(st.sampled_from("abcde")),
    order=st.permutations("abcde"),
    kept=st.integers(0, 5),
)
def test_any_order_of_registering_and_removing(
    names: list[str], several: set[str], order: list[str], kept: int
) -> None:
    """Whatever was registered and removed in whatever order, what is plain stands in the module's own order."""
    module = nn.Module()
    for name in "abcde":
        module.register_parameter(name, nn.Parameter(torch.ones(2)))
    for name in names:
        OURS.P.register_parametrization(module, name, Halves() if name in several else Scale())
    for name in order[kept:]:
        OURS.P.remove_parametrizations(module, name)
        assert list(module._parameters) == sorted(module._parameters)
    assert list(module._parameters) == sorted(order[kept:])
