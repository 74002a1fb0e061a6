"""Checkpoint files behind one interface: list the tensors, read one, write a changed copy.

Everything outside this file, ``_torch_file`` and ``_safetensors_file`` sees a :class:`CheckpointFile`: groups of
tensor keys with shapes and dtypes, `read` for one tensor at a time, and :func:`write_copy` for the file with some
keys replaced. How a container stores its bytes, and whether it is streamed, stays behind this line.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from torchkiln._core.errors import CheckpointError
from torchkiln._core.spellings.entries import Entry, Group, Label
from torchkiln.checkpoint._atomic import replacing

__all__ = [
    "Change",
    "CheckpointFile",
    "Entry",
    "Group",
    "Label",
    "open_checkpoint",
    "output_container",
    "replaced",
    "write_copy",
]

_TORCH_SUFFIXES = frozenset({".bin", ".ckpt", ".pkl", ".pt", ".pth", ".tar"})


@dataclass(frozen=True)
class Change:
    """In one group, `keys` give way to the tensors that `make` returns, put where the first of them stood."""

    group: Group
    keys: tuple[str, ...]
    make: Callable[[], Mapping[str, Tensor]]
    before: tuple[Label, ...] = ()
    after: tuple[Label, ...] = ()


class CheckpointFile(ABC):
    """An open checkpoint."""

    path: Path
    container: str
    metadata: dict[str, str]
    groups: tuple[Group, ...]
    loose: tuple[Entry, ...]
    """Tensors that no mapping with string keys holds; they are never folded."""
    remarks: tuple[str, ...]
    """What a reader of reports should know about this file."""

    @abstractmethod
    def read(self, group: Group, key: str) -> Tensor:
        """Return one tensor, on the CPU, possibly mapped from the file: do not write to it."""

    @abstractmethod
    def identity(self, group: Group, key: str) -> Hashable:
        """Return a value that is equal for two keys exactly when they hold the same memory."""

    @abstractmethod
    def changed(self, changes: Sequence[Change]) -> Any:
        """Return the whole content with the changes made; the file object is used up by it."""

    @property
    def entries(self) -> tuple[Entry, ...]:
        """Every tensor of the file."""
        return (*(entry for group in self.groups for entry in group.entries.values()), *self.loose)


def replaced(items: Mapping[Any, Any], changes: Sequence[Change]) -> dict[Any, Any]:
    """Return the items with the changes made, each where the first of its keys stood."""
    at = {change.keys[0]: change for change in changes}
    dropped = {key for change in changes for key in change.keys}
    result: dict[Any, Any] = {}
    for key, value in items.items():
        if key in at:
            result.update(at[key].make())
        elif key not in dropped:
            result[key] = value
    return result


def open_checkpoint(path: str | os.PathLike[str]) -> AbstractContextManager[CheckpointFile]:
    """Open a checkpoint by what its first bytes say, whatever its name is.

    Args:
        path: A safetensors file or a file written by ``torch.save``.

    Returns:
        A context manager giving the :class:`CheckpointFile`.

    Raises:
        CheckpointError: The file is missing, is no checkpoint, is damaged, or cannot be read without running code.
    """
    from torchkiln.checkpoint._safetensors_file import open_safetensors
    from torchkiln.checkpoint._torch_file import open_torch

    path = Path(path)
    container = _sniff(path)
    return open_safetensors(path) if container == "safetensors" else open_torch(path, container=container)


def _sniff(path: Path) -> str:
    if path.is_dir():
        raise CheckpointError(f"{path}: expected a checkpoint file, got a directory. Name a file inside it.")
    try:
        with path.open("rb") as stream:
            head = stream.read(64)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file.") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}.") from error
    return _container_of(head, path=path)


def _container_of(head: bytes, *, path: Path) -> str:
    if head.startswith(b"PK\x03\x04"):
        return "torch zip"
    if head[8:9] == b"{":
        return "safetensors"
    if head.startswith(b"\x80") and _LEGACY_MAGIC in head:
        return "torch legacy"
    raise CheckpointError(
        f"{path}: not a checkpoint: {_guess(head)}.\nExpected safetensors or a torch.save file."
    )


# The number that torch.save writes first in files from before torch 1.6, as it appears in the pickle.
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C.to_bytes(10, "little")


def _guess(head: bytes) -> str:
    if not head:
        return "the file is empty"
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer; fetch the real file"
    if head.lstrip().startswith((b"{", b"[")):
        return "it looks like JSON (an index names its shards: pass one of them)"
    if head.startswith(b"\x80"):
        return "it is a pickle that torch.save did not write"
    return "its first bytes are of no known format"


def output_container(target: Path, source: CheckpointFile) -> str:
    """Return the container that a file name asks for: by its suffix, or the source's where that says nothing."""
    if target.suffix == ".safetensors":
        return "safetensors"
    return "torch" if target.suffix in _TORCH_SUFFIXES or source.container != "safetensors" else "safetensors"


def write_copy(file: CheckpointFile, changes: Sequence[Change], target: Path, *, force: bool) -> int:
    """Write the file's content with the changes to `target`, whole or not at all.

    Args:
        file: The source; it cannot be read after this.
        changes: What to replace. Everything else is written as it was.
        target: The new file. Its suffix chooses the container.
        force: Replace an existing target.

    Returns:
        The size of the new file in bytes.

    Raises:
        CheckpointError: The content does not fit the container, or the system refused to write.
        OutputExistsError: The target exists and `force` is false.
    """
    content = file.changed(changes)
    as_safetensors = output_container(target, file) == "safetensors"
    if as_safetensors:
        content = _flat(content, target=target)
    with replacing(target, source=file.path, force=force) as temporary:
        if as_safetensors:
            safetensors.torch.save_file(content, temporary, metadata=_metadata(file))
        else:
            with temporary.open("wb") as stream:
                torch.save(content, stream)
        return temporary.stat().st_size


def _metadata(file: CheckpointFile) -> dict[str, str] | None:
    # transformers and diffusers load a file only if it names the framework its layout came from.
    return (file.metadata or None) if file.container == "safetensors" else {"format": "pt"}


def _flat(content: Any, *, target: Path) -> dict[str, Tensor]:
    """The content as safetensors can hold it: one level of plain tensors, each with memory of its own."""
    if not isinstance(content, Mapping):
        raise CheckpointError(_not_flat(target, f"a {type(content).__name__} at the top"))
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor) or value.layout != torch.strided:
            raise CheckpointError(_not_flat(target, f"a {type(value).__name__} under {key!r}"))
        tensors[key] = _unshared(value.detach(), seen)
    return tensors


def _unshared(tensor: Tensor, seen: set[int]) -> Tensor:
    storage = tensor.untyped_storage()
    alone = storage.data_ptr() not in seen and storage.nbytes() == tensor.nbytes
    seen.add(storage.data_ptr())
    return tensor.contiguous() if alone else tensor.clone(memory_format=torch.contiguous_format)


def _not_flat(target: Path, found: str) -> str:
    return (
        f"{target}: safetensors holds one level of named tensors, and the source has {found}.\n"
        'Choose a name ending in ".pt".'
    )
