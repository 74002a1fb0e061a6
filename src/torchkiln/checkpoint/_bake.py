"""Baking a file: every parametrized tensor gives way to its plain value, everything else stays as it is."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import Parameter

from torchkiln._core.errors import NothingToFoldError
from torchkiln._core.spellings.options import Options
from torchkiln.checkpoint._atomic import check_target
from torchkiln.checkpoint._io import Change, CheckpointFile, open_checkpoint, output_container, write_copy
from torchkiln.checkpoint._report import FileReport, Folded, Note
from torchkiln.checkpoint._scan import Found, refuse_blocked, scan

__all__ = ["Progress", "as_stored", "bake", "container_notes"]

Progress = Callable[[int, int, str], None]


def bake(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    force: bool = False,
    assume: Mapping[str, str] | None = None,
    dims: Mapping[str, int | None] | None = None,
    progress: Progress | None = None,
) -> FileReport:
    """Write a copy of a checkpoint in which every parametrized tensor is plain.

    The values are those that the model computes with in eval mode, to the bit for float32 and float64; smaller
    dtypes are computed in float32 and rounded once. The new file appears whole or not at all.

    A step without tensors at the end of a chain (a ReLU after a spectral norm) shows only in files that keep the
    module records of ``state_dict()``, as those of ``torch.save`` do and safetensors do not.

    Args:
        source: A safetensors file or a file written by ``torch.save``; it is never modified.
        target: The new file. The suffix ``.safetensors`` asks for that container.
        force: Replace an existing target.
        assume: Name pattern to what the file cannot say: ``"matrix_exp"``, ``"cayley"`` or ``"householder"`` for
            torch's orthogonal, ``"identity"`` to take an original as it is, ``"data"`` to keep keys that only look
            like parts of a parametrization, ``"weight_norm"`` for a gain and a direction that are both vectors.
        dims: Name pattern to the normalized dim, where shapes leave a choice.
        progress: Called with the number of tensors done, their total, and the name of the last one.

    Returns:
        A row for each tensor: what it was, the keys it was read from, and what was assumed.

    Raises:
        CheckpointError: The file cannot be read or written, or a tensor's rule is not known.
        NothingToFoldError: Every tensor is plain already; nothing is written.
        OutputExistsError: The target exists and `force` is false.

    Example:
        >>> import tempfile, torch
        >>> from torchkiln import checkpoint
        >>> folder = tempfile.mkdtemp()
        >>> state = {"weight_g": torch.tensor([[10.0]]), "weight_v": torch.tensor([[3.0, 4.0]])}
        >>> torch.save(state, folder + "/model.pt")
        >>> report = checkpoint.bake(folder + "/model.pt", folder + "/plain.pt")
        >>> torch.load(folder + "/plain.pt")
        {'weight': tensor([[6., 8.]])}
    """
    target = Path(target)
    options = Options(assume, dims)
    with open_checkpoint(source) as file:
        check_target(target, source=file.path, force=force)
        scanned = scan(file, options)
        refuse_blocked(scanned, str(source))
        options.check_used(str(source))
        if not scanned.found:
            raise NothingToFoldError(f"{source}: every tensor is plain already; nothing was written.")
        folding = _Folding(total=len(scanned.found), progress=progress)
        changes = [folding.change(found) for found in scanned.found]
        notes = (*scanned.notes, *container_notes(file, target))
        size = write_copy(file, changes, target, force=force)
    kept = len(file.entries) - sum(len(found.keys) for found in scanned.found)
    return FileReport(str(source), str(target), tuple(folding.rows), kept, (*notes, *folding.notes), size)


def container_notes(file: CheckpointFile, target: Path) -> tuple[Note, ...]:
    """Return what a change of container does not carry over."""
    if file.metadata and output_container(target, file) != "safetensors":
        return (Note("info", "", "the safetensors metadata has no place in a torch file and is left out"),)
    return ()


def as_stored(value: Tensor, originals: Sequence[Tensor]) -> Tensor:
    """Return a tensor as a parameter if what it was made from are parameters, as it is otherwise."""
    parameters = [tensor for tensor in originals if isinstance(tensor, Parameter)]
    if not parameters:
        return value
    return Parameter(value, requires_grad=any(parameter.requires_grad for parameter in parameters))


@dataclass
class _Folding:
    """Computes tensors when the writer asks for them, and keeps the rows."""

    total: int
    progress: Progress | None
    rows: list[Folded] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    _shared: dict[Hashable, Tensor] = field(default_factory=dict)

    def change(self, found: Found) -> Change:
        return Change(found.group, found.keys, lambda: self._make(found), before=found.labels)

    def _make(self, found: Found) -> dict[str, Tensor]:
        item = found.item
        result = found.evaluate(item)
        dtype = item.entry.dtype
        notes = (
            ()
            if result.tensor.dtype == dtype
            else (f"computed in {_name(result.tensor.dtype)}, rounded once",)
        )
        self.notes += [Note("warning", found.name, text) for text in result.warnings]
        self.rows.append(
            Folded(
                name=found.name,
                spelling=item.spelling,
                shape=item.entry.shape,
                dtype=_name(dtype),
                keys=found.keys,
                written=(item.name,),
                dim=result.dim,
                assumptions=tuple(result.assumptions),
                notes=notes,
            )
        )
        if self.progress is not None:
            self.progress(len(self.rows), self.total, found.name)
        # Tensors tied before are tied after: the same memory in, the same memory out.
        value = self._shared.setdefault(found.evaluate.identity(item), result.tensor.to(dtype))
        return {item.name: as_stored(value, [found.read(key) for key in found.keys])}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
