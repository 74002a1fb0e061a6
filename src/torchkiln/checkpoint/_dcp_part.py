"""The parts of a distributed checkpoint's data files: each is what ``torch.save`` wrote, somewhere in the file."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchkiln._core.errors import CheckpointError
from torchkiln.checkpoint._bytes import Extent, nbytes
from torchkiln.checkpoint._io import Entry
from torchkiln.checkpoint._torch_archive import read_archive, stream_of

__all__ = ["load_part", "load_value", "locate_part"]


def load_value(extent: Extent, name: str, *, device: str = "cpu") -> Any:
    """Load a tensor, or a value that is none.

    Args:
        extent: Where it is.
        name: Its name, for messages.
        device: ``"meta"`` for tensors without their bytes.

    Raises:
        CheckpointError: It is damaged, or needs code to load.
    """
    try:
        read_archive(extent)
        return torch.load(stream_of(extent), map_location=device, weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # as for any torch file
        reason = str(error).strip().splitlines() or ["unexpected end"]
        raise CheckpointError(
            f"{extent.file.path}: {name}: truncated or corrupt, or needs code to load ({reason[0][:120]})."
        ) from error


def load_part(extent: Extent, name: str, entry: Entry) -> Tensor:
    """Load a tensor of a known shape and dtype.

    Raises:
        CheckpointError: As for :func:`load_value`, or it is another tensor.
    """
    part = load_value(extent, name)
    if not isinstance(part, Tensor) or tuple(part.shape) != entry.shape or part.dtype != entry.dtype:
        raise CheckpointError(
            f"{extent.file.path}: {name}: a chunk is not of the shape and dtype it should be."
        )
    return part


def locate_part(extent: Extent, name: str, entry: Entry) -> Extent | None:
    """Return where the bytes of a tensor are, or None where they do not lie in order, or where reading has to tell."""
    try:
        part = load_value(extent, name, device="meta")
    except CheckpointError:
        return None
    if type(part) is not Tensor or not part.is_meta or tuple(part.shape) != entry.shape:
        return None
    offset = getattr(part.untyped_storage(), "_checkpoint_offset", None)
    in_order = part.is_contiguous() and not part.is_conj() and not part.is_neg()
    if offset is None or not in_order or part.dtype != entry.dtype or not part.numel():
        return None
    start = offset + int(part.storage_offset()) * entry.dtype.itemsize
    length = nbytes(entry)
    if not 0 < start <= start + length <= extent.length:
        return None
    return Extent(extent.file, extent.offset + start, length)
