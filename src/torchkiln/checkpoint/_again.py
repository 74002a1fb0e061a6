"""What a folded tensor has to be, some rows at a time, by other formulas than those that made it.

The formulas run over blocks that stay in the processor's cache, and so need no memory to speak of; orthogonal matrices,
which torch's maps make, are made by torchkiln's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod

import torch
from torch import Tensor

from torchkiln._core.spellings import fold
from torchkiln._core.spellings.evaluate import Evaluation
from torchkiln.checkpoint._scan import Found

__all__ = ["BLOCK", "Expected", "expected", "row_scales", "slices"]

# How many numbers a block has: with what is computed from them they stay in the second-level cache.
BLOCK = 1 << 17
# How many partial sums torch keeps, at the least, where it sums up a whole tensor.
_LANES = 32

Expected = Callable[[slice], Tensor]
"""Returns some rows, in new memory."""


def slices(tensor: Tensor) -> Iterator[slice]:
    """Yield the rows of a tensor, some at a time."""
    rows = max(1, BLOCK // max(1, tensor[:1].numel()))
    return (slice(start, start + rows) for start in range(0, tensor.shape[0], rows))


def expected(found: Found, value: Tensor, evaluation: Evaluation) -> Expected | None:
    """Return what computes rows of a tensor anew, or None where it is not one simple rule that made it.

    Args:
        found: What it was computed from.
        value: What it was computed to be.
        evaluation: What was found out meanwhile.
    """
    item = found.item
    if len(found.parts) != 1 or len(item.steps) != 1 or item.skipped or not item.entry.shape:
        return None
    originals = [found.read(key).detach() for key in item.originals]
    if not all(tensor.is_floating_point() for tensor in originals):
        return None
    kind = item.steps[0].kind
    if kind == "weight_norm":
        g, v = originals
        return _weight_norm(g, v, value, evaluation.dim)
    if kind == "spectral_norm" and evaluation.dim is not None:
        u, v = (found.read(key).detach().double() for key in item.steps[0].state)
        return _spectral_norm(originals[0], u, v, evaluation.dim)
    if kind == "orthogonal":
        base = [found.read(key).detach() for key in item.steps[0].state]
        return _orthogonal(originals[0], *base, name=item.steps[0].map)
    return None


def _weight_norm(g: Tensor, v: Tensor, value: Tensor, dim: int | None) -> Expected:
    dtype = torch.promote_types(fold.compute_dtype(g.dtype), fold.compute_dtype(v.dtype))
    if dim == 0:
        gains = g.reshape(-1, *[1] * (v.ndim - 1)).to(dtype)

        def normed(rows: slice) -> Tensor:
            part = v[rows].to(dtype)
            return part * row_scales(gains[rows], part)

        return normed
    over = [d for d in range(v.ndim) if d != dim]
    squares = torch.zeros([1 if d in over else n for d, n in enumerate(v.shape)], dtype=torch.float64)
    for rows in slices(v):
        squares += v[rows].double().square().sum(over, keepdim=True)
    scale = g.double().reshape(squares.shape) / squares.sqrt().masked_fill_(squares == 0, torch.inf)
    if dim is None:
        scale = _as_summed(scale, v, value, squares)
    scale = scale.to(dtype)
    return lambda rows: v[rows].to(dtype) * scale


def row_scales(g: Tensor, v: Tensor) -> Tensor:
    """Return what rows of v are multiplied by to have the lengths g: 0 for rows of zeros. Both are of one dtype."""
    over = list(range(1, v.ndim))
    # A long sum in float32 loses digits; the accumulator of the kernel that made the value is its own.
    wide = torch.float64 if v[:1].numel() > BLOCK else None
    norm = torch.linalg.vector_norm(v, dim=over, keepdim=True, dtype=wide).to(v.dtype) if over else v.abs()
    return g / norm.masked_fill(norm == 0, torch.inf)


def _as_summed(scale: Tensor, v: Tensor, value: Tensor, squares: Tensor) -> Tensor:
    """Return the one factor of a value, where it is the right one but for the rounding of one long sum of squares.

    torch sums in the tensor's own dtype: of 16 million floats it gets the third digit wrong, and so does the model.
    """
    product = torch.zeros((), dtype=torch.float64)
    for rows in slices(v):
        product += (v[rows].double() * value[rows]).sum()
    found = (product / squares).reshape(scale.shape)
    lost = v.numel() / _LANES * torch.finfo(fold.compute_dtype(v.dtype)).eps
    return torch.where((found - scale).abs() <= lost * scale.abs(), found, scale)


def _spectral_norm(W: Tensor, u: Tensor, v: Tensor, dim: int) -> Expected:
    sigma = torch.zeros((), dtype=torch.float64)
    between, behind = prod(W.shape[1:dim]), prod(W.shape[dim + 1 :])
    # The entries of v are those of the other dims in their order, the first one first.
    v = v.reshape(W.shape[0] if dim else 1, between, behind)
    for rows in slices(W):
        part = W[rows].double()
        if dim == 0:
            sigma += u[rows] @ (part.flatten(1) @ v.flatten())
        else:
            sigma += torch.einsum("abrc,r,abc->", part.reshape(-1, between, len(u), behind), u, v[rows])
    dtype = fold.compute_dtype(W.dtype)
    return lambda rows: W[rows].to(dtype) / sigma.to(dtype)


def _orthogonal(X: Tensor, base: Tensor | None = None, *, name: str | None) -> Expected | None:
    from torchkiln.families._maps.orthogonal import cayley, exponential, householder

    maps = {"cayley": cayley, "householder": householder, "matrix_exp": exponential}
    if name not in maps or (base is not None and not base.is_floating_point()):
        return None
    wide = X.shape[-2] < X.shape[-1]
    Q = maps[name]((X.mT if wide else X).double(), base if base is None else base.double())
    whole = Q.mT if wide else Q
    return lambda rows: whole[rows]
