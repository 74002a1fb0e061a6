"""Checkpoint files without the model's code: inspect, bake, convert, verify."""

from torchkiln.checkpoint._adapters.folder import Adapter
from torchkiln.checkpoint._bake import bake
from torchkiln.checkpoint._convert import convert
from torchkiln.checkpoint._inspect import inspect
from torchkiln.checkpoint._report import (
    Checked,
    FileReport,
    Folded,
    Inspection,
    Module,
    Note,
    Parametrized,
    Part,
    Verification,
)
from torchkiln.checkpoint._save import load, save
from torchkiln.checkpoint._verify import verify
from torchkiln.checkpoint._weights import load_weights

__all__ = [
    "Adapter",
    "Checked",
    "FileReport",
    "Folded",
    "Inspection",
    "Module",
    "Note",
    "Parametrized",
    "Part",
    "Verification",
    "bake",
    "convert",
    "inspect",
    "load",
    "load_weights",
    "save",
    "verify",
]
