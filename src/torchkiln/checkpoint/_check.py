"""Whether a computed tensor is what its definition says, for the price of reading it twice.

The formulas here are not those that made the tensor. They run over blocks that stay in the processor's cache, and so
need no memory to speak of, for the usual cases; whatever else there is, is computed whole in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from torchkiln._core.errors import CheckpointError
from torchkiln._core.spellings import fold
from torchkiln._core.spellings.evaluate import Evaluation
from torchkiln.checkpoint._blocks import block_by_block
from torchkiln.checkpoint._scan import Found

__all__ = [
    "beyond",
    "check",
    "check_block",
    "check_merged",
    "check_merged_block",
    "errors",
    "magnitude",
    "overflows",
    "tolerance",
]

# Rounding of a sum of products in the dtype it is computed in, relative to the tensor's largest magnitude.
_ROUNDINGS = 256
_BLOCK = 1 << 17

Expected = Callable[[slice], Tensor]


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
    stored = found.item.entry.dtype
    expected = None if evaluation.warnings else _expected(found, evaluation)
    if expected is not None and _relative(value, expected) <= tolerance(stored, folded=True):
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
    _, relative = errors(value, expected)
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
    for block in _blocks(value) if value.numel() else ():
        other = exact(block)
        if overflows(value[block], other):
            return
        difference = magnitude(other.sub_(value[block]))
        largest = difference if math.isnan(difference) else max(largest, difference)
        scale = max(scale, magnitude(value[block]))
    _judge_merged(name, value, source, largest, scale)


@torch.no_grad()
def check_merged_block(name: str, value: Tensor, expected: Tensor, *, source: Tensor, scale: float) -> None:
    """Raise as :func:`check_merged` does, for some rows.

    Args:
        name: The tensor, for messages.
        value: The rows, as they are to be written.
        expected: They, computed anew; it is overwritten.
        source: They, before adapters were merged into them.
        scale: The largest magnitude in `value`.
    """
    if math.isfinite(scale) or not overflows(value, expected):
        _judge_merged(name, value, source, magnitude(expected.sub_(value)), scale)


def _judge_merged(name: str, value: Tensor, source: Tensor, largest: float, scale: float) -> None:
    precision = _least_precise(source.dtype, value.dtype)
    if largest <= tolerance(precision, folded=True) * scale < math.inf:
        return
    if not math.isfinite(largest):
        raise CheckpointError(
            f"{name}: the adapters make values that are not finite. Is one of their tensors damaged?\n"
            "Nothing was written."
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


def _expected(found: Found, evaluation: Evaluation) -> Expected | None:
    """Return what computes rows of the tensor anew, where one simple rule made it from floats of one dtype."""
    item = found.item
    if len(found.parts) != 1 or len(item.steps) != 1 or item.skipped or not item.entry.shape:
        return None
    originals = [found.read(key).detach() for key in item.originals]
    if len({tensor.dtype for tensor in originals}) != 1 or originals[0].dtype not in (
        torch.float32,
        torch.float64,
    ):
        return None
    kind = item.steps[0].kind
    if kind == "weight_norm" and evaluation.dim in (0, None):
        g, v = originals
        return _weight_norm(g, v, evaluation.dim)
    if kind == "spectral_norm" and evaluation.dim == 0:
        u, v = (found.read(key).detach() for key in item.steps[0].state)
        return _spectral_norm(originals[0], u, v)
    return None


def _weight_norm(g: Tensor, v: Tensor, dim: int | None) -> Expected:
    if dim == 0:
        gains = g.reshape(-1, *[1] * (v.ndim - 1))
        over = tuple(range(1, v.ndim))
        wide = v[:1].numel() > _BLOCK

        def rows(block: slice) -> Tensor:
            part = v[block]
            norm = _norm(part, over, wide=wide) if over else part.abs()
            return part * (gains[block] / norm)

        return rows
    squares = sum(_norm(v[block], None, wide=True).square() for block in _blocks(v))
    scale = (g.reshape(()).double() / torch.as_tensor(squares).sqrt()).to(v.dtype)
    return lambda block: v[block] * scale


def _norm(part: Tensor, over: tuple[int, ...] | None, *, wide: bool) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(
        part, dim=over, keepdim=over is not None, dtype=torch.float64 if wide else None
    )
    return norm.to(part.dtype) if over is not None else norm


def _spectral_norm(W: Tensor, u: Tensor, v: Tensor) -> Expected:
    u, v = u.double(), v.double()
    sigma = torch.zeros((), dtype=torch.float64)
    for block in _blocks(W):
        sigma += (W[block].flatten(1).double() @ v) @ u[block]
    return lambda block: W[block] / sigma.to(W.dtype)


def _blocks(tensor: Tensor) -> Iterator[slice]:
    rows = max(1, _BLOCK // max(1, tensor[:1].numel()))
    return (slice(start, start + rows) for start in range(0, tensor.shape[0], rows))


def _relative(value: Tensor, expected: Expected) -> float:
    """Return the largest difference over the largest magnitude, NaN if there is a NaN."""
    largest = scale = 0.0
    for block in _blocks(value):
        mine, other = value[block], expected(block)
        if mine.numel():
            difference = magnitude(other.sub_(mine))
            largest = difference if math.isnan(difference) else max(largest, difference)
            scale = max(scale, magnitude(mine))
    return largest / scale if scale else largest


def magnitude(tensor: Tensor) -> float:
    """Return the largest magnitude, NaN if there is one; many times as fast as the norm that is the same.

    Of complex numbers it is that of a part.
    """
    real = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    low, high = torch.aminmax(real)
    return max(-float(low), float(high)) if bool(low == low) else math.nan


def errors(value: Tensor, exact: Tensor) -> tuple[float, float]:
    """Return the largest difference, and the same over the largest magnitude."""
    if value.numel() == 0:
        return 0.0, 0.0
    wide = _widest(value.dtype, exact.dtype)
    value, exact = value.to(wide), exact.to(wide)
    # Equal values differ by nothing, infinities and shared NaNs among them.
    same = (value == exact) | (value.isnan() & exact.isnan())
    absolute = float(torch.where(same, 0, (value - exact).abs()).max())
    scale = float(exact.abs().nan_to_num(nan=0.0, posinf=0.0).max())
    if scale == 0:
        return absolute, absolute * math.inf if absolute else 0.0
    return absolute, absolute / scale


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
