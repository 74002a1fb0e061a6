"""Writing torch files: the structure pickled as ``torch.save`` does it, the bytes streamed into the archive."""

from __future__ import annotations

import io
import pickle
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Generator, Hashable
from functools import partial
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor
from torch.storage import TypedStorage

from torchkiln._core.errors import CheckpointError
from torchkiln.checkpoint._bytes import Extent, InputFile, OutputFile, as_bytes, chunks
from torchkiln.checkpoint._io import Content, Piece
from torchkiln.checkpoint._stream import Advance, Job, pump
from torchkiln.checkpoint._team import Team
from torchkiln.checkpoint._torch_archive import read_archive

__all__ = ["TorchSink", "pickled", "write_archive"]

_ALIGNMENT = 64
# From here on a record is written with 64-bit sizes; below, its header has to have room for 32 bits.
_LARGE = 1 << 30
_LOCAL_HEADER, _LARGE_FIELD = 30, 20

Record = tuple[str, int, Piece | bytes]


class TorchSink:
    """The archive to write, planned whole before a byte is written.

    Args:
        content: What the file is to hold.
    """

    shared_out = False

    def __init__(self, content: Content) -> None:
        self._content = content  # its placeholders are named by their addresses
        self._records = records_of(*pickled(content))
        self.size = sum(size + 2 * len(name) + 230 for name, size, _ in self._records)

    @property
    def pieces(self) -> list[Piece]:
        """Where everything comes from, in the order of writing."""
        return [piece for _, _, piece in self._records if not isinstance(piece, bytes)]

    def write(self, path: Path, advance: Advance, _team: Team) -> None:
        """Write to an empty file."""
        with OutputFile(path) as out:
            write_archive(out, self._records, advance)
        written = InputFile(path)
        try:
            found = {
                name: extent.length for name, extent in read_archive(Extent(written, 0, written.size)).items()
            }
        finally:
            written.close()
        if found != {name: size for name, size, _ in self._records}:
            raise CheckpointError(f"{path.name}: what was written is not what was planned.")


def records_of(data: bytes, pieces: list[tuple[int, Piece]]) -> list[Record]:
    """Return the records of an archive for a pickle and its storages."""
    order = sys.byteorder.encode()
    records: list[Record] = [("data.pkl", len(data), data), ("byteorder", len(order), order)]
    records += [(f"data/{index}", size, piece) for index, (size, piece) in enumerate(pieces)]
    return [*records, ("version", 2, b"3\n")]


def pickled(content: Content) -> tuple[bytes, list[tuple[int, Piece]]]:
    """Return the pickle of a content, and the storages that it names 0, 1, ... with their sizes."""
    buffer = io.BytesIO()
    pickler = _Pickler(buffer, content)
    pickler.dump(content.root)
    return buffer.getvalue(), pickler.storages


class _Pickler(pickle.Pickler):
    """Pickles placeholders as the tensors they stand for, with their storages by number."""

    def __init__(self, buffer: io.BytesIO, content: Content) -> None:
        super().__init__(buffer, protocol=2)
        self._content = content
        self._numbers: dict[Hashable, str] = {}
        self._alive: list[object] = []
        self.storages: list[tuple[int, Piece]] = []

    def persistent_id(self, obj: Any) -> tuple[str, Any, str, str, int] | None:
        if isinstance(obj, TypedStorage):
            storage = obj._untyped_storage
            kind, count = _kind(obj), storage.nbytes() // obj.dtype.itemsize
        elif isinstance(obj, torch.UntypedStorage):
            storage, kind, count = obj, torch.UntypedStorage, obj.nbytes()
        else:
            return None
        self._alive.append(obj)  # or its address might become another's
        return "storage", kind, self._number(storage), "cpu", count

    def _number(self, storage: torch.UntypedStorage) -> str:
        piece = self._content.piece(storage)
        memory = (piece.file, piece.offset, piece.length) if isinstance(piece, Extent) else piece.memory
        memory = storage._cdata if memory is None else (type(piece), memory)
        if memory not in self._numbers:
            self._numbers[memory] = str(len(self.storages))
            self.storages.append((storage.nbytes(), piece))
        return self._numbers[memory]

    def reducer_override(self, obj: Any) -> Any:
        # torch would pickle a tensor without memory as one without memory.
        if type(obj) is not Tensor or obj.device.type != "meta" or obj.layout != torch.strided:
            return NotImplemented
        rebuild, arguments = _reduced(obj)
        state = torch._utils._get_obj_state(obj)  # type: ignore[no-untyped-call]  # torch leaves it without annotations
        if state:
            return torch._tensor._rebuild_from_type_v2, (rebuild, Tensor, arguments, state)
        return rebuild, arguments


def _kind(storage: TypedStorage) -> Any:
    """Return the class of storages of this dtype, which torch names in a pickle."""
    return getattr(torch, storage._pickle_storage_type())  # type: ignore[no-untyped-call]  # as above


def _reduced(tensor: Tensor) -> tuple[Callable[..., Tensor], tuple[Any, ...]]:
    """Return how torch rebuilds a tensor from its storage."""
    storage: Any = tensor.untyped_storage()
    layout: tuple[Any, ...] = (
        tensor.storage_offset(),
        tuple(tensor.size()),
        tensor.stride(),
        tensor.requires_grad,
        OrderedDict(),
    )
    named = tensor.dtype in torch.storage._dtype_to_storage_type_map()
    metadata = torch._utils.get_tensor_metadata(tensor)  # type: ignore[no-untyped-call]  # as above
    more = (metadata,) if metadata else ()
    if not named:
        return torch._utils._rebuild_tensor_v3, (storage, *layout, tensor.dtype, *more)
    typed = TypedStorage(wrap_storage=storage, dtype=tensor.dtype, _internal=True)  # type: ignore[no-untyped-call]  # as above
    return torch._utils._rebuild_tensor_v2, (typed, *layout, *more)


class _Rest:
    """A file from its present end on, which is where an archive's own offsets begin."""

    def __init__(self, out: OutputFile) -> None:
        self._out, self._start = out, out.tell()
        self.write, self.flush = out.write, out.flush

    def tell(self) -> int:
        return self._out.tell() - self._start

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._out.seek(offset + (self._start if whence == 0 else 0), whence) - self._start


def write_archive(out: OutputFile, records: list[Record], advance: Advance) -> None:
    """Write an archive that torch maps: records as they are, each at a multiple of 64 bytes, with checksums."""
    rest = _Rest(out)
    archive = zipfile.ZipFile(cast("IO[bytes]", rest), "w", zipfile.ZIP_STORED)
    try:
        pump(_jobs(archive, rest, records), advance)
    except BaseException:
        # Half a record cannot be finished, which closing would try; the file is going to be removed.
        archive.fp = None
        raise
    archive.close()


def _jobs(archive: zipfile.ZipFile, rest: _Rest, records: list[Record]) -> Generator[Job, None, None]:
    """Compute what has to be computed piece by piece, and yield the writing of it."""
    for name, size, piece in records:
        record = _Record(archive, rest, name, size)
        if isinstance(piece, Extent):
            yield Job("", size, partial(record.copy, piece), 0)
        elif isinstance(piece, bytes):
            yield Job("", 0, partial(record.write, piece), 0)
        else:
            for tensor in piece.pieces():
                held = tensor.numel() * tensor.element_size()
                yield Job(piece.name, held, partial(record.write_tensor, tensor), held)
        yield Job("", 0, record.close, 0)


class _Record:
    """One record of an archive, begun when its first bytes come: until then another one is being written."""

    def __init__(self, archive: zipfile.ZipFile, rest: _Rest, name: str, size: int) -> None:
        self._archive, self._rest = archive, rest
        self._info = zipfile.ZipInfo(f"archive/{name}")
        self._info.file_size = size
        self._stream: IO[bytes] | None = None

    def write(self, data: bytes | memoryview) -> None:
        if self._stream is None:
            _align(self._info, self._rest.tell())
            large = self._info.file_size >= _LARGE
            self._stream = self._archive.open(self._info, "w", force_zip64=large)
        self._stream.write(data)

    def write_tensor(self, tensor: Tensor) -> None:
        self.write(as_bytes(tensor))

    def copy(self, extent: Extent) -> None:
        for chunk in chunks(extent):
            self.write(chunk)

    def close(self) -> None:
        self.write(b"")  # of a tensor without elements there were no bytes so far
        assert self._stream is not None
        self._stream.close()


def _align(info: zipfile.ZipInfo, offset: int) -> None:
    """Let the record begin at a multiple of 64 bytes, by a field in its header that readers skip."""
    start = offset + _LOCAL_HEADER + len(info.filename.encode()) + 4
    start += _LARGE_FIELD if info.file_size >= _LARGE else 0
    padding = -start % _ALIGNMENT
    info.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
