"""torchkiln: parametrizations for PyTorch, put in, trained through, and taken out again."""

from __future__ import annotations

from torchkiln import parametrizations, parametrize
from torchkiln._install import install, installed, uninstall

__version__ = "0.1.0"

__all__ = [
    "install",
    "installed",
    "parametrizations",
    "parametrize",
    "uninstall",
]
