r"""The Cayley transform of skew-Hermitian matrices, and its derivative by two products with what is at hand.

.. math:: c(A) = (I - A/2)^{-1} (I + A/2) = 2 N - I, \qquad N = (I - A/2)^{-1} = (c(A) + I)/2

As :math:`dN = N (dA/2) N`, the adjoint derivative of B c(A) takes a cotangent G to :math:`(B N)^H G N^H`, with
:math:`B N = (B c(A) + B)/2`: no factorization, and no product with B.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from torchkiln.families._maps.hermitian import minus_adjoint
from torchkiln.families._maps.products import add_product, plus_identity_
from torchkiln.families._maps.skew import SkewFunction

__all__ = ["CAYLEY"]


# Up to this size of a matrix LAPACK takes no longer in double precision; thin matrices come as small ones.
_PRECISE = 128


def _value(A: Tensor, base: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the Cayley transform of ``A`` around the base; to keep are N - I, with a base, and that value."""
    value = A.new_empty(0)
    if A.device.type != "cpu" or _is_large(A):
        Q: Tensor = torch.linalg.solve_ex(plus_identity_(A * -0.5), plus_identity_(A * 0.5))[0]
        return (Q, (value,)) if base is None else (base @ Q, (plus_identity_(Q * 0.5, -0.5), value))
    D = _precisely_minus_one(A) if A.shape[-1] <= _PRECISE else _inverse_minus_one(A * -0.5)
    if base is None:
        return plus_identity_(D.mul_(2)), (value,)
    return add_product(base, base, D, alpha=2), (D, value)


def _is_large(A: Tensor) -> bool:
    """Return whether inversion by halves, which exchanges no rows, would lose more digits than LAPACK does."""
    n = A.shape[-1]
    return n > _PRECISE and bool(torch.linalg.vector_norm(A, dim=(-2, -1)).max() > math.sqrt(1.2 * n))


def _precisely_minus_one(A: Tensor) -> Tensor:
    """Return N - I."""
    half = A.to(torch.promote_types(A.dtype, torch.float64)) * 0.5
    D: Tensor = torch.linalg.solve_ex(plus_identity_(-half), half)[0]
    return D.to(A.dtype)


def _pullback(_A: Tensor, base: Tensor | None, kept: Sequence[Tensor], G: Tensor) -> Tensor:
    """Return twice the skew-Hermitian part of the adjoint derivative of the transform applied to ``G``."""
    if base is None:
        N = plus_identity_(kept[0] * 0.5, 0.5).mH
        return minus_adjoint(N @ G @ N)
    D, BQ = kept
    P = ((BQ + base).mul_(0.5)).mH @ G
    return minus_adjoint(add_product(P, P, D.mH))


def _quotient(_A: Tensor, kept: Sequence[Tensor], k: int) -> Tensor:
    """Return the first ``k`` rows and columns of :math:`(c(A) - I) A^{-1} = N`, which A = 0 has as well."""
    return plus_identity_(kept[0][..., :k, :k] * 0.5, 0.5)


def _kept_like(A: Tensor, base: Tensor | None) -> tuple[Tensor, ...]:
    value = A.new_empty(0)
    return (value,) if base is None else (torch.empty_like(A), value)


# Matrices up to this size are inverted by factors, larger ones by halves: products are faster.
_LEAF = 64


def _inverse_minus_one(X: Tensor) -> Tensor:
    r"""Return :math:`(I + X)^{-1} - I`, which rounds no more than X is large.

    The Hermitian part of I + X is positive; so are those of its halves and Schur complements.
    """
    n = X.shape[-1]
    if n <= _LEAF:
        return _by_factors(X)
    h = n // 2
    a = _inverse_minus_one(X[..., :h, :h])
    right = X[..., :h, h:] + a @ X[..., :h, h:]
    left = X[..., h:, :h] + X[..., h:, :h] @ a
    d = _inverse_minus_one(X[..., h:, h:] - X[..., h:, :h] @ right)
    result = torch.empty_like(X)
    result[..., h:, h:] = d
    lower = torch.matmul(d, left, out=result[..., h:, :h]).add_(left)
    torch.matmul(right, lower, out=result[..., :h, :h]).add_(a)
    torch.matmul(right, d, out=result[..., :h, h:]).add_(right).neg_()
    lower.neg_()
    return result


def _by_factors(X: Tensor) -> Tensor:
    """Return :math:`-X U^{-1} L^{-1} P^T`: solving from the right takes LAPACK half as long as from the left."""
    factors, pivots, _ = torch.linalg.lu_factor_ex(plus_identity_(X.clone()))
    P = torch.lu_unpack(factors, pivots, unpack_data=False)[0]
    solved = torch.linalg.solve_triangular(factors, X, upper=True, left=False)
    solved = torch.linalg.solve_triangular(factors, solved, upper=False, left=False, unitriangular=True)
    result: Tensor = solved @ -P.mT
    return result


# --- by differentiable operations ---------------------------------------------------------------------------------


def _plain(A: Tensor) -> Tensor:
    I = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)  # noqa: E741  # the identity's name
    Q: Tensor = torch.linalg.solve_ex(torch.add(I, A, alpha=-0.5), torch.add(I, A, alpha=0.5))[0]
    return Q


def _plain_quotient(M: Tensor, B: Tensor) -> Tensor:
    I = torch.eye(M.shape[-1], dtype=M.dtype, device=M.device)  # noqa: E741  # as above
    result: Tensor = torch.linalg.solve_ex(I - M / 2, B)[0]
    return result


CAYLEY = SkewFunction(
    value=_value,
    pullback=_pullback,
    quotient=_quotient,
    plain=_plain,
    plain_quotient=_plain_quotient,
    kept_like=_kept_like,
    small=48,
    precise=True,
)
