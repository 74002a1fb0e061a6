"""A tensor with products added to it, some rows at a time, each block checked while it is in the cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from math import prod

import torch
from torch import Tensor

from torchkiln.checkpoint._adapters.edits import Product, add_products
from torchkiln.checkpoint._adapters.projection import Projection
from torchkiln.checkpoint._check import check_merged_block, magnitude, tolerance
from torchkiln.checkpoint._io import Entry, Extent
from torchkiln.checkpoint._rows import rows_of

__all__ = ["Products", "merged_rows"]

Products = Callable[[torch.dtype], list[Product]]
"""Reads what is added to a tensor, in a dtype."""


def merged_rows(
    name: str,
    source: tuple[Extent, Entry],
    products: Products,
    *,
    wide: torch.dtype,
    dtype: torch.dtype,
    verify: bool,
) -> Iterator[tuple[Tensor, bool]]:
    """Yield the rows of a tensor with products added to it, and with each block whether all of it is finite.

    Args:
        name: What to call it.
        source: Where its bytes are.
        products: What is added to it.
        wide: The dtype to compute in.
        dtype: The dtype to return.
        verify: Check each block, and compute it again where that finds anything.

    Raises:
        CheckpointError: As for :func:`torchkiln.checkpoint._check.check_merged`.
    """
    factors = products(wide)
    check = _Check(name, products, wide=wide, columns=prod(source[1].shape[1:])) if verify else None
    start = 0
    for (W,) in rows_of([source]):
        block = slice(start, start + W.shape[0])
        value = W.to(wide, copy=True)
        projected = check.projection.of_sum(value, block) if check else value
        rows = add_products(value, factors, block).to(dtype)
        finite = check(W, value, rows, block=block, projected=projected) if check else _finite(rows)
        yield rows, finite
        start = block.stop


def _finite(rows: Tensor) -> bool:
    return math.isfinite(magnitude(rows))


class _Check:
    """Checks one block after another."""

    def __init__(self, name: str, products: Products, *, wide: torch.dtype, columns: int) -> None:
        self._name, self._products = name, products
        self._scale = 0.0
        # From factors that are read again: those in memory may have changed.
        self.projection = Projection(products(wide), columns)

    def __call__(self, W: Tensor, value: Tensor, rows: Tensor, *, block: slice, projected: Tensor) -> bool:
        """Raise unless rows are right, and return whether all of them are finite.

        Args:
            W: They, before anything was added.
            value: They, as they were computed; it is overwritten where it was rounded.
            rows: They, as they are to be written.
            block: Which rows of the tensor they are.
            projected: Their projections, as these have to be.

        Raises:
            CheckpointError: As for :func:`torchkiln.checkpoint._check.check_merged`.
        """
        off = magnitude(self.projection(value).sub_(projected)) / tolerance(value.dtype, folded=True)
        if rows.dtype != value.dtype:
            rounding = magnitude(value.sub_(rows.to(value.dtype))) / (torch.finfo(rows.dtype).eps / 2)
            off = max(off, rounding) if rounding == rounding else math.nan
        # By the largest magnitude so far: not every block needs its own.
        if off <= self._scale < math.inf:
            return True
        scale = magnitude(rows)
        self._scale = max(self._scale, scale)
        if not off <= self._scale < math.inf:
            self._compare(W, rows, block, scale)
        return math.isfinite(scale)

    def _compare(self, W: Tensor, rows: Tensor, block: slice, scale: float) -> None:
        narrow = max(W.dtype.itemsize, rows.dtype.itemsize) < torch.float32.itemsize
        # float64 tells nothing more of values that are rounded to half of float32.
        finer = torch.float32 if narrow else torch.float64
        exact = [(L, R * factor, 1.0) for L, R, factor in self._products(finer)]
        other = add_products(W.to(finer, copy=True), exact, block)
        check_merged_block(self._name, rows, other, source=W, scale=scale)
