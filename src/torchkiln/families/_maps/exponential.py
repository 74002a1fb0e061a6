r"""The exponential of skew-Hermitian matrices and its derivative, by few products.

**Value.** :math:`e^A = (e^{A/2^s})^{2^s}`, the inner one as C + S, an even and an odd polynomial: the Chebyshev series
of cos and sin on the interval of the spectrum, which need fewer terms than Taylor's. Four products make both. Three
are squares of skew or Hermitian matrices, of which one half is computed and the other its adjoint:

.. math:: B = A^2, \quad B_2 = B^2, \quad W = (B_2 + a B)^2, \quad C + S = F H + \ldots

F is a sum of :math:`W, B_2, B, A`, and H and what is added are sums of :math:`B_2, B, A, I`. As A is normal, traces of
its powers bound its norm well, and s stays small.

**Derivative.** The same products in reverse. Of a cotangent of B only the Hermitian part counts, and of one of A the
skew one, so that a square costs one product; there are five in all, and two for each of the s squarings.

s and the coefficients are chosen on the host, from a few numbers: on a device it waits for them, in the value alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.functional import pad

from torchkiln.families._maps.explicit import around, around_adjoint
from torchkiln.families._maps.exponential_series import Series, plan, spectral_bound
from torchkiln.families._maps.skew import SkewFunction, minus_adjoint, plus_adjoint

__all__ = ["EXPONENTIAL"]

Kept = tuple[Tensor, Tensor]
# From which size on half a square is computed: below, its copying takes as long as the other half.
_LARGE = 256


# --- the value ----------------------------------------------------------------------------------------------------


def _value(A: Tensor, base: Tensor | None) -> tuple[Tensor, Kept]:
    """Return the exponential of ``A``, of 2 or 3 dimensions, around the base, and what the other functions need.

    That is W, and a bound of the norm of A.
    """
    F, kept = _exponential(A)
    return around(base, F), kept


def _exponential(A: Tensor) -> tuple[Tensor, Kept]:
    norms = torch.linalg.vector_norm(A, dim=(-2, -1))
    largest = float(norms.max())
    if A.ndim == 3 and largest > max(2, 8 * float(norms.min())):  # they need different numbers of squarings
        values, kept = zip(*map(_exponential, A), strict=True)
        Ws, bounds = zip(*kept, strict=True)
        return torch.stack(values), (torch.stack(Ws), torch.stack(bounds))
    # No power may overflow.
    size = 2.0 ** math.ceil(math.log2(largest)) if 2**9 < largest < math.inf else 1.0
    A = A / size if size > 1 else A
    B = _square(A)
    B2 = _square(B)
    bound = size * spectral_bound(A, B, B2)
    steps, series = plan(bound, A)
    scale = size / 2**steps
    if scale != 1:
        A, B, B2 = A * scale, B * scale**2, B2 * scale**4
    W = _square(torch.add(B2, B, alpha=series.a))
    D = _minus_one(series, A, B, B2, W)
    return _squared(D, steps), (W, A.new_full(A.shape[:-2], bound, dtype=torch.float64, device="cpu"))


def _squared(D: Tensor, steps: int) -> Tensor:
    """Return :math:`(I + D)^{2^s}` in the place of D; as D is squared, a small one keeps its digits."""
    for step in range(1, steps + 1):
        D = _fused(D, D, D, beta=2)
        # Each squaring doubles what the last one left to orthogonality: one step of Newton and Schulz takes it away.
        if step % 8 == 0 or step == steps > 2:
            Q = _plus_identity_(D.clone())
            D = _fused(D, Q, _plus_identity_(-(Q.mH @ Q)), alpha=0.5)
    return _plus_identity_(D)


def _square(X: Tensor) -> Tensor:
    """Return the square of a Hermitian or skew-Hermitian matrix, of a large one by the columns from the diagonal on."""
    n = X.shape[-1]
    if n < _LARGE or X.ndim > 2:
        return X @ X
    result = torch.empty_like(X)
    size = max(_LARGE // 2, n // 4)
    for i in range(0, n, size):
        j = min(i + size, n)
        torch.mm(X[i:], X[:, i:j], out=result[i:, i:j])
        result[i:j, j:] = result[j:, i:j].mH
    return result


def _minus_one(series: Series, A: Tensor, B: Tensor, B2: Tensor, W: Tensor) -> Tensor:
    """Return :math:`e^A - I`."""
    result = _sum(series.rest, A, B, B2)
    _fuse_(result, _first(series, A, B, B2, W), _sum(series.second, A, B, B2))
    return result


def _first(series: Series, A: Tensor, B: Tensor, B2: Tensor, W: Tensor) -> Tensor:
    _, x, x1, x2 = series.first
    return torch.add(W, B2, alpha=x2).add_(B, alpha=x1).add_(A, alpha=x)


def _sum(coefficients: Sequence[float], A: Tensor, B: Tensor, B2: Tensor) -> Tensor:
    """Return the sum of I, A, B and B2 by their coefficients."""
    one, x, x1, x2 = coefficients
    return _plus_identity_((B2 * x2).add_(B, alpha=x1).add_(A, alpha=x), one)


def _plus_identity_(A: Tensor, factor: float = 1) -> Tensor:
    A.diagonal(dim1=-2, dim2=-1).add_(factor)
    return A


def _fused(C: Tensor, A: Tensor, B: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """Return ``beta C + alpha A B``."""
    multiply = torch.addmm if C.ndim == 2 else torch.baddbmm
    result: Tensor = multiply(C, A, B, beta=beta, alpha=alpha)
    return result


def _fuse_(C: Tensor, A: Tensor, B: Tensor, *, beta: float = 1, alpha: float = 1) -> None:
    (C.addmm_ if C.ndim == 2 else C.baddbmm_)(A, B, beta=beta, alpha=alpha)


# --- the derivative -----------------------------------------------------------------------------------------------


def _pullback(A: Tensor, base: Tensor | None, kept: Sequence[Tensor], G: Tensor) -> Tensor:
    """Return twice the skew-Hermitian part of the adjoint derivative of the exponential at ``A`` applied to ``G``."""
    return _pulled_back(A, kept, around_adjoint(base, G))


def _pulled_back(A: Tensor, kept: Sequence[Tensor], G: Tensor) -> Tensor:
    W, bounds = kept
    if _differ(bounds):
        return torch.stack([_pulled_back(X, each, H) for X, *each, H in zip(A, W, bounds, G, strict=True)])
    steps, series, A, B, B2 = _powers(A, bounds)
    first, second = _first(series, A, B, B2, W), _sum(series.second, A, B, B2)
    for R in reversed(_roots(_sum(series.rest, A, B, B2), first, second, steps)):
        G = _fused(G @ R.mH, R.mH, G)
    of_first, of_second = G @ second.mH, first.mH @ G
    M = torch.add(B2, B, alpha=series.a)
    of_M = M @ plus_adjoint(of_first)
    parts = (of_first, of_second, G)
    _, x, x1, x2 = zip(series.first, series.second, series.rest, strict=True)
    of_B = _added(of_M * series.a, x1, parts)
    of_B2 = plus_adjoint(_added(of_M, x2, parts))
    _fuse_(of_B, B, of_B2)
    of_A = _added(of_first.mul_(x[0]), x[1:], parts[1:])
    _fuse_(of_A, A, plus_adjoint(of_B), alpha=-1)
    return minus_adjoint(of_A).div_(2**steps)


def _added(total: Tensor, coefficients: Sequence[float], parts: Sequence[Tensor]) -> Tensor:
    for coefficient, part in zip(coefficients, parts, strict=True):
        total.add_(part, alpha=coefficient)
    return total


def _powers(A: Tensor, bounds: Tensor) -> tuple[int, Series, Tensor, Tensor, Tensor]:
    """Return s and the series, and A, B and B2 for :math:`A/2^s`."""
    steps, series = plan(bounds.max().item(), A)
    A = A / 2**steps if steps else A
    B = _square(A)
    return steps, series, A, B, _square(B)


def _roots(rest: Tensor, first: Tensor, second: Tensor, steps: int) -> list[Tensor]:
    """Return the exponentials of :math:`A/2^s` up to :math:`A/2`."""
    if steps == 0:
        return []
    _fuse_(rest, first, second)
    return list(accumulate(range(steps - 1), lambda R, _: R @ R, initial=_plus_identity_(rest)))


def _differ(bounds: Tensor) -> bool:
    return bounds.ndim > 0 and len(set(bounds.tolist())) > 1


def _quotient(A: Tensor, kept: Sequence[Tensor], k: int) -> Tensor:
    r"""Return the first ``k`` rows and columns of :math:`\varphi(A) = (e^A - I) A^{-1}`, which A = 0 has as well.

    For :math:`A/2^s` that is :math:`S A^{-1} + A (C - I) B^{-1}`; :math:`\varphi(2A) = \varphi(A) (e^A + I)/2`.
    """
    W, bounds = kept
    if _differ(bounds):
        return torch.stack([_quotient(X, each, k) for X, *each in zip(A, W, bounds, strict=True)])
    steps, series, A, B, B2 = _powers(A, bounds)
    roots = _roots(
        _sum(series.rest, A, B, B2), _first(series, A, B, B2, W), _sum(series.second, A, B, B2), steps
    )
    c, (_, s1, s2, *_, s4) = series.cosine, series.sine
    b, b2, w = (X[..., :k] for X in (B, B2, W))
    # c(B) - c(0) over B, of degree 5, by W B = B^5 + 2 a B^4 + a^2 B^3.
    c4 = c[5] - 2 * series.a * c[6]
    c3 = c[4] - 2 * series.a * c4 - series.a**2 * c[6]
    even = _plus_identity_(b * c[2] + b2 * (c[3] - series.a**2 * c4), c[1])
    _fuse_(even, W, _plus_identity_(b * c[6], c4))
    _fuse_(even, B2, b, alpha=c3)
    total = _sum((series.sine[0], 0, s1, s2 - s4 * series.a**2), A[..., :k], b, b2).add_(w, alpha=s4)
    _fuse_(total, A, even)
    for R in roots:
        total = _fused(total, R, total, beta=0.5, alpha=0.5)
    result: Tensor = total[..., :k, :]
    return result


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
    kept_like=lambda A, _base: (
        torch.empty_like(A),
        A.new_empty(A.shape[:-2], dtype=torch.float64, device="cpu"),
    ),
)
