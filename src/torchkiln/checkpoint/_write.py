"""Writing a changed copy: planned from headers alone, then streamed into a temporary file that takes its place."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, get_args

from torchkiln._core.errors import CheckpointError
from torchkiln.checkpoint._atomic import check_target, replacing
from torchkiln.checkpoint._bytes import Extent, nbytes
from torchkiln.checkpoint._description import carried
from torchkiln.checkpoint._io import Change, CheckpointFile, Content, Made, Piece
from torchkiln.checkpoint._read_back import check_copies, copies
from torchkiln.checkpoint._report import Note
from torchkiln.checkpoint._safetensors_sink import FILE_SUFFIXES, SafetensorsSink, check_directory, flat
from torchkiln.checkpoint._stream import Advance
from torchkiln.checkpoint._team import ALONE, Team
from torchkiln.checkpoint._torch_sink import TorchSink

__all__ = ["Container", "Plan", "Progress", "chosen_container", "plan_copy", "plan_notes"]

Container = Literal["dcp", "safetensors", "torch"]
"""The kinds of checkpoint that are written."""

Progress = Callable[[int, int, str], None]
"""Called with how much is done, of how much, and the name of the last tensor."""

# Whoever asks for one of these would get a file that its readers refuse.
_OTHER_SUFFIXES = frozenset(
    {".gguf", ".h5", ".hdf5", ".mlmodel", ".msgpack", ".npy", ".npz", ".onnx", ".pb", ".tflite"}
)
_SHARD_SIZE = 5_000_000_000
# What a disk of today writes, and what Python and torch take: the estimate of a dry run needs them, and nothing else.
_RATE = 1_000_000_000
_BASE_MEGABYTES = 300


class Sink(Protocol):
    """Files of one container, planned and ready to be written."""

    size: int

    @property
    def shared_out(self) -> bool:
        """Whether several processes write it, each its share."""

    @property
    def pieces(self) -> Sequence[Piece]:
        """Where everything comes from, in the order of writing."""

    def write(self, path: Path, advance: Advance, team: Team) -> None:
        """Write to an empty file or directory."""


@dataclass(frozen=True)
class Plan:
    """What is going to be read, computed and written, known before any tensor is read.

    Attributes:
        file: The source.
        sink: What is written.
        target: Where.
        directory: Whether that is a directory.
        container: What kind of checkpoint it is.
        copies: Where the tensors that are copied lie in the source, by their new names.
    """

    file: CheckpointFile
    sink: Sink
    target: Path
    directory: bool
    container: Container
    copies: Mapping[str, Extent]

    @property
    def size(self) -> int:
        """How many bytes are going to be written."""
        return self.sink.size

    @property
    def copied(self) -> int:
        """How many bytes are copied as they are."""
        return sum(piece.length for piece in self.sink.pieces if isinstance(piece, Extent))

    @property
    def computed(self) -> int:
        """How many bytes of tensors are computed."""
        return sum(nbytes(piece.entry) for piece in self.sink.pieces if not isinstance(piece, Extent))

    def check_target(self, *, force: bool, also: Sequence[Path] = ()) -> None:
        """Raise if the target may not be written, or is larger than what is free on its disk.

        Args:
            force: Replace an existing file.
            also: What else is read, and so may not be written.

        Raises:
            CheckpointError: Says why not.
            OutputExistsError: The target exists and `force` is false.
        """
        sources = [*(one.path for one in self.file.inputs), *also]
        check_target(self.target, sources=sources, force=force, directory=self.directory)
        free = shutil.disk_usage(self.target.parent).free
        if free < self.size:
            raise CheckpointError(
                f"{self.target}: needs {self.size:,} bytes, and {free:,} are free on its disk."
            )

    def write(self, *, force: bool, progress: Progress | None = None, team: Team = ALONE) -> int:
        """Write, whole or not at all, and return the size in bytes.

        Args:
            force: Replace an existing file.
            progress: Called with the bytes of tensors done, their total, and the name of the last one.
            team: The processes that write together; only the first one writes what cannot be shared out.

        Raises:
            CheckpointError: The source cannot be read, changes meanwhile, or the system refuses to write.
            OutputExistsError: The target exists and `force` is false.
        """
        sources = [one.path for one in self.file.inputs]
        done, total = 0, self.copied + self.computed

        def advance(size: int, name: str) -> None:
            nonlocal done
            done += size
            if progress is not None:
                progress(min(done, total), total, name)

        with replacing(
            self.target, sources=sources, force=force, directory=self.directory, team=team
        ) as temporary:
            if team.rank == 0 or self.sink.shared_out:
                self.sink.write(temporary, advance, team)
            self.file.check_unchanged()
            if team.rank == 0:
                check_copies(temporary, self.copies)
            written = temporary.iterdir() if self.directory else [temporary]
            return team.exchange(sum(path.stat().st_size for path in written))[0]


def plan_notes(file: CheckpointFile, plan: Plan, *, dry_run: bool) -> Iterator[Note]:
    """Yield what there is to know of a plan: what its container has no place for, and what it would do.

    Args:
        file: What is read.
        plan: What is written.
        dry_run: Whether it is not carried out.
    """
    if file.metadata and plan.container != "safetensors":
        kind = "torch file" if plan.container == "torch" else "distributed checkpoint"
        yield Note("info", "", f"the safetensors metadata has no place in a {kind} and is left out")
    if dry_run:
        whole = [
            piece.entry for piece in plan.sink.pieces if isinstance(piece, Made) and piece.blocks is None
        ]
        memory = 4 * max(map(nbytes, whole), default=0) / 1e6 + _BASE_MEGABYTES
        yield Note(
            "info",
            "",
            f"dry run: nothing was written. It would be {plan.size:,} bytes of {plan.container}, of which "
            f"{plan.copied:,} are copied and {plan.computed:,} computed: about {max(1, round(plan.size / _RATE))} s at "
            f"{_RATE / 1e9:g} GB/s, in about {memory:,.0f} MB of memory",
        )


def chosen_container(
    target: Path, source: CheckpointFile, *, container: Container | None, max_shard_size: int | None
) -> tuple[Container, int | None]:
    """Return the kind of checkpoint to write, and the size of its shards if it is to have some.

    Args:
        target: Its suffix decides where nothing else does, then the kind of the source.
        source: What is read.
        container: What the caller asks for.
        max_shard_size: The size of shards that the caller asks for.

    Raises:
        CheckpointError: The two do not go together.
    """
    if container not in (None, *get_args(Container)):
        raise CheckpointError(
            f"container: expected one of {', '.join(get_args(Container))}, got {container!r}."
        )
    if max_shard_size is not None:
        if max_shard_size < 1:
            raise CheckpointError(f"max_shard_size: expected at least one byte, got {max_shard_size}.")
        if container not in (None, "safetensors"):
            raise CheckpointError(
                f"max_shard_size: shards are written as safetensors, not as {container}.\nLeave one of them out."
            )
        return "safetensors", max_shard_size
    if container is not None:
        shards = container == "safetensors" and source.container == "sharded safetensors"
        return container, _SHARD_SIZE if shards and target.suffix != ".safetensors" else None
    if target.suffix == ".safetensors":
        return "safetensors", None
    if target.suffix in _OTHER_SUFFIXES:
        raise CheckpointError(
            f"{target}: {target.suffix} is the suffix of another format, which is not written.\n"
            'Choose a name ending in ".safetensors" or ".pt".'
        )
    if target.suffix in FILE_SUFFIXES or source.container.startswith("torch "):
        return "torch", None
    if source.container == "dcp":
        return "dcp", None
    return "safetensors", _SHARD_SIZE if source.container == "sharded safetensors" else None


def plan_copy(
    file: CheckpointFile,
    changes: Sequence[Change],
    target: Path,
    *,
    container: Container | None = None,
    max_shard_size: int | None = None,
) -> Plan:
    """Plan a copy of a file with changes; nothing but its header is read.

    Args:
        file: The source.
        changes: What to replace. Everything else is written as it was.
        target: The new file or directory.
        container: As for :func:`chosen_container`.
        max_shard_size: As for :func:`chosen_container`.

    Raises:
        CheckpointError: The content does not fit the container.
    """
    kind, shard_size = chosen_container(target, file, container=container, max_shard_size=max_shard_size)
    if shard_size is not None:
        check_directory(target)
    kept = copies(file, changes)  # before the content is taken, which uses the groups up
    content = file.changed(changes)
    return Plan(
        file,
        _sink(content, _metadata(file, changes), target, kind, shard_size),
        target,
        kind == "dcp" or shard_size is not None,
        kind,
        kept,
    )


def _metadata(file: CheckpointFile, changes: Sequence[Change]) -> dict[str, str]:
    if "safetensors" in file.container:
        return carried(file.metadata, changes, where=str(file.path))
    # transformers and diffusers load a file only if it names the framework its layout came from.
    return {"format": "pt"}


def _sink(
    content: Content, metadata: Mapping[str, str], target: Path, kind: Container, shard_size: int | None
) -> Sink:
    if kind == "safetensors":
        return SafetensorsSink(flat(content, target=target), metadata, max_shard_size=shard_size)
    if kind == "dcp":
        from torchkiln.checkpoint._dcp_sink import DcpSink

        return DcpSink(content)
    return TorchSink(content)
