"""Writing a file or a directory whole or not at all: a temporary one beside it, synced, then renamed."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from torchkiln._core.errors import CheckpointError, OutputExistsError, TorchkilnError
from torchkiln.checkpoint._team import ALONE, Team

__all__ = ["check_target", "replacing"]


def check_target(target: Path, *, sources: Sequence[Path], force: bool, directory: bool = False) -> None:
    """Raise unless `target` may be written: another file than the sources, new or `force`, in a directory.

    Raises:
        CheckpointError: The target is a source (by any link), a directory, or lies in no directory.
        OutputExistsError: The target exists and `force` is false, or it is a directory that holds something.
    """
    if target.exists() and any(target.samefile(source) for source in sources):
        raise CheckpointError(f"{target}: is the input itself, which is never modified. Name another output.")
    if directory:
        _check_directory(target)
    elif target.is_dir():
        raise CheckpointError(f"{target}: is a directory. Name a file in it.")
    if not target.parent.is_dir():
        raise CheckpointError(f"{target}: the directory {target.parent} does not exist. Create it first.")
    if not directory and os.path.lexists(target) and not force:
        raise OutputExistsError(f"{target}: exists already. Choose another name, or replace it with force.")


def _check_directory(target: Path) -> None:
    # Directories cannot be exchanged in one step, so none is ever replaced; an empty one can.
    if os.path.lexists(target) and (target.is_symlink() or not target.is_dir() or any(target.iterdir())):
        raise OutputExistsError(
            f"{target}: exists already, and a directory is not replaced. Remove it, or choose another name."
        )


@contextmanager
def replacing(
    target: Path, *, sources: Sequence[Path], force: bool, directory: bool = False, team: Team = ALONE
) -> Iterator[Path]:
    """Give a temporary path beside `target` that takes its place on success and is removed on any failure.

    Of a team every process gets the path; the first one makes it, and puts it in place once the others are done.

    Args:
        target: The file to create or replace, or the directory to create.
        sources: The files being read, of which `target` must be none.
        force: Replace an existing target.
        directory: Make a directory.
        team: The processes that write it.

    Raises:
        CheckpointError: As :func:`check_target`, the system refused to write, or another process failed.
        OutputExistsError: The target exists and `force` is false.
    """
    first = team.rank == 0
    name = team.exchange(f".{target.name[:100]}.{secrets.token_hex(6)}.tmp")[0]
    temporary = target.with_name(name)
    try:
        with team.together():
            if first:
                check_target(target, sources=sources, force=force, directory=directory)
                temporary.mkdir() if directory else temporary.open("xb").close()
            team.exchange(None)
            yield temporary
            team.exchange(None)
            if first:
                (_sync_directory if directory else _sync)(temporary)
                # Once more: writing took time, and rename would replace what appeared meanwhile.
                check_target(target, sources=sources, force=force, directory=directory)
                _put(temporary, target, force=force or directory)
                _sync_directory(target.parent)
            team.exchange(None)
    except (MemoryError, OSError, RuntimeError) as error:
        if isinstance(error, TorchkilnError):
            raise
        raise CheckpointError(
            f"{target}: could not be written: {_first_line(error)}. Nothing was left."
        ) from error
    finally:
        _remove(temporary)


def _put(temporary: Path, target: Path, *, force: bool) -> None:
    """Rename; where nothing may be replaced, so that a file which appears this very moment is not either."""
    if force:
        temporary.replace(target)
        return
    try:
        os.link(temporary, target)
    except FileExistsError:
        raise OutputExistsError(
            f"{target}: exists already. Choose another name, or replace it with force."
        ) from None
    except OSError:  # a file system without hard links
        temporary.replace(target)


def _remove(temporary: Path) -> None:
    if temporary.is_dir():
        shutil.rmtree(temporary, ignore_errors=True)
    else:
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
