"""Files of torch before 1.6: five pickles, then the bytes of each storage after their number, one after the other."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import _weights_only_unpickler
from torch.storage import TypedStorage

from torchkiln.checkpoint._bytes import Extent, InputFile
from torchkiln.checkpoint._torch_archive import stream_of

__all__ = ["read_legacy"]

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_LENGTH_BYTES = 8


def read_legacy(file: InputFile) -> tuple[Any, dict[int, Extent]]:
    """Return what a file holds, its tensors without memory, and the bytes of their storages by offset.

    The pickles are loaded by torch's weights-only loader; only what it is told of storages is ours.

    Args:
        file: The file.

    Raises:
        NotImplementedError: The file has what only torch's own loading makes sense of.
        ValueError: It is damaged; the loader raises errors of other kinds as well.
    """
    stream = stream_of(Extent(file, 0, file.size))
    storages: dict[str, TypedStorage] = {}

    def storage_of(said: Any) -> TypedStorage:
        kind, storage_type, key, _location, count, view = said
        if kind != "storage" or view is not None:
            raise NotImplementedError
        if key not in storages:
            size = count * storage_type.dtype.itemsize
            untyped = torch.UntypedStorage(size, device="meta")  # type: ignore[no-untyped-call]  # torch leaves it without annotations
            storages[key] = TypedStorage(wrap_storage=untyped, dtype=storage_type.dtype, _internal=True)  # type: ignore[no-untyped-call]  # as above
        return storages[key]

    def load() -> Any:
        unpickler = _weights_only_unpickler.Unpickler(stream, encoding="utf-8")
        unpickler.persistent_load = storage_of  # type: ignore[method-assign]  # as torch's own loading does
        return unpickler.load()  # type: ignore[no-untyped-call]  # as above

    if load() != _MAGIC or load() != _PROTOCOL:
        raise ValueError("no magic number")
    if load()["little_endian"] != (sys.byteorder == "little"):
        raise NotImplementedError
    content, keys = load(), load()
    if sorted(keys) != sorted(storages):
        raise ValueError("its storages are not those that its tensors have")
    return content, _located(file, [storages[key] for key in keys], start=stream.tell())


def _located(file: InputFile, storages: list[TypedStorage], *, start: int) -> dict[int, Extent]:
    """Return where the storages are, and mark them with it, as torch does those of its archives."""
    extents: dict[int, Extent] = {}
    for typed in storages:
        storage: Any = typed._untyped_storage
        count = int.from_bytes(file.read(start, _LENGTH_BYTES), sys.byteorder, signed=True)
        start += _LENGTH_BYTES
        if count * typed.dtype.itemsize != storage.nbytes() or start + storage.nbytes() > file.size:
            raise ValueError(f"no storage of {storage.nbytes():,} bytes at byte {start:,}")
        extents[start] = Extent(file, start, storage.nbytes())
        storage._checkpoint_offset = start
        start += storage.nbytes()
    return extents
