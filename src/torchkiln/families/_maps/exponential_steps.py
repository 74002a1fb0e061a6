"""How often an exponential is squared: a number that the host knows, or one that a device chose and keeps.

The host's number costs one wait for the device. The device's costs products: all the squarings that may be needed are
computed, and each is taken or not.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Steps", "can_wait", "chosen_by_device", "computed", "divided", "taken"]

# Of the device they have two more dimensions than the numbers of matrices, to be used with them.
Steps = int | Tensor

# The most that a device may choose: for norms up to 1500 in float64, and to 8000 in float32.
_MOST = 12


def can_wait(A: Tensor) -> bool:
    """Return whether the host may wait for the device of ``A``, which it may not while a graph is captured."""
    return A.device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


def chosen_by_device(moments: Tensor, A: Tensor, radius: float) -> Tensor:
    r"""Return the numbers of squarings for the exponentials of ``A``; where too many are needed, one more than allowed.

    By :math:`m |\lambda|^8 \leq \|A^4\|^2` for an eigenvalue of m copies.
    """
    copies = 1 if A.is_complex() else 2
    bounds = (moments[..., 3] / copies).pow(1 / 8) * (1 + 1e-5)
    steps = (bounds / radius).log2().ceil().nan_to_num(nan=torch.inf)
    return steps.clamp(0, _MOST + 1).long()


def divided(X: Tensor, steps: Steps, *, times: int = 1) -> Tensor:
    """Return ``X`` over two to the power of so many times ``steps``; where those are too many, nothing of use."""
    if isinstance(steps, int):
        return X / 2 ** (times * steps) if steps else X
    # By a shift: powers of floats need not be exact. Filled: torch.where would copy the number from the host.
    return (X / (1 << times * steps)).masked_fill_(steps > _MOST, torch.nan)


def computed(steps: Steps) -> range:
    """Return the squarings that are computed, from 1."""
    return range(1, (steps if isinstance(steps, int) else _MOST) + 1)


def taken(step: int, steps: Steps, *, new: Tensor, old: Tensor) -> Tensor:
    """Return ``new`` for matrices that this step is taken for, ``old`` for the others."""
    return new if isinstance(steps, int) else torch.where(step <= steps, new, old)
