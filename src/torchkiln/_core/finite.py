"""Whether a tensor holds numbers throughout, asked in one way everywhere."""

from __future__ import annotations

import cmath

import torch
from torch import Tensor, nn

from torchkiln._core.sharded import holds_everywhere, is_sharded, shard_of

__all__ = ["has_plain_memory", "is_finite"]


def is_finite(value: Tensor) -> bool:
    """Return whether ``value`` has neither NaN nor infinity; True where it has no plain data to look at.

    Example:
        >>> is_finite(torch.tensor([1.0, 2.0])), is_finite(torch.tensor([1.0, torch.nan]))
        (True, False)
    """
    if is_sharded(value):
        return holds_everywhere(is_finite(shard_of(value)), value)
    looks = has_plain_memory(value) and not value.is_meta
    if not looks or not (value.is_floating_point() or value.is_complex()):
        return True
    if value.dtype.itemsize == 1:  # few operations are there for such types
        value = value.float()
    # NaN and infinity carry over into the sum, which takes a tenth of the time; a sum may overflow as well.
    return cmath.isfinite(_total(value)) or bool(torch.isfinite(value).all())


def _total(value: Tensor) -> complex:
    narrow = value.dtype is torch.complex32  # has no sum
    total: complex = (value.to(torch.complex64) if narrow else value).sum().item()
    return total


def has_plain_memory(tensor: Tensor) -> bool:
    """Return whether ``tensor`` is one of torch's own classes, strided."""
    return type(tensor) in (Tensor, nn.Parameter, nn.Buffer) and tensor.layout is torch.strided
