"""Hermitian and skew-Hermitian matrices, of which one half is computed, added or kept, and says what the other is."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["adjoint", "lower", "minus_adjoint", "packed", "plus_adjoint", "square", "unpacked"]

# From this size on a transpose is copied, in tiles: read across the rows it costs as much as a product.
_ACROSS = 128
# From this size on half a square is computed: below, its many calls take as long as the other half.
_HALF = 256


def adjoint(X: Tensor) -> Tensor:
    """Return a copy of :math:`X^H`, row by row.

    On the CPU float32 goes by way of ``channel_shuffle``, which transposes in registers: a third of a copy's time.

    Example:
        >>> adjoint(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]))
        tensor([[1., 4.],
                [2., 5.],
                [3., 6.]])
    """
    if X.dtype != torch.float32 or X.device.type != "cpu" or not X.is_contiguous():
        return X.mH.clone(memory_format=torch.contiguous_format)
    *batch, n, k = X.shape
    size = n * k
    channels = X.as_strided((X.numel() // size, size, 1, 1), (size, 1, size, size))
    return torch.channel_shuffle(channels, n).view(*batch, k, n)


def minus_adjoint(X: Tensor) -> Tensor:
    """Return :math:`X - X^H`."""
    if X.shape[-1] < _ACROSS:
        return X - X.mH
    result = adjoint(X)
    return torch.sub(X, result, out=result)


def plus_adjoint(X: Tensor) -> Tensor:
    """Return :math:`X + X^H`."""
    return X + X.mH if X.shape[-1] < _ACROSS else adjoint(X).add_(X)


def square(X: Tensor) -> Tensor:
    """Return the square of a Hermitian or skew-Hermitian matrix, of a large one by the rows up to the diagonal."""
    n = X.shape[-1]
    if n < _HALF or X.ndim > 2 or X.device.type != "cpu":
        return X @ X
    result = torch.empty_like(X)
    size = 64 * -(-n // 512)
    for i in range(0, n, size):
        # By narrow: an index of two slices takes twice as many calls.
        rows, j = min(size, n - i), min(i + size, n)
        torch.mm(X.narrow(0, i, rows), X.narrow(1, 0, j), out=result.narrow(0, i, rows).narrow(1, 0, j))
    upper = adjoint(result.tril_())
    return result.tril_(-1).add_(upper)


def packed(first: Tensor, second: Tensor) -> Tensor:
    """Return one matrix that holds two Hermitian ones, but for the diagonal of ``second``.

    Of ``first`` it holds as many digits as the larger one has.
    """
    return torch.sub(first, second).tril_().add_(second)


def unpacked(halves: Tensor, diagonal: Tensor) -> tuple[Tensor, Tensor]:
    """Return the two matrices that were :func:`packed`, the second one with that diagonal."""
    # Torch copies an upper triangle number by number: it is what is left without the lower one.
    others = adjoint(halves)
    of_first, of_second = lower(halves, -1), lower(others, -1)
    first = others.sub_(of_second).add_(of_first)
    second = torch.sub(halves, of_first, out=of_first).add_(of_second)
    second.diagonal(dim1=-2, dim2=-1).copy_(diagonal)
    return first, second


def lower(X: Tensor, diagonal: int = 0) -> Tensor:
    """Return what ``tril`` does; of a large matrix that copies number by number."""
    if X.shape[-1] < _ACROSS:
        return X.tril(diagonal)
    return X.clone(memory_format=torch.contiguous_format).tril_(diagonal)
