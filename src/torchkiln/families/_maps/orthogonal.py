"""Pure maps between free matrices and orthogonal ones; no modules, no state of their own.

Matrices are the last two dimensions, everything before them is a batch. ``X`` is tall: n x k with n >= k. A ``base``,
n x n, multiplies the value from the left.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchkiln.families._maps.cayley import CAYLEY
from torchkiln.families._maps.exponential import EXPONENTIAL
from torchkiln.families._maps.householder import HOUSEHOLDER
from torchkiln.families._maps.precision import widen
from torchkiln.families._maps.skew import explicit_map, skew

__all__ = [
    "cayley",
    "complete_basis",
    "exponential",
    "householder",
    "householder_inverse",
    "in_dtype_of",
    "is_orthonormal",
    "orthonormalize",
    "skew",
]


_EXPONENTIAL, _CAYLEY = explicit_map("exponential", EXPONENTIAL), explicit_map("cayley", CAYLEY)


def in_dtype_of(X: Tensor, base: Tensor | None) -> Tensor | None:
    """Return the base in the dtype of ``X``."""
    return base if base is None or base.dtype == X.dtype else base.to(X.dtype)


def exponential(X: Tensor, base: Tensor | None = None) -> Tensor:
    r"""Return the first k columns of :math:`\exp(A)`, ``A`` the :func:`skew` of ``X`` (arXiv:1901.08428)."""
    return _EXPONENTIAL(X, base)


def cayley(X: Tensor, base: Tensor | None = None) -> Tensor:
    r"""Return the first k columns of :math:`(I - A/2)^{-1} (I + A/2)`, ``A`` the :func:`skew` of ``X``."""
    return _CAYLEY(X, base)


def householder(X: Tensor, base: Tensor | None = None) -> Tensor:
    r"""Return :math:`H_1 \cdots H_k` times the first k unit vectors, times the signs on the diagonal of ``X``.

    :math:`H_i = I - \tau_i v_i v_i^T` with :math:`\tau_i = 2 / \|v_i\|^2`; :math:`v_i` is zero above row i, 1 there,
    and column i of ``X`` below. Only the sign of the diagonal counts, zero as negative: whatever weight decay does to
    it, the columns stay orthonormal, and ``X = 0`` gives the first unit vectors.
    """
    return HOUSEHOLDER(X, base)


def householder_inverse(Q: Tensor) -> Tensor:
    """Return an ``X`` with ``householder(X) == Q`` for orthonormal columns ``Q``; for others, of the nearest QR factor.

    Above the diagonal ``X`` holds what the factorization left there, which :func:`householder` does not read.
    """
    if Q.is_meta:
        return torch.empty_like(Q)
    X, tau = torch.geqrf(Q)
    diagonal = X.diagonal(dim1=-2, dim2=-1)
    signs = torch.where(diagonal < 0, -1.0, 1.0)
    # LAPACK leaves out a reflection that would change nothing (tau = 0); householder() always reflects.
    diagonal.copy_(torch.where(tau == 0, -signs, signs))
    return X.contiguous()  # LAPACK's columns lie one after the other; safetensors takes rows alone


def is_orthonormal(Q: Tensor) -> bool:
    """Say whether the columns of ``Q`` are orthonormal to the rounding of its dtype."""
    n, k = Q.shape[-2:]
    eps = torch.finfo(Q.dtype).eps
    # Rounding a matrix with unit columns moves its Gram matrix by at most eps; in wide types products round as well.
    tolerance = 10 * n * eps if widen(Q) is Q else 2 * eps
    Q = widen(Q)
    return torch.allclose(Q.mH @ Q, torch.eye(k, dtype=Q.dtype, device=Q.device), atol=tolerance)


def orthonormalize(A: Tensor) -> Tensor:
    """Return the factor ``Q`` of ``A = QR`` for which the diagonal of ``R`` is not negative."""
    X, tau = torch.geqrf(A)
    diagonal = X.diagonal(dim1=-2, dim2=-1)  # of R, and real also where A is complex
    signs = torch.where(diagonal.real < 0, -1.0, 1.0).to(A.dtype)
    Q: Tensor = torch.linalg.householder_product(X, tau)
    return (Q * signs.unsqueeze(-2)).contiguous()  # as above


def complete_basis(Q: Tensor) -> Tensor:
    """Return an n x n orthonormal matrix that begins with the columns of ``Q``, orthonormalized where they are not.

    The columns that ``Q`` lacks are drawn from torch's default generator; a square ``Q`` draws nothing.
    """
    n, k = Q.shape[-2:]
    if Q.is_meta:
        return Q.new_empty(*Q.shape[:-1], n)
    wide = widen(Q)
    if n == k:
        return Q.clone() if is_orthonormal(Q) else orthonormalize(wide).to(Q.dtype)
    rest = torch.randn(*Q.shape[:-1], n - k, dtype=wide.dtype, device=Q.device)
    return orthonormalize(torch.cat([wide, rest], dim=-1)).to(Q.dtype)
