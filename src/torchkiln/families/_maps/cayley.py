r"""The Cayley transform of skew-Hermitian matrices, and its derivative by two products with the value.

.. math:: c(A) = (I - A/2)^{-1} (I + A/2) = 2 N - I, \qquad N = (I - A/2)^{-1} = (c(A) + I)/2

As :math:`dN = N (dA/2) N`, the adjoint derivative takes a cotangent G to :math:`N^H G N^H`, with no factorization.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from torchkiln.families._maps.skew import SkewFunction, minus_adjoint

__all__ = ["CAYLEY"]

Kept = tuple[Tensor]


def _value(A: Tensor) -> tuple[Tensor, Kept]:
    """Return the Cayley transform of ``A``, which is also what the other functions need."""
    if A.device.type != "cpu" or _is_large(A):
        Q: Tensor = torch.linalg.solve_ex(_plus_identity(A, -0.5), _plus_identity(A, 0.5))[0]
    else:
        Q = _plus_identity(_inverse_minus_one(A * -0.5), 2)
    return Q, (Q,)


def _is_large(A: Tensor) -> bool:
    """Return whether inversion by halves, which exchanges no rows, would lose more digits than LAPACK does."""
    return bool(torch.linalg.vector_norm(A, dim=(-2, -1)).max() > math.sqrt(1.2 * A.shape[-1]))


def _plus_identity(A: Tensor, factor: float) -> Tensor:
    """Return :math:`I + f A`."""
    result = A * factor
    result.diagonal(dim1=-2, dim2=-1).add_(1)
    return result


def _pullback(_A: Tensor, kept: Sequence[Tensor], G: Tensor) -> Tensor:
    """Return twice the skew-Hermitian part of the adjoint derivative of the transform applied to ``G``."""
    N = _half_plus_identity(kept[0]).mH
    return minus_adjoint(N @ G @ N)


def _quotient(_A: Tensor, kept: Sequence[Tensor], k: int) -> Tensor:
    """Return the first ``k`` rows and columns of :math:`(c(A) - I) A^{-1} = N`, which A = 0 has as well."""
    return _half_plus_identity(kept[0][..., :k, :k])


def _half_plus_identity(Q: Tensor) -> Tensor:
    N = Q * 0.5
    N.diagonal(dim1=-2, dim2=-1).add_(0.5)
    return N


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
    factors, pivots, _ = torch.linalg.lu_factor_ex(_plus_identity(X, 1))
    P = torch.lu_unpack(factors, pivots, unpack_data=False)[0]
    solved = torch.linalg.solve_triangular(factors, X, upper=True, left=False)
    solved = torch.linalg.solve_triangular(factors, solved, upper=False, left=False, unitriangular=True)
    result: Tensor = solved @ -P.mT
    return result


# --- by differentiable operations ---------------------------------------------------------------------------------


def _plain(A: Tensor) -> Tensor:
    I = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)  # noqa: E741  # the identity's name
    Q: Tensor = torch.linalg.solve(torch.add(I, A, alpha=-0.5), torch.add(I, A, alpha=0.5))
    return Q


def _plain_quotient(M: Tensor, B: Tensor) -> Tensor:
    I = torch.eye(M.shape[-1], dtype=M.dtype, device=M.device)  # noqa: E741  # as above
    result: Tensor = torch.linalg.solve(I - M / 2, B)
    return result


CAYLEY = SkewFunction(
    value=_value,
    pullback=_pullback,
    quotient=_quotient,
    plain=_plain,
    plain_quotient=_plain_quotient,
    kept_like=lambda A: (torch.empty_like(A),),
    small=48,
)
