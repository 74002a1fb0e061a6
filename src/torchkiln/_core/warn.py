"""Warn at the line of the user's code that led here, however deep it is below."""

from __future__ import annotations

import sys
import warnings

from torchkiln._core.errors import TorchkilnWarning

__all__ = ["warn"]

_INTERNAL = ("torchkiln.", "torch.optim.", "torch.autograd.", "torch.utils.", "contextlib")


def warn(message: str) -> None:
    """Issue a ``TorchkilnWarning`` at the innermost caller outside of torchkiln."""
    depth, frame = 1, sys._getframe()
    while frame.f_back is not None and f"{frame.f_globals.get('__name__', '')}.".startswith(_INTERNAL):
        depth, frame = depth + 1, frame.f_back
    warnings.warn(message, TorchkilnWarning, stacklevel=depth)
