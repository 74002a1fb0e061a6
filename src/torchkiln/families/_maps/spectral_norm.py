"""Spectral norm of a matrix: power iteration, and the division by what it finds; pure maps, no state of their own."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from torchkiln._core.sharded import beside, is_sharded, whole
from torchkiln.families._maps.gradients import correct_gradient
from torchkiln.families._maps.norms import has_kernel
from torchkiln.families._maps.precision import full_precision, widen

__all__ = [
    "Iterate",
    "as_matrix",
    "divisor",
    "power_iteration",
    "restored",
    "spectral_normalize",
    "unit",
]

# Looked up once: each read of a weight calls it.
_autocasts = torch._C._is_any_autocast_enabled
_NARROW = (torch.float16, torch.bfloat16)
# From this many numbers on, reading them less often pays for a call of Python in the backward pass.
LARGE = 2**15


def as_matrix(W: Tensor, dim: int) -> Tensor:
    """Return ``W`` as a matrix whose rows run along ``dim`` and whose columns run along the rest.

    Example:
        >>> as_matrix(torch.zeros(2, 3, 5), 1).shape
        torch.Size([3, 10])
    """
    if dim != 0:
        W = W.movedim(dim, 0)
    return W if W.ndim == 2 else W.flatten(1)


# --- power iteration ----------------------------------------------------------------------------------------------


class Iterate(NamedTuple):
    r"""Where a power iteration is.

    Attributes:
        u: Left singular vector.
        v: Right singular vector.
        image: :math:`M^H u`, where the last step left it: a product that need not be computed again.
    """

    u: Tensor
    v: Tensor
    image: Tensor | None = None


def power_iteration(M: Tensor, u: Tensor, v: Tensor, *, steps: int, eps: float) -> Iterate:
    r"""Return better singular vectors than ``u`` and ``v`` of the largest singular value of ``M``.

    Each step is :math:`u \leftarrow M v / \|M v\|`, then :math:`v \leftarrow M^H u / \|M^H u\|`. A vector whose image
    is zero stays as it is.

    Args:
        M: matrix of shape (h, w).
        u: unit vector of length h.
        v: unit vector of length w.
        steps: number of iterations.
        eps: norms below it count as ``eps``.
    """
    if M.dtype in _NARROW or _autocasts():
        with full_precision(M):
            M = widen(M)
            found = _iterate(M, whole(u).to(M.dtype), whole(v).to(M.dtype), steps=steps, eps=eps)
        return Iterate(found.u.to(u.dtype), found.v.to(v.dtype))
    return _iterate(M, whole(u), whole(v), steps=steps, eps=eps)


def _iterate(M: Tensor, u: Tensor, v: Tensor, *, steps: int, eps: float) -> Iterate:
    adjoint = M.mH if M.is_complex() else M.t()
    product = _product if is_sharded(M) else torch.mv
    normalize = _unit_at_hand if _can_look(M) else unit
    image = None
    for _ in range(steps):
        u = normalize(product(M, v), eps, u)
        image = product(adjoint, u)
        v = normalize(image, eps, v)
    return Iterate(u, v, image)


def _product(M: Tensor, x: Tensor) -> Tensor:
    """Return the product with a sharded matrix, as a plain vector."""
    return whole(torch.mv(M, beside(x, M)))


def unit(x: Tensor, eps: float, fallback: Tensor) -> Tensor:
    """Return ``x`` divided by its length, or by ``eps`` where that is shorter; ``fallback`` where ``x`` is zero.

    Of a batch (b, n) that is done for each vector.

    Example:
        >>> unit(torch.tensor([0.0, 2.0]), 1e-12, torch.ones(2))
        tensor([0., 1.])
    """
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.where(norm == 0, fallback, x / norm.clamp_min(eps))


def _unit_at_hand(x: Tensor, eps: float, fallback: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x)
    length = norm.item()
    if length >= eps:
        return x / norm
    return fallback if length == 0 else x / norm.clamp_min(eps)


def restored(x: Tensor) -> Tensor:
    """Return ``x`` at length 1 where it is clearly another, as the average of unit vectors is; else as it is."""
    wide = widen(x)
    norm = torch.linalg.vector_norm(wide)
    is_unit = (norm - 1).abs() <= (1e-4 if x.dtype not in _NARROW else 1e-2)
    return torch.where(is_unit | (norm == 0), x, (wide / norm).to(x.dtype))


def _can_look(x: Tensor) -> bool:
    """Say whether to look at a number is cheaper than to compute for either case: nobody waits, and it has a value."""
    return x.is_cpu and has_kernel(x)


# --- division -----------------------------------------------------------------------------------------------------


def spectral_normalize(W: Tensor, at: Iterate, dim: int, *, trains: bool = True) -> Tensor:
    r"""Return :math:`W / \sigma` with :math:`\sigma = u^H M v`, ``M`` the matrix of ``W`` (:func:`as_matrix`).

    :math:`\sigma` is the spectral norm where ``u`` and ``v`` are the leading singular vectors; they are constants of
    the derivative (Miyato et al., arXiv:1802.05957). Zeros stay zeros.

    Args:
        W: the tensor.
        at: the singular vectors.
        dim: the dimension of the rows.
        trains: whether a gradient is to be expected, which is then prepared for. The value is the same to the bit.
    """
    if W.dtype in _NARROW or _autocasts():
        with full_precision(W):
            wide = widen(W)
            at = Iterate(at.u.to(wide.dtype), at.v.to(wide.dtype))
            return _divide(wide, at, dim, trains=trains).to(W.dtype)
    return _divide(W, at, dim, trains=trains)


def _divide(W: Tensor, at: Iterate, dim: int, *, trains: bool) -> Tensor:
    if W.is_complex() or not has_kernel(W):
        return W / beside(_nonzero(_sigma(W, at, dim)), W)
    if W.numel() < LARGE:
        sigma = torch.dot(at.u, torch.mv(as_matrix(W, dim), at.v))
    elif trains:
        return _divide_large(W, at, dim)
    else:
        sigma = torch.dot(_image(W, at.u, dim), at.v)
    return W / (sigma if sigma.is_cpu and sigma.item() else _nonzero(sigma))


def _divide_large(W: Tensor, at: Iterate, dim: int) -> Tensor:
    """Divide, with a gradient that reads W once: autograd's own makes five tensors of its size."""
    u, v, image = at
    if image is None:
        image = _image(W.detach(), u, dim)
    sigma = torch.dot(image, v)
    D = sigma if sigma.is_cpu and sigma.item() else _nonzero(sigma)
    result = W / D
    correct_gradient(result, W, partial(_before_division, W, u, v, D, dim))
    return result


def _image(W: Tensor, u: Tensor, dim: int) -> Tensor:
    # The product that power iteration ends with: a value is the same, to the bit, when it is read again.
    return torch.mv(as_matrix(W, dim).t(), u)


def _sigma(W: Tensor, at: Iterate, dim: int) -> Tensor:
    # The ONNX exporter by TorchScript knows dot, but not vdot.
    dot = torch.vdot if W.is_complex() else torch.dot
    return dot(whole(at.u), _product(as_matrix(W, dim), whole(at.v)))


def divisor(norm: Tensor, coefficient: float, *, cap: bool) -> Tensor:
    """Return what to divide by for a norm of ``coefficient``, or of that at most (``cap``): 1 where the norm is zero.

    Example:
        >>> divisor(torch.tensor(3.0), 2.0, cap=False), divisor(torch.tensor(1.0), 2.0, cap=True)
        (tensor(1.5000), tensor(1.))
    """
    D = norm if coefficient == 1 else norm / coefficient
    if cap:
        return (D.abs() if D.is_complex() else D).clamp(min=1)
    return _nonzero(D)


def _nonzero(norm: Tensor) -> Tensor:
    # To look at a number, where nobody has to wait for it, is cheaper than to compute for either case.
    return norm if _can_look(norm) and norm.item() else torch.where(norm == 0, 1, norm)


def _before_division(W: Tensor, u: Tensor, v: Tensor, D: Tensor, dim: int, G: Tensor) -> Tensor:
    r"""Return the gradient that, divided by D, is the whole one: :math:`G - \langle W, G \rangle / D\; u v^H`."""
    if torch.is_grad_enabled():  # to be differentiated once more, and the divisor is no constant then
        constant, D = D, _nonzero(torch.dot(_image(W, u, dim), v))
        G = G * (constant / D)
    along = u * (torch.dot(W.reshape(-1), G.reshape(-1)) / -D)
    M = torch.addr(as_matrix(G, dim), along, v)
    return M.view(W.movedim(dim, 0).shape).movedim(0, dim)
