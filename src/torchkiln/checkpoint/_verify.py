"""Verifying a file: recompute its tensors in float64, or compare it with another file."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from torchkiln._core.errors import CheckpointError, NothingToFoldError
from torchkiln._core.spellings.options import Options
from torchkiln.checkpoint._check import beyond, differences, errors
from torchkiln.checkpoint._io import CheckpointFile, Entry, Group
from torchkiln.checkpoint._open import open_checkpoint
from torchkiln.checkpoint._report import Checked, Note, Verification
from torchkiln.checkpoint._scan import Found, Scan, refuse_blocked, scan
from torchkiln.checkpoint._specs import Also
from torchkiln.checkpoint._values import parts_of
from torchkiln.checkpoint._write import Progress

__all__ = ["verify"]


def verify(
    path: str | os.PathLike[str],
    other: str | os.PathLike[str] | None = None,
    *,
    assume: Mapping[str, str] | None = None,
    dims: Mapping[str, int | None] | None = None,
    also: Also | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Check what a file's parametrized tensors fold to, or that two files hold the same model.

    Alone, every parametrized tensor is computed as :func:`bake` does and, from the definition, in float64. With
    another file both are folded as far as they need it, and compared tensor by tensor; where each has one state dict
    it does not matter under which name.

    Args:
        path: A safetensors file or a file written by ``torch.save``.
        other: The file to compare with.
        assume: As for :func:`bake`.
        dims: As for :func:`bake`.
        also: As for :func:`bake`.
        progress: Called with the number of tensors done, their total, and the name of the last one.

    Returns:
        A row for each tensor with its largest error. It is not ok beyond rounding, where values are not finite, where
        vectors of a spectral norm lack unit length, and where one file lacks a tensor or has another shape or dtype.

    Raises:
        CheckpointError: A file cannot be read, or a tensor's rule is not known.
        NothingToFoldError: There is one file, and every tensor in it is plain.

    Example:
        >>> import tempfile, torch
        >>> from torchkiln import checkpoint
        >>> path = tempfile.mkdtemp() + "/model.pt"
        >>> torch.save({"weight_g": torch.ones(3, 1), "weight_v": torch.randn(3, 4)}, path)
        >>> checkpoint.verify(path).ok
        True
    """
    options = Options(assume, dims)
    with open_checkpoint(path) as file:
        scanned = scan(file, options, also=also)
        refuse_blocked(scanned.found, str(path))
        if other is None:
            return _recompute(scanned, str(path), options, progress)
        with open_checkpoint(other) as second:
            scanned_other = scan(second, options, also=also)
            refuse_blocked(scanned_other.found, str(other))
            options.check_used(f"{path} and {other}")
            return _compare(_Side(file, scanned), _Side(second, scanned_other), progress)


def _recompute(scanned: Scan, path: str, options: Options, progress: Progress | None) -> Verification:
    options.check_used(path)
    if not scanned.found:
        raise NothingToFoldError(f"{path}: every tensor is plain: there is nothing to recompute.")
    rows: list[Checked] = []
    notes = list(scanned.notes)
    for found in scanned.found:
        row, warnings = _check(found)
        found.forget()
        rows.append(row)
        notes += [Note("warning", found.name, text) for text in warnings]
        if progress is not None:
            progress(len(rows), len(scanned.found), found.name)
    return Verification(tuple(rows), tuple(notes), all(row.ok for row in rows))


def _check(found: Found) -> tuple[Checked, list[str]]:
    item = found.item
    result = found.evaluate(item)
    exact = found.exact(item).tensor
    absolute, relative = differences(found, result.tensor.to(item.entry.dtype), exact)
    reason = "; ".join(result.warnings) or beyond(relative, item.entry.dtype, folded=True)
    return Checked(found.name, item.spelling, absolute, relative, not reason, reason), result.warnings


# Two files ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Value:
    spelling: str
    entry: Entry
    get: Callable[[], Tensor]
    found: Found | None = None


@dataclass(frozen=True)
class _Side:
    file: CheckpointFile
    scanned: Scan

    def values(self, *, full: bool) -> dict[str, _Value]:
        """Every named tensor, folded when asked for, by its name with the mappings around it or without."""
        return {key if not full else name: value for name, key, value in self._each()}

    def _each(self) -> Iterator[tuple[str, str, _Value]]:
        for found in self.scanned.found:
            value = _Value(found.item.spelling, found.item.entry, _folding(found), found)
            yield found.name, found.item.name, value
        for group, keys in self.scanned.plain.items():
            for key in keys:
                yield (
                    group.full_name(key),
                    key,
                    _Value("plain", group.entries[key], self._reading(group, key)),
                )

    def _reading(self, group: Group, key: str) -> Callable[[], Tensor]:
        return lambda: self.file.read(group, key).detach()


def _folding(found: Found) -> Callable[[], Tensor]:
    def get() -> Tensor:
        value = found.evaluate(found.item).tensor.to(found.item.entry.dtype)
        found.forget()
        return value

    return get


def _compare(one: _Side, two: _Side, progress: Progress | None) -> Verification:
    full = max(len(one.file.groups), len(two.file.groups)) > 1
    mine, theirs = one.values(full=full), two.values(full=full)
    if not mine.keys() & theirs.keys():
        raise CheckpointError(f"{one.file.path} and {two.file.path} have no tensor name in common.")
    rows: list[Checked] = []
    names = [*mine, *(name for name in theirs if name not in mine)]
    for name in names:
        rows.append(
            _pair(name, mine.get(name), theirs.get(name), where=(one.file.path.name, two.file.path.name))
        )
        if progress is not None:
            progress(len(rows), len(names), name)
    notes = (*one.scanned.notes, *two.scanned.notes)
    return Verification(tuple(rows), notes, all(row.ok for row in rows))


def _pair(name: str, mine: _Value | None, theirs: _Value | None, *, where: tuple[str, str]) -> Checked:
    if mine is None or theirs is None:
        present, lacking = (mine, where[1]) if mine else (theirs, where[0])
        assert present is not None
        return Checked(name, present.spelling, math.nan, math.nan, False, f"missing in {lacking}")
    spelling = mine.spelling if mine.spelling != "plain" else theirs.spelling
    a, b = mine.entry, theirs.entry
    if a.shape != b.shape:
        return Checked(name, spelling, math.nan, math.nan, False, f"shape {a.shape} and {b.shape}")
    absolute, relative = _differences(mine.found or theirs.found, mine.get(), theirs.get())
    reason = f"dtype {a.dtype} and {b.dtype}" if a.dtype != b.dtype else ""
    reason = reason or beyond(relative, a.dtype, folded=spelling != "plain")
    return Checked(name, spelling, absolute, relative, not reason, reason)


def _differences(found: Found | None, mine: Tensor, theirs: Tensor) -> tuple[float, float]:
    """Return the largest difference and the same relative to the largest magnitude, or to what rounding grows with."""
    if found is not None:
        pair = differences(found, mine, theirs)
        found.forget()
        return pair
    parts = parts_of(mine.detach()), parts_of(theirs.detach())
    if [part.shape for part in parts[0]] != [part.shape for part in parts[1]]:
        return math.inf, math.inf  # one is sparse, or has other entries
    pairs = [errors(one, two) for one, two in zip(*parts, strict=True)]
    return max(absolute for absolute, _ in pairs), max(relative for _, relative in pairs)
