"""Pure maps that set or measure the norms of a tensor."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["inputs", "nonzero", "norm", "operator_norm", "spectral", "tiny", "to_norm"]


def tiny(X: Tensor) -> float:
    """Return the smallest normal number of the dtype: norms below it are not divided by."""
    return torch.finfo(X.dtype).tiny


def inputs(W: Tensor) -> tuple[int, ...]:
    """Return the dimensions that belong to one output channel: all but the first."""
    return tuple(range(1, W.ndim))


def norm(X: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Return the Euclidean norm over ``dims``, kept as dimensions of length 1.

    Example:
        >>> norm(torch.tensor([[3.0, 4.0]]), (1,))
        tensor([[5.]])
    """
    # An empty list of dimensions would mean all of them.
    return torch.linalg.vector_norm(X, dim=dims, keepdim=True) if dims else X.abs()


def to_norm(X: Tensor, value: float, dims: tuple[int, ...]) -> Tensor:
    """Return ``X`` scaled to a Euclidean norm of ``value`` over ``dims``; zeros stay zeros."""
    return X * (value / norm(X, dims).clamp(min=tiny(X)))


def nonzero(X: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Return ``X`` with ones in place of the slices over ``dims`` that are all zero, which have no direction."""
    return torch.where(norm(X, dims) == 0, 1, X)


def operator_norm(X: Tensor, order: int | str) -> Tensor:
    """Return the operator norm of each matrix for ``order`` 1, 2 or "inf", kept as 1 x 1.

    Example:
        >>> operator_norm(torch.tensor([[3.0, -4.0]]), "inf")
        tensor([[7.]])
    """
    if order == 2:
        return spectral(X)
    sums = X.abs().sum(-1 if order == "inf" else -2)
    return (sums.amax(-1) if sums.shape[-1] else sums.sum(-1))[..., None, None]


def spectral(X: Tensor) -> Tensor:
    """Return the largest singular value of each matrix, kept as 1 x 1; its derivative is finite where it repeats."""
    # Not svdvals(): it rounds otherwise where a gradient is wanted, and baking would change the last bit.
    S = torch.linalg.svd(X, full_matrices=False).S
    result: Tensor = (S[..., 0] if S.shape[-1] else S.sum(-1))[..., None, None]
    return result
