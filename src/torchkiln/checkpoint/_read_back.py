"""Reading a new file back before it takes its place: what was copied has to be found there, under its name.

That the system copies bytes right is taken for granted; that each tensor has those of its own source is not. Their
beginning, middle and end are compared, which costs next to nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from torchkiln._core.errors import CheckpointError
from torchkiln.checkpoint._bytes import Extent
from torchkiln.checkpoint._io import Change, CheckpointFile, Kept, replaced
from torchkiln.checkpoint._open import open_checkpoint

__all__ = ["check_copies", "copies"]

_SAMPLE = 16 << 10


def copies(file: CheckpointFile, changes: Sequence[Change]) -> dict[str, Extent]:
    """Return where the tensors that are copied lie in the source, by the names that they are to have.

    Args:
        file: The source, before its content is taken.
        changes: What is not to stay as it is.
    """
    found: dict[str, Extent] = {}
    for group in file.groups:
        mine = [change for change in changes if change.group is group]
        outputs = replaced({key: Kept(key) for key in group.entries}, mine, lambda output: output)
        for name, output in outputs.items():
            extent = file.extent(group, output.key) if isinstance(output, Kept) else None
            if extent is not None:
                found[group.full_name(name)] = extent
    return found


def check_copies(path: Path, expected: Mapping[str, Extent]) -> None:
    """Raise unless a new file has every tensor that was copied.

    Args:
        path: The new file or directory.
        expected: What :func:`copies` found.

    Raises:
        CheckpointError: Names the first tensor that is not there, or has other bytes.
    """
    if not expected:
        return
    with open_checkpoint(path) as written:
        places = {group.full_name(key): (group, key) for group in written.groups for key in group.entries}
        for name, source in expected.items():
            place = places.get(name)
            extent = None if place is None else written.extent(*place)
            if extent is None or not _are_equal(source, extent):
                raise CheckpointError(
                    f"{name}: what was written is not what was read. Nothing was left.\nPlease report this."
                )


def _are_equal(one: Extent, two: Extent) -> bool:
    if one.length != two.length:
        return False
    return all(
        one.file.read(one.offset + start, size) == two.file.read(two.offset + start, size)
        for start, size in _samples(one.length)
    )


def _samples(length: int) -> Iterator[tuple[int, int]]:
    if length <= 3 * _SAMPLE:
        yield 0, length
        return
    for start in (0, (length - _SAMPLE) // 2, length - _SAMPLE):
        yield start, _SAMPLE
