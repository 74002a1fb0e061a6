"""Parametrized modules under torch's distributed engines: DDP, FSDP2 and DTensor.

Nothing has to be called: registering, removing and baking know the engines. See ``README.md`` beside this file.
"""

from __future__ import annotations

from torchkiln._core.engine import attach
from torchkiln.distributed._engines import Engines

__all__: list[str] = []

attach(Engines())
