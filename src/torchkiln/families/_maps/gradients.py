"""A gradient that is corrected before the operation it goes through: an explicit derivative without a new operation.

Where a tensor is divided by its own norm, ``W / D`` with the norm taken for a constant has all of the gradient but what
comes of D. To add that to the gradient that arrives costs one call of Python, and reads and makes fewer tensors than
autograd's own way through the norm.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from torchkiln._core.tracing import is_recorded

__all__ = ["correct_gradient"]

Correction = Callable[[Tensor], Tensor]


def correct_gradient(result: Tensor, W: Tensor, correction: Correction) -> None:
    """Let ``correction`` change the gradient of ``result`` on its way to ``W``, and for nobody who asks for it itself.

    Args:
        result: The result of an operation, which ``correction`` must not hold: no collector would see that cycle.
        W: What it was computed from, and ``correction`` reads. A write to it before the backward pass is an error.
        correction: Where gradients are recorded, as for second derivatives, it consists of differentiable operations.
    """
    node: Any = result.grad_fn
    if node is not None:  # not a hook of the tensor, which is there for all who look at its gradient
        node.register_prehook(partial(_corrected, W, W._version, correction))


def _corrected(
    W: Tensor, version: int, correction: Correction, gradients: tuple[Tensor | None]
) -> tuple[Tensor] | None:
    if not is_recorded() and W._version != version:
        raise RuntimeError(
            "A tensor that is divided by its norm was modified by an inplace operation after that, and before the "
            f"backward pass: it is at version {W._version}, expected {version}."
        )
    (G,) = gradients
    return None if G is None else (correction(G),)
