"""Looking at every value of a file: which tensors have some that are not numbers, or are infinite."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from torchkiln.checkpoint._blocks import block_by_block
from torchkiln.checkpoint._io import CheckpointFile, Group
from torchkiln.checkpoint._report import Note
from torchkiln.checkpoint._rows import rows_of

__all__ = ["blocks_of", "not_finite", "parts_of"]


def not_finite(file: CheckpointFile) -> Iterator[Note]:
    """Yield a warning for each named tensor with values that are not finite, saying how many.

    Raises:
        CheckpointError: A tensor cannot be read.
    """
    for group in file.groups:
        for key, entry in group.entries.items():
            if entry.dtype.is_floating_point or entry.dtype.is_complex:
                nans, infinite = _counts(file, group, key)
                if nans or infinite:
                    name = group.full_name(key)
                    of = f"of its {math.prod(entry.shape):,} values"
                    text = f"{name}: {nans:,} NaN and {infinite:,} infinite {of}"
                    yield Note("warning", name, text)


@block_by_block()
def _counts(file: CheckpointFile, group: Group, key: str) -> tuple[int, int]:
    nans = infinite = 0
    for block in blocks_of(file, group, key):
        block = parts_of(block)[-1]
        # A byte of float is a number in all of its kinds that torch can sum, and only there.
        wide = block.float() if block.dtype.itemsize == 1 else block
        if not bool(torch.isfinite(wide.sum())):
            nans += int(torch.isnan(wide).sum())
            infinite += int(torch.isinf(wide).sum())
    return nans, infinite


def parts_of(tensor: Tensor) -> tuple[Tensor, ...]:
    """Return the plain tensors that a tensor consists of, its values the last: of a plain one itself.

    Example:
        >>> [part.tolist() for part in parts_of(torch.tensor([0.0, 3.0]).to_sparse())]
        [[[1]], [3.0]]
    """
    if tensor.is_quantized:
        return (tensor.dequantize(),)
    if tensor.layout == torch.sparse_coo:
        tensor = tensor.coalesce()
        return tensor.indices(), tensor.values()
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return tensor.crow_indices(), tensor.col_indices(), tensor.values()
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return tensor.ccol_indices(), tensor.row_indices(), tensor.values()
    return (tensor,)


def blocks_of(file: CheckpointFile, group: Group, key: str) -> Iterator[Tensor]:
    """Yield a tensor in blocks of rows that the next ones overwrite, or whole where its bytes do not lie in order.

    Raises:
        CheckpointError: It cannot be read.
    """
    extent, entry = file.extent(group, key), group.entries[key]
    if extent is None or not math.prod(entry.shape) or not entry.shape:
        yield file.read(group, key).detach()
    else:
        for (rows,) in rows_of([(extent, entry)]):
            yield rows
