"""Spectral norms of a batch of matrices (b, h, w) by one call: what ``spectral_norm.py`` does for a single one."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from torchkiln.families._maps.gradients import correct_gradient
from torchkiln.families._maps.norms import has_kernel
from torchkiln.families._maps.spectral_norm import unit

__all__ = ["iterate", "normalize"]


def iterate(M: Tensor, u: Tensor, v: Tensor, *, steps: int, eps: float) -> tuple[Tensor, Tensor]:
    """Return better singular vectors than ``u`` (b, h) and ``v`` (b, w); one whose image is zero stays as it is."""
    for _ in range(steps):
        u = unit(_image(M, v), eps, u)
        v = unit(_image(M.mT, u.conj()).conj(), eps, v)
    return u, v


def normalize(M: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Return the matrices divided by :math:`u^H M v`; zeros stay zeros."""
    if M.is_complex() or not has_kernel(M):
        return M / _divisor(M, u, v)[:, None, None]
    D = _divisor(M.detach(), u, v)
    result = M / D[:, None, None]
    correct_gradient(result, M, partial(_before_division, M, u, v, D))
    return result


def _divisor(M: Tensor, u: Tensor, v: Tensor) -> Tensor:
    sigma = torch.linalg.vecdot(u, _image(M, v))
    return torch.where(sigma == 0, 1, sigma)


def _image(M: Tensor, x: Tensor) -> Tensor:
    # Rows from the left: on a CPU, columns from the right take up to ten times as long.
    return (x[:, None] @ M.mT)[:, 0]


def _before_division(M: Tensor, u: Tensor, v: Tensor, D: Tensor, G: Tensor) -> Tensor:
    r"""Return the gradient that, divided by D, is the whole one: :math:`G - \langle M, G \rangle / D\; u v^H`."""
    if torch.is_grad_enabled():  # to be differentiated once more, and the divisor is no constant then
        constant, D = D, _divisor(M, u, v)
        G = G * (constant / D)[:, None, None]
    along = u * ((M * G).sum((1, 2)) / -D)[:, None]
    return torch.addcmul(G, along[:, :, None], v[:, None])
