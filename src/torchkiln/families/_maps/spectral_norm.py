"""Spectral norm of a matrix: power iteration, and the division by what it finds; pure maps, no state of their own."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from torchkiln._core.sharded import beside, is_sharded, whole
from torchkiln.families._maps.norms import has_kernel
from torchkiln.families._maps.precision import full_precision, widen

__all__ = [
    "Iterate",
    "as_matrix",
    "can_look",
    "divisor",
    "power_iteration",
    "restored",
    "spectral_normalize",
    "unit",
]

_NARROW = (torch.float16, torch.bfloat16)
# From this many numbers on, reading them less often pays for a call of Python in the backward pass.
LARGE = 2**15
_MOST_STEPS = 1000


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


def power_iteration(
    M: Tensor, u: Tensor, v: Tensor, *, steps: int, eps: float, tolerance: float | None = None
) -> Iterate:
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
    if M.dtype in _NARROW or torch._C._is_any_autocast_enabled():
        with full_precision(M):
            M = widen(M)
            found = _iterate(
                M, whole(u).to(M.dtype), whole(v).to(M.dtype), steps=steps, eps=eps, tolerance=tolerance
            )
        return Iterate(found.u.to(u.dtype), found.v.to(v.dtype))
    return _iterate(M, whole(u), whole(v), steps=steps, eps=eps, tolerance=tolerance)


def _iterate(M: Tensor, u: Tensor, v: Tensor, *, steps: int, eps: float, tolerance: float | None) -> Iterate:
    adjoint = M.mH if M.is_complex() else M.t()
    product = _product if is_sharded(M) else torch.mv
    normalize = _unit_at_hand if can_look(M) else unit
    image = None
    for _ in range(steps if tolerance is None else _MOST_STEPS):
        forth = product(M, v)
        if tolerance is not None and _is_aligned(forth, u, tolerance):
            break
        u = normalize(forth, eps, u)
        image = product(adjoint, u)
        v = normalize(image, eps, v)
    return Iterate(u, v, image)


def _product(M: Tensor, x: Tensor) -> Tensor:
    """Return the product with a sharded matrix, as a plain vector."""
    return whole(torch.mv(M, beside(x, M)))


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


def can_look(x: Tensor) -> bool:
    """Say whether to look at a number is cheaper than to compute for either case: nobody waits, and it has a value."""
    return x.is_cpu and has_kernel(x)


# --- division -----------------------------------------------------------------------------------------------------


def spectral_normalize(
    W: Tensor,
    at: Iterate,
    dim: int,
    *,
    coefficient: float = 1.0,
    cap: bool = False,
) -> Tensor:
    r"""Return :math:`c\, W / \sigma` with :math:`\sigma = u^H M v`, ``M`` the matrix of ``W`` (:func:`as_matrix`).

    :math:`\sigma` is the spectral norm where ``u`` and ``v`` are the leading singular vectors; they are constants of
    the derivative (Miyato et al., arXiv:1802.05957). Zeros stay zeros.

    Args:
        W: the tensor.
        at: the singular vectors.
        dim: the dimension of the rows.
        coefficient: the norm :math:`c` of the result.
        cap: divide only where the norm is above ``coefficient``.
    """
    u, v, image = at
    if W.dtype in _NARROW or torch._C._is_any_autocast_enabled():
        with full_precision(W):
            wide = widen(W)
            at = Iterate(u.to(wide.dtype), v.to(wide.dtype))
            return spectral_normalize(wide, at, dim, coefficient=coefficient, cap=cap).to(W.dtype)
    if not has_kernel(W) or W.is_complex():
        return W / beside(divisor(_sigma(W, u, v, dim=dim), coefficient, cap=cap), W)
    if W.numel() >= LARGE:
        return _divide_large(
            _Division(W, u, v, dim, coefficient, cap, W._version if W.requires_grad else 0), image
        )
    sigma = torch.dot(u, torch.mv(as_matrix(W, dim), v))
    if coefficient == 1 and not cap and W.is_cpu and sigma.item():
        return W / sigma  # nearly every read
    return W / divisor(sigma, coefficient, cap=cap)


def divisor(norm: Tensor, coefficient: float, *, cap: bool) -> Tensor:
    """Return what to divide by for a norm of ``coefficient``, or of that at most (``cap``): 1 where the norm is zero.

    Example:
        >>> divisor(torch.tensor(3.0), 2.0, cap=False), divisor(torch.tensor(1.0), 2.0, cap=True)
        (tensor(1.5000), tensor(1.))
    """
    D = norm if coefficient == 1 else norm / coefficient
    if cap:
        return (D.abs() if D.is_complex() else D).clamp(min=1)
    if can_look(D) and D.item() != 0:
        return D
    return torch.where(D == 0, 1, D)


def _sigma(W: Tensor, u: Tensor, v: Tensor, *, dim: int) -> Tensor:
    # The ONNX exporter by TorchScript knows dot, but not vdot.
    dot = torch.vdot if W.is_complex() else torch.dot
    return dot(whole(u), _product(as_matrix(W, dim), v))


class _Division(NamedTuple):
    """A division by the spectral norm, and what its gradient is computed from."""

    W: Tensor
    u: Tensor
    v: Tensor
    dim: int
    coefficient: float
    cap: bool
    version: int

    def divisor(self, image: Tensor | None = None) -> Tensor:
        # Always the product that power iteration ends with: a value is the same, to the bit, when it is read again.
        if image is None:
            image = torch.mv(as_matrix(self.W, self.dim).t(), self.u)
        return divisor(torch.dot(image, self.v), self.coefficient, cap=self.cap)


def _divide_large(of: _Division, image: Tensor | None) -> Tensor:
    """Divide, with a gradient that reads W once: autograd's own makes five tensors of its size."""
    with torch.no_grad():
        D = of.divisor(image)
    result = of.W / D
    if result.grad_fn is not None:
        result.grad_fn.register_hook(partial(_spectral_gradient, of, D))
    return result


def _spectral_gradient(
    of: _Division, D: Tensor, grads: tuple[Tensor | None, ...], outputs: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...] | None:
    r"""Add to :math:`G / D` what comes of the divisor, :math:`-\langle W, G \rangle / (c D^2)\; u v^H`."""
    direct, G = grads[0], outputs[0]
    if direct is None or G is None:
        return None
    if of.W._version != of.version:
        raise RuntimeError(
            "The original of a spectral norm was modified by an inplace operation after it was used, and before the "
            f"backward pass: it is at version {of.W._version}, expected {of.version}."
        )
    again = torch.is_grad_enabled()  # to be differentiated once more
    if again:
        D = of.divisor()
        direct = G / D
    scale = torch.dot(of.W.reshape(-1), G.reshape(-1)) / (D * D * -of.coefficient)
    if of.cap:
        scale = scale * (D > 1)
    M = as_matrix(direct, of.dim)
    # G / D is a new tensor, which nobody else has seen.
    M = torch.addr(M, of.u * scale, of.v) if again else M.addr_(of.u * scale, of.v)
    shape = direct.movedim(of.dim, 0).shape
    return (M.view(shape).movedim(0, of.dim), *grads[1:])
