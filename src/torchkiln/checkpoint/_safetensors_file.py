"""Reading safetensors files: the header names every tensor, and each is read by itself."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from torchkiln._core.errors import CheckpointError
from torchkiln.checkpoint._io import Change, CheckpointFile, Entry, Group, replaced

__all__ = ["open_safetensors"]

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}


@contextmanager
def open_safetensors(path: Path) -> Iterator[CheckpointFile]:
    """Open a safetensors file.

    Raises:
        CheckpointError: The file is damaged, or holds a dtype that this torch does not have.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as handle:
            yield _SafetensorsFile(path, handle)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: truncated or corrupt safetensors file ({_reason(error)}).") from error


def _reason(error: SafetensorError) -> str:
    return str(error).splitlines()[0].removeprefix("Error while deserializing header: ")


class _SafetensorsFile(CheckpointFile):
    container = "safetensors"
    loose = ()
    remarks = ()

    def __init__(self, path: Path, handle: Any) -> None:
        self.path = path
        self.metadata = dict(handle.metadata() or {})
        self._handle = handle
        self.groups = (Group((), {key: self._entry(key) for key in handle.offset_keys()}),)

    def _entry(self, key: str) -> Entry:
        part = self._handle.get_slice(key)
        dtype = _DTYPES.get(part.get_dtype())
        if dtype is None:
            raise CheckpointError(
                f"{self.path}: {key} has dtype {part.get_dtype()}, which torch cannot hold."
            )
        return Entry(tuple(part.get_shape()), dtype)

    def read(self, group: Group, key: str) -> Tensor:  # noqa: ARG002  # there is one group
        tensor: Tensor = self._handle.get_tensor(key)
        return tensor

    def identity(self, group: Group, key: str) -> Hashable:  # noqa: ARG002
        return key

    def changed(self, changes: Sequence[Change]) -> dict[str, Tensor]:
        (group,) = self.groups
        return replaced({key: self.read(group, key) for key in group.entries}, changes)
