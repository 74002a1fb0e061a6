"""Tensors of which each row is computed from its own: a block of rows at a time, which never leaves the cache.

Reading a tensor whole, computing it and writing it moves every byte through memory six times; a copy does twice. Weight
norm over the first dimension, pruning and casts need no more than a copy does, for they need no row but the one they
compute. Each block is checked by a second formula while it is there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from torchkiln._core.spellings import fold
from torchkiln.checkpoint._again import row_scales
from torchkiln.checkpoint._bytes import Extent, Reading, as_bytes
from torchkiln.checkpoint._io import Entry
from torchkiln.checkpoint._scan import Found

__all__ = ["Rowwise", "folding", "rows_of"]

# A third of the second-level cache: there are the input, the output and what is between them.
_BLOCK_BYTES = 1 << 20

Rule = Callable[..., Tensor]


@dataclass(frozen=True)
class Rowwise:
    """How the rows of a tensor come from the same rows of others.

    Attributes:
        inputs: Where those are, and what.
        compute: Returns rows from theirs, in the dtype they are computed in.
        difference: Returns how much given rows are more than what another formula makes of theirs.
        fill: Returns rows that are not finite, given them and their inputs, with zeros where nothing but a division
            by zero is the reason.
        dim: The normalized dim, None where there is none.
    """

    inputs: Sequence[tuple[Extent, Entry]]
    compute: Rule
    difference: Rule
    fill: Rule | None = None
    dim: int | None = None

    def blocks(self) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """Yield computed rows, and the inputs that they come from, which the next ones overwrite."""
        for block in rows_of(self.inputs):
            yield self.compute(*block), block


def rows_of(inputs: Sequence[tuple[Extent, Entry]]) -> Iterator[list[Tensor]]:
    """Yield some rows of each of several tensors of equal length, in memory that the next ones overwrite.

    Raises:
        CheckpointError: They cannot be read.
    """
    length = inputs[0][1].shape[0]
    sizes = [prod(entry.shape[1:]) * entry.dtype.itemsize for _, entry in inputs]
    rows = max(1, min(length, _BLOCK_BYTES // max(1, *sizes)))
    readings = [_RowReading(extent, entry, rows) for extent, entry in inputs]
    for start in range(0, length, rows):
        yield [reading.next(min(rows, length - start)) for reading in readings]


class _RowReading:
    """The rows of one tensor, a block after another."""

    def __init__(self, extent: Extent, entry: Entry, rows: int) -> None:
        self._reading = Reading(extent)
        self._buffer = torch.empty((rows, *entry.shape[1:]), dtype=entry.dtype)

    def next(self, rows: int) -> Tensor:
        block = self._buffer[:rows]
        self._reading.fill(as_bytes(block))
        return block


def folding(found: Found) -> Rowwise | None:
    """Return how a tensor is folded row by row, or None where its rule, its layout or its container does not allow it.

    Args:
        found: Recognised by names and shapes.
    """
    item, group = found.item, found.group
    if len(found.parts) != 1 or len(item.steps) != 1 or item.skipped or not prod(item.entry.shape):
        return None
    inputs = [(found.extent(key), group.entries[key]) for key in item.inputs]
    located = [(extent, entry) for extent, entry in inputs if extent is not None]
    if len(located) < len(inputs) or not item.entry.shape:
        return None
    if not all(group.entries[key].dtype.is_floating_point for key in item.originals):
        return None
    step = item.steps[0]
    if step.kind == "pruning":
        return Rowwise(located, _pruned, _off_pruned)
    if step.kind == "weight_norm" and (found.evaluate.choice(step, item) == (True, 0) or step.dims == (0,)):
        (extent, g), v = located
        gains = (extent, Entry((item.entry.shape[0], *[1] * (len(item.entry.shape) - 1)), g.dtype))
        return Rowwise([gains, v], _normed, _off_normed, fill=_filled, dim=0)
    return None


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(fold.compute_dtype(tensor.dtype))


def _pruned(W: Tensor, mask: Tensor) -> Tensor:
    return fold.apply_mask(_wide(W), _wide(mask))


def _off_pruned(value: Tensor, W: Tensor, mask: Tensor) -> Tensor:
    return value - W.double().mul_(mask)


def _normed(g: Tensor, v: Tensor) -> Tensor:
    dtype = torch.promote_types(fold.compute_dtype(g.dtype), fold.compute_dtype(v.dtype))
    return fold.weight_norm(g.to(dtype), v.to(dtype), 0)


def _filled(W: Tensor, _: Tensor, v: Tensor) -> Tensor:
    return W.masked_fill(fold.directionless(v.to(W.dtype), 0), 0)


def _off_normed(value: Tensor, g: Tensor, v: Tensor) -> Tensor:
    dtype = torch.promote_types(fold.compute_dtype(g.dtype), fold.compute_dtype(v.dtype))
    g, v = g.to(dtype), v.to(dtype)
    return torch.addcmul(value.to(dtype), v, row_scales(g, v), value=-1)
