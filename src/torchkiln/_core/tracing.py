"""Whether a graph is being recorded, by a compiler, an exporter or a tracer: version counters mean nothing there."""

from __future__ import annotations

import torch

__all__ = ["is_recorded"]

_tracing_state = torch._C._get_tracing_state


def is_recorded() -> bool:
    """Return whether what runs now is recorded into a graph: torch.compile, torch.export, torch.jit.trace."""
    return torch.compiler.is_compiling() or _tracing_state() is not None
