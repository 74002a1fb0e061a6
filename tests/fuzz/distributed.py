"""Targets of the distributed checkpoint: its metadata, its layout in numbers, its pickles and its bytes by turns.

A damaged byte of a data file almost always ends at the checksum of an archive, and one of the metadata at the class of
some part. So there is a target for each thing behind those, in files that are right otherwise. The right ones are
those that ``torch.distributed.checkpoint.save`` writes.
"""

from __future__ import annotations

import io
import pickle
import struct
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

__all__ = ["MARK", "archived", "dcp_data", "dcp_layout", "dcp_metadata", "dcp_pickles", "dcp_seeds"]

MARK = b"<part>"
"""What separates the pickles of the parts in an input of :func:`dcp_pickles`."""

_DATA = "__0_0.distcp"
_DTYPES = (torch.float32, torch.bfloat16, torch.int8, torch.bool, torch.complex64, torch.float64)
# One chunk: which tensor, dtype, file; shape, offsets, sizes; where its bytes are and how many.
_CHUNK = struct.Struct("<3B2b2b2bhh")
# Of the storages in an archive; torch reads one only as what it is as long as.
_STORAGES = (8, 24, 4, 12)
# The numbers that no signed byte is, and what is none.
_STRANGE: dict[int, Any] = {127: 2**62, 126: 2**30, 125: True, 124: 1.0, 123: None, 122: "1", 121: -(2**62)}


def dcp_metadata(data: bytes, folder: Path) -> Path:
    """The pickle of the metadata, beside a data file that is right."""
    return _directory(folder, data, _written()[1])


def dcp_data(data: bytes, folder: Path) -> Path:
    """The data file, beside metadata that is right."""
    return _directory(folder, _written()[0], data)


def dcp_pickles(data: bytes, folder: Path) -> Path:
    """The pickles of the parts, each in an archive that is right, beside metadata that tells where they are."""
    archives = [archived(part) for part in data.split(MARK)[:8]]
    metadata, start = pickle.loads(_written()[0]), 0
    for index, place in enumerate(metadata.storage_data.values()):
        archive = archives[index] if index < len(archives) else b""
        place.offset, place.length = start, len(archive)
        start += len(archive)
    return _directory(folder, pickle.dumps(metadata), b"".join(archives))


def dcp_layout(data: bytes, folder: Path) -> Path:
    """The numbers in the metadata: shapes, chunks, and where they are, of types that are right or nearly so."""
    stored: dict[str, Any] = {}
    places: dict[Any, Any] = {}
    for name, kind, file, *numbers in _CHUNK.iter_unpack(data[: len(data) // _CHUNK.size * _CHUNK.size]):
        shape, offsets, sizes = ([_STRANGE.get(n, n) for n in numbers[i : i + 2]] for i in (0, 2, 4))
        dtype = _DTYPES[kind % len(_DTYPES)]
        key = f"{name % 8 // 2}.weight_{'vg'[name % 2]}"
        fresh = TensorStorageMetadata(TensorProperties(dtype=dtype), _size(shape), [])
        one = stored.setdefault(key, fresh)
        one.chunks.append(ChunkStorageMetadata(_size(offsets), _size(sizes)))
        index = MetadataIndex(key, None)
        object.__setattr__(index, "offset", _size(offsets))  # which would not take what is none
        place = _StorageInfo(_DATA if file < 250 else "other", *(_STRANGE.get(n, n) for n in numbers[6:]))
        places[index] = place
    metadata = pickle.dumps(Metadata(stored, storage_data=places))
    return _directory(folder, metadata, _written()[1])


def dcp_seeds(name: str) -> Iterator[bytes]:
    """Yield right inputs of a target."""
    metadata, data = _written()
    known = pickle.loads(metadata)
    if name == "dcp_metadata":
        yield metadata
    elif name == "dcp_data":
        yield data
    elif name == "dcp_pickles":
        parts = [data[place.offset :][: place.length] for place in known.storage_data.values()]
        yield MARK.join(map(_pickle_of, parts))
    else:
        yield b"".join(_records(known))


def archived(content: bytes) -> bytes:
    """Return a torch file with a pickle of any bytes, and four storages that it may speak of."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/byteorder", b"little")
        for index, size in enumerate(_STORAGES):
            archive.writestr(f"archive/data/{index}", bytes(size))
        archive.writestr("archive/version", b"3\n")
    return buffer.getvalue()


def _records(metadata: Metadata) -> Iterator[bytes]:
    """Yield the chunks of two dimensions as numbers."""
    for number, (name, one) in enumerate(metadata.state_dict_metadata.items()):
        for chunk in getattr(one, "chunks", ()):
            if len(chunk.sizes) == 2:
                place = metadata.storage_data[MetadataIndex(name, chunk.offsets)]
                numbers = (*one.size, *chunk.offsets, *chunk.sizes, place.offset, place.length)
                yield _CHUNK.pack(number, 0, 0, *numbers)


def _size(numbers: list[Any]) -> Any:
    try:
        return torch.Size(numbers)
    except TypeError:
        return tuple(numbers)


def _pickle_of(archive: bytes) -> bytes:
    """Return the pickle in what torch saved, of the storage among those of :func:`archived` that is as long."""
    with zipfile.ZipFile(io.BytesIO(archive)) as opened:
        records = {info.filename.partition("/")[2]: info for info in opened.infolist()}
        content = opened.read(records["data.pkl"])
        if "data/0" not in records:
            return content
        key = str(_STORAGES.index(records["data/0"].file_size))
        return content.replace(_text("0"), _text(key), 1)


def _text(value: str) -> bytes:
    return pickle.BINUNICODE + len(value).to_bytes(4, "little") + value.encode()


def _directory(folder: Path, metadata: bytes, data: bytes) -> Path:
    path = folder / "dcp"
    path.mkdir(exist_ok=True)
    (path / _DATA).write_bytes(data)
    (path / ".metadata").write_bytes(metadata)
    return path


class _Halves(torch.Tensor):
    """A tensor that is saved as by two processes, each of which has half of the rows."""

    def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
        return [self._item(name, row) for row in (0, len(self) // 2)]

    def _item(self, name: str, row: int) -> WriteItem:
        offsets, sizes = torch.Size([row, 0]), torch.Size([len(self) // 2, self.shape[1]])
        data = TensorWriteData(
            ChunkStorageMetadata(offsets, sizes), TensorProperties.create_from_tensor(self), self.shape
        )
        return WriteItem(MetadataIndex(name, offsets), WriteItemType.SHARD, tensor_data=data)

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        raise NotImplementedError  # which is for loading

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        assert index.offset is not None
        return self.as_subclass(torch.Tensor)[index.offset[0] :][: len(self) // 2].clone()


@cache
def _written() -> tuple[bytes, bytes]:
    """Return the metadata and the data of a checkpoint that torch wrote."""
    model = {"w_g": torch.ones(2, 1), "w_v": torch.ones(2, 3), "h": torch.ones(2, dtype=torch.float16)}
    optimizer = {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1}]}
    state = {
        "half": torch.ones(2, 3).as_subclass(_Halves),
        "model": model,
        "epoch": 3,
        "optimizer": optimizer,
    }
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no process group
        dcp.save(state, checkpoint_id=folder, no_dist=True)
        return (Path(folder) / ".metadata").read_bytes(), (Path(folder) / _DATA).read_bytes()
