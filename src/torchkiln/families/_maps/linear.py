"""Orthogonal projections onto linear subspaces of matrices, and the tensors that write them in fewer numbers."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "antihermitize",
    "antisymmetrize",
    "circulant_pattern",
    "hankel_pattern",
    "hermitize",
    "mean_over",
    "remove_mean",
    "remove_trace",
    "spread",
    "symmetrize",
    "toeplitz_pattern",
]


def symmetrize(X: Tensor) -> Tensor:
    """Return the symmetric matrix nearest to ``X``.

    Example:
        >>> symmetrize(torch.tensor([[1.0, 2.0], [4.0, 3.0]]))
        tensor([[1., 3.],
                [3., 3.]])
    """
    return (X + X.mT) / 2


def antisymmetrize(X: Tensor) -> Tensor:
    """Return the skew-symmetric matrix nearest to ``X``."""
    return (X - X.mT) / 2


def hermitize(X: Tensor) -> Tensor:
    """Return the Hermitian matrix nearest to ``X``; the symmetric one where it is real."""
    return (X + X.mH) / 2


def antihermitize(X: Tensor) -> Tensor:
    """Return the skew-Hermitian matrix nearest to ``X``."""
    return (X - X.mH) / 2


def remove_mean(X: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """Return ``X`` without its mean over ``dim``; an empty ``X`` as it is."""
    return X - X.mean(dim, keepdim=True) if X.numel() else X


def remove_trace(X: Tensor) -> Tensor:
    """Return the matrix of trace 0 nearest to ``X``."""
    n = X.shape[-1]
    mean = X.diagonal(dim1=-2, dim2=-1).mean(-1) if n else X.new_zeros(())
    return X - mean[..., None, None] * torch.eye(n, dtype=X.dtype, device=X.device)


# --- matrices with equal entries ----------------------------------------------------------------------------------
#
# A pattern is an integer matrix: entries of the same number are equal. `spread` writes the matrix, `mean_over` is its
# left inverse and, followed by `spread`, the orthogonal projection.


def spread(values: Tensor, pattern: Tensor) -> Tensor:
    """Return the matrices whose entry at each place is the one of ``values`` that ``pattern`` names there.

    Example:
        >>> spread(torch.tensor([5.0, 6.0, 7.0]), toeplitz_pattern(2, 2))
        tensor([[6., 5.],
                [7., 6.]])
    """
    return values[..., pattern]


def mean_over(X: Tensor, pattern: Tensor, *, groups: int) -> Tensor:
    """Return for each number of ``pattern`` the mean of the entries of ``X`` that bear it."""
    flat = pattern.flatten()
    sums = X.new_zeros(*X.shape[: X.ndim - pattern.ndim], groups)
    sums = sums.index_add(-1, flat, X.flatten(X.ndim - pattern.ndim))
    counts = X.new_zeros(groups).index_add(0, flat, X.new_ones(flat.shape))
    return sums / counts


def _grid(n: int, m: int, device: torch.device | None) -> tuple[Tensor, Tensor]:
    return torch.arange(n, device=device)[:, None], torch.arange(m, device=device)


def toeplitz_pattern(n: int, m: int, device: torch.device | None = None) -> Tensor:
    """Return the pattern of constant diagonals, numbered from the upper right corner to the lower left."""
    i, j = _grid(n, m, device)
    return i - j + m - 1


def hankel_pattern(n: int, m: int, device: torch.device | None = None) -> Tensor:
    """Return the pattern of constant anti-diagonals, numbered from the upper left corner."""
    i, j = _grid(n, m, device)
    return i + j


def circulant_pattern(n: int, device: torch.device | None = None) -> Tensor:
    """Return the pattern in which each column is the one before it, moved down by one."""
    i, j = _grid(n, n, device)
    return (i - j) % n
