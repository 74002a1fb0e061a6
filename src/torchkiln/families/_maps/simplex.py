"""Pure maps onto simplices, ordered vectors, balls and doubly stochastic matrices."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "gaps_to_ordered",
    "ordered_to_gaps",
    "project_l1",
    "project_l2",
    "sinkhorn",
    "sparsemax",
    "stick_breaking",
    "stick_breaking_inverse",
    "uniform_in_l1",
    "uniform_in_l2",
    "uniform_on_simplex",
]


def sparsemax(x: Tensor, total: float = 1.0) -> Tensor:
    r"""Return the point of the simplex nearest to ``x`` (arXiv:1602.02068, algorithm 1), over the last dimension.

    :math:`y = \max(x - \tau, 0)` with the :math:`\tau` for which :math:`y` sums to ``total``.

    Example:
        >>> sparsemax(torch.tensor([0.5, 2.0, 1.8]))
        tensor([0.0000, 0.6000, 0.4000])
    """
    if x.shape[-1] == 0:
        return x
    # Shifting changes no difference, and keeps the sums small.
    x = x - x.detach().amax(-1, keepdim=True)
    descending = x.sort(-1, descending=True).values
    sums = descending.cumsum(-1) - total
    k = torch.arange(1, x.shape[-1] + 1, device=x.device)
    support = (k * descending > sums).sum(-1, keepdim=True)
    tau = sums.gather(-1, support - 1) / support
    return (x - tau).clamp(min=0)


def project_l1(x: Tensor, radius: float) -> Tensor:
    """Return the point nearest to ``x`` with a sum of absolute values of at most ``radius``, over the last dimension.

    Example:
        >>> project_l1(torch.tensor([3.0, -2.0, 0.5]), 1.0)
        tensor([1., 0., 0.])
    """
    outside = x.abs().sum(-1, keepdim=True) > radius
    # "+ 0.0" turns the -0. that sign() leaves into 0.
    return torch.where(outside, x.sign() * sparsemax(x.abs(), radius) + 0.0, x)


def project_l2(x: Tensor, radius: float, dim: int | tuple[int, ...]) -> Tensor:
    """Return ``x`` shortened to a Euclidean norm of at most ``radius``, the norm taken over ``dim``."""
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
    result: Tensor = x * (radius / norm.clamp(min=radius))
    return result


def stick_breaking(x: Tensor) -> Tensor:
    r"""Return the n weights that n - 1 numbers break a stick of length 1 into; zeros give equal weights.

    :math:`y_i = z_i \prod_{j<i} (1 - z_j)` with :math:`z_i = \sigma(x_i - \log(n - i))`, in logarithms.

    Example:
        >>> stick_breaking(torch.zeros(3))
        tensor([0.2500, 0.2500, 0.2500, 0.2500])
    """
    x = x - _offsets(x)
    left = F.pad(F.logsigmoid(-x).cumsum(-1), (1, 0))  # log of what is left before each break
    return (F.pad(F.logsigmoid(x), (0, 1)) + left).exp()


def stick_breaking_inverse(y: Tensor) -> Tensor:
    """Return the numbers that :func:`stick_breaking` sends to ``y``, a point of the simplex."""
    y = y.clamp(min=torch.finfo(y.dtype).tiny)
    left = y.flip(-1).cumsum(-1).flip(-1)  # summed from the small end: no digits are lost
    x = y[..., :-1].log() - left[..., 1:].log()
    return x + _offsets(x)


def _offsets(x: Tensor) -> Tensor:
    return torch.arange(x.shape[-1], 0, -1, dtype=x.dtype, device=x.device).log()


def gaps_to_ordered(first: Tensor, gaps: Tensor) -> Tensor:
    """Return the increasing vector that starts at ``first`` and goes up by ``gaps``.

    Example:
        >>> gaps_to_ordered(torch.tensor([1.0]), torch.tensor([2.0, 3.0]))
        tensor([1., 3., 6.])
    """
    return torch.cat([first, gaps], -1).cumsum(-1)


def ordered_to_gaps(y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first number of each vector, sorted, and the steps up from it."""
    y = y.sort(-1).values
    return y[..., :1], y.diff(dim=-1)


def sinkhorn(log_scale: Tensor, steps: int) -> Tensor:
    r"""Return :math:`D_1 e^X D_2` with rows and columns that sum to 1, by scaling them in turn, in logarithms.

    Columns are scaled last: they sum to 1 exactly, the rows as far as the iteration has converged.
    """
    for _ in range(steps):
        log_scale = log_scale - log_scale.logsumexp(-1, keepdim=True)
        log_scale = log_scale - log_scale.logsumexp(-2, keepdim=True)
    return log_scale.exp()


# --- samples, from independent standard normal numbers --------------------------------------------------------------


def uniform_on_simplex(Z: Tensor) -> Tensor:
    """Return points spread evenly over the simplex: exponential waiting times, divided by their sum."""
    waits = -torch.special.log_ndtr(Z)
    result: Tensor = waits / waits.sum(-1, keepdim=True)
    return result


def uniform_in_l1(Z: Tensor, radius: float) -> Tensor:
    """Return points spread evenly over the l1 ball of that radius."""
    waits = -math.log(2) - torch.special.log_ndtr(-Z.abs())  # exponential, and independent of the signs
    total = waits.sum(-1, keepdim=True)
    return _spread_radially(Z.sign() * waits / total, torch.special.gammainc(_shape(Z, 1.0), total), radius)


def uniform_in_l2(Z: Tensor, radius: float) -> Tensor:
    """Return points spread evenly over the Euclidean ball of that radius."""
    norm = torch.linalg.vector_norm(Z, dim=-1, keepdim=True)
    return _spread_radially(Z / norm, torch.special.gammainc(_shape(Z, 0.5), norm.square() / 2), radius)


def _shape(Z: Tensor, scale: float) -> Tensor:
    """Return the shape of the gamma distribution of a sum over the last dimension."""
    return torch.full((), scale * Z.shape[-1], dtype=Z.dtype, device=Z.device)


def _spread_radially(direction: Tensor, uniform: Tensor, radius: float) -> Tensor:
    """Return the points whose distance from 0, to the n-th power, is uniform."""
    result: Tensor = direction * radius * uniform ** (1 / max(direction.shape[-1], 1))
    return result
