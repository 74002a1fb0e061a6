"""Factorizations and norms compute in float32 or wider, with autocast off, and round once at the end."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

__all__ = ["full_precision", "widen"]


def widen(X: Tensor) -> Tensor:
    """Return ``X`` in float32 where its type is narrower (float16, bfloat16), else ``X`` itself."""
    return X.float() if X.dtype in (torch.float16, torch.bfloat16) else X


def full_precision(X: Tensor) -> AbstractContextManager[object]:
    """Return a context in which autocast does not narrow the operations on ``X``."""
    kind = X.device.type
    if torch._C._is_any_autocast_enabled() and torch.amp.is_autocast_available(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()
