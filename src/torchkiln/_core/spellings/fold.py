"""The maps that checkpoints spell, as pure functions of tensors.

They round as torch's modules do in eval mode, so that a folded tensor has the bits its model computes with; where there
is nothing to divide by torch computes NaN, and :func:`directionless` tells where.
Those under "Exact" are written from the definitions instead, in float64, to check the others by.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = [
    "apply_mask",
    "compute_dtype",
    "directionless",
    "exact_spectral_norm",
    "exact_weight_norm",
    "matrix",
    "orthogonal",
    "singular_pair",
    "spectral_norm",
    "split_gain",
    "weight_norm",
]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype to fold in: a tensor's own, but never below 32 bits, where rounding costs 29 dB."""
    if dtype.itemsize >= (8 if dtype.is_complex else 4) or not (dtype.is_floating_point or dtype.is_complex):
        return dtype
    return torch.complex64 if dtype.is_complex else torch.float32


def matrix(W: Tensor, dim: int) -> Tensor:
    """Return the tensor as a matrix whose rows run along `dim`."""
    return W.movedim(dim, 0).flatten(1)


def weight_norm(g: Tensor, v: Tensor, dim: int | None) -> Tensor:
    """Return ``g * v / |v|``, the norm taken over every dim but `dim`, or over all.

    Uses the operation that torch's weight norm uses: its fused kernel rounds unlike the formula spelled out.
    """
    return torch._weight_norm(v, g, -1 if dim is None else dim)


def directionless(v: Tensor, dim: int | None) -> Tensor:
    """Return where weight norm has nothing to divide by: True for slices of norm 0, in the shape of their gains."""
    over = [d for d in range(v.ndim) if d != dim]
    return (torch.linalg.vector_norm(v, dim=over, keepdim=True) if over else v.abs()) == 0


def spectral_norm(W: Tensor, u: Tensor, v: Tensor, dim: int) -> Tensor:
    """Return ``W / (u . W v)`` for the matrix of `W` along `dim`."""
    return W / torch.vdot(u, torch.mv(matrix(W, dim), v))


def apply_mask(W: Tensor, mask: Tensor) -> Tensor:
    """Return the product with a mask of any dtype."""
    return mask.to(W.dtype) * W


def orthogonal(X: Tensor, base: Tensor | None, name: str) -> Tensor:
    """Return the matrix with orthonormal columns, or rows if it is wide, that the free parameters `X` stand for.

    Args:
        X: Free parameters, below the diagonal; for householder the signs of R are on it.
        base: A square orthogonal matrix to multiply from the left, or None.
        name: ``"matrix_exp"``, ``"cayley"`` or ``"householder"``.

    Shape:
        - X: (..., n, k), base: (..., m, m) with m = max(n, k), result as X.
    """
    wide = X.shape[-2] < X.shape[-1]
    Y = X.mT if wide else X
    Q = _reflections(Y) if name == "householder" else _rotation(Y, _ROTATIONS[name])
    Q = Q if base is None else torch.matmul(base, Q)
    return Q.mT if wide else Q


def _rotation(Y: Tensor, of_skew: Callable[[Tensor], Tensor]) -> Tensor:
    n, k = Y.shape[-2:]
    L = torch.nn.functional.pad(Y.tril(), (0, n - k))
    return of_skew(L - L.mH)[..., :k]


def _cayley(A: Tensor) -> Tensor:
    identity = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    rotation: Tensor = torch.linalg.solve(identity - A / 2, identity + A / 2)
    return rotation


_ROTATIONS: dict[str, Callable[[Tensor], Tensor]] = {"cayley": _cayley, "matrix_exp": torch.linalg.matrix_exp}


def _reflections(Y: Tensor) -> Tensor:
    L = Y.tril(-1)
    tau = 2 / (1 + L.square().sum(-2))
    reflected: Tensor = torch.linalg.householder_product(L, tau)
    return reflected * Y.diagonal(dim1=-2, dim2=-1).trunc().unsqueeze(-2)


# Exact ----------------------------------------------------------------------------------------------------------------


def exact_weight_norm(g: Tensor, v: Tensor, dim: int | None) -> Tensor:
    """Return weight norm by its definition, and zeros for slices of zeros."""
    over = [d for d in range(v.ndim) if d != dim]
    norm = torch.linalg.vector_norm(v, dim=over, keepdim=True) if over else v.abs()
    return (g * v).div_(norm.masked_fill(norm == 0, torch.inf))


def exact_spectral_norm(W: Tensor, u: Tensor, v: Tensor, dim: int) -> Tensor:
    """Return spectral norm by its definition, and zeros for zeros."""
    # From the side that spectral_norm() does not take, without another tensor as large as this one.
    sigma = torch.dot(torch.mv(matrix(W, dim).T, u.conj()), v)
    return W / sigma if W.any() else W


# Inverses -------------------------------------------------------------------------------------------------------------


def split_gain(W: Tensor, dim: int | None) -> tuple[Tensor, Tensor]:
    """Return g and v with ``weight_norm(g, v, dim) == W`` to the bit, in the dtypes of :func:`compute_dtype`.

    A row of zeros has no direction: it becomes gain 0 and a direction of ones.
    """
    over = [d for d in range(W.ndim) if d != dim]
    zero = W.abs().amax(dim=over, keepdim=True) == 0 if over else W == 0
    v = torch.where(zero, torch.ones_like(W), W).contiguous()
    if dim in (0, W.ndim - 1):
        # The norm as the fused kernel rounds it; only then is g / |v| exactly 1.
        _, g = torch._weight_norm_interface(v, torch.norm_except_dim(v, 2, dim), dim)
    else:
        g = torch.norm_except_dim(v, 2, -1 if dim is None else dim)
    return torch.where(zero.reshape(g.shape), torch.zeros_like(g), g), v


def singular_pair(W: Tensor, dim: int) -> tuple[Tensor, Tensor, float]:
    """Return the first left and right singular vectors of the matrix along `dim`, and its largest singular value."""
    U, S, Vh = torch.linalg.svd(
        matrix(W, dim).to(torch.promote_types(W.dtype, torch.float64)), full_matrices=False
    )
    return U[:, 0].contiguous(), Vh[0].conj().resolve_conj().contiguous(), float(S[0])
