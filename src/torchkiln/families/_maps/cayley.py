r"""The Cayley transform of skew-Hermitian matrices, and its derivative by two products with the value.

.. math:: c(A) = (I - A/2)^{-1} (I + A/2) = 2 N - I, \qquad N = (I - A/2)^{-1} = (c(A) + I)/2

As :math:`dN = N (dA/2) N`, the adjoint derivative takes a cotangent G to :math:`N^H G N^H`, with no factorization.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from torchkiln.families._maps.skew import SkewFunction

__all__ = ["CAYLEY"]

Kept = tuple[Tensor]


def _value(A: Tensor) -> tuple[Tensor, Kept]:
    """Return the Cayley transform of ``A``, which is also what the other functions need."""
    if A.shape[-1] <= _LEAF or A.device.type != "cpu" or _is_large(A):
        Q: Tensor = torch.linalg.solve_ex(_plus_identity(A, -0.5), _plus_identity(A, 0.5))[0]
    else:
        # As I + A N, which has no more rounding than A is large.
        Q = _plus_identity(A @ _inverse_by_halves(_plus_identity(A, -0.5)), 1)
    return Q, (Q,)


def _is_large(A: Tensor) -> bool:
    """Return whether inversion by halves, which exchanges no rows, would lose more digits than LAPACK does."""
    return bool(torch.linalg.vector_norm(A, dim=(-2, -1)).max() > math.sqrt(2 * A.shape[-1]))


def _plus_identity(A: Tensor, factor: float) -> Tensor:
    """Return :math:`I + f A`."""
    result = A * factor
    result.diagonal(dim1=-2, dim2=-1).add_(1)
    return result


def _pullback(_A: Tensor, kept: Sequence[Tensor], G: Tensor) -> Tensor:
    """Return twice the skew-Hermitian part of the adjoint derivative of the transform applied to ``G``."""
    N = _half_plus_identity(kept[0]).mH
    H = N @ G @ N
    return H - H.mH


def _quotient(_A: Tensor, kept: Sequence[Tensor], k: int) -> Tensor:
    """Return the first ``k`` rows and columns of :math:`(c(A) - I) A^{-1} = N`, which A = 0 has as well."""
    return _half_plus_identity(kept[0][..., :k, :k])


def _half_plus_identity(Q: Tensor) -> Tensor:
    N = Q * 0.5
    N.diagonal(dim1=-2, dim2=-1).add_(0.5)
    return N


# Matrices up to this size are inverted by LAPACK, larger ones by halves: products are faster.
_LEAF = 64


def _inverse_by_halves(M: Tensor) -> Tensor:
    """Return the inverse of a matrix whose Hermitian part is positive: so are its halves and Schur complements."""
    n = M.shape[-1]
    if n <= _LEAF:
        return torch.linalg.inv_ex(M)[0]  # type: ignore[no-any-return]  # torch's
    h = n // 2
    a = _inverse_by_halves(M[..., :h, :h])
    right, left = a @ M[..., :h, h:], M[..., h:, :h] @ a
    d = _inverse_by_halves(M[..., h:, h:] - M[..., h:, :h] @ right)
    inverse = torch.empty_like(M)
    lower = d @ left
    inverse[..., h:, h:] = d
    inverse[..., h:, :h] = -lower
    inverse[..., :h, h:] = -(right @ d)
    inverse[..., :h, :h] = a + right @ lower
    return inverse


# --- by differentiable operations ---------------------------------------------------------------------------------


def _plain(A: Tensor) -> Tensor:
    I = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)  # noqa: E741  # the identity's name
    Q: Tensor = torch.linalg.solve(I - A / 2, I + A / 2)
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
)
