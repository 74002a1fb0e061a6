"""The bytes of a file: read where they are needed, copied without becoming tensors, on their way to the disk early."""

from __future__ import annotations

import ctypes
import os
import stat
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from torchkiln._core.errors import CheckpointError
from torchkiln._core.spellings.entries import Entry

__all__ = ["Extent", "InputFile", "OutputFile", "Reading", "as_bytes", "chunks", "nbytes"]

# Small enough to stay in a processor's cache between being read and being written.
_CHUNK = 256 << 10
# How much the system copies before other threads and interrupts get their turn.
_SEND = 8 << 20
# How much is written before the disk is told to begin: enough to be written in large pieces.
_FLUSH_EVERY = 32 << 20
# How far the disk may be behind.
_FLUSH_AGAIN = 256 << 20


def nbytes(entry: Entry) -> int:
    """Return how many bytes a tensor takes.

    Example:
        >>> nbytes(Entry((3, 4), torch.bfloat16))
        24
    """
    size = entry.dtype.itemsize
    for length in entry.shape:
        size *= length
    return size


def as_bytes(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor, which has to outlive the view."""
    if tensor.numel() == 0:
        return memoryview(b"")
    # By address: a tensor gives its memory away through numpy only, which torch can do without.
    size = tensor.numel() * tensor.element_size()
    return memoryview((ctypes.c_char * size).from_address(tensor.data_ptr())).cast("B")


class InputFile:
    """A regular file open for reading, at any place, by several threads.

    Bytes are read, not mapped: a file that shrinks or a disk that fails is an error then and not a killed process,
    and what was read does not stay counted as this process's memory.

    Raises:
        CheckpointError: It cannot be opened, or is no regular file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # Without waiting: a named pipe that nobody writes to would never open.
            self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | _BINARY)
        except FileNotFoundError:
            raise CheckpointError(f"{path}: no such file.") from None
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}.") from error
        self._status = os.fstat(self._descriptor)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        if not stat.S_ISREG(self._status.st_mode):
            self.close()
            raise CheckpointError(f"{path}: expected a regular file.")

    @property
    def size(self) -> int:
        """Its size when it was opened."""
        return self._status.st_size

    def close(self) -> None:
        """Close it."""
        os.close(self._descriptor)

    def fill(self, view: memoryview, offset: int) -> None:
        """Read as many bytes as `view` has, from `offset` on.

        Raises:
            CheckpointError: The file ends before, or cannot be read there.
        """
        done = 0
        while done < len(view):
            try:
                count = os.preadv(self._descriptor, [view[done : done + (1 << 30)]], offset + done)
            except OSError as error:
                raise CheckpointError(
                    f"{self.path}: cannot be read at byte {offset + done:,}: {error.strerror or error}."
                ) from error
            if not count:
                raise CheckpointError(
                    f"{self.path}: truncated or corrupt file: it ends before byte {offset + len(view):,}."
                )
            done += count

    def read(self, offset: int, length: int) -> bytes:
        """Return some of its bytes.

        Raises:
            CheckpointError: As for :meth:`fill`.
        """
        if offset < 0 or length < 0 or offset + length > self.size:
            raise CheckpointError(f"{self.path}: truncated or corrupt file: it has {self.size:,} bytes only.")
        data = bytearray(length)
        self.fill(memoryview(data), offset)
        return bytes(data)

    def check_unchanged(self) -> None:
        """Raise if the file was written to since it was opened.

        Raises:
            CheckpointError: Its size or its time of change is another.
        """
        now = os.fstat(self._descriptor)
        if (now.st_size, now.st_mtime_ns) != (self._status.st_size, self._status.st_mtime_ns):
            raise CheckpointError(f"{self.path}: was changed while it was read. Run again when it is whole.")

    def send(self, target: int, offset: int, length: int) -> int:
        """Let the system copy bytes into another open file at its position; return how many it did copy."""
        if not hasattr(os, "copy_file_range"):
            return 0
        try:
            return os.copy_file_range(self._descriptor, target, length, offset_src=offset)
        except OSError:
            return 0  # another file system, or a full one: writing tells


_BINARY = getattr(os, "O_BINARY", 0)


@dataclass(frozen=True)
class Extent:
    """Bytes of a file, with their checksum where the file tells it."""

    file: InputFile
    offset: int
    length: int
    checksum: int | None = None

    def tensor(self, entry: Entry) -> Tensor:
        """Return the bytes as a new tensor, in memory of its own.

        Raises:
            CheckpointError: They cannot be read, or are not those that the checksum was made of.
        """
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        view = as_bytes(tensor)
        self.file.fill(view, self.offset)
        self.check(zlib.crc32(view) if self.checksum is not None else None)
        return tensor

    def part(self, start: int, length: int) -> Extent:
        """Return some of the bytes.

        Raises:
            CheckpointError: They are not among these; offsets and strides come from the file.
        """
        if not 0 <= start <= start + length <= self.length:
            raise CheckpointError(
                f"{self.file.path}: truncated or corrupt file: a tensor has bytes outside of the {self.length:,} "
                "that are its own."
            )
        whole = (start, length) == (0, self.length)
        return Extent(self.file, self.offset + start, length, self.checksum if whole else None)

    def check(self, checksum: int | None) -> None:
        """Raise unless the checksum is the one that the file tells.

        Raises:
            CheckpointError: It is another.
        """
        if checksum is not None and self.checksum is not None and checksum != self.checksum:
            raise CheckpointError(
                f"{self.file.path}: truncated or corrupt file: the {self.length:,} bytes from {self.offset:,} on "
                "do not have their checksum."
            )


@dataclass
class Reading:
    """Reads an extent front to back, piece by piece, with its checksum checked after the last one."""

    extent: Extent
    _done: int = 0
    _checksum: int = 0

    def fill(self, view: memoryview) -> None:
        """Read as many bytes as `view` has.

        Raises:
            CheckpointError: They cannot be read, or the last of them shows that some are not those that were written.
        """
        extent = self.extent
        extent.file.fill(view, extent.offset + self._done)
        self._done += len(view)
        if extent.checksum is not None:
            self._checksum = zlib.crc32(view, self._checksum)
            if self._done == extent.length:
                extent.check(self._checksum)


def chunks(extent: Extent) -> Iterator[memoryview]:
    """Yield the bytes of an extent in pieces, each overwritten by the next.

    Raises:
        CheckpointError: As for :meth:`Reading.fill`.
    """
    reading = Reading(extent)
    buffer = memoryview(bytearray(min(_CHUNK, extent.length)))
    for start in range(0, extent.length, _CHUNK):
        view = buffer[: min(_CHUNK, extent.length - start)]
        reading.fill(view)
        yield view


class OutputFile:
    """A file being written front to back, which goes to the disk meanwhile and is on it at the end.

    Args:
        path: A file that exists already, and is empty.
    """

    def __init__(self, path: Path) -> None:
        self._stream = path.open("r+b", buffering=0)
        self._written = self._flushed = 0

    def __enter__(self) -> OutputFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                os.fsync(self._stream.fileno())
        finally:
            self._stream.close()

    def write(self, data: bytes | memoryview) -> int:
        """Write all of it."""
        view = memoryview(data).cast("B")
        done = 0
        while done < len(view):
            count = self._stream.write(view[done : done + _SEND])
            done += count
            self._begin_flush(count)
        return len(view)

    def copy(self, extent: Extent) -> None:
        """Write bytes of another file; those with a checksum are checked.

        Raises:
            CheckpointError: They cannot be read, or are not those that the checksum was made of.
        """
        done = 0
        while extent.checksum is None and done < extent.length:
            count = extent.file.send(
                self._stream.fileno(), extent.offset + done, min(_SEND, extent.length - done)
            )
            if not count:
                break
            done += count
            self._begin_flush(count)
        if done < extent.length:
            for chunk in chunks(extent.part(done, extent.length - done)):
                self.write(chunk)

    def tell(self) -> int:
        """Return the position."""
        return self._stream.tell()

    def seek(self, offset: int, whence: int = 0) -> int:
        """Move the position, as files do."""
        return self._stream.seek(offset, whence)

    def flush(self) -> None:
        """Do nothing: there is no buffer."""

    def _begin_flush(self, count: int) -> None:
        """Let the disk begin with what is there already, and the system reuse the memory of what the disk has.

        The same bytes are given up several times: at first they begin to be written, and once they are, their memory
        becomes that of what comes next. A file larger than the memory fills it otherwise, and new memory costs more
        time than the copying into it.
        """
        self._written += count
        if self._written - self._flushed >= _FLUSH_EVERY:
            start = max(0, self._flushed - _FLUSH_AGAIN)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(self._stream.fileno(), start, self._written - start, os.POSIX_FADV_DONTNEED)
            self._flushed = self._written
