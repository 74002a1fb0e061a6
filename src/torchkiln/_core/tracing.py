"""Whether a graph is being recorded, by a compiler, an exporter or a tracer: version counters mean nothing there."""

from __future__ import annotations

import torch

__all__ = ["is_recorded"]

# Looked up once: reads ask for them.
_is_compiling = torch.compiler.is_compiling
_is_traced = torch._C._is_tracing


def is_recorded() -> bool:
    """Return whether what runs now is recorded into a graph: torch.compile, torch.export, torch.jit.trace."""
    return _is_compiling() or _is_traced()
