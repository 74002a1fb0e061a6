r"""The exponential of skew-Hermitian matrices by products alone, and its derivative for two or three times that.

**Value.** :math:`e^A = (e^{A/2^s})^{2^s}`: a Taylor polynomial of degree 8 or 18 in 3 or 5 products (Bader, Blanes and
Casas, doi:10.3390/math7121174), then s squarings of :math:`e^A - I`, which keep the digits of a small A. As A is
normal, :math:`\|A\|_2 = \|A^6\|_2^{1/6}`: powers that are there anyway bound it well, and s stays small.

**Derivative.** The adjoint of the Frechet derivative is the derivative at :math:`A^H` (Al-Mohy and Higham,
doi:10.1137/080716426). What a cotangent G contributes along skew directions is

.. math:: \int_0^1 e^{tA} K e^{-tA} dt = \varphi(\mathrm{ad}_A)\, K, \qquad
    K = e^{-A} G - G^H e^A, \quad \mathrm{ad}_A K = A K - K A, \quad \varphi(z) = (e^z - 1)/z

One application of ad is one product, because :math:`K A = (A K)^H`. Its spectrum is imaginary and bounded, so that a
short Chebyshev series serves for :math:`A/2^s`; :math:`\varphi(2z) = \varphi(z)(e^z + 1)/2` takes it to A.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from torchkiln.families._maps.skew import SkewFunction

__all__ = ["EXPONENTIAL"]

Kept = tuple[Tensor, Tensor]


class _Radius(NamedTuple):
    """Up to which norm a polynomial is right to the rounding, and the series of the derivative is short."""

    degree_8: float
    degree_18: float


_RADIUS = {
    torch.float32: _Radius(0.58, 2.0),
    torch.complex64: _Radius(0.58, 2.0),
    torch.float64: _Radius(0.0499, 1.09),
    torch.complex128: _Radius(0.0499, 1.09),
}
# From which size on a transpose is copied before it is read with something else.
_LARGE = 256


# --- the value ----------------------------------------------------------------------------------------------------

_R = math.sqrt(177)
# Degree 8 from A2 = A A and A4 = A2 (x A + y A2), with e^A - I = third + first second: their coefficients by
# (I, A, A2, A4).
_STEP_8 = ((1 + _R) / 132, (1 + _R) / 528)
_SUMS_8 = (
    (0, 0, 2 / 3, 1),
    ((-271 + 29 * _R) / 210, 11 * (-1 + _R) / 840, 11 * (-9 + _R) / 3360, (89 - _R) / 2240),
    (0, 1, (857 - 58 * _R) / 630, 0),
)
# Degree 18 from A2, A3 and A6, with A9 = first second + third and e^A - I = fifth + (fourth + A9) A9: their
# coefficients by (I, A, A2, A3, A6).
_SUMS_18 = (
    (0, -1.00365581030144618291e-1, -8.02924648241156932449e-3, -8.92138498045729985177e-4, 0),
    (0, 0, -9.23364619367118555360e-2, -1.69364939002081722752e-2, -1.40086798182036094347e-5),
    (
        *(-9.04316832390810593223e-2, -6.76404519071381882256e-2, 6.75961301770459654925e-2),
        *(2.95552570429315521194e-2, -1.39180257516060693404e-5),
    ),
    (
        *(-1.09676396052962061844e1, 1.68015813878906206114, 5.71779846478865511061e-2),
        *(-6.98210122488052056106e-3, 3.34975017086070470649e-5),
    ),
    # The identity is left out: it comes from the product.
    (
        -1,
        3.97849749499645077844e-1,
        1.36783778460411720168,
        4.98289622525382669416e-1,
        -6.37898194594723280150e-4,
    ),
)


def _value(A: Tensor) -> tuple[Tensor, Kept]:
    """Return the exponential of ``A``, of 2 or 3 dimensions, and what the other functions need.

    That is the exponential of A/2^s, which is the value itself where s is 0, and a bound of the norm of A.
    """
    if A.ndim == 3 and _differ(torch.linalg.vector_norm(A, dim=(-2, -1)).tolist()):
        values, kept = zip(*map(_value, A), strict=True)
        roots, bounds = zip(*kept, strict=True)
        return torch.stack(values), (torch.stack(roots), torch.stack(bounds))
    D, bound = _minus_one(A)
    steps = _steps(bound, D.dtype)
    root = _plus_identity(D)
    for step in range(1, steps + 1):
        D = _fused(D, D, D, beta=2)
        # Each squaring doubles what the last one left to orthogonality: one step of Newton and Schulz takes it away.
        if step % 8 == 0 or step == steps > 2:
            Q = _plus_identity(D)
            D = _fused(D, Q, _plus_identity(-(Q.mH @ Q)), alpha=0.5)
    Q = _plus_identity(D) if steps else root
    return Q, (root, A.new_full(A.shape[:-2], bound, dtype=torch.float64, device="cpu"))


def _differ(norms: list[float]) -> bool:
    """Return whether the matrices of a batch need different numbers of squarings."""
    return max(norms) > max(2, 8 * min(norms))


def _steps(bound: float, dtype: torch.dtype) -> int:
    """Return s, so that the polynomial of degree 18 is right for A/2^s."""
    return max(0, math.ceil(math.log2(bound / _RADIUS[dtype].degree_18))) if 0 < bound < math.inf else 0


def _minus_one(A: Tensor) -> tuple[Tensor, float]:
    """Return :math:`e^{A/2^s} - I`, and a bound of the norm of A, which s is from."""
    A2 = A @ A
    bound = math.sqrt(_norm(A2))
    if bound <= _RADIUS[A.dtype].degree_8:
        x, y = _STEP_8
        A4 = A2 @ A.mul(x).add_(A2, alpha=y)
        first, second, third = _combined(_sums_8(A.dtype, A.device), A, A2, A4)
        return _fused(third, first, second), bound
    size = 1.0
    if bound > 2**9:  # no power may overflow
        bound = _norm(A)
        size = 2.0 ** _steps(bound, A.dtype)
        A = A / size
        A2 = A @ A
    A3 = A @ A2
    A6 = A3 @ A3
    bound = min(bound, size * _norm(A6) ** (1 / 6))
    scale = size / 2 ** _steps(bound, A.dtype)
    first, second, third, fourth, fifth = _combined(_sums_18(scale, A.dtype, A.device), A, A2, A3, A6)
    A9 = _fused(third, first, second)
    return _fused(fifth, fourth.add_(A9), A9), bound


def _norm(A: Tensor) -> float:
    """Return a bound of the spectral norms of Hermitian or skew matrices, powers of a skew one."""
    largest = float(torch.linalg.vector_norm(A, dim=(-2, -1)).max())
    # The eigenvalues of real ones come in pairs.
    return largest if A.is_complex() else largest / math.sqrt(2)


@lru_cache(maxsize=16)
def _sums_8(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(_SUMS_8, dtype=dtype, device=device)


@lru_cache(maxsize=64)
def _sums_18(scale: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    powers = torch.tensor([scale**degree for degree in (0, 1, 2, 3, 6)], dtype=torch.float64)
    return (torch.tensor(_SUMS_18, dtype=torch.float64) * powers).to(dtype).to(device)


def _combined(sums: Tensor, *powers: Tensor) -> tuple[Tensor, ...]:
    """Return sums of the identity and ``powers``, by the coefficients in the rows of ``sums``, in one product."""
    P = torch.stack(powers)
    result = (sums[:, 1:] @ P.view(len(powers), -1)).view(-1, *P.shape[1:])
    result.diagonal(dim1=-2, dim2=-1).add_(sums[:, 0].view(-1, *[1] * (P.ndim - 2)))
    return result.unbind()


def _fused(C: Tensor, A: Tensor, B: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """Return ``beta C + alpha A B``."""
    multiply = torch.addmm if C.ndim == 2 else torch.baddbmm
    result: Tensor = multiply(C, A, B, beta=beta, alpha=alpha)
    return result


def _fuse_(C: Tensor, A: Tensor, B: Tensor, *, beta: float = 1, alpha: float = 1) -> None:
    (C.addmm_ if C.ndim == 2 else C.baddbmm_)(A, B, beta=beta, alpha=alpha)


def _plus_identity(A: Tensor) -> Tensor:
    result = A.clone()
    result.diagonal(dim1=-2, dim2=-1).add_(1)
    return result


# --- the derivative -----------------------------------------------------------------------------------------------


def _pullback(A: Tensor, kept: Sequence[Tensor], G: Tensor) -> Tensor:
    """Return twice the skew-Hermitian part of the adjoint derivative of the exponential at ``A`` applied to ``G``."""
    root, bounds = kept
    if bounds.ndim and len(set(bounds.tolist())) > 1:
        return torch.stack([_pullback(*each) for each in _one_by_one(A, root, bounds, G)])
    bound = bounds.max().item()
    steps = _steps(bound, A.dtype)
    roots = _squares(root, steps)
    norm, series = _series(bound / 2**steps, 2, root.dtype)
    K = _minus_adjoint(roots[-1].mH @ G)
    scale = 2 / (norm * 2**steps)
    before, term = K, _minus_adjoint(A @ K).mul_(scale / 2)
    total = (series[0] * before).add_(term, alpha=series[1])
    for coefficient in series[2:]:
        _fuse_(before, A, term, beta=0.5, alpha=scale)
        before, term = term, _minus_adjoint(before)
        total.add_(term, alpha=coefficient)
    for R in roots[:-1]:
        _fuse_(total, R @ total, R.mH, beta=0.5, alpha=0.5)
    return total


def _quotient(A: Tensor, kept: Sequence[Tensor], k: int) -> Tensor:
    r"""Return the first ``k`` rows and columns of :math:`\varphi(A) = (e^A - I) A^{-1}`, which A = 0 has as well."""
    root, bounds = kept
    if bounds.ndim and len(set(bounds.tolist())) > 1:
        return torch.stack([_quotient(X, (R, bound), k) for X, R, bound in zip(A, root, bounds, strict=True)])
    bound = bounds.max().item()
    steps = _steps(bound, A.dtype)
    norm, series = _series(bound / 2**steps, 1, root.dtype)
    scale = 2 / (norm * 2**steps)
    before = torch.eye(A.shape[-1], k, dtype=A.dtype, device=A.device).repeat(*A.shape[:-2], 1, 1)
    term = A[..., :k] * (scale / 2)
    total = (series[0] * before).add_(term, alpha=series[1])
    for coefficient in series[2:]:
        _fuse_(before, A, term, alpha=scale)
        before, term = term, before
        total.add_(term, alpha=coefficient)
    for R in _squares(root, steps)[:-1]:
        total = _fused(total, R, total, beta=0.5, alpha=0.5)
    result: Tensor = total[..., :k, :]
    return result


def _one_by_one(A: Tensor, root: Tensor, bounds: Tensor, G: Tensor) -> Iterator[tuple[Tensor, Kept, Tensor]]:
    for X, R, bound, H in zip(A, root, bounds, G, strict=True):
        yield X, (R, bound), H


def _squares(R: Tensor, steps: int) -> list[Tensor]:
    """Return ``R`` and its squares, ``steps`` times."""
    return list(accumulate(range(steps), lambda R, _: R @ R, initial=R))


def _minus_adjoint(A: Tensor) -> Tensor:
    # Read across the rows of a large matrix, a transpose costs as much as some products; copying it is done in tiles.
    return A - (A.mH.contiguous() if A.shape[-1] >= _LARGE else A.mH)


def _series(bound: float, factor: int, dtype: torch.dtype) -> tuple[float, tuple[float, ...]]:
    """Return a radius of at least ``factor * bound``, and the coefficients of the series."""
    # By steps of the fourth root of 2, so that few series are ever computed.
    power = math.ceil(4 * math.log2(bound)) if bound > 0 else -100
    radius = factor * 2.0 ** (max(power, -100) / 4)
    return radius, _chebyshev(radius, torch.finfo(dtype).eps / 2)


@lru_cache(maxsize=256)
def _chebyshev(radius: float, tolerance: float) -> tuple[float, ...]:
    r"""Return c, so that :math:`\varphi(r z) \approx \sum c_j \tau_j(z)` for z on the imaginary axis up to i.

    :math:`\tau_0 = 1, \tau_1 = z, \tau_{j+1} = 2 z \tau_j + \tau_{j-1}`. As
    :math:`e^{rz} = J_0(r) + 2 \sum J_j(r) \tau_j` and :math:`\int_0^r J_j = 2 \sum_m J_{j+1+2m}(r)` (DLMF 10.12.3,
    10.22.8).
    """
    J = [_bessel(order, radius) for order in range(48)]
    series = [(2 if j == 0 else 4) / radius * sum(J[j + 1 :: 2]) for j in range(24)]
    while len(series) > 2 and abs(series[-1]) < tolerance / 2:
        series.pop()
    return tuple(series)


def _bessel(order: int, x: float) -> float:
    terms = (
        (-1) ** m * (x / 2) ** (2 * m + order) / (math.factorial(m) * math.factorial(m + order))
        for m in range(16)
    )
    return math.fsum(terms)


# --- by differentiable operations ---------------------------------------------------------------------------------


def _plain_quotient(M: Tensor, B: Tensor) -> Tensor:
    """Return the last columns of an exponential: that of (M, B; 0, 0)."""
    rows, columns = B.shape[-2:]
    exponential: Tensor = torch.matrix_exp(pad(torch.cat([M, B], -1), (0, 0, 0, columns)))
    return exponential[..., :rows, rows:]


EXPONENTIAL = SkewFunction(
    value=_value,
    pullback=_pullback,
    quotient=_quotient,
    plain=torch.matrix_exp,
    plain_quotient=_plain_quotient,
    kept_like=lambda A: (torch.empty_like(A), A.new_empty(A.shape[:-2], dtype=torch.float64, device="cpu")),
)
