"""Pure maps that normalize: weight norm and spectral norm; no modules, no state of their own."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from torchkiln._core.tracing import is_recorded
from torchkiln.families._maps.precision import full_precision, widen

__all__ = [
    "as_matrix",
    "norm_except",
    "power_iteration",
    "spectral_normalize",
    "weight_normalize",
]


def norm_except(V: Tensor, dim: int) -> Tensor:
    r"""Return the Euclidean norm of ``V`` over every dimension but ``dim``; over all of them where ``dim`` is -1.

    Shape:
        ``V`` with every dimension but ``dim`` set to 1; a scalar for ``dim=-1``.

    Example:
        >>> norm_except(torch.tensor([[3.0, 4.0], [6.0, 8.0]]), 0)
        tensor([[ 5.],
                [10.]])
    """
    V.size(dim)  # raises where there is no such dimension
    others = None if dim == -1 else _others(V, dim)
    if others == []:
        return V.abs()
    norm: Tensor = torch.linalg.vector_norm(V, dim=others, keepdim=others is not None)
    return norm


def _others(V: Tensor, dim: int) -> list[int]:
    return [other for other in range(V.ndim) if other != dim % V.ndim]


def weight_normalize(V: Tensor, g: Tensor, dim: int) -> Tensor:
    r"""Return :math:`g\, V / \|V\|` with the norm of :func:`norm_except` (Salimans and Kingma, arXiv:1602.07868).

    No epsilon is added: a slice of zeros gives NaN.
    """
    if not _has_kernel(V, dim):
        return V * (g / norm_except(V, dim))
    W = torch._weight_norm(V, g, dim)
    if W.grad_fn is not None:
        W.grad_fn.register_hook(partial(_second_derivative, V, g, dim))
    return W


def _has_kernel(V: Tensor, dim: int) -> bool:
    """Say whether torch's fused kernel serves; compilers and transforms want the formula in plain operations."""
    plain = type(V) in (torch.nn.Parameter, Tensor) and (V.is_cpu or V.is_cuda) and dim in (0, V.ndim - 1)
    return plain and not (
        is_recorded() or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    )


def _second_derivative(
    V: Tensor, g: Tensor, dim: int, grads: tuple[Tensor | None, ...], outputs: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...] | None:
    """Give the gradients of the kernel by the formula where they are to be differentiated again.

    The kernel's own second derivative is wrong: it takes the norm for a constant (seen on torch 2.13).
    """
    G = outputs[0]
    if G is None or not torch.is_grad_enabled():
        return None
    norm = norm_except(V, dim)
    others = _others(V, dim)
    along = (G * V).sum(others, keepdim=True) / norm if others else G * V / norm
    exact = (g / norm * (G - V * (along / norm)), along)
    return tuple(None if kernel is None else formula for kernel, formula in zip(grads, exact, strict=True))


def as_matrix(W: Tensor, dim: int) -> Tensor:
    """Return ``W`` as a matrix whose rows run along ``dim`` and whose columns run along the rest.

    Example:
        >>> as_matrix(torch.zeros(2, 3, 5), 1).shape
        torch.Size([3, 10])
    """
    if dim != 0:
        W = W.movedim(dim, 0)
    return W if W.ndim == 2 else W.flatten(1)


def power_iteration(M: Tensor, u: Tensor, v: Tensor, *, steps: int, eps: float) -> tuple[Tensor, Tensor]:
    r"""Return better singular vectors than ``u`` and ``v`` of the largest singular value of ``M``.

    Each step is :math:`u \leftarrow M v / \|M v\|`, then :math:`v \leftarrow M^H u / \|M^H u\|`.

    Args:
        M: matrix of shape (h, w).
        u: unit vector of length h.
        v: unit vector of length w.
        steps: number of iterations.
        eps: norms below it count as ``eps``.
    """
    dtype = u.dtype
    with full_precision(M):
        M = widen(M)
        v = v.to(M.dtype)
        for _ in range(steps):
            u = F.normalize(torch.mv(M, v), dim=0, eps=eps)
            v = F.normalize(torch.mv(M.mH, u), dim=0, eps=eps)
    return u.to(dtype), v.to(dtype)


def spectral_normalize(W: Tensor, u: Tensor, v: Tensor, dim: int) -> Tensor:
    r"""Return :math:`W / \sigma` with :math:`\sigma = u^H M v`, ``M`` the matrix of ``W`` (:func:`as_matrix`).

    :math:`\sigma` is the spectral norm where ``u`` and ``v`` are the leading singular vectors; they are constants of
    the derivative (Miyato et al., arXiv:1802.05957).
    """
    if W.dtype in (torch.float16, torch.bfloat16) or torch._C._is_any_autocast_enabled():
        with full_precision(W):
            wide = widen(W)
            return spectral_normalize(wide, u.to(wide.dtype), v.to(wide.dtype), dim).to(W.dtype)
    # The ONNX exporter by TorchScript knows dot, but not vdot.
    dot = torch.vdot if W.is_complex() else torch.dot
    return W / dot(u, torch.mv(as_matrix(W, dim), v))
