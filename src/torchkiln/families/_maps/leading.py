"""The leading singular vector of a linear operator, by power iteration from where it was; no state of its own."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from torchkiln.families._maps.norms import has_kernel

__all__ = ["Operator", "leading_vector", "starting_vector", "watched_vectors"]

# An operator on vectors of any shape, and its adjoint.
Operator = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]

_MOST_STEPS = 2000
# Where the host cannot look at numbers, in a graph or under torch.func, the number of steps is fixed.
_BLIND_STEPS = 50
_TRACE = 0.01
_GOLDEN = (math.sqrt(5) - 1) / 2


def starting_vector(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Return a unit vector in a general direction, the same each time: a chirp, which draws no random number."""
    index = torch.arange(math.prod(shape), dtype=torch.float64, device=like.device)
    x = torch.cos(_GOLDEN * index * index + index)
    length: Tensor = torch.linalg.vector_norm(x)
    return (x / length).to(like.dtype).view(shape)


@torch.no_grad()
def leading_vector(operator: Operator, v: Tensor, *, steps: int, tolerance: float | None) -> Tensor:
    r"""Return a unit vector that the operator A stretches more than ``v``, up to :math:`\sigma_1`.

    Each step is :math:`v \leftarrow A^* A v / \|A^* A v\|`. The length of ``v`` does not matter.

    Args:
        operator: A and its adjoint.
        v: the vector to start from.
        steps: number of iterations.
        tolerance: iterate until :math:`\|A^* A v - \sigma^2 v\| \le` ``tolerance`` :math:`\sigma^2`, with
            :math:`\sigma = \|A v\|`, at most 2000 times. A vector that is that good already is returned as it is. The
            host then waits for the device at each step.
    """
    there, back = operator
    v = _unit(v, v)
    if tolerance is not None:
        tolerance = max(tolerance, 32 * torch.finfo(v.dtype).eps)
        steps = _MOST_STEPS if has_kernel(v) else _BLIND_STEPS
    looks = tolerance is not None and has_kernel(v)
    for _ in range(steps):
        image = there(v)
        again = back(image)
        if looks and _is_settled(v, image, again, tolerance=tolerance):
            break
        v = _unit(again, v)
    return v


@torch.no_grad()
def watched_vectors(
    operator: Operator, v: Tensor, watch: Tensor, *, tolerance: float | None
) -> tuple[Tensor, Tensor]:
    """Return what :func:`leading_vector` does, and a vector across it that is on its way to the next singular one.

    Where the operator stretches ``watch`` more than ``v``, the search goes on from there. A trace of a fixed vector
    keeps it open to every direction.
    """
    there, back = operator
    v, watch = _unit(v, v), _unit(watch, watch)
    overtaken = torch.linalg.vector_norm(there(watch)) > torch.linalg.vector_norm(there(v))
    v, watch = torch.where(overtaken, watch, v), torch.where(overtaken, v, watch)
    v = leading_vector(operator, v, steps=1, tolerance=tolerance)
    open_to_all = starting_vector(tuple(v.shape), v)
    watch = back(there(_across(watch + _TRACE * open_to_all, v)))
    return v, _unit(_across(watch, v), open_to_all)


def _across(x: Tensor, v: Tensor) -> Tensor:
    return x - (v.conj() * x).sum() * v


def _is_settled(v: Tensor, image: Tensor, again: Tensor, *, tolerance: float | None) -> bool:
    assert tolerance is not None
    squared = torch.linalg.vector_norm(image).square()
    return bool(torch.linalg.vector_norm(again - squared * v) <= tolerance * squared)


def _unit(x: Tensor, fallback: Tensor) -> Tensor:
    """Return ``x`` at length 1; one that has that length already, to rounding, as it is."""
    norm = torch.linalg.vector_norm(x)
    kept = ((norm - 1).abs() <= 32 * torch.finfo(x.dtype).eps) & (norm > 0)
    return torch.where(kept, x, torch.where(norm == 0, fallback, x / norm))
