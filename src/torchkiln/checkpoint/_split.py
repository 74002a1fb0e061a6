"""Putting a plain tensor under a norm: the tensors that a module under that norm would hold."""

from __future__ import annotations

import torch
from torch import Tensor

from torchkiln._core.errors import CheckpointError
from torchkiln._core.spellings import fold
from torchkiln._core.spellings.spelled import Norm

__all__ = ["split"]


@torch.no_grad()
def split(
    stored: Tensor, dim: int | None, *, norm: Norm, name: str, dtype: torch.dtype
) -> tuple[tuple[Tensor, ...], tuple[str, ...]]:
    """Return the tensors of a norm, and what there is to say about them.

    Weight norm gives g and v whose fold is the tensor; spectral norm gives the first singular vectors to keep beside
    the tensor, which a power iteration would converge to.

    Args:
        stored: The plain tensor.
        dim: The normalized dim.
        norm: Which norm.
        name: The tensor's name, for errors.
        dtype: The dtype to return them in.

    Raises:
        CheckpointError: The tensor has values that are not finite, or is all zero and has no spectral norm.
    """
    W = stored.detach().to(fold.compute_dtype(stored.dtype))
    if not bool(torch.isfinite(W).all()):
        raise CheckpointError(f"{name}: has values that are not finite, and so no {norm}.")
    if norm == "weight_norm":
        return _gain(W, dim, dtype)
    assert dim is not None
    return _singular(W, dim, dtype, name=name)


def _gain(W: Tensor, dim: int | None, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], tuple[str, ...]]:
    g, v = (part.to(dtype) for part in fold.split_gain(W, dim))
    back = fold.weight_norm(g.to(W.dtype), v.to(W.dtype), dim).to(dtype)
    change = float((back.double() - W.double()).abs().max())
    notes = (
        (f"rounding to {str(dtype).removeprefix('torch.')} moves values by up to {change:.3g}",)
        if change
        else ()
    )
    return (g, v), notes


def _singular(
    W: Tensor, dim: int, dtype: torch.dtype, *, name: str
) -> tuple[tuple[Tensor, ...], tuple[str, ...]]:
    u, v, sigma = fold.singular_pair(W, dim)
    if not sigma > 0:
        raise CheckpointError(f"{name}: is all zero, and so has no spectral norm.")
    notes = (f"reads as the stored value divided by {sigma:.6g}, its largest singular value",)
    return (u.to(dtype), v.to(dtype)), notes
