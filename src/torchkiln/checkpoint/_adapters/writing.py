"""Plain tensors with adapters merged into them, computed when the writer asks for them, and their report."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from torchkiln._core.spellings.fold import compute_dtype
from torchkiln.checkpoint._adapters.merging import Merging, Step, by_rows
from torchkiln.checkpoint._check import overflows
from torchkiln.checkpoint._io import Change, CheckpointFile, Entry, Group, Made
from torchkiln.checkpoint._report import Folded, Note
from torchkiln.checkpoint._select import Renaming

__all__ = ["Writing"]


@dataclass
class Writing:
    """Makes the changes of plain tensors that adapters are merged into, and remembers what to say of them.

    Attributes:
        file: The base.
        rename: The new names.
        dtype: What every float becomes; None leaves each its own.
        merging: The changes.
        verify: Whether to compute each in float64 too, and compare.
    """

    file: CheckpointFile
    rename: Renaming
    dtype: torch.dtype | None
    merging: Merging
    verify: bool
    rows: list[Folded] = field(default_factory=list)
    warnings: list[Note] = field(default_factory=list)

    def changes(self, plain: dict[Group, list[str]]) -> list[Change]:
        """Take the tensors that adapters change out of those that stay as they are, and return their changes."""
        return [self._change(group, key) for group, key in self.merging.taken_from(plain)]

    def _change(self, group: Group, key: str) -> Change:
        steps, entry = self.merging.of(group, key), group.entries[key]
        dtype = self.dtype or entry.dtype
        self.rows.append(self._row(group, key, steps, dtype))
        made = Made(
            Entry(entry.shape, dtype),
            lambda: self._merged(group, key, steps, dtype),
            like=(key,),
            memory=(self.file.identity(group, key), tuple(steps)),
            name=group.full_name(key),
            blocks=self._blocks(group, key, steps, dtype),
        )
        return Change(group, (key,), {self.rename(key): made})

    def _blocks(
        self, group: Group, key: str, steps: Sequence[Step], dtype: torch.dtype
    ) -> Callable[[], Iterator[Tensor]] | None:
        extent, entry = self.file.extent(group, key), group.entries[key]
        if extent is None or 0 in entry.shape or not by_rows(steps):
            return None
        name, source = group.full_name(key), (extent, entry)

        def blocks() -> Iterator[Tensor]:
            fits = True
            for value, finite in self.merging.rows(name, source, steps, dtype=dtype, verify=self.verify):
                fits = fits and finite
                yield value
            if not fits:
                self._warn(name, dtype)

        return blocks

    def _warn(self, name: str, dtype: torch.dtype) -> None:
        text = f"{name}: has values that are not finite in {_name(dtype)}"
        self.warnings.append(Note("warning", name, text))

    def _merged(self, group: Group, key: str, steps: Sequence[Step], dtype: torch.dtype) -> Tensor:
        name, W = group.full_name(key), self.file.read(group, key).detach()
        value = self.merging.merged(name, W, steps, dtype=dtype, verify=self.verify)
        if overflows(value, W):
            self._warn(name, dtype)
        return value

    def _row(self, group: Group, key: str, steps: Sequence[Step], dtype: torch.dtype) -> Folded:
        wide = compute_dtype(group.entries[key].dtype)
        return Folded(
            name=group.full_name(key),
            spelling=" + ".join(step.kind for step in steps),
            shape=group.entries[key].shape,
            dtype=_name(dtype),
            keys=(key, *self.merging.keys(group, key)),
            written=(self.rename(key),),
            notes=() if wide == dtype else (f"computed in {_name(wide)}, rounded once",),
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
