"""Pure maps around a base: matrices with orthonormal columns, n x k, in O(n k^2) time and O(n k) memory."""

from __future__ import annotations

import torch
from torch import Tensor

from torchkiln.families._maps.spectral import polar

__all__ = [
    "complete",
    "first_columns",
    "gram_residual",
    "horizontal",
    "nearest_frame",
    "nearest_rotation",
    "newton_schulz",
    "retract",
]


def first_columns(X: Tensor) -> Tensor:
    """Return the first unit vectors, in the shape of ``X``."""
    return torch.eye(*X.shape[-2:], dtype=X.dtype, device=X.device).expand_as(X)


def retract(Q: Tensor, X: Tensor) -> Tensor:
    r"""Return the Cayley transform of :math:`W = P X Q^H - Q X^H P`, with :math:`P = I - Q Q^H / 2`, times ``Q``.

    ``X = 0`` gives ``Q``. W is skew and of rank 2k, so the n x n system shrinks to one of 2k x 2k
    (Wen and Yin, doi:10.1007/s10107-012-0584-1).
    """
    k = Q.shape[-1]
    PX = X - Q @ (Q.mH @ X) / 2
    U, V = torch.cat([PX, Q], -1), torch.cat([Q, -PX], -1)
    I = torch.eye(2 * k, dtype=X.dtype, device=X.device)  # noqa: E741  # the identity's name
    step: Tensor = torch.linalg.solve(I - V.mH @ U / 2, V.mH @ Q)
    return Q + U @ step


def horizontal(Q: Tensor, X: Tensor) -> Tensor:
    """Return the part of ``X`` that moves the span of ``Q``: what is orthogonal to all columns of ``Q``."""
    return X - Q @ (Q.mH @ X)


def gram_residual(Q: Tensor) -> Tensor:
    """Return ``Q^H Q - I`` for a tall ``Q`` and ``Q Q^H - I`` for a wide one, in double precision."""
    Q = Q.to(torch.promote_types(Q.dtype, torch.float64))
    G = Q.mH @ Q if Q.shape[-2] >= Q.shape[-1] else Q @ Q.mH
    return G - torch.eye(G.shape[-1], dtype=G.dtype, device=G.device)


def nearest_frame(A: Tensor) -> Tensor:
    """Return ``A`` where its columns are orthonormal to the rounding, else the nearest matrix with such columns."""
    if A.numel() == 0:
        return A.clone()
    tolerance = 10 * A.shape[-2] * torch.finfo(A.dtype).eps
    on = gram_residual(A).abs().amax((-2, -1), keepdim=True) <= tolerance
    return torch.where(on, A, polar(A))


def nearest_rotation(A: Tensor) -> Tensor:
    """Return the nearest matrix of determinant 1 with orthonormal columns, for a square ``A``."""
    if A.numel() == 0:
        return A.clone()
    U, _, Vh = torch.linalg.svd(A)
    sign = torch.linalg.det(U @ Vh).sign()
    flip = torch.ones_like(A[..., 0])
    flip[..., -1:] = sign[..., None]
    on = gram_residual(A).abs().amax((-2, -1)) <= 10 * A.shape[-1] * torch.finfo(A.dtype).eps
    keep = (on & (sign > 0))[..., None, None]
    return torch.where(keep, A, (U * flip[..., None, :]) @ Vh)


def complete(Q: Tensor) -> Tensor:
    """Return a square matrix with orthonormal columns that begins with those of ``Q``."""
    n, k = Q.shape[-2:]
    return Q if n == k else torch.cat([Q, torch.linalg.qr(Q, mode="complete").Q[..., k:]], -1)


def newton_schulz(A: Tensor, steps: int, *, order: int) -> Tensor:
    r"""Return the polar factor by products alone: :math:`A \leftarrow A (I + R/2 + \dots)`, with :math:`R = I - A^H A`.

    ``order`` terms of the series of :math:`(I - R)^{-1/2}`: 1 or 2 (Bjorck and Bowie, doi:10.1137/0708036).
    """
    bound = torch.linalg.matrix_norm(A.detach(), keepdim=True).clamp(min=torch.finfo(A.dtype).tiny)
    A = A / bound
    I = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)  # noqa: E741  # the identity's name
    for _ in range(steps):
        R = I - A.mH @ A
        A = A @ (I + R / 2 if order == 1 else I + R / 2 + R @ R * (3 / 8))
    return A
