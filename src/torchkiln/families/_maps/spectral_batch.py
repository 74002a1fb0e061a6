"""Spectral norms of a batch of matrices (b, h, w) by one call: what ``spectral_norm.py`` does for a single one."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["iterate", "normalize"]


def iterate(M: Tensor, u: Tensor, v: Tensor, *, steps: int, eps: float) -> tuple[Tensor, Tensor]:
    """Return better singular vectors than ``u`` (b, h) and ``v`` (b, w); one whose image is zero stays as it is."""
    for _ in range(steps):
        u = _unit(_product(M, v), eps, u)
        v = _unit(_product(M.mH, u), eps, v)
    return u, v


def normalize(M: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Return the matrices divided by :math:`u^H M v`; zeros stay zeros."""
    sigma = torch.linalg.vecdot(u, _product(M, v))
    return M / torch.where(sigma == 0, 1, sigma)[..., None, None]


def _product(M: Tensor, x: Tensor) -> Tensor:
    return (M @ x.unsqueeze(-1)).squeeze(-1)


def _unit(x: Tensor, eps: float, fallback: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.where(norm == 0, fallback, x / norm.clamp_min(eps))
