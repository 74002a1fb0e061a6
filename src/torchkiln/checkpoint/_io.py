"""Checkpoint files behind one interface: what tensors there are, the bytes of each, and how they change.

Everything outside the files of the containers sees a :class:`CheckpointFile`: groups of tensor keys with shapes and
dtypes, known from headers alone; `read` and `extent` for one tensor at a time; `changed` for the content with some
keys replaced, in which a tensor is a placeholder (on torch's meta device) for bytes that are somewhere else.

The seam for whatever computes tensors is :class:`Change`: keys of a group give way to outputs. A :class:`Made` output
is its shape, its dtype, and a function without arguments that returns it when its turn comes. Where that function
takes its inputs from does not matter here: this file, several, or none.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from torchkiln._core.spellings.entries import Entry, Group, Label
from torchkiln.checkpoint._blocks import block_by_block
from torchkiln.checkpoint._bytes import Extent, InputFile

__all__ = [
    "Change",
    "CheckpointFile",
    "Content",
    "Entry",
    "Extent",
    "Group",
    "Kept",
    "Label",
    "Made",
    "Piece",
    "as_stored",
    "placeholder",
    "replaced",
    "unusual",
]


@dataclass(frozen=True)
class Kept:
    """The tensor that the source has under `key`, byte for byte."""

    key: str


@dataclass(frozen=True)
class Made:
    """A tensor that is computed when it is written.

    Attributes:
        entry: Its shape and dtype.
        make: Returns it: contiguous, on the CPU, with exactly this shape and dtype.
        like: Keys of the group; it is a parameter where one of these is.
        memory: Two outputs with equal memory are one tensor; None is equal to nothing.
        name: What to call it while it is computed.
        blocks: Yields the same values front to back in pieces of any shape, where they can be computed so. A piece
            is written while the next one is computed, and must not change any more.
    """

    entry: Entry
    make: Callable[[], Tensor]
    like: tuple[str, ...] = ()
    memory: Hashable = None
    name: str = ""
    blocks: Callable[[], Iterator[Tensor]] | None = None

    def pieces(self) -> Iterator[Tensor]:
        """Yield the values front to back, in as many contiguous pieces as it takes."""
        if self.blocks is None:
            yield self.make()
        else:
            with block_by_block():
                yield from self.blocks()


@dataclass(frozen=True)
class Change:
    """In one group, `keys` give way to `outputs`, put where the first of them stood."""

    group: Group
    keys: tuple[str, ...]
    outputs: Mapping[str, Kept | Made]
    before: tuple[Label, ...] = ()
    after: tuple[Label, ...] = ()


# Where the bytes of a storage come from.
Piece = Extent | Made


class Content:
    """What a file is to hold: anything that ``torch.save`` takes, with placeholders for tensors.

    Attributes:
        root: The mapping of names to tensors, or whatever is around it.
    """

    def __init__(self) -> None:
        self.root: Any = None
        self._pieces: dict[int, Piece] = {}
        self._extents: Mapping[int, Extent] = {}
        self._alive: list[Tensor] = []

    def stored_at(self, extents: Mapping[int, Extent]) -> None:
        """Tell where the storages are that torch loaded without their bytes, by their offset in the file."""
        self._extents = extents

    def hold(self, tensor: Tensor, piece: Piece) -> Tensor:
        """Remember where the bytes of a placeholder come from, and return it."""
        self._alive.append(tensor)  # or the address might become another's
        self._pieces[tensor.untyped_storage()._cdata] = piece
        return tensor

    def piece(self, storage: torch.UntypedStorage) -> Piece:
        """Return where the bytes of a storage come from."""
        found = self._pieces.get(storage._cdata)
        if found is not None:
            return found
        offset = getattr(storage, "_checkpoint_offset", None)
        if offset is not None:
            return self._extents[offset].part(0, storage.nbytes())
        entry = Entry((storage.nbytes(),), torch.uint8)
        return Made(entry, lambda: torch.empty(0, dtype=torch.uint8).set_(storage), memory=storage._cdata)


class CheckpointFile(ABC):
    """An open checkpoint."""

    path: Path
    container: str
    metadata: dict[str, str]
    groups: tuple[Group, ...]
    loose: tuple[Entry, ...] = ()
    """Tensors that no mapping with string keys holds; they are never folded."""
    remarks: tuple[str, ...] = ()
    """What a reader of reports should know about this file."""
    inputs: tuple[InputFile, ...] = ()
    """Every file that is read."""

    @abstractmethod
    def read(self, group: Group, key: str) -> Tensor:
        """Return one tensor, on the CPU: do not write to it."""

    @abstractmethod
    def identity(self, group: Group, key: str) -> Hashable:
        """Return a value that is equal for two keys exactly when they hold the same memory."""

    @abstractmethod
    def extent(self, group: Group, key: str) -> Extent | None:
        """Return the bytes of one tensor where they lie together and in order."""

    def unusual(self, group: Group, key: str) -> str:  # noqa: ARG002  # most files hold plain tensors alone
        """Return what a tensor is whose values are not simply its elements (see :func:`unusual`); mostly empty."""
        return ""

    @abstractmethod
    def changed(self, changes: Sequence[Change]) -> Content:
        """Return the whole content with the changes made; `groups` may be used up by it, `read` is not."""

    @property
    def entries(self) -> tuple[Entry, ...]:
        """Every tensor of the file."""
        return (*(entry for group in self.groups for entry in group.entries.values()), *self.loose)

    @property
    def size(self) -> int:
        """Its size in bytes, in all its files."""
        return sum(one.size for one in self.inputs)

    def check_unchanged(self) -> None:
        """Raise if a file was written to since it was opened.

        Raises:
            CheckpointError: Names the file.
        """
        for one in self.inputs:
            one.check_unchanged()

    def close(self) -> None:
        """Close every file."""
        for one in self.inputs:
            one.close()


def placeholder(entry: Entry) -> Tensor:
    """Return a tensor of this shape and dtype that has no memory."""
    return torch.empty(entry.shape, dtype=entry.dtype, device="meta")


def unusual(tensor: Tensor) -> str:
    """Return ``"sparse"``, ``"quantized"`` or ``"nested"``, and nothing for a tensor whose values are its elements.

    Example:
        >>> unusual(torch.eye(3).to_sparse())
        'sparse'
    """
    if tensor.is_nested:
        return "nested"
    if tensor.is_quantized:
        return "quantized"
    return "sparse" if tensor.layout != torch.strided else ""


def as_stored(value: Tensor, originals: Sequence[Tensor]) -> Tensor:
    """Return a tensor as a parameter if what it was made from are parameters, as it is otherwise."""
    parameters = [tensor for tensor in originals if isinstance(tensor, Parameter)]
    if not parameters:
        return value
    return Parameter(value, requires_grad=any(parameter.requires_grad for parameter in parameters))


def replaced(
    items: Mapping[Any, Any], changes: Sequence[Change], make: Callable[[Kept | Made], Any]
) -> dict[Any, Any]:
    """Return the items with the changes made, each where the first of its keys stood.

    Args:
        items: Keys to what stands for their tensors.
        changes: What gives way to what.
        make: Returns what stands for an output.
    """
    at = {change.keys[0]: change for change in changes}
    dropped = {key for change in changes for key in change.keys}
    result: dict[Any, Any] = {}
    for key, value in items.items():
        if key in at:
            result.update({name: make(output) for name, output in at[key].outputs.items()})
        elif key not in dropped:
            result[key] = value
    return result
