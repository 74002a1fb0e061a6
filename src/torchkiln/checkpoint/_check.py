"""Whether a computed tensor is what its definition says, for the price of reading it twice.

It is compared a block at a time. What it is compared with is computed so too, by other formulas than those that made
it, for the usual cases; whatever else there is, is computed whole in float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torchkiln._core.errors import CheckpointError
from torchkiln._core.spellings import fold
from torchkiln._core.spellings.evaluate import Evaluation
from torchkiln.checkpoint._again import BLOCK, Expected, expected, slices
from torchkiln.checkpoint._blocks import block_by_block
from torchkiln.checkpoint._scan import Found

__all__ = [
    "beyond",
    "check",
    "check_block",
    "check_merged",
    "check_merged_block",
    "differences",
    "errors",
    "magnitude",
    "overflows",
    "tolerance",
]

# Rounding of a sum of products in the dtype it is computed in, relative to the tensor's largest magnitude.
_ROUNDINGS = 256


@torch.no_grad()
@block_by_block()
def check(found: Found, value: Tensor, evaluation: Evaluation) -> None:
    """Raise unless a computed tensor agrees with a recomputation from the same inputs.

    Args:
        found: What it was computed from.
        value: It, as it is to be written.
        evaluation: What was found out while computing it.

    Raises:
        CheckpointError: It differs by more than rounding explains. That is a fault of the machine or of torchkiln.
    """
    precision = _least_precise(found.item.entry.dtype, value.dtype)
    exact = None if evaluation.warnings else expected(found, value, evaluation)
    if exact is not None:
        absolute, relative = _compared(value, exact)
        if _grown(found, value, absolute, relative) <= tolerance(precision, folded=True):
            return
    # Not a case for blocks, or values that are not finite, which are equal where they are the same.
    _compare(found, value, found.exact(found.item).tensor)


@torch.no_grad()
def check_block(found: Found, value: Tensor, difference: Tensor, *, scale: float) -> None:
    """Raise unless some rows of a tensor agree with what another formula makes of the same inputs.

    Args:
        found: Whose rows they are.
        value: They, as they are to be written.
        difference: How much they are more than by the other formula.
        scale: Their largest magnitude.

    Raises:
        CheckpointError: As for :func:`check`.
    """
    precision = _least_precise(found.item.entry.dtype, value.dtype)
    if not magnitude(difference) <= tolerance(precision, folded=True) * scale:
        _compare(found, value, value - difference)


def overflows(value: Tensor, source: Tensor) -> bool:
    """Tell whether a cast made values infinite that were not."""
    if value.numel() == 0 or math.isfinite(magnitude(value)):
        return False
    return not torch.equal(torch.isfinite(value), torch.isfinite(source))


def _compare(found: Found, value: Tensor, expected: Tensor) -> None:
    """Raise unless two results agree, values that are not finite where they are the same."""
    _, relative = differences(found, value, expected)
    reason = beyond(relative, _least_precise(found.item.entry.dtype, value.dtype), folded=True)
    if reason:
        raise CheckpointError(
            f"{found.name}: {found.item.spelling} was computed twice, with different results: {reason}.\n"
            "Nothing was written. Check this machine's memory, and report it if it happens again."
        )


@torch.no_grad()
@block_by_block()
def check_merged(name: str, value: Tensor, exact: Expected, *, source: Tensor) -> None:
    """Raise unless a tensor with adapters merged into it agrees with a recomputation in float64, and is finite.

    Values that only the new dtype makes infinite are the caller's to tell of.

    Args:
        name: The tensor, for messages.
        value: It, as it is to be written.
        exact: Returns rows of it, computed anew.
        source: It, before adapters were merged into it.

    Raises:
        CheckpointError: It does not.
    """
    largest = scale = 0.0
    for block in slices(value) if value.numel() else ():
        other = exact(block)
        if overflows(value[block], other):
            return
        difference = magnitude(other.sub_(value[block]))
        largest = difference if math.isnan(difference) else max(largest, difference)
        scale = max(scale, magnitude(value[block]))
    _judge_merged(name, value, source, largest, scale)


@torch.no_grad()
def check_merged_block(name: str, value: Tensor, other: Tensor, *, source: Tensor, scale: float) -> None:
    """Raise as :func:`check_merged` does, for some rows.

    Args:
        name: The tensor, for messages.
        value: The rows, as they are to be written.
        other: They, computed anew; it is overwritten.
        source: They, before adapters were merged into them.
        scale: The largest magnitude in `value`.
    """
    if math.isfinite(scale) or not overflows(value, other):
        _judge_merged(name, value, source, magnitude(other.sub_(value)), scale)


def _judge_merged(name: str, value: Tensor, source: Tensor, largest: float, scale: float) -> None:
    precision = _least_precise(source.dtype, value.dtype)
    if largest <= tolerance(precision, folded=True) * scale < math.inf:
        return
    if not math.isfinite(largest):
        raise CheckpointError(
            f"{name}: has values that are not finite, in the base or once adapters are merged into it.\n"
            "Nothing was written. Is the base damaged?"
        )
    # What was added may have cancelled what was there: rounding is that of the larger one.
    scale = max(scale, magnitude(source))
    reason = beyond(largest / scale if scale else largest, precision, folded=True)
    if reason:
        raise CheckpointError(
            f"{name}: was merged twice, with different results: {reason}.\n"
            "Nothing was written. Check this machine's memory, and report it if it happens again."
        )


def _least_precise(one: torch.dtype, two: torch.dtype) -> torch.dtype:
    floating = [dtype for dtype in (one, two) if dtype.is_floating_point]
    return max(floating, key=lambda dtype: torch.finfo(dtype).eps) if len(floating) == 2 else one


def _compared(value: Tensor, exact: Expected) -> tuple[float, float]:
    """Return the largest difference, and the same over the largest magnitude; NaN if there is a NaN."""
    largest = scale = 0.0
    for block in slices(value):
        mine, other = value[block], exact(block)
        if mine.numel():
            difference = magnitude(other.sub_(mine))
            largest = difference if math.isnan(difference) else max(largest, difference)
            scale = max(scale, magnitude(mine))
    return largest, largest / scale if scale else largest


def magnitude(tensor: Tensor) -> float:
    """Return the largest magnitude, NaN if there is one; many times as fast as the norm that is the same.

    Of complex numbers it is that of a part.
    """
    real = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    low, high = torch.aminmax(real)
    return max(-float(low), float(high)) if bool(low == low) else math.nan


def differences(found: Found, value: Tensor, exact: Tensor) -> tuple[float, float]:
    """Return the largest difference of a recomputed tensor, and the same relative to what its rounding grows with.

    That is the largest magnitude, and for orthogonal matrices more: they come from products of such matrices, in which
    small entries are as far off as large ones.
    """
    absolute, relative = errors(value, exact)
    return absolute, _grown(found, value, absolute, relative)


def _grown(found: Found, value: Tensor, absolute: float, relative: float) -> float:
    """Return the difference relative to what rounding grows with."""
    if not value.numel() or all(step.kind != "orthogonal" for step in found.item.steps):
        return relative
    return absolute / (max(_longest(value)) * (1 + _squarings(found) / _ROUNDINGS))


def _squarings(found: Found) -> float:
    """Return what rounding of an exponential grows with: the norm of its argument, for it is squared as often."""
    X, (step, *_) = found.item.originals[-1], found.item.steps
    if step.map != "matrix_exp" or X not in found.group.entries:
        return 0.0
    # Of the skew matrix that X stands for: its columns are those of X, and its rows.
    return sum(_longest(found.read(X).detach(), power=1))


def _longest(tensor: Tensor, power: float = 2) -> tuple[float, float]:
    """Return the largest norm of a row and of a column."""
    wide = tensor.to(fold.compute_dtype(tensor.dtype))
    rows, columns = (float(torch.linalg.vector_norm(wide, power, dim=dim).max()) for dim in (-1, -2))
    return rows, columns


def errors(value: Tensor, exact: Tensor) -> tuple[float, float]:
    """Return the largest difference, and the same over the largest magnitude."""
    wide = _widest(value.dtype, exact.dtype)
    absolute, scale = 0.0, 0.0
    for a, b in zip(torch.split(value.flatten(), BLOCK), torch.split(exact.flatten(), BLOCK), strict=True):
        difference, largest = _errors(a.to(wide), b.to(wide))
        absolute = difference if math.isnan(difference) else max(absolute, difference)
        scale = max(scale, largest)
    if scale == 0:
        return absolute, absolute * math.inf if absolute else 0.0
    return absolute, absolute / scale


def _errors(value: Tensor, exact: Tensor) -> tuple[float, float]:
    if value.numel() == 0:
        return 0.0, 0.0
    # Equal values differ by nothing, infinities and shared NaNs among them.
    same = (value == exact) | (value.isnan() & exact.isnan())
    difference = torch.where(same, 0, (value - exact).abs())
    return float(difference.max()), float(exact.abs().nan_to_num(nan=0.0, posinf=0.0).max())


def _widest(one: torch.dtype, two: torch.dtype) -> torch.dtype:
    if one.is_complex or two.is_complex:
        return torch.complex128
    return torch.float64 if one.is_floating_point or two.is_floating_point else torch.int64


def tolerance(dtype: torch.dtype, *, folded: bool) -> float:
    """Return the largest relative error that rounding explains."""
    if not folded or not (dtype.is_floating_point or dtype.is_complex):
        return 0.0
    computed = fold.compute_dtype(dtype)
    stored = torch.finfo(dtype).eps if computed != dtype else 0.0
    return stored + _ROUNDINGS * torch.finfo(computed).eps


def beyond(relative: float, dtype: torch.dtype, *, folded: bool) -> str:
    """Return what is wrong with a relative error, empty if nothing is."""
    # Written so that NaN is beyond.
    if relative <= tolerance(dtype, folded=folded):
        return ""
    return f"relative error {relative:.3g}" + (
        " beyond rounding" if folded else "; plain tensors should be equal"
    )
