"""Whether rows that products were added to are right: random projections of them, in place of the products again.

``V = W + s L R`` has ``V x = W x + s L (R x)`` for every x, and the right side is no product of matrices (Freivalds
1979, doi:10.1007/3-540-09526-8_5). One short x projects every few columns by themselves: the sums are short, so that
rounding is told from errors as finely as by comparing every entry.

The entries of x have random signs and sizes between 1 and 2. An error of one entry is there in full in its projection.
Errors of several columns cancel to less than t with a probability of at most t over the largest of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchkiln.checkpoint._adapters.edits import Product, add_products

__all__ = ["Projection"]

# Short enough for rounding in float32, long enough to be quick.
_MOST_COLUMNS = 64


class Projection:
    """Projects rows, and tells what those of a tensor become when products are added to it.

    Args:
        products: What is added to the whole tensor; all factors are of one dtype.
        columns: How many columns the tensor has as a matrix.
    """

    def __init__(self, products: Sequence[Product], columns: int) -> None:
        together = next(n for n in range(min(columns, _MOST_COLUMNS), 0, -1) if columns % n == 0)
        self._x = _signed(together).to(products[0][1].dtype)
        self._products = [(L, self(R), scale) for L, R, scale in products]

    def __call__(self, rows: Tensor) -> Tensor:
        """Return one number for every few columns of each row."""
        return (rows.reshape(-1, len(self._x)) @ self._x).view(rows.shape[0], -1)

    def of_sum(self, W: Tensor, rows: slice) -> Tensor:
        """Return the projections of rows with the products added, from those rows before."""
        return add_products(self(W), self._products, rows)


def _signed(length: int) -> Tensor:
    # Faults do not know them, so they may be the same every time.
    generator = torch.Generator().manual_seed(1979)
    sizes = torch.rand(length, generator=generator, dtype=torch.float64) + 1
    return sizes.where(torch.rand(length, generator=generator) < 0.5, -sizes)
