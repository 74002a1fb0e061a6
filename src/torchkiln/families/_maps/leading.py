"""The leading singular vector of a linear operator, searched from where it was; no state of its own."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from torchkiln.families._maps.norms import has_kernel

__all__ = ["Operator", "block_norms", "leading_vector", "starting_vector", "watched_vectors"]

# An operator on vectors of any shape, and its adjoint.
Operator = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]

_MOST_SEARCHES = 200
_DEPTH = 6
# Where the host cannot look at numbers, in a graph or under torch.func, there is one search, of this depth.
_BLIND_DEPTH = 24
# How much of a general direction is mixed in to see whether another is the largest.
_TRACE = 0.1
_GOLDEN = (math.sqrt(5) - 1) / 2


def starting_vector(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Return a unit vector in a general direction, the same each time: a chirp, which draws no random number."""
    index = torch.arange(math.prod(shape), dtype=torch.float64, device=like.device)
    x = torch.cos(_GOLDEN * index * index + index)
    length: Tensor = torch.linalg.vector_norm(x)
    return (x / length).to(like.dtype).view(shape)


@torch.no_grad()
def leading_vector(
    operator: Operator, v: Tensor, *, steps: int, tolerance: float | None, blocks: int = 1
) -> Tensor:
    r"""Return a unit vector that the operator A stretches more than ``v``, up to :math:`\sigma_1`.

    With a tolerance, by Lanczos' method: the best vector of the span of :math:`v, A^*A v, (A^*A)^2 v, \dots`, started
    again from there; it needs the square root of the steps that power iteration needs. The length of ``v`` does not
    matter. An operator that is diagonal by blocks has such a vector for each: no step leads from one to another.

    Args:
        operator: A and its adjoint.
        v: the vector to start from.
        steps: number of power iterations, :math:`v \leftarrow A^* A v / \|A^* A v\|`, where there is no tolerance.
        tolerance: search until :math:`\|A^* A v - \sigma^2 v\| \le` ``tolerance`` :math:`\sigma_1^2`, with
            :math:`\sigma = \|A v\|`. A vector that is that good already is returned as it is. The host then waits for
            the device at each search.
        blocks: the number of blocks, each of consecutive entries.
    """
    there, back = operator
    v = _unit(v, v, blocks)
    if tolerance is None:
        for _ in range(steps):
            v = _unit(back(there(v)), v, blocks)
        return v
    if not has_kernel(v):
        return _best_in_span(operator, v, _BLIND_DEPTH, blocks=blocks)
    tolerance = max(tolerance, 32 * torch.finfo(v.dtype).eps)
    for _ in range(_MOST_SEARCHES):
        image = there(v)
        if _is_settled(back(image), v, block_norms(image, blocks), tolerance=tolerance):
            break
        v = _best_in_span(operator, v, _DEPTH, blocks=blocks)
    return v


def _best_in_span(operator: Operator, v: Tensor, depth: int, *, blocks: int) -> Tensor:
    """Return the vector that is stretched most of those that ``depth`` applications of the operator span."""
    basis, images = [v.reshape(blocks, -1)], []
    for _ in range(depth):
        image = operator[1](operator[0](basis[-1].view(v.shape))).reshape(blocks, -1)
        images.append(image)
        Q = torch.stack(basis, 1)
        for _ in range(2):  # once leaves what rounding makes of it
            image = image - ((Q.conj() @ image[..., None]).mT @ Q)[:, 0]
        # Where the span is complete there is no further direction.
        length = torch.linalg.vector_norm(image, dim=1, keepdim=True)
        is_new = length > torch.finfo(v.dtype).eps * block_norms(images[-1], blocks)[:, None]
        basis.append(torch.where(is_new, image / length, 0))
    Q = torch.stack(basis[:-1], 1)
    T = Q.conj() @ torch.stack(images, 1).mT
    weights = torch.linalg.eigh((T + T.mH) / 2)[1][..., -1]
    return _unit((weights[:, None] @ Q).view(v.shape), v, blocks)


def _is_settled(again: Tensor, v: Tensor, sigma: Tensor, *, tolerance: float) -> bool:
    squared = sigma.square()
    rest = block_norms(again - _scaled(v, squared), sigma.numel())
    return bool((rest <= tolerance * squared.max()).all())


@torch.no_grad()
def watched_vectors(
    operator: Operator, v: Tensor, watch: Tensor, *, tolerance: float, blocks: int = 1
) -> tuple[Tensor, Tensor]:
    """Return what :func:`leading_vector` does, and a vector across it that is on its way to the next singular one.

    Where the operator stretches ``watch`` more than ``v``, the search goes on from there. A trace of a fixed vector
    keeps it open to every direction. Where ``v`` was good, nothing is looked for.
    """
    before = _unit(v, v, blocks)
    v, watch = _larger_first(operator, before, _unit(watch, watch, blocks), blocks)
    v = leading_vector(operator, v, steps=1, tolerance=tolerance, blocks=blocks)
    if has_kernel(v) and torch.equal(v, before):
        return v, watch
    there, back = operator
    start = starting_vector(tuple(v.shape), v)
    watch = _unit(_across(watch + _TRACE * start, v, blocks), start, blocks)
    beside = (lambda x: there(_across(x, v, blocks))), (lambda y: _across(back(y), v, blocks))
    watch = _best_in_span(beside, watch, _DEPTH, blocks=blocks)
    v, watch = _larger_first(operator, v, watch, blocks)
    return leading_vector(operator, v, steps=1, tolerance=tolerance, blocks=blocks), watch


def _larger_first(operator: Operator, v: Tensor, watch: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """Return both vectors, that which the operator stretches more first, for each block."""
    overtaken = block_norms(operator[0](watch), blocks) > block_norms(operator[0](v), blocks)
    v_, watch_ = v.reshape(blocks, -1), watch.reshape(blocks, -1)
    both = (torch.where(overtaken[:, None], one, other) for one, other in ((watch_, v_), (v_, watch_)))
    first, second = (one.view(v.shape) for one in both)
    return first, second


def _across(x: Tensor, v: Tensor, blocks: int) -> Tensor:
    along = (v.conj() * x).reshape(blocks, -1).sum(1)
    return x - _scaled(v, along)


def block_norms(x: Tensor, blocks: int) -> Tensor:
    """Return the length of each block of ``x``."""
    lengths: Tensor = torch.linalg.vector_norm(x.reshape(blocks, -1), dim=1)
    return lengths


def _scaled(x: Tensor, factors: Tensor) -> Tensor:
    return (x.reshape(factors.numel(), -1) * factors[:, None]).view(x.shape)


def _unit(x: Tensor, fallback: Tensor, blocks: int) -> Tensor:
    """Return ``x`` with blocks of length 1; those that have it already, to rounding, as they are."""
    length = block_norms(x, blocks)[:, None]
    blocks_of_x, others = x.reshape(blocks, -1), fallback.reshape(blocks, -1)
    kept = (length - 1).abs() <= 32 * torch.finfo(x.dtype).eps
    unit = torch.where(kept, blocks_of_x, torch.where(length == 0, others, blocks_of_x / length))
    return unit.view(x.shape)
