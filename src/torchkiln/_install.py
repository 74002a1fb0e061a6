"""Put torchkiln's modules in the place of torch's, so that libraries which call torch's get ours."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch.nn.utils.parametrizations
import torch.nn.utils.parametrize

from torchkiln import parametrizations, parametrize

__all__ = ["install", "installed", "uninstall"]

_PACKAGE = torch.nn.utils
_TORCH = {"parametrize": torch.nn.utils.parametrize, "parametrizations": torch.nn.utils.parametrizations}
_OURS = {"parametrize": parametrize, "parametrizations": parametrizations}


def install() -> None:
    """Make ``torch.nn.utils.parametrize`` and ``torch.nn.utils.parametrizations`` torchkiln's.

    Imports and attribute look-ups from now on find torchkiln's modules. A function or module object that a library
    imported before stays torch's: call this first. Modules that torch parametrized keep working. Calling it
    again changes nothing.

    Example:
        >>> import torch, torchkiln
        >>> torchkiln.install()
        >>> torch.nn.utils.parametrizations.weight_norm.__module__
        'torchkiln.parametrizations'
        >>> torchkiln.uninstall()
        >>> torch.nn.utils.parametrizations.weight_norm.__module__
        'torch.nn.utils.parametrizations'
    """
    _put(_OURS)


def uninstall() -> None:
    """Put torch's own modules back in their place; parametrized modules keep working."""
    _put(_TORCH)


@contextmanager
def installed() -> Iterator[None]:
    """Install for the time of the context, and put back what was there before.

    Example:
        >>> import torchkiln
        >>> with torchkiln.installed():
        ...     from torch.nn.utils import parametrize
        >>> parametrize is torchkiln.parametrize
        True
    """
    before = {name: getattr(_PACKAGE, name) for name in _TORCH}
    install()
    try:
        yield
    finally:
        _put(before)


def _put(modules: dict[str, ModuleType]) -> None:
    for name, module in modules.items():
        sys.modules[f"{_PACKAGE.__name__}.{name}"] = module
        setattr(_PACKAGE, name, module)
