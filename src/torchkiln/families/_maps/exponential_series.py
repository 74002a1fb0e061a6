r"""How to evaluate the exponential of a skew-Hermitian matrix: from a bound of its norm, scaling and coefficients.

On :math:`[-r, r]`, with :math:`J_k` the Bessel functions and :math:`T_k` the Chebyshev polynomials (DLMF 10.12.2-3),

.. math:: \cos t = J_0(r) + 2 \sum_{k > 0} (-1)^k J_{2k}(r)\, T_{2k}(t/r), \qquad
    \sin t = 2 \sum_{k \geq 0} (-1)^k J_{2k+1}(r)\, T_{2k+1}(t/r)

The series are cut off behind :math:`T_{10}` and :math:`T_9`. With :math:`B = A^2 = -t^2` they are C = c(B) and
S = A s(B), and are evaluated as

.. math:: M = B^2 + a B, \quad W = M^2, \quad
    C + S = f (W + x_2 M + x_1 B + x A)(M + y_1 B + y A + y_0) + z_2 M + z_1 B + z_0 + 1

By that c is of degree 6, and its last coefficient is free. One of three to five times that of :math:`T_{12}`, whose
terms are as small as those left out, leaves no A behind the product. Then x y is small as well: with the right one, or
none, it is large, and x A times y A cancels digits against :math:`z_1 B`.

Near zero, as where training from a base begins, :math:`T_8` and :math:`T_5` are the last ones needed, and one square
less: a and :math:`y_1` are zero, and F is :math:`M + x_1 B + x A`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Series", "moments", "plan", "spectral_bound", "widest"]


class Series(NamedTuple):
    """Coefficients.

    Attributes:
        squares: How many there are: W is left out where they are two.
        a: Of B in M.
        factor: Of the product.
        first: Of A, B and M in its first factor.
        second: Of I, A and B in its second one.
        rest: Of I, B and M in what is added.
        sine: Of s, by powers of B.
        cosine: Of c, by powers of B.
    """

    squares: int
    a: float
    factor: float
    first: tuple[float, float, float]
    second: tuple[float, float, float]
    rest: tuple[float, float, float]
    sine: tuple[float, ...]
    cosine: tuple[float, ...]


def plan(bound: float, A: Tensor) -> tuple[int, Series]:
    """Return s, and the series for matrices of the size and dtype of ``A`` whose norm is at most ``bound`` / 2^s."""
    short = _radius(A.shape[-1], A.dtype, left_out=7)
    if bound <= short:
        return 0, _short_series(_rounded(bound, short))
    largest, series = widest(A)
    if not bound < math.inf:
        return 0, series
    steps = max(0, math.ceil(math.log2(bound / largest)))
    return steps, _series(_rounded(bound / 2**steps, largest))


def _rounded(bound: float, largest: float) -> float:
    """Return a radius by steps of the eighth root of 2, so that few series are ever computed."""
    smaller = math.floor(8 * math.log2(largest / bound)) if bound > 0 else 24
    return largest / 2 ** (min(smaller, 24) / 8)


def widest(A: Tensor) -> tuple[float, Series]:
    """Return the largest norm that a series serves for matrices like ``A``, and that series."""
    largest = _radius(A.shape[-1], A.dtype)
    return largest, _series(largest)


@lru_cache(maxsize=256)
def _radius(n: int, dtype: torch.dtype, left_out: int = 11) -> float:
    """Return the radius on which what the series leave out is less than products of n x n matrices round off."""
    tolerance = torch.finfo(dtype).eps * min(n / 12, math.sqrt(n)) / 5
    # By the next term of the sine, which is at most 2 (r/2)^k / k!.
    return 2 * math.pow(tolerance * math.factorial(left_out) / 2, 1 / left_out)


@lru_cache(maxsize=256)
def _series(r: float) -> Series:
    s = _in_squares([_term(k, r) for k in range(1, 10, 2)], r, start=1)
    without = _in_squares([_bessel(0, r), *(_term(k, r) for k in range(2, 11, 2)), 0], r, start=0)
    last = _in_squares([0] * 6 + [_term(12, r)], r, start=0)

    def cosine(times: float) -> list[float]:
        return [one + times * other for one, other in zip(without, last, strict=True)]

    low, high = 2.0, 6.0
    while low < (times := (low + high) / 2) < high:
        x, _, _, y0, _ = _factors(cosine(times), s)
        low, high = (times, high) if s[0] < x * y0 else (low, times)
    c = cosine(low)
    a, y, y2 = s[3] / (2 * s[4]), s[4], c[6]
    x, x1, x2, _, y1 = _factors(c, s)
    y0 = s[0] / x  # to the last digit, for it is A's coefficient
    z1, z2 = c[1] - x1 * y0 - x * y, c[2] - (x2 + a**2) * y0 - x1 * y1
    # From sums of B^2 and B to those of M and B.
    first, second, rest = (x, x1 - a * x2, x2), (y0 / y2, y / y2, y1 / y2 - a), (c[0] - 1, z1 - a * z2, z2)
    return Series(3, a, y2, first, second, rest, tuple(s), tuple(c))


@lru_cache(maxsize=256)
def _short_series(r: float) -> Series:
    c = _in_squares([_bessel(0, r), *(_term(k, r) for k in range(2, 9, 2))], r, start=0)
    s = _in_squares([_term(k, r) for k in range(1, 6, 2)], r, start=1)
    factor = c[4]
    x1 = c[3] / factor
    y = s[1] / (factor * x1)
    x = s[2] / factor - y
    y0 = s[0] / (factor * x)
    rest = (c[0] - 1, c[1] - factor * (x1 * y0 + x * y), c[2] - factor * y0)
    return Series(2, 0, factor, (x, x1, 1), (y0, y, 0), rest, (*s, 0, 0), (*c, 0, 0))


def _factors(c: Sequence[float], s: Sequence[float]) -> tuple[float, float, float, float, float]:
    """Return the coefficients of A, B and B^2 in the first factor, and of I and B in the second, f in the latter."""
    a = s[3] / (2 * s[4])
    y, y2 = s[4], c[6]
    y1 = c[5] - 2 * a * y2
    # What is left to choose so that the third coefficients agree.
    excess = c[3] - 2 * a * c[4] + 4 * a**2 * y1
    x = (s[2] * (y1 - 2 * a * y2) + s[1] * y2 - y * excess) / (2 * y2 * (y1 - a * y2))
    square = (s[2] - x * y2) / y
    x1 = (s[1] - x * y1) / y
    return x, x1, square - a**2, c[4] - 2 * a * y1 - square * y2, y1


def _term(k: int, r: float) -> float:
    """Return the coefficient of :math:`T_k(t/r)` in cos t (k even) or sin t (k odd), k > 0."""
    return (-2 if k % 4 > 1 else 2) * _bessel(k, r)


def _bessel(order: int, x: float) -> float:
    terms = (
        (-1) ** m * (x / 2) ** (2 * m + order) / (math.factorial(m) * math.factorial(m + order))
        for m in range(16)
    )
    return math.fsum(terms)


def _in_squares(terms: list[float], r: float, *, start: int) -> list[float]:
    """Return a sum of :math:`T_k(t/r)`, k from ``start`` by steps of 2, over t^start, by the powers of :math:`-t^2`."""
    powers = [0.0] * len(terms)
    for index, term in enumerate(terms):
        k = start + 2 * index
        for j in range(index + 1):
            powers[j] += term * _chebyshev(k, start + 2 * j)
    return [(-1) ** j * power / r ** (start + 2 * j) for j, power in enumerate(powers)]


def _chebyshev(k: int, power: int) -> float:
    """Return the coefficient of a power in :math:`T_k` (DLMF 18.5.11)."""
    if k == 0:
        return 1
    m = (k - power) // 2
    ways = math.factorial(k - m - 1) / (math.factorial(m) * math.factorial(power))
    return math.copysign(k / 2 * ways * 2.0**power, 1 - 2 * (m % 2))


# --- a bound of the norm ------------------------------------------------------------------------------------------


def moments(B: Tensor, B2: Tensor) -> Tensor:
    """Return, of each matrix, the traces of :math:`B, B^2, B^3` and :math:`B^4`, from B and :math:`B^2`."""
    traces = [X.diagonal(dim1=-2, dim2=-1).sum(-1) for X in (B, B2)]
    b, b2 = B.flatten(-2), B2.flatten(-2)
    return torch.stack([*traces, torch.linalg.vecdot(b, b2), torch.linalg.vecdot(b2, b2)], -1).real


def spectral_bound(traces: Sequence[float], A: Tensor) -> float:
    r"""Return a bound of the norm of a matrix like ``A``, from the :func:`moments` of its square.

    Let :math:`x = |\lambda|^2` and :math:`v = (1, x, x^2)` for the eigenvalues of A, and H the sum of all
    :math:`v v^T`, which consists of n and the moments. As :math:`m\, v v^T \leq H` for an eigenvalue of m copies,
    :math:`v^T H^{-1} v \leq 1/m` (the Christoffel function). m is 2 for real matrices, whose eigenvalues come in pairs.
    It is nan where one of the moments is not finite.
    """
    if not all(map(math.isfinite, traces)):
        return math.nan
    m1, m2, m3, m4 = traces
    return math.sqrt(_largest_square(A.shape[-1], -m1, m2, -m3, m4, copies=1 if A.is_complex() else 2))


def _largest_square(n: int, m1: float, m2: float, m3: float, m4: float, *, copies: int) -> float:
    top = math.sqrt(math.sqrt(m4 / copies))  # a bound as well, and the unit of x
    if top == 0:
        return max(m1, 0) / copies
    ridge = 1e-5 * n  # more than the moments are rounded by; it makes the bound larger
    a, b, c, d, e = n + ridge, m1 / top, m2 / top**2, m3 / top**3, m4 / top**4 + ridge
    # H = (a, b, c; b, c + ridge, d; c, d, e) by its adjugate, and what is not positive for an eigenvalue.
    g = c + ridge
    A, B, C = g * e - d * d, c * d - b * e, b * d - c * g
    polynomial = (
        a * g - b * b,
        2 * (b * c - a * d),
        2 * C + a * e - c * c,
        2 * B,
        A - (a * A + b * B + c * C) / copies,
    )
    return top * _largest_root(polynomial)


def _largest_root(polynomial: tuple[float, ...]) -> float:
    """Return a little more than the largest root below 1: beyond it the polynomial is convex, and 1 a bound of it."""
    x, step = 1.0, 1.0
    while step > 1e-3:
        value = slope = 0.0
        for coefficient in polynomial:
            slope = slope * x + value
            value = value * x + coefficient
        step = value / slope if value > 0 < slope else 0.0
        x -= step
    return x
