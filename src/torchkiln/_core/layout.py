"""Strides: fused optimizer kernels go through a parameter, its gradient and its state as they lie in memory."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["laid_out_as", "lay_out_state"]


def laid_out_as(tensor: Tensor, like: Tensor) -> Tensor:
    """Return ``tensor`` with the strides of ``like``, where it has the shape of it and strides at all."""
    strided = tensor.layout is torch.strided and like.layout is torch.strided
    if not strided or tensor.shape != like.shape or tensor.stride() == like.stride():
        return tensor
    return torch.empty_like(like, dtype=tensor.dtype, device=tensor.device, requires_grad=False).copy_(tensor)


def lay_out_state(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Give what ``optimizer`` keeps for ``parameters`` the strides that they have now."""
    for parameter in parameters:
        state = optimizer.state.get(parameter, {})
        for key, value in list(state.items()):
            if isinstance(value, Tensor):
                state[key] = laid_out_as(value, parameter)
