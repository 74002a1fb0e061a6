"""Parametrized modules under torch's distributed engines: DDP, FSDP2 and DTensor."""

from __future__ import annotations

__all__: list[str] = []
