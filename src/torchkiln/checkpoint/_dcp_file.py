"""Reading the directory of a distributed checkpoint, without a process group and without its pickled code."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchkiln._core.errors import CheckpointError
from torchkiln.checkpoint._bytes import Extent, InputFile
from torchkiln.checkpoint._dcp_part import load_part, load_value, locate_part
from torchkiln.checkpoint._dcp_pickle import load_plain
from torchkiln.checkpoint._io import (
    Change,
    CheckpointFile,
    Content,
    Entry,
    Group,
    Kept,
    Made,
    placeholder,
    replaced,
)

__all__ = ["METADATA", "open_dcp"]

METADATA = ".metadata"
_MOST_METADATA_BYTES = 1 << 30


def open_dcp(path: Path) -> CheckpointFile:
    """Open a directory that ``torch.distributed.checkpoint.save`` wrote.

    Raises:
        CheckpointError: It is damaged, needs code to load, or names files outside of it.
    """
    files = {METADATA: InputFile(path / METADATA)}
    try:
        metadata = _metadata(files[METADATA])
        with _damage(path):
            for info in metadata.storage_data.values():
                name = info.relative_path
                if name not in files:
                    files[name] = InputFile(path / _plain_name(path, name))
            return _DcpFile(path, metadata, files)
    except BaseException:
        for file in files.values():
            file.close()
        raise


@contextmanager
def _damage(path: Path):  # type: ignore[no-untyped-def]  # a generator of nothing
    """Name the directory where its metadata is not of the types that it should be of."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: truncated or corrupt distributed checkpoint ({error}).") from error


def _metadata(file: InputFile) -> Any:
    if file.size > _MOST_METADATA_BYTES:
        raise CheckpointError(f"{file.path}: {file.size:,} bytes of metadata are too many.")
    metadata = load_plain(file.read(0, file.size), file.path)
    from torch.distributed.checkpoint.metadata import Metadata

    if not isinstance(metadata, Metadata):
        raise CheckpointError(f"{file.path}: is not the metadata of a distributed checkpoint.")
    return metadata


def _plain_name(path: Path, name: Any) -> str:
    if not isinstance(name, str) or name in ("", ".", "..") or any(sign in name for sign in "/\\:\0"):
        raise CheckpointError(
            f"{path}: its metadata names the file {str(name)[:80]!r}, which is not one in it."
        )
    return name


class _DcpFile(CheckpointFile):
    container = "dcp"

    def __init__(self, path: Path, metadata: Any, files: Mapping[str, InputFile]) -> None:
        self.path = path
        self.metadata = {}
        self.inputs = tuple(files.values())
        self._metadata = metadata
        stored = metadata.state_dict_metadata
        self._paths = {name: _path(metadata, name) for name in stored}
        self._where: dict[tuple[str, tuple[int, ...]], Extent] = {}
        for index, info in metadata.storage_data.items():
            extent = _extent(files[info.relative_path], info)
            self._where[index.fqn, tuple(index.offset or ())] = extent
        self._values = {
            name: self._where[name, ()] for name, one in stored.items() if not hasattr(one, "chunks")
        }
        self._check_apart()
        self.groups = self._grouped({name: one for name, one in stored.items() if hasattr(one, "chunks")})
        self._located: dict[tuple[tuple[str, ...], str], Extent | None] = {}
        self.remarks = ()

    def _check_apart(self) -> None:
        """Raise if two parts have bytes in common: a small file could claim to be as large as it likes."""
        places = sorted(
            (str(part.file.path), part.offset, part.length) for part in self._where.values() if part.length
        )
        for (path, start, length), (other, begin, _) in pairwise(places):
            if path == other and begin < start + length:
                raise ValueError(f"two of its parts have byte {begin:,} of {Path(path).name} in common")

    def _grouped(self, tensors: Mapping[str, Any]) -> tuple[Group, ...]:
        entries: dict[tuple[str, ...], dict[str, Entry]] = {}
        self._names: dict[tuple[tuple[str, ...], str], str] = {}
        for name, one in tensors.items():
            *around, key = self._paths[name]
            entry = Entry(_shape(one.size), one.properties.dtype)
            if not isinstance(entry.dtype, torch.dtype):
                raise ValueError(f"{name} has no dtype")
            self._check_chunks(name, entry, one.chunks)
            entries.setdefault(tuple(around), {})[key] = entry
            self._names[tuple(around), key] = name
        return tuple(Group(path, group) for path, group in entries.items())

    def _check_chunks(self, name: str, entry: Entry, chunks: Sequence[Any]) -> None:
        """Raise unless the chunks lie in the tensor, have their bytes in a file, and make up its size."""
        total = 0
        for chunk in chunks:
            offsets, sizes = _shape(chunk.offsets), _shape(chunk.sizes)
            ends = [start + size for start, size in zip(offsets, sizes, strict=True)]
            if len(ends) != len(entry.shape) or any(e > s for e, s in zip(ends, entry.shape, strict=True)):
                raise ValueError(f"{name} has a chunk outside of its shape")
            extent = self._where[name, offsets]
            if extent.length < prod(sizes) * entry.dtype.itemsize:
                raise ValueError(f"{name} has a chunk of {extent.length:,} bytes, too few for its shape")
            total += prod(sizes)
        if total != prod(entry.shape):
            raise ValueError(f"{name} has chunks of {total:,} elements for {prod(entry.shape):,}")
        if _overlap(sorted((tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in chunks)):
            raise ValueError(f"{name} has chunks that overlap")

    def read(self, group: Group, key: str) -> Tensor:
        name, entry = self._names[group.path, key], group.entries[key]
        tensor = torch.empty(entry.shape, dtype=entry.dtype)  # which its chunks fill
        for chunk in self._metadata.state_dict_metadata[name].chunks:
            offsets, sizes = _shape(chunk.offsets), _shape(chunk.sizes)
            part = load_part(self._where[name, offsets], name, Entry(sizes, entry.dtype))
            place = tuple(slice(start, start + size) for start, size in zip(offsets, sizes, strict=True))
            tensor[place] = part
        return tensor

    def identity(self, group: Group, key: str) -> Hashable:
        return group.path, key

    def extent(self, group: Group, key: str) -> Extent | None:
        """Return the bytes of a tensor that is one chunk; of several each is somewhere else."""
        name, entry = self._names[group.path, key], group.entries[key]
        first, *others = self._metadata.state_dict_metadata[name].chunks or [None]
        if (group.path, key) not in self._located:
            whole = first is not None and not others
            found = locate_part(self._where[name, _shape(first.offsets)], name, entry) if whole else None
            self._located[group.path, key] = found
        return self._located[group.path, key]

    def changed(self, changes: Sequence[Change]) -> Content:
        content = Content()
        root: dict[Any, Any] = {}
        for group in self.groups:
            mine = [change for change in changes if change.group is group]
            kept = {key: Kept(key) for key in group.entries}
            items = replaced(kept, mine, lambda output: output)
            place = _descend(root, group.path)
            for key, output in items.items():
                place[key] = self._placed(content, group, output)
        for name, extent in self._values.items():
            *around, key = self._paths[name]
            _descend(root, tuple(around))[key] = load_value(extent, name)
        content.root = root
        return content

    def _placed(self, content: Content, group: Group, output: Kept | Made) -> Tensor:
        if isinstance(output, Made):
            return content.hold(placeholder(output.entry), output)
        key, entry = output.key, group.entries[output.key]
        extent = self.extent(group, key)
        made = Made(entry, lambda: self.read(group, key), memory=(group.path, key), name=group.full_name(key))
        return content.hold(placeholder(entry), made if extent is None else extent)


def _overlap(boxes: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> bool:
    """Tell whether two of some boxes share an element; they come sorted by where they begin."""
    for index, (offsets, sizes) in enumerate(boxes):
        for others, lengths in boxes[index + 1 :]:
            if others and others[0] >= offsets[0] + sizes[0]:
                break  # and so does every later one
            apart = (
                o + n <= other or other + m <= o
                for o, n, other, m in zip(offsets, sizes, others, lengths, strict=True)
            )
            if not any(apart):
                return True
    return False


def _path(metadata: Any, name: str) -> tuple[str, ...]:
    """Return the names of the mappings around a tensor, and its own."""
    found = (metadata.planner_data or {}).get(name) or (name,)
    return tuple(map(str, found))


def _descend(root: dict[Any, Any], path: tuple[str, ...]) -> dict[Any, Any]:
    for name in path:
        root = root.setdefault(name, {})
        if not isinstance(root, dict):
            raise CheckpointError(f"{'.'.join(path)}: is a mapping and a value.")
    return root


def _shape(size: Any) -> tuple[int, ...]:
    if not all(type(length) is int and 0 <= length < 2**60 for length in size):
        raise ValueError("a shape that is none")
    return tuple(size)


def _extent(file: InputFile, info: Any) -> Extent:
    if info.transform_descriptors if hasattr(info, "transform_descriptors") else None:
        raise CheckpointError(f"{file.path}: is compressed or otherwise transformed, which is not read here.")
    if not 0 <= info.offset <= info.offset + info.length <= file.size:
        raise CheckpointError(f"{file.path}: truncated or corrupt file: it has {file.size:,} bytes only.")
    return Extent(file, info.offset, info.length)
