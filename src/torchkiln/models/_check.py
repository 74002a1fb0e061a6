"""Check what is baked: the values are finite, what rounding costs, and that the model has them afterwards."""

from __future__ import annotations

import torch
from torch import Tensor

from torchkiln._core.errors import ParametrizationError
from torchkiln._core.finite import is_finite
from torchkiln._core.sharded import shard_of, whole
from torchkiln.models._find import Found

__all__ = ["check_finite", "check_stored", "does_nothing", "round_to", "same"]


def same(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors with data are alike in everything, down to the last bit."""
    alike = (a.shape, a.dtype, a.device, a.is_meta) == (b.shape, b.dtype, b.device, False)
    return alike and torch.equal(a, b)


def check_finite(one: Found, value: Tensor, *, advice: str) -> None:
    """Raise where a computed value is not finite; ``advice`` ends the message."""
    if is_finite(value):
        return
    bad = value.numel() - int(whole(torch.isfinite(value).sum()))
    raise ParametrizationError(
        f"{one.path}: {bad} of {value.numel()} values computed by {one.fold.what()} are not finite{advice}"
    )


def round_to(
    found: list[Found], values: list[Tensor], dtype: torch.dtype | None
) -> tuple[list[Tensor], list[float]]:
    """Return the values in ``dtype``, and how far each is from what was computed, relative to its largest entry."""
    if dtype is not None and not dtype.is_floating_point:
        raise ParametrizationError(f"dtype: expected a floating-point dtype, got {dtype}.")
    rounded = [value.to(dtype) if value.is_floating_point() else value for value in values]
    for one, before, after in zip(found, values, rounded, strict=True):
        if after is not before and not is_finite(after):
            largest = float(whole(before.abs().max()))
            raise ParametrizationError(
                f"{one.path}: values up to {largest:.4g} do not fit {dtype}; nothing was changed.\n"
                f"Bake to a wider dtype, or leave the tensor out: exclude={one.path!r}."
            )
    return rounded, [_error(before, after) for before, after in zip(values, rounded, strict=True)]


def _error(before: Tensor, after: Tensor) -> float:
    if after.dtype == before.dtype or before.is_meta or before.numel() == 0:
        return 0.0
    largest = float(whole(before.abs().max()))
    return float(whole((after.double() - before.double()).abs().max())) / largest if largest else 0.0


def does_nothing(found: list[Found], values: list[Tensor]) -> bool:
    """Return whether every value is, bit for bit, the one original it is computed from."""
    originals = (one.fold.survivor() for one in found)
    return all(
        original is not None and same(original, value)
        for original, value in zip(originals, values, strict=True)
    )


def check_stored(path: str, stored: object, value: Tensor) -> None:
    """Raise unless the tensor that the module has now is ``value``, bit for bit."""
    if stored is value or not isinstance(stored, Tensor) or value.is_meta:
        return
    # Each process looks at its own part: one that need not look would leave the others waiting.
    stored, value = shard_of(stored), shard_of(value)
    shares = (
        stored.layout is torch.strided and value.layout is torch.strided and _place(stored) == _place(value)
    )
    if not shares and not same(stored, value):
        raise ParametrizationError(
            f"{path}: the module does not have the baked value after it was set; nothing was changed.\n"
            "Its register_parameter, a hook, or another tensor with the same original changes it."
        )


def _place(tensor: Tensor) -> tuple[object, ...]:
    tensor = shard_of(tensor)
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
