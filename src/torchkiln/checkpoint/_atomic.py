"""Writing a file whole or not at all: a temporary file beside it, synced, then renamed."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from torchkiln._core.errors import CheckpointError, OutputExistsError, TorchkilnError

__all__ = ["check_target", "replacing"]


def check_target(target: Path, *, source: Path, force: bool) -> None:
    """Raise unless `target` may be written: another file than the source, new or `force`, in a directory.

    Raises:
        CheckpointError: The target is the source (by any link), a directory, or lies in no directory.
        OutputExistsError: The target exists and `force` is false.
    """
    if target.exists() and target.samefile(source):
        raise CheckpointError(f"{target}: is the input itself, which is never modified. Name another output.")
    if target.is_dir():
        raise CheckpointError(f"{target}: is a directory. Name a file in it.")
    if not target.parent.is_dir():
        raise CheckpointError(f"{target}: the directory {target.parent} does not exist. Create it first.")
    if os.path.lexists(target) and not force:
        raise OutputExistsError(f"{target}: exists already. Choose another name, or replace it with force.")


@contextmanager
def replacing(target: Path, *, source: Path, force: bool) -> Iterator[Path]:
    """Give a temporary path beside `target` that takes its place on success and is removed on any failure.

    Args:
        target: The file to create or replace.
        source: The file being read, which `target` must not be.
        force: Replace an existing target.

    Raises:
        CheckpointError: As :func:`check_target`, or the system refused to write.
        OutputExistsError: The target exists and `force` is false.
    """
    check_target(target, source=source, force=force)
    temporary = target.with_name(f".{target.name[:100]}.{secrets.token_hex(6)}.tmp")
    try:
        temporary.open("xb").close()
        permissions = temporary.stat().st_mode
        yield temporary
        # A writer may have put a file of its own in this one's place, and safetensors does: with mode 600.
        temporary.chmod(permissions)
        _sync(temporary)
        # Once more: writing took time, and rename would replace what appeared meanwhile.
        check_target(target, source=source, force=force)
        temporary.replace(target)
        _sync_directory(target.parent)
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, TorchkilnError):
            raise
        raise CheckpointError(
            f"{target}: could not be written: {_first_line(error)}. Nothing was left."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    with path.open("rb+") as stream:
        os.fsync(stream.fileno())


def _sync_directory(path: Path) -> None:
    if os.name != "posix":  # elsewhere a directory cannot be opened, and rename is durable by itself
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _first_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
