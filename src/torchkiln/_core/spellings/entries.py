"""What a state dict says about its tensors without their values: keys, shapes, dtypes, and whose they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

__all__ = ["Entry", "Group", "Label"]


@dataclass(frozen=True)
class Entry:
    """What a file says about a tensor without reading it."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class Group:
    """One mapping from names to tensors: a state dict, wherever in the file it lies. Equal only to itself.

    Attributes:
        path: The names of the mappings around it.
        entries: Its tensors by key, in file order.
        modules: Paths of the modules it was saved from, those without tensors too; empty where it does not say.
    """

    path: tuple[str, ...]
    entries: Mapping[str, Entry]
    modules: frozenset[str] = frozenset()

    def full_name(self, key: str) -> str:
        """The key with the names of the mappings around it, joined by dots."""
        return ".".join((*self.path, key))


@dataclass(frozen=True)
class Label:
    """How one tensor of a module is spelled, for the version records that torch keeps beside a state dict."""

    prefix: str
    tensor: str
    style: str
    norm: str
