"""Finiteness: the sum is a short way to it, and never the answer by itself."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from torchkiln._core.finite import is_finite

# torch warns that complex32 lacks operations.
pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")
FLOATING = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex32]
NARROW = [torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", [*FLOATING, *NARROW])
def test_numbers_are_finite(dtype: torch.dtype) -> None:
    assert is_finite(torch.tensor([0.0, -1.0, 2.0]).to(dtype))
    assert is_finite(torch.empty(0).to(dtype))


@pytest.mark.parametrize("dtype", FLOATING)
def test_numbers_whose_sum_overflows_are_finite(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    assert is_finite(torch.tensor([largest, largest, largest], dtype=dtype))


@pytest.mark.parametrize("bad", [[torch.nan], [torch.inf], [-torch.inf], [torch.inf, -torch.inf]])
@pytest.mark.parametrize("dtype", [*FLOATING, torch.float8_e5m2])
def test_nan_and_infinity_are_not(dtype: torch.dtype, bad: list[float]) -> None:
    assert not is_finite(torch.tensor([1.0, *bad, 2.0], dtype=torch.float64).to(dtype))


def test_nan_in_a_type_without_infinity_is_not() -> None:
    assert not is_finite(torch.tensor([1.0, torch.nan]).to(torch.float8_e4m3fn))


def test_what_has_no_numbers_to_look_at_counts_as_finite() -> None:
    assert is_finite(torch.tensor([1, 2]))
    assert is_finite(torch.tensor([True]))
    assert is_finite(torch.empty(3, device="meta"))
    assert is_finite(torch.tensor([1.0, torch.nan]).to_sparse())


def test_a_parameter_that_trains_is_looked_at() -> None:
    assert not is_finite(nn.Parameter(torch.tensor([torch.nan])))
