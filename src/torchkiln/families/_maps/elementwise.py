"""Pure maps that act on one number at a time, and their inverses."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["INTERVAL", "POSITIVE", "Map", "clamp_straight_through", "softplus", "softplus_inverse"]

Map = Callable[[Tensor], Tensor]


def softplus(x: Tensor) -> Tensor:
    r"""Return :math:`\log(1 + e^x)` to the rounding at every x; torch's own is x itself above 20.

    Example:
        >>> softplus(torch.tensor([-1e4, 0.0, 1e4]))
        tensor([0.0000e+00, 6.9315e-01, 1.0000e+04])
    """
    return torch.logaddexp(x, torch.zeros_like(x))


def softplus_inverse(y: Tensor) -> Tensor:
    r"""Return :math:`\log(e^y - 1) = y + \log(1 - e^{-y})`."""
    return y + torch.log(-torch.expm1(-y))


def _positive_part(y: Tensor) -> Tensor:
    """Return ``y`` where it is positive, and the rounding unit elsewhere: the open end cannot be reached."""
    return torch.where(y > 0, y, torch.finfo(y.dtype).eps)


# Each map onto the positive numbers with its inverse, which takes every number.
POSITIVE: dict[str, tuple[Map, Map]] = {
    "softplus": (softplus, lambda y: softplus_inverse(_positive_part(y))),
    "exp": (torch.exp, lambda y: _positive_part(y).log()),
    # 0 is a value of the square, and kept; what is negative must not get stuck there.
    "square": (torch.square, lambda y: torch.where(y < 0, torch.finfo(y.dtype).eps, y).sqrt()),
}


def _inside(p: Tensor) -> Tensor:
    eps = torch.finfo(p.dtype).eps
    return torch.where(p > 0, p, eps).clamp(max=1 - eps)


# Each map onto the numbers from 0 to 1 with its inverse.
INTERVAL: dict[str, tuple[Map, Map]] = {
    "sigmoid": (torch.sigmoid, lambda p: torch.logit(_inside(p))),
    "tanh": (lambda x: (1 + torch.tanh(x)) / 2, lambda p: torch.logit(_inside(p)) / 2),
}


def clamp_straight_through(x: Tensor, lower: float | None, upper: float | None) -> Tensor:
    """Return ``x`` clamped, with the derivative of the identity (arXiv:1308.3432).

    Example:
        >>> x = torch.tensor(5.0, requires_grad=True)
        >>> clamp_straight_through(x, 0.0, 1.0).backward()
        >>> x.grad
        tensor(1.)
    """
    return x.detach().clamp(lower, upper) + (x - x.detach())
