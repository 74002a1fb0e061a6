"""The header of a safetensors file: read strictly, written so that every tensor is aligned."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from torchkiln._core.errors import CheckpointError
from torchkiln._core.spellings.entries import Entry
from torchkiln.checkpoint._bytes import Extent, InputFile, nbytes

__all__ = ["DTYPES", "Header", "make_header", "read_header", "strict_json"]

DTYPES = {
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
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# The format's own limit, which keeps a reader from parsing what is no header.
_MOST_BYTES = 100_000_000


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of itself: the tensors in the order of their bytes, and where those are."""

    metadata: dict[str, str]
    entries: dict[str, Entry]
    extents: dict[str, Extent]


def read_header(file: InputFile) -> Header:
    """Read and check a header: the tensors' bytes follow one another and fill the file exactly.

    Args:
        file: The whole file.

    Raises:
        CheckpointError: Anything about it is not as the format says, or a dtype is not one of torch's.
    """
    try:
        length = int.from_bytes(file.read(0, 8), "little")
        if length > _MOST_BYTES:
            raise ValueError(f"a header of {length:,} bytes, the most is {_MOST_BYTES:,}")
        if 8 + length > file.size:
            raise ValueError(f"a header of {length:,} bytes in a file of {file.size:,}")
        raw = file.read(8, length)
        if not raw.startswith(b"{"):
            raise ValueError("the header does not begin with {")
        fields = strict_json(raw)
        return _checked(fields, file, 8 + length)
    except ValueError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{file.path}: truncated or corrupt safetensors file ({error}).") from error


def strict_json(raw: bytes) -> dict[str, Any]:
    """Parse a JSON object in UTF-8 that names nothing twice.

    Raises:
        ValueError: It is not one.
    """
    try:
        parsed = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None
    if not isinstance(parsed, dict):
        raise ValueError("expected a JSON object")
    return parsed


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} is there twice")
    return found


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _checked(fields: dict[str, Any], file: InputFile, start: int) -> Header:
    metadata = fields.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("the metadata is not text by name")
    parts = [(*_offsets(key, field), key) for key, field in fields.items()]
    parts.sort(key=lambda part: part[:2])
    entries: dict[str, Entry] = {}
    extents: dict[str, Extent] = {}
    end = 0
    for begin, stop, key in parts:
        if begin != end:
            raise ValueError(f"{key!r} begins at {begin:,}, where {end:,} is expected: a gap or an overlap")
        entry = _entry(key, fields[key], file)
        if stop - begin != nbytes(entry):
            raise ValueError(f"{key!r} has {stop - begin:,} bytes for {nbytes(entry):,}")
        entries[key], extents[key] = entry, Extent(file, start + begin, stop - begin)
        end = stop
    if start + end != file.size:
        raise ValueError(f"the tensors end at byte {start + end:,}, the file at {file.size:,}")
    return Header(metadata, entries, extents)


def _offsets(key: str, field: Any) -> tuple[int, int]:
    if not isinstance(field, dict) or field.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{key!r} needs dtype, shape and data_offsets, and nothing else")
    offsets = _integers(key, field["data_offsets"])
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{key!r} has the offsets {str(offsets)[:60]}")
    return offsets[0], offsets[1]


def _entry(key: str, field: dict[str, Any], file: InputFile) -> Entry:
    shape, dtype = _integers(key, field["shape"]), field["dtype"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{file.path}: {key} has dtype {str(dtype)[:40]}, which torch cannot hold.")
    # Zero elements in all, and yet a length that torch has no number for.
    if prod(max(length, 1) for length in shape) >= 2**60:
        raise ValueError(f"{key!r} has a shape that no tensor has")
    return Entry(tuple(shape), DTYPES[dtype])


def _integers(key: str, value: Any) -> list[int]:
    if not isinstance(value, list) or not all(type(number) is int and number >= 0 for number in value):
        raise ValueError(f"{key!r} has a shape or an offset that is no list of whole numbers")
    return value


def make_header(entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> tuple[bytes, list[str]]:
    """Return a header with its length before it, and the keys in the order in which their bytes are to follow.

    Raises:
        CheckpointError: A dtype has no name in the format, or there are too many tensors for one header.
    """
    # Wide dtypes first, so that each tensor begins at a multiple of its own element size.
    order = sorted(entries, key=lambda key: -entries[key].dtype.itemsize)
    fields: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for key in order:
        entry = entries[key]
        if entry.dtype not in _NAMES:
            raise CheckpointError(f"{key}: safetensors has no dtype {entry.dtype}. Write a torch file.")
        begin, end = end, end + nbytes(entry)
        fields[key] = {"dtype": _NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": [begin, end]}
    text = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")
    text += b" " * (-len(text) % 8)
    if len(text) > _MOST_BYTES:
        raise CheckpointError(f"{len(order):,} tensors need a header of {len(text):,} bytes. Write shards.")
    return len(text).to_bytes(8, "little") + text, order
