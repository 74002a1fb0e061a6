"""Writing safetensors: one file, or shards with their index."""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchkiln._core.errors import CheckpointError
from torchkiln.checkpoint._bytes import Extent, InputFile, OutputFile, as_bytes, nbytes
from torchkiln.checkpoint._io import Content, Entry, Made, Piece, unusual
from torchkiln.checkpoint._safetensors_header import make_header, read_header
from torchkiln.checkpoint._stream import Advance, Job, pump
from torchkiln.checkpoint._team import Team

__all__ = ["FILE_SUFFIXES", "SafetensorsSink", "check_directory", "flat"]

INDEX = "model.safetensors.index.json"
# What the name of one file ends in, and so no directory of shards.
FILE_SUFFIXES = frozenset({".bin", ".ckpt", ".pkl", ".pt", ".pth", ".safetensors", ".tar"})
# A tensor that was expanded is stored with strides of zero. It is written out as long as that is no bomb.
_MOST_REPEATS, _SMALL = 64, 1 << 24


@dataclass(frozen=True)
class _File:
    name: str
    header: bytes
    order: tuple[str, ...]


class SafetensorsSink:
    """The files to write, planned whole before a byte is written.

    Args:
        tensors: Each with its shape, dtype and where its bytes come from.
        metadata: Text for the header of every file.
        max_shard_size: Begin another file before one has more bytes of tensors than this; None for one file alone.
    """

    def __init__(
        self,
        tensors: Mapping[str, tuple[Entry, Piece]],
        metadata: Mapping[str, str],
        *,
        max_shard_size: int | None = None,
    ) -> None:
        self._tensors, self._metadata = tensors, metadata
        self._sharded = max_shard_size is not None
        shards = _shards({key: entry for key, (entry, _) in tensors.items()}, max_shard_size)
        self._files = [self._plan(keys, index, len(shards)) for index, keys in enumerate(shards)]
        self.size = sum(len(file.header) for file in self._files)
        self.size += sum(nbytes(entry) for entry, _ in tensors.values())

    def _plan(self, keys: list[str], index: int, count: int) -> _File:
        header, order = make_header({key: self._tensors[key][0] for key in keys}, self._metadata)
        return _File(f"model-{index + 1:05}-of-{count:05}.safetensors", header, tuple(order))

    @property
    def pieces(self) -> list[Piece]:
        """Where everything comes from, in the order of writing."""
        return [self._tensors[key][1] for file in self._files for key in file.order]

    @property
    def shared_out(self) -> bool:
        """Whether several processes write it: where there are shards."""
        return self._sharded

    def write(self, path: Path, advance: Advance, team: Team) -> None:
        """Write to an empty file, or into an empty directory where there are shards: this process's share of them."""
        if not self._sharded:
            self._write_one(self._files[0], path, advance)
            return
        for number in team.share([self._bytes(file) for file in self._files]):
            shard = path / self._files[number].name
            shard.touch(exist_ok=False)
            self._write_one(self._files[number], shard, advance)
        team.exchange(None)
        if team.rank == 0:
            self._write_index(path / INDEX)

    def _bytes(self, file: _File) -> int:
        return sum(nbytes(self._tensors[key][0]) for key in file.order)

    def _write_index(self, index: Path) -> None:
        index.touch(exist_ok=False)
        with OutputFile(index) as out:
            out.write(json.dumps(self._index(), indent=2, sort_keys=True).encode())

    def _write_one(self, file: _File, path: Path, advance: Advance) -> None:
        with OutputFile(path) as out:
            out.write(file.header)
            pump(self._jobs(file, out), advance)
        self._check(file, path)

    def _jobs(self, file: _File, out: OutputFile) -> Generator[Job, None, None]:
        for key in file.order:
            entry, piece = self._tensors[key]
            if isinstance(piece, Extent):
                yield Job("", nbytes(entry), partial(out.copy, piece), 0)
            else:
                yield from _computing(piece, out)

    def _check(self, file: _File, path: Path) -> None:
        """Read the header back, with its offsets against the size of the file."""
        with closing(InputFile(path)) as written:
            found = read_header(written)
        if found.entries != {key: self._tensors[key][0] for key in file.order}:
            raise CheckpointError(f"{path.name}: what was written is not what was planned.")

    def _index(self) -> dict[str, Any]:
        total = sum(nbytes(entry) for entry, _ in self._tensors.values())
        places = {key: file.name for file in self._files for key in file.order}
        return {"metadata": {"total_size": total}, "weight_map": places}


def _computing(made: Made, out: OutputFile) -> Generator[Job, None, None]:
    """Compute a tensor piece by piece, and yield the writing of each."""
    for tensor in made.pieces():
        size = tensor.numel() * tensor.element_size()
        yield Job(made.name, size, partial(_write, tensor, out), size)


def _write(tensor: Tensor, out: OutputFile) -> None:
    out.write(as_bytes(tensor))


def _shards(entries: Mapping[str, Entry], most: int | None) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    used = 0
    for key, entry in entries.items():
        size = nbytes(entry)
        if most is not None and shards[-1] and used + size > most:
            shards.append([])
            used = 0
        shards[-1].append(key)
        used += size
    return shards


def check_directory(target: Path) -> None:
    """Raise if the directory of shards would have the name of a file: programs go by the suffix.

    Raises:
        CheckpointError: Its name ends as that of a checkpoint file.
    """
    if target.suffix in FILE_SUFFIXES:
        raise CheckpointError(
            f"{target}: shards and their {INDEX} are written as a directory, and {target.suffix} is the suffix of a "
            f"file.\nName a directory, such as {target.with_suffix('')}, or leave out the size of shards."
        )


def flat(content: Content, *, target: Path) -> dict[str, tuple[Entry, Piece]]:
    """Return the content as safetensors can hold it: one level of plain tensors, each with bytes of its own.

    Raises:
        CheckpointError: There is more than that in it.
    """
    if not isinstance(content.root, Mapping):
        raise CheckpointError(_not_flat(target, f"{_called(content.root)} at the top"))
    tensors: dict[str, tuple[Entry, Piece]] = {}
    for key, value in content.root.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise CheckpointError(_not_flat(target, f"{_called(value)} under {key!r}"))
        if kind := unusual(value):
            raise CheckpointError(_not_flat(target, f"a {kind} tensor under {key!r}"))
        tensors[key] = (Entry(tuple(value.shape), value.dtype), contiguous(value.detach(), content))
    return tensors


def contiguous(tensor: Tensor, content: Content) -> Piece:
    """Return where the elements of a tensor come from, in order and without what else its storage has."""
    entry = Entry(tuple(tensor.shape), tensor.dtype)
    if tensor.device.type != "meta":
        return Made(entry, lambda: tensor.contiguous().resolve_conj().resolve_neg())
    piece = content.piece(tensor.untyped_storage())
    if isinstance(piece, Made):
        return piece
    start = int(tensor.storage_offset()) * tensor.element_size()
    if tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg():
        return piece.part(start, nbytes(entry))
    return Made(entry, lambda: gathered(tensor, piece))


def gathered(tensor: Tensor, extent: Extent) -> Tensor:
    """Return the values of a placeholder as a contiguous tensor.

    Raises:
        CheckpointError: They cannot be read, or strides of zero make very many of few.
    """
    if tensor.numel() * tensor.element_size() > max(_MOST_REPEATS * extent.length, _SMALL):
        raise CheckpointError(
            f"{extent.file.path}: {extent.length:,} bytes are said to be a tensor of shape {tuple(tensor.shape)}."
        )
    start, size = int(tensor.storage_offset()), tensor.element_size()
    length = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    if tensor.numel() == 0:
        return torch.empty(tensor.shape, dtype=tensor.dtype)
    part = extent.part(start * size, length * size)
    values = part.tensor(Entry((length,), tensor.dtype))
    values = values.as_strided(tensor.shape, tensor.stride())
    values = values.conj() if tensor.is_conj() else values
    values = torch._neg_view(values) if tensor.is_neg() else values
    return values.contiguous().resolve_conj().resolve_neg()


def _not_flat(target: Path, found: str) -> str:
    return (
        f"{target}: safetensors holds one level of named tensors, and the source has {found}.\n"
        'Choose a name ending in ".pt", or save its state dict alone.'
    )


def _called(value: object) -> str:
    if isinstance(value, Mapping):
        return "a mapping"
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"
