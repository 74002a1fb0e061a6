"""The zip archive around a torch file: which bytes of the file are whose, checked before torch sees it."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Set
from pathlib import Path
from typing import Any

import torch

from torchkiln._core.errors import CheckpointError
from torchkiln.checkpoint._bytes import Extent

__all__ = ["read_archive", "stream_of"]

_LOCAL_HEADER = 30
_ALIGNMENT = ".storage_alignment"
_LOCAL_MAGIC = b"PK\x03\x04"


class _Stream(io.RawIOBase):
    """A part of a file as a file of its own."""

    def __init__(self, extent: Extent) -> None:
        self._extent, self._position = extent, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._extent.length}[whence]
        self._position = max(0, start + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        count = max(0, min(len(view), self._extent.length - self._position))
        self._extent.file.fill(view[:count], self._extent.offset + self._position)
        self._position += count
        return count


def stream_of(extent: Extent) -> io.BufferedReader:
    """Return a part of a file as a file of its own."""
    return io.BufferedReader(_Stream(extent))


def read_archive(whole: Extent) -> dict[str, Extent]:
    """Return the records of an archive by their name in it.

    torch stores records as they are. A compressed one is refused: it could be larger than any memory, and its bytes
    cannot be copied.

    Args:
        whole: Where it is: a file, or a part of one.

    Raises:
        CheckpointError: It is damaged, holds code, or is an archive of something else.
    """
    path = whole.file.path
    try:
        with zipfile.ZipFile(stream_of(whole)) as archive:
            infos = archive.infolist()
    except CheckpointError:  # that it cannot be read
        raise
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, EOFError) as error:
        raise CheckpointError(f"{path}: truncated or corrupt zip file ({error}).") from error
    _check_kind(path, {info.filename.partition("/")[2] for info in infos})
    records: dict[str, Extent] = {}
    for info in infos:
        name = info.filename.partition("/")[2]
        if name in records:
            raise CheckpointError(f"{path}: truncated or corrupt zip file ({name!r} is there twice).")
        records[name] = _record(path, whole, info)
    _check_apart(path, records)
    _check_alignment(path, whole)
    return records


def _record(path: Path, whole: Extent, info: zipfile.ZipInfo) -> Extent:
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
        raise CheckpointError(
            f"{path}: {info.filename!r} is compressed, which torch.save never does.\n"
            "Load it where you trust it, and save it again."
        )
    start = info.header_offset
    local = whole.part(start, _LOCAL_HEADER)
    header = local.file.read(local.offset, local.length)
    if not header.startswith(_LOCAL_MAGIC):
        raise CheckpointError(f"{path}: truncated or corrupt zip file (no record at byte {start:,}).")
    start += _LOCAL_HEADER + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    if start + info.file_size > whole.length:
        raise CheckpointError(
            f"{path}: truncated or corrupt zip file ({info.filename!r} ends after the file)."
        )
    # torch writes 0 where it was told not to compute checksums.
    return Extent(whole.file, whole.offset + start, info.file_size, info.CRC or None)


def _check_apart(path: Path, records: dict[str, Extent]) -> None:
    """Raise if two records have bytes in common: a small file could claim to be as large as it likes."""
    places = sorted((extent.offset, extent.length, name) for name, extent in records.items())
    end = 0
    for start, length, name in places:
        if start < end:
            raise CheckpointError(
                f"{path}: truncated or corrupt zip file ({name!r} overlaps another record)."
            )
        end = start + length


def _check_kind(path: Path, names: Set[str]) -> None:
    if "constants.pkl" in names:
        raise CheckpointError(
            f"{path}: is a TorchScript archive, which holds code.\n"
            "Load it with torch.jit.load and save its state_dict()."
        )
    if "data.pkl" not in names:
        raise CheckpointError(f"{path}: a zip file, but not one that torch.save wrote: it has no data.pkl.")


def _check_alignment(path: Path, whole: Extent) -> None:
    """Raise if the archive tells an alignment of 0: torch 2.13 divides by it, which ends the process."""
    try:
        # It has its own idea of where a record is.
        reader: Any = torch._C.PyTorchFileReader(stream_of(whole))
        told = reader.get_record(_ALIGNMENT) if reader.has_record(_ALIGNMENT) else b"1"
        fine = int(told) > 0
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0][:120]
        raise CheckpointError(f"{path}: truncated or corrupt zip file ({reason}).") from error
    if not fine:
        raise CheckpointError(f"{path}: truncated or corrupt zip file (an alignment of 0).")
