r"""The exponential of skew-Hermitian matrices and its derivative, by few products and in few buffers.

**Value.** :math:`e^A = (e^{A/2^s})^{2^s}`, the inner one as C + S, an even and an odd polynomial: the Chebyshev series
of cos and sin on the interval of the spectrum, which need fewer terms than Taylor's. Four products make both, and three
near zero. All but one are squares of skew or Hermitian matrices, of which one half is computed, the other its adjoint:

.. math:: B = A^2, \quad M = B^2 + a B, \quad W = M^2, \quad C + S = f F H + \ldots

F is W, H is M, each with a sum of lower powers, and what is added is such a sum. As A is normal, traces of its powers
bound its norm well, and s stays small.

**Derivative.** The same products in reverse. Of a cotangent of B only the Hermitian part counts, and of one of A the
skew one, so that a square costs one product; there are five in all, and two for each of the s squarings. The Hermitian
part of F and M are kept as the two halves of one matrix.

s and the coefficients are chosen on the host, from a few numbers: a device is waited for once, in the value alone, and
again where powers overflow. While a graph is captured, which forbids it, the device chooses s itself. That is not the
rule, for it has to compute twelve squarings, and their derivatives, whether they are needed or not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from torchkiln.families._maps.explicit import around, around_adjoint
from torchkiln.families._maps.exponential_polynomial import (
    Parts,
    evaluated,
    exponential,
    minus_one,
    through_products,
    with_factors,
)
from torchkiln.families._maps.exponential_series import moments, plan, spectral_bound, widest
from torchkiln.families._maps.exponential_steps import (
    Steps,
    can_wait,
    chosen_by_device,
    computed,
    divided,
    taken,
)
from torchkiln.families._maps.hermitian import minus_adjoint, square, unpacked
from torchkiln.families._maps.products import add_product, add_product_, plus_identity_
from torchkiln.families._maps.skew import SkewFunction

__all__ = ["EXPONENTIAL"]

# The Hermitian part of F and M, packed; and bounds of the norms of A on the host, or the numbers of squarings where a
# device chose them.
Kept = tuple[Tensor, Tensor]


# --- the value ----------------------------------------------------------------------------------------------------


def _value(A: Tensor, base: Tensor | None) -> tuple[Tensor, Kept]:
    """Return the exponential of ``A``, of 2 or 3 dimensions, around the base, and what the other functions need."""
    Q, kept = _unbased(A)
    return around(base, Q), kept


def _unbased(A: Tensor) -> tuple[Tensor, Kept]:
    B = square(A)
    B2 = square(B)
    if not can_wait(A):
        return _by_device(A, B, B2)
    bounds = [spectral_bound(row, A) for row in _read(moments(B, B2))]
    if not all(map(math.isfinite, bounds)):
        return _of_large(A)
    if max(bounds) > max(2, 8 * min(bounds)):  # they need different numbers of squarings
        return _stacked(_by_host(*each) for each in zip(A, B, B2, bounds, strict=True))
    return _by_host(A, B, B2, max(bounds))


def _read(numbers: Tensor) -> list[list[float]]:
    """Return rows of numbers; a device is waited for."""
    rows: list[list[float]] = numbers.view(-1, numbers.shape[-1]).tolist()
    return rows


def _of_large(A: Tensor) -> tuple[Tensor, Kept]:
    """Return the exponentials of matrices whose powers overflow, or which are not finite themselves."""
    if A.ndim > 2:
        return _stacked(map(_of_large, A))
    norm = float(torch.linalg.vector_norm(A))
    size = 2.0 ** math.ceil(math.log2(norm)) if 1 < norm < math.inf else 1.0
    A = A / size
    B = square(A)
    B2 = square(B)
    (row,) = _read(moments(B, B2))
    bound = size * spectral_bound(row, A)
    return _by_host(A, B, B2, bound, size=size)


def _stacked(results: Iterable[tuple[Tensor, Kept]]) -> tuple[Tensor, Kept]:
    values, kept = zip(*results, strict=True)
    halves, bounds = zip(*kept, strict=True)
    return torch.stack(values), (torch.stack(halves), torch.stack(bounds))


def _by_host(A: Tensor, B: Tensor, B2: Tensor, bound: float, *, size: float = 1) -> tuple[Tensor, Kept]:
    """Return the same by a bound of the norm of ``size`` times ``A``, using up ``B`` and ``B2``."""
    steps, series = plan(bound, A)
    scale = size / 2**steps
    if scale != 1:
        A, B, B2 = A * scale, B.mul_(scale**2), B2.mul_(scale**4)
    parts, halves = evaluated(series, A, B, B2)
    Q = _squared(minus_one(parts, out=parts.M), steps) if steps else exponential(parts, out=parts.M)
    return Q, (halves, A.new_full(A.shape[:-2], bound, dtype=torch.float64, device="cpu"))


def _by_device(A: Tensor, B: Tensor, B2: Tensor) -> tuple[Tensor, Kept]:
    """Return the same by the series for all norms, and all squarings that may be needed."""
    radius, series = widest(A)
    kept = chosen_by_device(moments(B, B2), A, radius)
    steps = kept[..., None, None]
    A, B, B2 = (divided(X, steps, times=times) for X, times in ((A, 1), (B, 2), (B2, 4)))
    parts, halves = evaluated(series, A, B, B2)
    return _squared(minus_one(parts, out=parts.M), steps), (halves, kept)


def _squared(D: Tensor, steps: Steps) -> Tensor:
    """Return :math:`(I + D)^{2^s}` in the place of D; as D is squared, a small one keeps its digits."""
    last = len(computed(steps))
    for step in computed(steps):
        D = taken(step, steps, new=add_product(D, D, D, beta=2), old=D)
        # Each squaring doubles what the last one left to orthogonality: one step of Newton and Schulz takes it away.
        if step % 8 == 0 or step == last > 2:
            Q = plus_identity_(D.clone())
            D = add_product(D, Q, plus_identity_(-(Q.mH @ Q)), alpha=0.5)
    return plus_identity_(D)


# --- the derivative -----------------------------------------------------------------------------------------------


def _pullback(A: Tensor, base: Tensor | None, kept: Sequence[Tensor], G: Tensor) -> Tensor:
    """Return twice the skew-Hermitian part of the adjoint derivative of the exponential at ``A`` applied to ``G``."""
    return _pulled_back(A, kept, around_adjoint(base, G))


def _pulled_back(A: Tensor, kept: Sequence[Tensor], G: Tensor) -> Tensor:
    halves, numbers = kept
    if _differ(numbers):
        each = zip(A, halves, numbers, G, strict=True)
        return torch.stack([_pulled_back(X, (half, number), H) for X, half, number, H in each])
    steps, parts = _parts(A, halves, numbers)
    for step, R in zip(reversed(computed(steps)), reversed(_roots(steps, parts)), strict=True):
        G = taken(step, steps, new=add_product(G @ R.mH, R.mH, G), old=G)
    return divided(minus_adjoint(through_products(parts, G)), steps)


def _parts(A: Tensor, halves: Tensor, numbers: Tensor) -> tuple[Steps, Parts]:
    """Return s, and the parts of the exponential of :math:`A/2^s` by what was kept."""
    steps: Steps
    if numbers.is_floating_point():
        steps, series = plan(numbers.max().item(), A)
    else:
        steps, series = numbers[..., None, None], widest(A)[1]
    A = divided(A, steps)
    if series.squares == 2:
        M, B = unpacked(halves, _squares(A).neg_())
        return steps, with_factors(series, A, B, M, torch.add(M, B, alpha=series.first[1]))
    B = square(A)
    hermitian, M = unpacked(halves, _squares(B).add_(B.diagonal(dim1=-2, dim2=-1).real, alpha=series.a))
    return steps, with_factors(series, A, B, M, hermitian)


def _squares(X: Tensor) -> Tensor:
    """Return the squared lengths of the rows, which are the diagonal of :math:`X X^H`."""
    lengths: Tensor = torch.linalg.vector_norm(X, dim=-1)
    return lengths.square_()


def _roots(steps: Steps, parts: Parts) -> list[Tensor]:
    """Return what is squared: the exponential of :math:`A/2^s`, its square and so on."""
    roots: list[Tensor] = []
    for _ in computed(steps):
        roots.append(roots[-1] @ roots[-1] if roots else exponential(parts))
    return roots


def _differ(bounds: Tensor) -> bool:
    return bounds.ndim > 0 and bounds.is_floating_point() and len(set(bounds.tolist())) > 1


def _quotient(A: Tensor, kept: Sequence[Tensor], k: int) -> Tensor:
    r"""Return the first ``k`` rows and columns of :math:`\varphi(A) = (e^A - I) A^{-1}`, which A = 0 has as well.

    For :math:`A/2^s` that is :math:`S A^{-1} + A (C - I) B^{-1}`; :math:`\varphi(2A) = \varphi(A) (e^A + I)/2`.
    """
    halves, numbers = kept
    if _differ(numbers):
        return torch.stack([_quotient(X, each, k) for X, *each in zip(A, halves, numbers, strict=True)])
    steps, parts = _parts(A, halves, numbers)
    series, A, B, M, F, _ = parts
    (x, x1, x2), c, (s0, s1, s2, *_, s4) = series.first, series.cosine, series.sine
    square_a = series.a**2
    a, b, m = (X[..., :k] for X in (A, B, M))
    b2 = torch.sub(m, b, alpha=series.a)
    # c(B) - c(0) over B is M times (c6 M B + c4 M + c3 B) and a sum of lower powers, as M^2 = B^4 + 2 a B^3 + a^2 B^2.
    c4 = c[5] - 2 * series.a * c[6]
    c3 = c[4] - 2 * series.a * c4 - square_a * c[6]
    inner = add_product_(torch.add(b * c3, m, alpha=c4), M, b, alpha=c[6])
    even = torch.add(b * c[2], b2, alpha=c[3] - square_a * c4 - series.a * c3)
    add_product_(plus_identity_(even, c[1]), M, inner)
    total = torch.add(b * s1, b2, alpha=s2 - s4 * square_a)
    if series.squares == 3:
        total.add_(F[..., :k].sub(m, alpha=x2).sub_(b, alpha=x1).sub_(a, alpha=x), alpha=s4)
    total = add_product_(plus_identity_(total, s0), A, even)
    for step, R in zip(computed(steps), _roots(steps, parts), strict=True):
        total = taken(step, steps, new=add_product(total, R, total, beta=0.5, alpha=0.5), old=total)
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
