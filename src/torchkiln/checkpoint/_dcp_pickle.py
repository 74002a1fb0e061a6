"""Unpickling the metadata of a distributed checkpoint: plain data, in the memory and time that its size explains.

torch's own reader runs whatever the pickle says. The unpickler in C allocates what an opcode asks for before it looks
whether the bytes are there, so this one is that of the library in Python, without the opcodes that metadata has no use
for.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar

import torch

from torchkiln._core.errors import CheckpointError

__all__ = ["load_plain"]

# Everything that the metadata of a distributed checkpoint is made of. All are plain data, whatever they are given.
_ALLOWED: dict[str, frozenset[str]] = {
    "torch.distributed.checkpoint.metadata": frozenset(
        {
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        }
    ),
    "torch.distributed.checkpoint.filesystem": frozenset({"_StorageInfo"}),
    "torch.serialization": frozenset({"_get_layout"}),
    "torch": frozenset({"Size"}),
}

# Buffers, extensions and objects from outside; sets, whose elements are hashed.
_REFUSED = (
    pickle.BYTEARRAY8,
    pickle.NEXT_BUFFER,
    pickle.READONLY_BUFFER,
    pickle.EXT1,
    pickle.EXT2,
    pickle.EXT4,
    pickle.PERSID,
    pickle.BINPERSID,
    pickle.INST,
    pickle.OBJ,
    pickle.NEWOBJ_EX,
    pickle.EMPTY_SET,
    pickle.ADDITEMS,
    pickle.FROZENSET,
)
_TUPLES = (pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3)


def load_plain(data: bytes, path: Path) -> Any:
    """Return what a pickle holds, built of the parts of checkpoint metadata alone.

    Args:
        data: The pickle.
        path: Its file, for messages.

    Raises:
        CheckpointError: It needs anything else, or is damaged.
    """
    try:
        return _Unpickler(io.BytesIO(data)).load()
    except CheckpointError as error:
        raise CheckpointError(
            f"{path}: loading it would run code: {error}.\nSave the checkpoint again where you trust it."
        ) from None
    except Exception as error:  # pickles are damaged in as many ways as there are opcodes
        raise CheckpointError(f"{path}: truncated or corrupt metadata ({type(error).__name__}).") from error


def _checked(load: Callable[[Any], None]) -> Callable[[Any], None]:
    """Refuse tuples in tuples in tuples: hashing them takes twice as long for each level that names one twice."""

    def load_tuple(unpickler: Any) -> None:
        load(unpickler)
        parts = [part for part in unpickler.stack[-1] if isinstance(part, tuple)]
        if any(isinstance(inner, tuple) for part in parts for inner in part):
            raise ValueError("tuples nested too deeply")

    return load_tuple


_LOADERS: dict[int, Callable[[Any], None]] = pickle._Unpickler.dispatch


class _Unpickler(pickle._Unpickler):
    dispatch: ClassVar = {
        code: _checked(load) if bytes([code]) in _TUPLES else load
        for code, load in _LOADERS.items()
        if bytes([code]) not in _REFUSED
    }

    def find_class(self, module: str, name: str) -> Any:
        if name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) == ("builtins", "getattr"):
            return _member
        if module.startswith("pathlib") and name.endswith("Path"):
            return _Text  # where it was saved to, which nothing here needs
        raise CheckpointError(f"{module}.{name} is not a part of the metadata of a checkpoint")


def _member(kind: Any, name: Any) -> Any:
    """Return a member of an enumeration, which early releases of Python 3.11 pickle as an attribute of its class."""
    if not (isinstance(kind, type) and issubclass(kind, Enum) and name in kind.__members__):
        raise CheckpointError("builtins.getattr of what is no enumeration")
    return kind.__members__[name]


class _Text(tuple):  # type: ignore[type-arg]  # of whatever parts a path has
    """The parts of a path, which is not to be one."""

    def __new__(cls, *parts: Any) -> _Text:
        return super().__new__(cls, parts)
