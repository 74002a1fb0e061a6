"""Tensors that are not folded: another name, another dtype, or as they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from torchkiln._core.errors import CheckpointError
from torchkiln.checkpoint._check import overflows
from torchkiln.checkpoint._io import Change, CheckpointFile, Entry, Group, Kept, Made
from torchkiln.checkpoint._report import Note
from torchkiln.checkpoint._select import Renaming
from torchkiln.checkpoint._values import blocks_of

__all__ = ["DTYPES", "Casting"]

# Narrower ones need a scale for each tensor, and a file whose reader knows where that is.
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64)
}


@dataclass
class Casting:
    """Makes the changes of tensors that are not folded, and remembers which of them do not fit their new dtype.

    Attributes:
        file: Where they are.
        rename: Their new names.
        dtype: The dtype for those of floats; None leaves each its own.

    Raises:
        CheckpointError: The dtype is not one that every float can be written in.
    """

    file: CheckpointFile
    rename: Renaming
    dtype: torch.dtype | None
    warnings: list[Note] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in DTYPES.values():
            raise CheckpointError(f"dtype: expected one of {', '.join(DTYPES)}, got {self.dtype}.")

    def changes(self, plain: Mapping[Group, Sequence[str]]) -> Iterator[Change]:
        """Yield what is to happen to tensors, by group and key; those that stay as they are have no change."""
        for group, keys in plain.items():
            for key in keys:
                name, output = self.rename(key), self.of(group, key)
                if name != key or isinstance(output, Made):
                    yield Change(group, (key,), {name: output})

    def of(self, group: Group, key: str) -> Kept | Made:
        """Return a tensor in the dtype that it is to have.

        Raises:
            CheckpointError: It is another, and the tensor is sparse.
        """
        own, dtype = group.entries[key].dtype, self.dtype_of(group.entries[key])
        if dtype == own:
            return Kept(key)
        if kind := self.file.unusual(group, key):
            name = str(dtype).removeprefix("torch.")
            raise CheckpointError(
                f"{self.file.path}: {group.full_name(key)}: expected a plain tensor to write as {name}, "
                f"got a {kind} one.\n"
                "Leave its dtype as it is, or save it plain: tensor.to_dense()."
            )
        return self._cast(group, key, dtype)

    def dtype_of(self, entry: Entry) -> torch.dtype:
        """Return the dtype that a tensor is to have."""
        return entry.dtype if self.dtype is None or not entry.dtype.is_floating_point else self.dtype

    def notes(self, changes: Sequence[Change]) -> list[Note]:
        """Return how many tensors change their dtype, and which of them do not fit it."""
        if self.dtype is None:
            return []
        outputs = [output for change in changes for output in change.outputs.values()]
        count = sum(isinstance(output, Made) and output.entry.dtype == self.dtype for output in outputs)
        name = str(self.dtype).removeprefix("torch.")
        return [
            Note("info", "", f"tensors cast to {name}, or computed and rounded to it: {count}"),
            *self.warnings,
        ]

    def _cast(self, group: Group, key: str, dtype: torch.dtype) -> Made:
        shape = group.entries[key].shape
        return Made(
            Entry(shape, dtype),
            lambda: next(self._blocks(group, key, dtype)),
            like=(key,),
            memory=(self.file.identity(group, key), dtype),
            blocks=lambda: self._blocks(group, key, dtype),
        )

    def _blocks(self, group: Group, key: str, dtype: torch.dtype) -> Iterator[Tensor]:
        fits = True
        for source in blocks_of(self.file, group, key):
            value = source.to(dtype).contiguous()
            fits = fits and not overflows(value, source)
            yield value
        if not fits:
            name = group.full_name(key)
            text = f"{name}: has values beyond the range of {str(dtype).removeprefix('torch.')}, which become infinite"
            self.warnings.append(Note("warning", name, text))
