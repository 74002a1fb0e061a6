"""Pure maps between free tensors and normalized or orthogonal ones; no modules, no state of their own.

Matrices are the last two dimensions, everything before them is a batch. Maps that factorize or take norms compute in
float32 or wider, with autocast off, and round once at the end.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

__all__ = [
    "as_matrix",
    "cayley",
    "complete_basis",
    "exponential",
    "full_precision",
    "householder",
    "householder_inverse",
    "is_orthonormal",
    "norm_except",
    "orthonormalize",
    "power_iteration",
    "skew",
    "spectral_normalize",
    "weight_normalize",
    "widen",
]


def widen(X: Tensor) -> Tensor:
    """Return ``X`` in float32 where its type is narrower (float16, bfloat16), else ``X`` itself."""
    return X.float() if X.dtype in (torch.float16, torch.bfloat16) else X


def full_precision(X: Tensor) -> AbstractContextManager[object]:
    """Return a context in which autocast does not narrow the operations on ``X``."""
    kind = X.device.type
    if torch._C._is_any_autocast_enabled() and torch.amp.is_autocast_available(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


# --- norms --------------------------------------------------------------------------------------------------------


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
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
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


# --- orthogonal maps: X is tall (n x k, n >= k) -------------------------------------------------------------------


def skew(X: Tensor) -> Tensor:
    r"""Return the skew-Hermitian :math:`L - L^H`, ``L`` the lower triangle of ``X`` padded with zero columns to n x n.

    Example:
        >>> skew(torch.tensor([[1.0, 9.0], [2.0, 1.0]]))
        tensor([[ 0., -2.],
                [ 2.,  0.]])
    """
    n, k = X.shape[-2:]
    L = F.pad(X.tril(), (0, n - k))
    return L - L.mH


def exponential(X: Tensor) -> Tensor:
    r"""Return the first k columns of :math:`\exp(A)`, ``A`` the :func:`skew` of ``X`` (arXiv:1901.08428)."""
    Q: Tensor = torch.matrix_exp(skew(X))
    return Q[..., : X.shape[-1]]


def cayley(X: Tensor) -> Tensor:
    r"""Return the first k columns of :math:`(I - A/2)^{-1} (I + A/2)`, ``A`` the :func:`skew` of ``X``."""
    half = skew(X) / 2
    I = torch.eye(half.shape[-1], dtype=half.dtype, device=half.device)  # noqa: E741  # the identity's name
    Q: Tensor = torch.linalg.solve(I - half, I + half)
    return Q[..., : X.shape[-1]]


def householder(X: Tensor) -> Tensor:
    r"""Return :math:`H_1 \cdots H_k` times the first k unit vectors, times the signs on the diagonal of ``X``.

    :math:`H_i = I - \tau_i v_i v_i^T` with :math:`\tau_i = 2 / \|v_i\|^2`; :math:`v_i` is zero above row i, 1 there,
    and column i of ``X`` below. Only the sign of the diagonal counts, zero as negative: whatever weight decay does to
    it, the columns stay orthonormal, and ``X = 0`` gives the first unit vectors.
    """
    V = X.tril(-1)
    tau = 2 / (1 + (V * V).sum(-2))
    signs = torch.where(X.diagonal(dim1=-2, dim2=-1) > 0, 1.0, -1.0).to(X.dtype)
    Q: Tensor = torch.linalg.householder_product(V, tau)
    return Q * signs.unsqueeze(-2)


def householder_inverse(Q: Tensor) -> Tensor:
    """Return an ``X`` with ``householder(X) == Q`` for orthonormal columns ``Q``; for others, of the nearest QR factor.

    Above the diagonal ``X`` holds what the factorization left there, which :func:`householder` does not read.
    """
    if Q.is_meta:
        return torch.empty_like(Q)
    X, tau = torch.geqrf(Q)
    diagonal = X.diagonal(dim1=-2, dim2=-1)
    signs = torch.where(diagonal < 0, -1.0, 1.0)
    # LAPACK leaves out a reflection that would change nothing (tau = 0); householder() always reflects.
    diagonal.copy_(torch.where(tau == 0, -signs, signs))
    return X


def is_orthonormal(Q: Tensor) -> bool:
    """Say whether the columns of ``Q`` are orthonormal to the rounding of its dtype."""
    n, k = Q.shape[-2:]
    eps = torch.finfo(Q.dtype).eps
    # Rounding a matrix with unit columns moves its Gram matrix by at most eps; in wide types products round as well.
    tolerance = 10 * n * eps if widen(Q) is Q else 2 * eps
    Q = widen(Q)
    return torch.allclose(Q.mH @ Q, torch.eye(k, dtype=Q.dtype, device=Q.device), atol=tolerance)


def orthonormalize(A: Tensor) -> Tensor:
    """Return the factor ``Q`` of ``A = QR`` for which the diagonal of ``R`` is not negative."""
    X, tau = torch.geqrf(A)
    diagonal = X.diagonal(dim1=-2, dim2=-1)  # of R, and real also where A is complex
    signs = torch.where(diagonal.real < 0, -1.0, 1.0).to(A.dtype)
    Q: Tensor = torch.linalg.householder_product(X, tau)
    # LAPACK's columns lie one after the other; files want rows.
    return (Q * signs.unsqueeze(-2)).contiguous()


def complete_basis(Q: Tensor) -> Tensor:
    """Return an n x n orthonormal matrix that begins with the columns of ``Q``, orthonormalized where they are not.

    The columns that ``Q`` lacks are drawn from torch's default generator; a square ``Q`` draws nothing.
    """
    n, k = Q.shape[-2:]
    if Q.is_meta:
        return Q.new_empty(*Q.shape[:-1], n)
    wide = widen(Q)
    if n == k:
        return Q.clone() if is_orthonormal(Q) else orthonormalize(wide).to(Q.dtype)
    rest = torch.randn(*Q.shape[:-1], n - k, dtype=wide.dtype, device=Q.device)
    return orthonormalize(torch.cat([wide, rest], dim=-1)).to(Q.dtype)
