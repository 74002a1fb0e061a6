"""What the exponential is evaluated from: the series keep what they promise, and the bound of the norm is one."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from torchkiln.families._maps.exponential_series import (
    Series,
    _bessel,
    _radius,
    _series,
    _short_series,
    moments,
    plan,
    spectral_bound,
)
from torchkiln.families._maps.orthogonal import skew


def evaluated(series: Series, A: Tensor) -> Tensor:
    """Return the products of the file's docstring, for numbers."""
    B = A**2
    M = B**2 + series.a * B
    powers = torch.stack([torch.ones_like(A), A, B, M])
    first, second, rest = (
        (torch.tensor(each, dtype=A.dtype) @ powers)
        for each in ((0, *series.first), (*series.second, 1), (series.rest[0], 0, *series.rest[1:]))
    )
    return 1 + rest + series.factor * (M**2 * (series.squares - 2) + first) * second


@pytest.mark.parametrize(
    ("build", "left_out"),
    [
        # The next term of either series; the even one has one of three to five times its size.
        pytest.param(_series, {11: 2, 12: 8}, id="three squares"),
        pytest.param(_short_series, {7: 2, 10: 2}, id="two squares"),
    ],
)
@pytest.mark.parametrize("radius", [0.05, 0.4, 1.0, 2.1, 2.6])
def test_the_series_are_the_exponential_on_their_interval(
    build: Callable[[float], Series], left_out: dict[int, float], radius: float
) -> None:
    A = 1j * torch.linspace(-radius, radius, 2001, dtype=torch.float64)
    series = build(radius)
    value = evaluated(series, A)
    error = sum(times * _bessel(order, radius) for order, times in left_out.items())
    assert (value - A.exp()).abs().max() < 1.1 * error + 4e-15
    even = sum(c * (A * A) ** j for j, c in enumerate(series.cosine))
    odd = sum(s * (A * A) ** j for j, s in enumerate(series.sine)) * A
    torch.testing.assert_close(value, even + odd, rtol=0, atol=4e-15)
    # A A comes back from the product this many times, to be cancelled.
    assert abs(series.factor * series.first[0] * series.second[1]) < 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [2, 30, 256, 1000])
@pytest.mark.parametrize("bound", [0.0, 1e-30, 0.1, 1.0, 7.0, 1e6, math.inf, math.nan])
def test_a_plan_has_room_for_the_bound(dtype: torch.dtype, n: int, bound: float) -> None:
    steps, series = plan(bound, torch.empty(1, n, dtype=dtype))
    radius = _radius(n, dtype)
    assert steps == (max(0, math.ceil(math.log2(bound / radius))) if 0 < bound < math.inf else 0)
    scaled = min(bound / 2**steps, radius) if bound >= 0 else 0.0
    A = torch.tensor([1j * scaled], dtype=torch.complex128)
    tolerance = torch.finfo(dtype).eps * max(0.2, math.sqrt(n) / 4) + 4e-16  # of these few operations
    assert abs(evaluated(series, A) - A.exp()) < tolerance


SPECTRA = {
    "random": lambda n: skew(torch.randn(n, n)),
    "one plane": lambda n: skew(torch.eye(n).roll(1, 0).tril(-1) * (torch.arange(n) == 0)),
    "all the same": lambda n: torch.kron(torch.eye(n // 2), torch.tensor([[0.0, -3.0], [3.0, 0.0]])),
    "all scales": lambda n: skew(torch.randn(n, n) * torch.logspace(-6, 3, n)),
    "zero": lambda n: torch.zeros(n, n),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64], ids=str)
@pytest.mark.parametrize("n", [2, 8, 100])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_the_bound_is_one(spectrum: str, n: int, dtype: torch.dtype) -> None:
    A = SPECTRA[spectrum](n).to(dtype)
    norm = torch.linalg.matrix_norm(A, 2).item()
    B = A @ A
    traces = moments(B, B @ B)
    bound = spectral_bound(traces.tolist(), A)
    assert norm * (1 - 1e-5) <= bound <= norm * 1.42
    together = torch.stack([B, B / 4])
    torch.testing.assert_close(moments(together, together @ together)[0], traces)


@pytest.mark.parametrize("what", [math.inf, math.nan])
def test_a_bound_from_what_is_not_finite_is_not(what: float) -> None:
    assert math.isnan(spectral_bound([-1.0, 1.0, -1.0, what], torch.empty(3, 3)))
