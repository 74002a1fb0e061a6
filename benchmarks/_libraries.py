"""The libraries that are compared, each under its name: ours, torch's own, and geotorch where it is installed."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch.nn.utils import parametrizations as torch_parametrizations
from torch.nn.utils import parametrize as torch_parametrize

from benchmarks._timing import OURS, Meter
from torchkiln import parametrizations, parametrize


class Library(NamedTuple):
    """One implementation of the parametrization system; the names and signatures in both modules are torch's."""

    parametrize: Any
    parametrizations: Any


LIBRARIES = {
    OURS: Library(parametrize, parametrizations),
    "torch": Library(torch_parametrize, torch_parametrizations),
}


def geotorch() -> ModuleType | None:
    """Return geotorch, or None where it is not installed."""
    return importlib.import_module("geotorch") if importlib.util.find_spec("geotorch") else None


def each(make: Callable[[Library], Meter]) -> dict[str, Meter]:
    """Return the contender of each library, every one made from the same random numbers."""
    return {name: seeded(partial(make, library)) for name, library in LIBRARIES.items()}


def seeded(make: Callable[[], Meter]) -> Meter:
    """Return ``make()``, with its random numbers from the start of one sequence."""
    torch.manual_seed(0)
    return make()
