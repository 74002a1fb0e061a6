"""The comparison itself can fail: each difference between two runs is seen."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from .oracle import anatomy, assert_same, assert_same_error, fingerprint, freeze, snapshot
from .steps import linear


def renamed(layer: nn.Linear) -> None:
    layer.extra = nn.Identity()


def revalued(layer: nn.Linear) -> None:
    layer.weight.data[0, 0] += 1e-15


def frozen(layer: nn.Linear) -> None:
    layer.weight.requires_grad_(False)


def switched(layer: nn.Linear) -> None:
    layer.eval()


def reordered(layer: nn.Linear) -> None:
    weight = layer.weight
    del layer.weight
    layer.weight = weight


@pytest.mark.parametrize("change", [renamed, revalued, frozen, switched, reordered])
def test_a_snapshot_sees_every_change(change: Callable[[nn.Linear], None]) -> None:
    torch.manual_seed(0)
    layer = linear()
    nn.init.zeros_(layer.weight)
    before = snapshot(layer)
    assert_same(snapshot(layer), before)
    change(layer)
    with pytest.raises(AssertionError):
        assert_same(snapshot(layer), before)


def test_an_anatomy_sees_a_replaced_parameter() -> None:
    layer = linear()
    before = anatomy(layer)
    layer.weight = nn.Parameter(layer.weight.detach().clone())
    assert snapshot(layer) == {key: before[key] for key in snapshot(layer)}
    assert anatomy(layer) != before


def test_an_observation_is_frozen_when_it_is_made() -> None:
    value = torch.zeros(2)
    seen = freeze([value])
    value += 1
    assert seen == [fingerprint(torch.zeros(2))]


def test_a_parameter_is_not_a_tensor() -> None:
    assert fingerprint(nn.Parameter(torch.zeros(2))) != fingerprint(torch.zeros(2).requires_grad_())


@pytest.mark.parametrize(
    "ours",
    [TypeError("bad dtype"), ValueError("dtype is bad"), None],
    ids=["type", "text", "missing"],
)
def test_a_different_error_is_seen(ours: Exception | None) -> None:
    with pytest.raises(AssertionError):
        assert_same_error(ours, ValueError("bad dtype"))


def test_a_subclass_that_says_more_is_the_same_error() -> None:
    assert_same_error(UnicodeError("bad dtype\nuse float32"), ValueError("bad dtype"))


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("Module 'Linear' does not have a thing", True),
        ("Module 'Linear(in_features=1)' does not have a thing; use b", True),
        ("Module 'Linear' does not have a think", False),
        ("Object 'Linear' does not have a thing", False),
    ],
)
def test_a_printed_module_may_be_shortened(text: str, same: bool) -> None:
    expected = ValueError(f"Module '{nn.Sequential(nn.Linear(1, 1))}' does not have a thing")
    try:
        assert_same_error(ValueError(text), expected)
    except AssertionError:
        assert not same
    else:
        assert same
