"""One module that an adapter changes: its tensors in the base and those of the adapter, by shape; and complaints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

from torchkiln._core.errors import CheckpointError
from torchkiln._core.spellings.entries import Entry
from torchkiln.checkpoint._adapters.settings import Settings

__all__ = ["Shape", "Target"]

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Target:
    """What a rule knows before any value is read.

    Attributes:
        name: The module's name in the adapter.
        settings: The adapter's settings.
        parts: The adapter's tensors for it, by the name within the module, and those that all modules share.
        base: The base's tensors of the module, by name.
    """

    name: str
    settings: Settings
    parts: Mapping[str, Entry]
    base: Mapping[str, Entry]

    @property
    def weight(self) -> Shape:
        """The shape of the weight."""
        return self.base["weight"].shape

    @property
    def matrix(self) -> Shape:
        """The shape of the weight as a matrix whose rows run along its first dim."""
        first, *others = self.weight
        size = 1
        for length in others:
            size *= length
        return first, size

    def shape(self, part: str) -> Shape:
        """Return the shape of one of the adapter's tensors.

        Raises:
            CheckpointError: It is missing.
        """
        if part not in self.parts:
            there = ", ".join(sorted(self.parts))
            self.refuse(f"the adapter has no {part}, only {there}. Is its file complete?")
        return self.parts[part].shape

    def check(self, part: str, *shapes: Shape) -> None:
        """Raise unless one of the adapter's tensors has one of the shapes.

        Raises:
            CheckpointError: It has another one, or is missing.
        """
        if self.shape(part) not in shapes:
            wanted = " or ".join(_spelled(shape) for shape in dict.fromkeys(shapes))
            self.refuse(
                f"{part}: expected shape {wanted} for a weight of {_spelled(self.weight)}, "
                f"got {_spelled(self.shape(part))}. Is this the base that the adapter was trained on?"
            )

    def check_rank(self, part: str, *, rank: int, pattern: str = "") -> None:
        """Raise unless the rank of a tensor is the one in the settings.

        Raises:
            CheckpointError: They differ.
        """
        wanted = self.settings.number("r", module=self.name, pattern=pattern)
        if rank != wanted:
            self.refuse(
                f"rank mismatch: {part} has shape {_spelled(self.shape(part))}, rank {rank}, and "
                f"{self.settings.path.name} says r = {wanted:g}. The folder's files do not belong together."
            )

    def refuse(self, text: str) -> NoReturn:
        """Raise an error about this module."""
        raise CheckpointError(f"{self.settings.path.parent}: {self.name}: {text}")


def _spelled(shape: Shape) -> str:
    return "x".join(map(str, shape)) or "scalar"
