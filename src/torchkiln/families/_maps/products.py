"""A product of matrices added to another matrix in one call, for a single one as for batches of them."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["add_product", "add_product_"]


def add_product(C: Tensor, A: Tensor, B: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """Return ``beta C + alpha A B``; all have the same dimensions before the last two."""
    if C.ndim == 2:
        return torch.addmm(C, A, B, beta=beta, alpha=alpha)
    if C.ndim == 3:
        return torch.baddbmm(C, A, B, beta=beta, alpha=alpha)
    return torch.add(beta * C, A @ B, alpha=alpha)


def add_product_(C: Tensor, A: Tensor, B: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """Make C ``beta C + alpha A B``, in place, and return it."""
    if C.ndim == 2:
        return C.addmm_(A, B, beta=beta, alpha=alpha)
    if C.ndim == 3:
        return C.baddbmm_(A, B, beta=beta, alpha=alpha)
    return C.mul_(beta).add_(A @ B, alpha=alpha)
