"""The zip archive around a torch file: which bytes of the file are whose, checked before torch sees it."""

from __future__ import annotations

import zipfile
from pathlib import Path

from torchkiln._core.errors import CheckpointError
from torchkiln.checkpoint._bytes import Extent, InputFile

__all__ = ["read_archive"]

_LOCAL_HEADER = 30
_LOCAL_MAGIC = b"PK\x03\x04"


def read_archive(path: Path, file: InputFile) -> dict[str, Extent]:
    """Return the records of an archive by their name in it.

    torch stores records as they are. A compressed one is refused: it could be larger than any memory, and its bytes
    cannot be copied.

    Args:
        path: The file.
        file: The same file, open.

    Raises:
        CheckpointError: It is damaged, holds code, or is an archive of something else.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, EOFError) as error:
        raise CheckpointError(f"{path}: truncated or corrupt zip file ({error}).") from error
    records: dict[str, Extent] = {}
    for info in infos:
        name = info.filename.partition("/")[2]
        if name in records:
            raise CheckpointError(f"{path}: truncated or corrupt zip file ({name!r} is there twice).")
        records[name] = _record(path, file, info)
    _check_apart(path, records)
    _check_kind(path, records)
    return records


def _record(path: Path, file: InputFile, info: zipfile.ZipInfo) -> Extent:
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
        raise CheckpointError(
            f"{path}: {info.filename!r} is compressed, which torch.save never does.\n"
            "Load it where you trust it, and save it again."
        )
    start = info.header_offset
    header = file.read(start, _LOCAL_HEADER)
    if not header.startswith(_LOCAL_MAGIC):
        raise CheckpointError(f"{path}: truncated or corrupt zip file (no record at byte {start:,}).")
    start += _LOCAL_HEADER + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    if start + info.file_size > file.size:
        raise CheckpointError(
            f"{path}: truncated or corrupt zip file ({info.filename!r} ends after the file)."
        )
    # torch writes 0 where it was told not to compute checksums.
    return Extent(file, start, info.file_size, info.CRC or None)


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


def _check_kind(path: Path, records: dict[str, Extent]) -> None:
    if "constants.pkl" in records:
        raise CheckpointError(
            f"{path}: is a TorchScript archive, which holds code.\n"
            "Load it with torch.jit.load and save its state_dict()."
        )
    if "data.pkl" not in records:
        raise CheckpointError(f"{path}: a zip file, but not one that torch.save wrote: it has no data.pkl.")
