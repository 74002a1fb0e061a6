"""Pure maps that set or measure the norms of a tensor."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from torchkiln.families._maps.gradients import correct_gradient
from torchkiln.families._maps.linear import remove_mean
from torchkiln.families._maps.norms import has_kernel

__all__ = [
    "inputs",
    "norm",
    "onto_sphere",
    "operator_norm",
    "rescale",
    "spectral",
    "standardize",
]


_REAL = frozenset((torch.float32, torch.float64))


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


def rescale(X: Tensor, size: Tensor, *, to: float, dims: tuple[int, ...]) -> Tensor:
    """Return ``X`` scaled from the norm ``size`` over ``dims`` to a fixed one; equal entries where it is zero.

    What is zero has no direction, and yet a gradient, as if it had the size 1: it can move.
    """
    zero = _is_zero(size)
    equal = zero * (to / _root_of_count(X, dims))
    return torch.addcdiv(equal.to(X.dtype), X, (size + zero).to(X.dtype), value=to)


def _is_zero(size: Tensor) -> Tensor:
    """Say of norms whether their square is no normal number: adding 1 to these makes divisors of them."""
    return size < _least(size.dtype)


def _least(dtype: torch.dtype) -> float:
    return float(torch.finfo(dtype).tiny ** 0.5)


def _root_of_count(X: Tensor, dims: tuple[int, ...]) -> float:
    """Return the root of the number of entries along ``dims``: the norm of as many ones."""
    return math.sqrt(max(math.prod([X.shape[dim] for dim in dims]), 1))


def onto_sphere(X: Tensor, radius: float, dims: tuple[int, ...]) -> Tensor:
    """Return the point nearest to ``X`` that has the Euclidean norm ``radius`` over ``dims``; equal entries for zeros.

    Example:
        >>> onto_sphere(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), 10.0, (1,))
        tensor([[6.0000, 8.0000],
                [7.0711, 7.0711]])
    """
    if not (X.is_cpu and X.dtype in _REAL and has_kernel(X)):
        return rescale(X, norm(X, dims), to=radius, dims=dims)
    size = norm(X.detach(), dims)
    if not size.min().item() >= _least(size.dtype):
        return rescale(X, norm(X, dims), to=radius, dims=dims)
    result = X / (size if radius == 1 else size / radius)
    correct_gradient(result, X, partial(_tangent, X, size, dims))
    return result


def _tangent(X: Tensor, size: Tensor, dims: tuple[int, ...], G: Tensor) -> Tensor:
    """Return of ``G`` what is tangent to the sphere through ``X``, whose radius is ``size``."""
    if torch.is_grad_enabled():  # to be differentiated once more, and the size is no constant then
        constant, size = size, norm(X, dims)
        G = G * (constant / size)
    along = X * G if not dims else (X * G).sum(dims, keepdim=True)
    return torch.addcmul(G, X, along / size.square(), value=-1)


def standardize(X: Tensor, deviation: float, dims: tuple[int, ...]) -> Tensor:
    """Return ``X`` with mean 0 and a standard ``deviation`` over ``dims``; what is constant becomes 0.

    Example:
        >>> standardize(torch.tensor([[1.0, 3.0], [2.0, 2.0]]), 1.0, (1,))
        tensor([[-1.,  1.],
                [ 0.,  0.]])
    """
    X = remove_mean(X, dims)
    size = norm(X, dims) / _root_of_count(X, dims)
    return X * (deviation / (size + _is_zero(size)))


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
