"""Looking into a file: what is parametrized, how it is spelled, and what would be wrong with it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator

from torchkiln._core.errors import CheckpointError
from torchkiln._core.spellings.options import Options
from torchkiln.checkpoint._modules import modules_of, tied_in
from torchkiln.checkpoint._open import open_checkpoint
from torchkiln.checkpoint._report import Inspection, Note, Parametrized
from torchkiln.checkpoint._scan import Found, known_dim, scan
from torchkiln.checkpoint._specs import Also
from torchkiln.checkpoint._values import not_finite

__all__ = ["inspect"]


def inspect(path: str | os.PathLike[str], *, deep: bool = False, also: Also | None = None) -> Inspection:
    """Say what a checkpoint file holds, without the model's code.

    Args:
        path: As for :func:`torchkiln.checkpoint.bake`.
        deep: Read every tensor and compute the parametrized ones too: decides dims that the values tell, and reports
            rows of zeros, vectors that should have unit length, and how many values are not finite.
        also: Your own classes, by the names that a file from :func:`torchkiln.checkpoint.save` has for them.

    Returns:
        A row for each parametrized tensor, what there is of each module, which tensors are tied, and notes on what
        cannot be baked or looks like a part of a parametrization.

    Raises:
        CheckpointError: The file is missing, damaged, no checkpoint, or needs code to load.

    Example:
        >>> import tempfile, torch
        >>> from torchkiln import checkpoint
        >>> path = tempfile.mkdtemp() + "/model.pt"
        >>> torch.save({"conv.weight_g": torch.ones(3, 1), "conv.weight_v": torch.ones(3, 4)}, path)
        >>> [(row.name, row.spelling, row.dim) for row in checkpoint.inspect(path).rows]
        [('conv.weight', 'legacy weight_norm', 0)]
    """
    with open_checkpoint(path) as file:
        scanned = scan(file, Options(), also=also)
        rows: list[Parametrized] = []
        notes = list(scanned.notes)
        for found in scanned.found:
            row, said = _look(found, deep=deep)
            found.forget()
            rows.append(row)
            notes += said
        if deep:
            notes += not_finite(file)
        if not rows:
            nothing = "every tensor is plain" if file.entries else "it holds no tensors"
            notes.append(Note("info", "", f"{nothing}: there is nothing to fold"))
        return Inspection(
            path=str(path),
            container=file.container,
            size_bytes=file.size,
            metadata=file.metadata,
            tensors=len(file.entries),
            dtypes=dict(Counter(str(entry.dtype).removeprefix("torch.") for entry in file.entries)),
            rows=tuple(rows),
            notes=tuple(notes),
            modules=modules_of(scanned),
            tied=tied_in(file),
        )


def _look(found: Found, *, deep: bool) -> tuple[Parametrized, list[Note]]:
    item = found.item
    dim, assumptions, blocked = _from_names(found)
    notes: list[Note] = []
    if deep and not blocked:
        try:
            result = found.evaluate(item)
        except CheckpointError as error:
            blocked = str(error)
        else:
            dim, assumptions = result.dim, tuple(result.assumptions)
            notes += [Note("warning", found.name, text) for text in result.warnings]
    if blocked:
        notes.append(Note("warning", found.name, blocked))
    dtype = str(item.entry.dtype).removeprefix("torch.")
    row = Parametrized(
        found.name, item.spelling, item.entry.shape, dtype, found.keys, dim, assumptions, blocked
    )
    return row, notes


def _from_names(found: Found) -> tuple[int | None, tuple[str, ...], str]:
    """The dim, the assumptions and the obstacle that names and shapes give."""
    return known_dim(found), (*found.item.assumptions, *_open_questions(found)), found.blocked


def _open_questions(found: Found) -> Iterator[str]:
    for step in found.item.steps:
        if len(step.dims) > 1 and step.kind == "weight_norm":
            yield "the gain is one number: one norm over the whole tensor"
        elif len(step.dims) > 1:
            fitting = " and ".join(map(str, step.dims))
            yield f"dims {fitting} fit the shapes; the values may tell (deep=True)"
    if found.item.skipped:
        yield f"step {found.item.skipped[0]} keeps nothing in the file; the values may tell (deep=True)"
