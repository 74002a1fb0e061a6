"""Writing the directory of a distributed checkpoint, as one process would."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchkiln._core.errors import CheckpointError
from torchkiln.checkpoint._bytes import OutputFile, nbytes
from torchkiln.checkpoint._dcp_file import METADATA
from torchkiln.checkpoint._io import Content, Entry, Piece, placeholder
from torchkiln.checkpoint._safetensors_sink import contiguous
from torchkiln.checkpoint._stream import Advance
from torchkiln.checkpoint._torch_sink import pickled, records_of, write_archive

__all__ = ["DcpSink"]

_FILE = "__0_0.distcp"


class DcpSink:
    """One data file with an archive for each tensor and value, and the metadata that says where they are.

    Args:
        content: Mappings in mappings; their keys make the names.
    """

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

    def write(self, path: Path, advance: Advance) -> None:
        """Write into an empty directory."""
        data = path / _FILE
        data.touch(exist_ok=False)
        places: dict[str, tuple[int, int]] = {}
        with OutputFile(data) as out:
            for name, value in self._values.items():
                places[name] = (out.tell(), out.write(value))
            for name, (entry, piece) in self._tensors.items():
                start = out.tell()
                write_archive(out, records_of(*_alone(entry, piece)), advance)
                places[name] = (start, out.tell() - start)
        # Last: a directory without its metadata is no checkpoint.
        metadata = path / METADATA
        metadata.touch(exist_ok=False)
        with OutputFile(metadata) as out:
            out.write(pickle.dumps(self._metadata(places)))

    def _metadata(self, places: Mapping[str, tuple[int, int]]) -> Any:
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
        for name, (start, length) in places.items():
            offset = [0] * len(self._tensors[name][0].shape) if name in self._tensors else None
            index = MetadataIndex(name, offset, index=0 if offset is not None else None)
            where[index] = _StorageInfo(_FILE, start, length)
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
