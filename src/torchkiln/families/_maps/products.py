"""A product of matrices, or the identity, added to another matrix in one call: for single ones as for batches."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["add_product", "add_product_", "plus_identity_"]


def add_product(
    C: Tensor, A: Tensor, B: Tensor, *, beta: float = 1, alpha: float = 1, out: Tensor | None = None
) -> Tensor:
    """Return ``beta C + alpha A B``; all have the same dimensions before the last two."""
    if C.ndim > 3:
        return torch.add(beta * C, A @ B, alpha=alpha, out=out)
    multiply = torch.addmm if C.ndim == 2 else torch.baddbmm
    result: Tensor = multiply(C, A, B, beta=beta, alpha=alpha, out=out)
    return result


def add_product_(C: Tensor, A: Tensor, B: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """Make C ``beta C + alpha A B``, in place, and return it."""
    if C.ndim == 2:
        return C.addmm_(A, B, beta=beta, alpha=alpha)
    if C.ndim == 3:
        return C.baddbmm_(A, B, beta=beta, alpha=alpha)
    return C.mul_(beta).add_(A @ B, alpha=alpha)


def plus_identity_(A: Tensor, factor: float = 1) -> Tensor:
    """Add a multiple of the identity to A, in place, and return it."""
    A.diagonal(dim1=-2, dim2=-1).add_(factor)
    return A
