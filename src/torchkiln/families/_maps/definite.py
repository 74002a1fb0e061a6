"""Pure maps onto definite matrices, correlations and stable systems, and their inverses."""

from __future__ import annotations

import torch
from torch import Tensor

from torchkiln.families._maps.elementwise import softplus, softplus_inverse

__all__ = [
    "cholesky_factor",
    "cholesky_free",
    "correlation_factor",
    "hurwitz",
    "hurwitz_inverse",
    "laplacian",
    "low_rank_root",
    "moebius",
    "principal_factors",
]


def _with_diagonal(X: Tensor, d: Tensor) -> Tensor:
    return X.tril(-1) + torch.diag_embed(d).to(X.dtype)


def cholesky_factor(X: Tensor) -> Tensor:
    """Return the lower triangle of ``X`` with the softplus of the diagonal: a Cholesky factor."""
    return _with_diagonal(X, softplus(X.diagonal(dim1=-2, dim2=-1).real))


def cholesky_free(L: Tensor) -> Tensor:
    """Return a matrix that :func:`cholesky_factor` sends to ``L``."""
    return _with_diagonal(L, softplus_inverse(L.diagonal(dim1=-2, dim2=-1).real))


def correlation_factor(X: Tensor) -> Tensor:
    """Return the lower triangle of ``X`` with ones on the diagonal, each row scaled to length 1."""
    L = _with_diagonal(X, torch.ones_like(X.diagonal(dim1=-2, dim2=-1).real))
    result: Tensor = L / torch.linalg.vector_norm(L, dim=-1, keepdim=True)
    return result


def low_rank_root(A: Tensor, rank: int) -> Tensor:
    """Return the n x rank matrix L for which ``L L^H`` is the semidefinite matrix of that rank nearest to ``A``.

    Eigenvalues are at least the rounding unit times the largest: a column of zeros would have no gradient.
    """
    values, V = torch.linalg.eigh((A + A.mH) / 2)
    start, eps = A.shape[-1] - rank, torch.finfo(values.dtype).eps
    scale = values[..., -1:].clamp(min=0) if A.shape[-1] else values
    floor = torch.where(scale > 0, scale, 1) * eps
    result: Tensor = V[..., start:] * torch.maximum(values[..., start:], floor)[..., None, :].sqrt().to(
        V.dtype
    )
    return result


def principal_factors(A: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    r"""Return d and U with ``diag(d) + U U^H`` near to ``A``.

    With P the projection onto the eigenvectors that :math:`A - D` has beside its ``rank`` largest, Newton's steps for
    :math:`P (A - D) P = 0` in d converge quadratically where ``A`` has this form and rank is small enough for it to be
    unique.
    """
    diagonal = A.diagonal(dim1=-2, dim2=-1).real
    d = diagonal.clamp(min=0) / 2
    for _ in range(50):
        E = A - torch.diag_embed(d).to(A.dtype)
        rest = torch.linalg.eigh(E).eigenvectors[..., : A.shape[-1] - rank]
        P = rest @ rest.mH
        steps = torch.linalg.pinv(P.abs().square(), hermitian=True)
        change = (P @ E @ P).diagonal(dim1=-2, dim2=-1).real
        d = (d + (steps @ change[..., None])[..., 0]).clamp(min=0)
    U = low_rank_root(A - torch.diag_embed(d).to(A.dtype), rank)
    return (diagonal - U.abs().square().sum(-1)).clamp(min=0), U


def laplacian(weights: Tensor) -> Tensor:
    """Return the Laplacian of the graph with symmetric edge ``weights``; their diagonal does not count.

    Example:
        >>> laplacian(torch.ones(2, 2))
        tensor([[ 1., -1.],
                [-1.,  1.]])
    """
    edges = weights.tril(-1) + weights.triu(1)
    return torch.diag_embed(edges.sum(-1)) - edges


# --- stable systems ---------------------------------------------------------------------------------------------------


def hurwitz(X: Tensor) -> Tensor:
    r"""Return :math:`Q^{-1} (S - I/2)`, with Q definite from the lower triangle of ``X`` and S skew from the upper.

    Every matrix whose eigenvalues have negative real parts is one of these, for the Q that solves Lyapunov's equation
    :math:`A^T Q + Q A = -I`, and for no other pair.
    """
    L, upper = cholesky_factor(X), X.triu(1)
    return torch.cholesky_solve(upper - upper.mT - _eye(X) / 2, L)


def hurwitz_inverse(A: Tensor) -> Tensor:
    """Return the matrix that :func:`hurwitz` sends to ``A``; computed in float64."""
    B = A.double()
    Q = _lyapunov(B)
    S = Q @ B
    X = cholesky_free(torch.linalg.cholesky(Q)) + ((S - S.mT) / 2).triu(1)
    return X.to(A.dtype)


def _lyapunov(A: Tensor) -> Tensor:
    r"""Solve :math:`A^T Q + Q A = -I` by doubling.

    With the Cayley transform C of A it is :math:`Q = C^T Q C + P`, the sum of :math:`(C^T)^k P C^k`.
    """
    scale = torch.linalg.matrix_norm(A).clamp(min=torch.finfo(A.dtype).tiny)[..., None, None]
    A, I = A / scale, _eye(A)  # noqa: E741  # the identity's name
    R = torch.linalg.inv(I - A)
    C, Q = (I + A) @ R, 2 * R.mT @ R
    for _ in range(64):  # C^(2^64) is 0 for every stable matrix of floats
        Q = Q + C.mT @ Q @ C
        C = C @ C
    Q = Q / scale
    result: Tensor = (Q + Q.mT) / 2
    return result


def moebius(H: Tensor) -> Tensor:
    r"""Return :math:`(I + H)(I - H)^{-1}`: eigenvalues of negative real part go into the unit circle."""
    I = _eye(H)  # noqa: E741  # the identity's name
    result: Tensor = torch.linalg.solve(I - H, I + H)
    return result


def _eye(X: Tensor) -> Tensor:
    return torch.eye(X.shape[-1], dtype=X.dtype, device=X.device)
