"""torchkiln: parametrizations for PyTorch, put in, trained through, and taken out again."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from torchkiln import distributed, families, parametrizations, parametrize
from torchkiln._core.base import Parametrization
from torchkiln._core.errors import (
    CheckpointError,
    InverseError,
    NothingToFoldError,
    OutputExistsError,
    ParametrizationError,
    TorchkilnError,
    TorchkilnWarning,
)
from torchkiln._core.stack import Stack, stack
from torchkiln._core.together import evaluate_together
from torchkiln._install import install, installed, uninstall
from torchkiln.models import (
    Report,
    bake,
    baked,
    functional_call,
    load_state_dict,
    restore,
    state_dict,
    summary,
)

if TYPE_CHECKING:
    from torchkiln import checkpoint

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "InverseError",
    "NothingToFoldError",
    "OutputExistsError",
    "Parametrization",
    "ParametrizationError",
    "Report",
    "Stack",
    "TorchkilnError",
    "TorchkilnWarning",
    "bake",
    "baked",
    "checkpoint",
    "distributed",
    "evaluate_together",
    "families",
    "functional_call",
    "install",
    "installed",
    "load_state_dict",
    "parametrizations",
    "parametrize",
    "restore",
    "stack",
    "state_dict",
    "summary",
    "uninstall",
]


def __getattr__(name: str) -> Any:
    """Import ``torchkiln.checkpoint`` when it is first asked for: ``import torchkiln`` loads torch alone."""
    if name == "checkpoint":
        return importlib.import_module("torchkiln.checkpoint")
    raise AttributeError(f"module 'torchkiln' has no attribute {name!r}")
