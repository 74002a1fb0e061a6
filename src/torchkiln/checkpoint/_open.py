"""Opening a checkpoint by what its first bytes say, whatever its name is."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from torchkiln._core.errors import CheckpointError
from torchkiln.checkpoint._bytes import InputFile
from torchkiln.checkpoint._io import CheckpointFile

__all__ = ["open_checkpoint"]

_INDEX = ".safetensors.index.json"


@contextmanager
def open_checkpoint(path: str | os.PathLike[str]) -> Iterator[CheckpointFile]:
    """Open a checkpoint.

    Args:
        path: A safetensors file, the index of its shards, a file written by ``torch.save``, a directory of
            ``torch.distributed.checkpoint``, or a directory with one index or one safetensors file in it.

    Returns:
        A context manager giving the :class:`CheckpointFile`.

    Raises:
        CheckpointError: The file is missing, is no checkpoint, is damaged, or cannot be read without running code.
    """
    file = _open(Path(path))
    try:
        yield file
    finally:
        file.close()


def _open(path: Path) -> CheckpointFile:
    from torchkiln.checkpoint._dcp_file import open_dcp
    from torchkiln.checkpoint._safetensors_file import open_index, open_safetensors
    from torchkiln.checkpoint._torch_file import open_torch

    if path.is_dir():
        if (path / ".metadata").is_file():
            return open_dcp(path)
        path = _inside(path)
    if path.name == ".metadata":
        return open_dcp(path.parent)
    with closing(InputFile(path)) as file:
        head = file.read(0, min(64, file.size))
    if path.name.endswith(".json") and head.lstrip().startswith(b"{"):
        return open_index(path)
    container = _container_of(head, path=path)
    return open_safetensors(path) if container == "safetensors" else open_torch(path, container=container)


def _inside(path: Path) -> Path:
    """Return the file of a directory that is meant: the only index, or else the only safetensors file."""
    names = sorted(os.listdir(path))
    if "adapter_config.json" in names:
        raise CheckpointError(
            f"{path}: holds an adapter, which is nothing without its base.\n"
            "Bake the base, and pass this directory as an adapter of it."
        )
    found = [name for name in names if name.endswith(_INDEX)]
    found = found or [name for name in names if name.endswith(".safetensors")]
    if len(found) != 1:
        what = f"{len(found)} of them" if found else "none"
        raise CheckpointError(
            f"{path}: got a directory without .metadata; expected one *{_INDEX} in it, or one *.safetensors, found "
            f"{what}.\nName a file inside it."
        )
    return path / found[0]


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
        return "it looks like JSON (the name of an index of shards ends in .json)"
    if head.startswith(b"\x80"):
        return "it is a pickle that torch.save did not write"
    return "its first bytes are of no known format"
