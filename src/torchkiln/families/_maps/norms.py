"""Weight norm: length and direction apart; pure maps, in torch's fused kernel where that serves."""

from __future__ import annotations

from collections import OrderedDict
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from torchkiln._core.sharded import beside, is_sharded, settled
from torchkiln._core.tracing import is_recorded
from torchkiln.families._maps.precision import widen

__all__ = ["directed", "has_kernel", "norm_except", "weight_normalize"]

# Looked up once: each read of a weight calls them.
_kernel = torch._weight_norm_interface
_in_transform = torch._C._are_functorch_transforms_active
_saved_tensors_hooks = torch._C._autograd._top_saved_tensors_default_hooks
_PLAIN = frozenset((Tensor, torch.nn.Parameter))


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


def directed(V: Tensor, norm: Tensor) -> Tensor:
    """Return ``V`` with ones in the slices of norm 0: a direction, from which their gain can be trained.

    Example:
        >>> directed(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([[5.0], [0.0]]))
        tensor([[3., 4.],
                [1., 1.]])
    """
    if has_kernel(V) and V.is_cpu and norm.min().item() != 0:  # as nearly always, and three operations less
        return V.clone()
    return torch.where(norm == 0, torch.ones_like(V), V)


def weight_normalize(V: Tensor, g: Tensor, dim: int) -> Tensor:
    r"""Return :math:`g\, V / \|V\|` with the norm of :func:`norm_except` (Salimans and Kingma, arXiv:1602.07868).

    A slice of zeros, which has no direction, stays zero, and no gradient reaches it.

    Example:
        >>> weight_normalize(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([[10.0], [1.0]]), 0)
        tensor([[6., 8.],
                [0., 0.]])
    """
    if (dim != 0 and dim != V.ndim - 1) or not has_kernel(V):
        return _weight_formula(V, g, dim)
    if not (V.is_contiguous() and g.is_contiguous()):  # the kernel does not look at strides
        V, g = V.contiguous(), g.contiguous()
    W, norm = _kernel(V, g, dim)
    on_host = V.is_cpu
    if on_host and norm.min().item() == 0:
        return _weight_formula(V, g, dim)
    if (node := W.grad_fn) is not None:
        if on_host and _saved_tensors_hooks(True) is None:
            node._register_hook_dict(_carrier)
        else:
            node.register_hook(partial(_weight_gradients, V, g, norm, dim))
    # On a device the host does not know whether a norm is zero, and does not wait for it.
    return W if on_host else torch.where(norm == 0, 0, W)


def has_kernel(V: Tensor) -> bool:
    """Say whether fused kernels serve; compilers and transforms want the formula in plain operations."""
    if type(V) not in _PLAIN or is_recorded() or _in_transform() or forward_ad._current_level >= 0:
        return False
    return (V.is_cpu or V.is_cuda) and V.numel() > 0


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


def _before_backward(_gradient: Tensor | None) -> None:
    """Have the gradients corrected, as the kernel's backward pass begins, where they are to be differentiated again."""
    if torch.is_grad_enabled():
        node: Any = torch._C._current_autograd_node()
        if "torchkiln" not in node.metadata:  # it goes through a kept graph again
            node.metadata["torchkiln"] = True
            saved = (node._saved_v, node._saved_g, node._saved_result1, node._saved_dim)
            node.register_hook(partial(_weight_gradients, *saved))


# What a node takes hooks from is a tensor. To hang the hook of this one on it costs a fifth of a hook with the tensors
# in it; that one is for tensors that are saved in another form (checkpoints), which may be asked for only once.
_carrier = torch.empty(0)
_carrier._backward_hooks = OrderedDict({0: _before_backward})


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
