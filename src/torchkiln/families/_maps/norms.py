"""Pure maps that normalize: weight norm and spectral norm; no modules, no state of their own."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from torchkiln._core.sharded import beside, is_sharded, settled, whole
from torchkiln._core.tracing import is_recorded
from torchkiln.families._maps.precision import full_precision, widen

__all__ = [
    "as_matrix",
    "divisor",
    "norm_except",
    "power_iteration",
    "spectral_normalize",
    "unit",
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
    if is_sharded(V):
        return _squares(V, others).sqrt()
    norm: Tensor = torch.linalg.vector_norm(V, dim=others, keepdim=others is not None)
    return norm


def _squares(V: Tensor, others: list[int] | None) -> Tensor:
    """Return the sums of squares of a sharded tensor. Its own norms may be left to be summed, and add up wrongly."""
    return settled(V.abs().square().sum(others, keepdim=others is not None))


def _others(V: Tensor, dim: int) -> list[int]:
    return [other for other in range(V.ndim) if other != dim % V.ndim]


def weight_normalize(V: Tensor, g: Tensor, dim: int) -> Tensor:
    r"""Return :math:`g\, V / \|V\|` with the norm of :func:`norm_except` (Salimans and Kingma, arXiv:1602.07868).

    A slice of zeros, which has no direction, stays zero, and no gradient reaches it.

    Example:
        >>> weight_normalize(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([[10.0], [1.0]]), 0)
        tensor([[6., 8.],
                [0., 0.]])
    """
    if not _has_kernel(V) or dim not in (0, V.ndim - 1):
        return _weight_formula(V, g, dim)
    W, norm = torch._weight_norm_interface(V, g, dim)
    if V.is_cpu and norm.min().item() == 0:
        return _weight_formula(V, g, dim)
    if W.grad_fn is not None:
        W.grad_fn.register_hook(partial(_weight_gradients, V, g, norm, dim))
    # On a device the host does not know whether a norm is zero, and does not wait for it.
    return W if V.is_cpu else torch.where(norm == 0, 0, W)


def _has_kernel(V: Tensor) -> bool:
    """Say whether fused kernels serve; compilers and transforms want the formula in plain operations."""
    if is_recorded() or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return False
    return type(V) in (torch.nn.Parameter, Tensor) and (V.is_cpu or V.is_cuda) and V.numel() > 0


def _weight_formula(V: Tensor, g: Tensor, dim: int) -> Tensor:
    wide = widen(V)
    W = wide * (beside(widen(g), wide) / _norm_or_infinity(wide, dim))
    return W.to(torch.promote_types(V.dtype, g.dtype))


def _norm_or_infinity(V: Tensor, dim: int) -> Tensor:
    # Divided by infinity, a slice of zeros is zero, and so are its derivatives.
    if is_sharded(V) and V.ndim > (dim != -1):
        squares = _squares(V, None if dim == -1 else _others(V, dim))
        return squares.masked_fill(squares == 0, torch.inf).sqrt()  # no root of 0 to differentiate
    norm = norm_except(V, dim)
    return norm.masked_fill(norm == 0, torch.inf)


def _weight_gradients(
    V: Tensor,
    g: Tensor,
    norm: Tensor,
    dim: int,
    grads: tuple[Tensor | None, ...],
    outputs: tuple[Tensor | None, ...],
) -> tuple[Tensor | None, ...] | None:
    """Correct the gradients of the kernel.

    Its own second derivative takes the norm for a constant (seen on torch 2.13): where the gradients are to be
    differentiated again, they are computed by the formula. On a device, slices of zeros have gradients that are NaN.
    """
    G = outputs[0]
    if G is None:
        return None
    if not torch.is_grad_enabled():
        return (
            None if V.is_cpu else tuple(grad if grad is None else grad.where(norm != 0, 0) for grad in grads)
        )
    norm = norm_except(V, dim)
    norm = norm.masked_fill(norm == 0, torch.inf)
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


def power_iteration(
    M: Tensor, u: Tensor, v: Tensor, *, steps: int, eps: float, tolerance: float | None = None
) -> tuple[Tensor, Tensor]:
    r"""Return better singular vectors than ``u`` and ``v`` of the largest singular value of ``M``.

    Each step is :math:`u \leftarrow M v / \|M v\|`, then :math:`v \leftarrow M^H u / \|M^H u\|`. A vector whose image
    is zero stays as it is.

    Args:
        M: matrix of shape (h, w).
        u: unit vector of length h.
        v: unit vector of length w.
        steps: number of iterations.
        eps: norms below it count as ``eps``.
        tolerance: iterate until :math:`\|M v - \sigma u\| \le` ``tolerance`` :math:`\sigma`, at most 1000 times.
            The host then waits for the device at each step.
    """
    dtype = u.dtype
    with full_precision(M):
        M = widen(M)
        u, v = whole(u).to(M.dtype), whole(v).to(M.dtype)
        for _ in range(steps if tolerance is None else _MOST_STEPS):
            image = whole(torch.mv(M, beside(v, M)))
            if tolerance is not None and _is_aligned(image, u, tolerance):
                break
            u = unit(image, eps, u)
            v = unit(whole(torch.mv(M.mH, beside(u, M))), eps, v)
    return u.to(dtype), v.to(dtype)


_MOST_STEPS = 1000


def _is_aligned(image: Tensor, u: Tensor, tolerance: float) -> bool:
    sigma = torch.linalg.vecdot(u, image)
    return bool(torch.linalg.vector_norm(image - sigma * u) <= tolerance * sigma.abs())


def unit(x: Tensor, eps: float, fallback: Tensor) -> Tensor:
    """Return ``x`` divided by its length, or by ``eps`` where that is shorter; ``fallback`` where ``x`` is zero.

    Example:
        >>> unit(torch.tensor([0.0, 2.0]), 1e-12, torch.ones(2))
        tensor([0., 1.])
    """
    norm = torch.linalg.vector_norm(x)
    return torch.where(norm == 0, fallback, x / norm.clamp_min(eps))


def spectral_normalize(
    W: Tensor, u: Tensor, v: Tensor, dim: int, *, coefficient: float = 1.0, cap: bool = False
) -> Tensor:
    r"""Return :math:`c\, W / \sigma` with :math:`\sigma = u^H M v`, ``M`` the matrix of ``W`` (:func:`as_matrix`).

    :math:`\sigma` is the spectral norm where ``u`` and ``v`` are the leading singular vectors; they are constants of
    the derivative (Miyato et al., arXiv:1802.05957). Zeros stay zeros.

    Args:
        W: the tensor.
        u: left singular vector.
        v: right singular vector.
        dim: the dimension of the rows.
        coefficient: the norm :math:`c` of the result.
        cap: divide only where the norm is above ``coefficient``.
    """
    if W.dtype in (torch.float16, torch.bfloat16) or torch._C._is_any_autocast_enabled():
        with full_precision(W):
            wide = widen(W)
            u, v = u.to(wide.dtype), v.to(wide.dtype)
            return spectral_normalize(wide, u, v, dim, coefficient=coefficient, cap=cap).to(W.dtype)
    if (
        W.requires_grad
        and torch.is_grad_enabled()
        and _has_kernel(W)
        and W.numel() >= _LARGE
        and not W.is_complex()
    ):
        return _spectral_recorded(_Spectral(W, u, v, dim, coefficient, cap, W._version))
    return W / beside(divisor(_sigma(W, u, v, dim), coefficient, cap=cap), W)


def divisor(norm: Tensor, coefficient: float, *, cap: bool) -> Tensor:
    """Return what to divide by for a norm of ``coefficient``, or of that at most (``cap``): 1 where the norm is zero.

    Example:
        >>> divisor(torch.tensor(3.0), 2.0, cap=False), divisor(torch.tensor(1.0), 2.0, cap=True)
        (tensor(1.5000), tensor(1.))
    """
    D = norm if coefficient == 1 else norm / coefficient
    if cap:
        return (D.abs() if D.is_complex() else D).clamp(min=1)
    # To look at the number is cheaper where that makes nobody wait.
    if D.is_cpu and _has_kernel(D) and D.item() != 0:
        return D
    return torch.where(D == 0, 1, D)


def _sigma(W: Tensor, u: Tensor, v: Tensor, dim: int) -> Tensor:
    # The ONNX exporter by TorchScript knows dot, but not vdot.
    dot = torch.vdot if W.is_complex() else torch.dot
    return dot(whole(u), whole(torch.mv(as_matrix(W, dim), beside(v, W))))


# Below, autograd's own operations cost less than a call of Python.
_LARGE = 0


class _Spectral(NamedTuple):
    """What the gradient of spectral norm is computed from."""

    W: Tensor
    u: Tensor
    v: Tensor
    dim: int
    coefficient: float
    cap: bool
    version: int

    def divisor(self) -> Tensor:
        return divisor(_sigma(self.W, self.u, self.v, self.dim), self.coefficient, cap=self.cap)


def _spectral_recorded(of: _Spectral) -> Tensor:
    """Divide, with a gradient that reads W once: autograd's own makes five tensors of its size."""
    with torch.no_grad():
        D = of.divisor()
    result = of.W / D
    assert result.grad_fn is not None
    result.grad_fn.register_hook(partial(_spectral_gradient, of, D))
    return result


def _spectral_gradient(
    of: _Spectral, D: Tensor, grads: tuple[Tensor | None, ...], outputs: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...] | None:
    r"""Add to :math:`G / D` what comes of the divisor, :math:`-\langle W, G \rangle / (c D^2)\; u v^H`."""
    direct, G = grads[0], outputs[0]
    if direct is None or G is None:
        return None
    W, u, v = of.W, of.u, of.v
    if W._version != of.version:
        raise RuntimeError(
            "The original of a spectral norm was modified by an inplace operation after it was used, and before the "
            f"backward pass: it is at version {W._version}, expected {of.version}."
        )
    if torch.is_grad_enabled():  # to be differentiated again
        D = of.divisor()
        direct = G / D
    scale = torch.dot(W.reshape(-1), G.reshape(-1)) / (D * D * -of.coefficient)
    if of.cap:
        scale = scale * (D > 1)
    M = torch.addr(as_matrix(direct, of.dim), u * scale, v)
    shape = direct.movedim(of.dim, 0).shape
    return (M.view(shape).movedim(0, of.dim), *grads[1:])
