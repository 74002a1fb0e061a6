"""Writing the directory of a distributed checkpoint: one file of data by each process, and what is where."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchkiln._core.errors import CheckpointError
from torchkiln.checkpoint._bytes import OutputFile, nbytes
from torchkiln.checkpoint._dcp_file import METADATA
from torchkiln.checkpoint._io import Content, Entry, Piece, placeholder, unusual
from torchkiln.checkpoint._safetensors_sink import contiguous
from torchkiln.checkpoint._stream import Advance
from torchkiln.checkpoint._team import Team
from torchkiln.checkpoint._torch_sink import pickled, records_of, write_archive

__all__ = ["DcpSink"]


class _Place(NamedTuple):
    """Where the archive of a tensor or value lies."""

    file: str
    start: int
    length: int


class DcpSink:
    """A data file by each process with an archive for each tensor and value, and the metadata: where they are.

    Args:
        content: Mappings in mappings; their keys make the names.
    """

    shared_out = True

    def __init__(self, content: Content) -> None:
        self._paths: dict[str, tuple[Any, ...]] = {}
        self._tensors: dict[str, tuple[Entry, Piece]] = {}
        self._values: dict[str, bytes] = {}
        self._content = content
        for path, value in _leaves(content.root, ()):
            name = ".".join(map(str, path))
            if name in self._paths or not name:
                raise CheckpointError(
                    f"two tensors would have the name {name!r} in a distributed checkpoint."
                )
            self._paths[name] = path
            if isinstance(value, Tensor):
                if kind := unusual(value):
                    raise CheckpointError(
                        f"{name}: is a {kind} tensor, and a distributed checkpoint holds plain ones alone.\n"
                        'Choose a name ending in ".pt".'
                    )
                entry = Entry(tuple(value.shape), value.dtype)
                self._tensors[name] = (entry, contiguous(value.detach(), content))
            else:
                self._values[name] = _saved(value)
        self.size = sum(nbytes(entry) + 1200 for entry, _ in self._tensors.values())
        self.size += sum(map(len, self._values.values()))

    @property
    def pieces(self) -> list[Piece]:
        """Where everything comes from, in the order of writing."""
        return [piece for _, piece in self._tensors.values()]

    def write(self, path: Path, advance: Advance, team: Team) -> None:
        """Write this process's share into an empty directory; the first process adds the metadata."""
        data = path / f"__{team.rank}_0.distcp"
        data.touch(exist_ok=False)
        with OutputFile(data) as out:
            mine = self._write_share(out, data.name, advance, team)
        places = {name: place for part in team.exchange(mine) for name, place in part.items()}
        if team.rank == 0:
            # Last: a directory without its metadata is no checkpoint.
            metadata = path / METADATA
            metadata.touch(exist_ok=False)
            with OutputFile(metadata) as out:
                out.write(pickle.dumps(self._metadata(places)))

    def _write_share(self, out: OutputFile, file: str, advance: Advance, team: Team) -> dict[str, _Place]:
        places = {}
        if team.rank == 0:
            for name, value in self._values.items():
                places[name] = _Place(file, out.tell(), out.write(value))
        names = list(self._tensors)
        for index in team.share([nbytes(entry) for entry, _ in self._tensors.values()]):
            name, start = names[index], out.tell()
            write_archive(out, records_of(*_alone(*self._tensors[name])), advance)
            places[name] = _Place(file, start, out.tell() - start)
        return places

    def _metadata(self, places: Mapping[str, _Place]) -> Any:
        from torch.distributed.checkpoint.filesystem import _StorageInfo
        from torch.distributed.checkpoint.metadata import (
            BytesStorageMetadata,
            ChunkStorageMetadata,
            Metadata,
            MetadataIndex,
            TensorProperties,
            TensorStorageMetadata,
        )

        stored: dict[str, Any] = {name: BytesStorageMetadata() for name in self._values}
        where: dict[Any, Any] = {}
        for name, (entry, _) in self._tensors.items():
            size, zero = torch.Size(entry.shape), torch.Size([0] * len(entry.shape))
            chunk = ChunkStorageMetadata(offsets=zero, sizes=size)
            stored[name] = TensorStorageMetadata(TensorProperties(dtype=entry.dtype), size, [chunk])
        for name, place in places.items():
            offset = [0] * len(self._tensors[name][0].shape) if name in self._tensors else None
            index = MetadataIndex(name, offset, index=0 if offset is not None else None)
            where[index] = _StorageInfo(*place)
        return Metadata(stored, planner_data=dict(self._paths), storage_data=where, version="1.0.0")


def _leaves(node: Any, path: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yield what the mappings hold, with the keys that lead there."""
    if isinstance(node, Mapping) and node and len(path) < 100:
        for key, value in node.items():
            yield from _leaves(value, (*path, str(key)))
    else:
        yield path, node


def _saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _alone(entry: Entry, piece: Piece) -> tuple[bytes, list[tuple[int, Piece]]]:
    """Return the pickle of one tensor by itself, and its storage."""
    content = Content()
    content.root = content.hold(placeholder(entry), piece)
    return pickled(content)
