"""Writing: whole or not at all, never onto the input, never over a file unasked."""

from __future__ import annotations

import hashlib
import os
import stat
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from torchkiln import checkpoint
from torchkiln._core.errors import CheckpointError, OutputExistsError
from torchkiln.checkpoint import _atomic
from torchkiln.checkpoint._bytes import OutputFile

STATE = {"weight_g": torch.ones(3, 1), "weight_v": torch.ones(3, 4)}


@pytest.fixture(params=[".pt", ".safetensors"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / f"in{request.param}"
    if path.suffix == ".pt":
        torch.save(STATE, path)
    else:
        safetensors.torch.save_file(STATE, path)
    return path


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_input_is_not_modified(source: Path) -> None:
    before, time = digest(source), source.stat().st_mtime_ns
    checkpoint.bake(source, source.with_name(f"out{source.suffix}"))
    checkpoint.convert(source, source.with_name(f"torch{source.suffix}"), to="torch")
    checkpoint.verify(source)
    assert (digest(source), source.stat().st_mtime_ns) == (before, time)


def test_existing_target_is_kept_without_force(source: Path) -> None:
    target = source.with_name(f"out{source.suffix}")
    target.write_bytes(b"precious")
    with pytest.raises(
        OutputExistsError, match=r"exists already\. Choose another name, or replace it with force"
    ):
        checkpoint.bake(source, target)
    assert target.read_bytes() == b"precious"
    checkpoint.bake(source, target, force=True)
    assert len(checkpoint.inspect(target).rows) == 0


@pytest.mark.parametrize("link", ["itself", "symlink", "hardlink", "dotted"])
def test_target_that_is_the_source_is_refused(link: str, source: Path) -> None:
    target = source.with_name(f"link{source.suffix}")
    if link == "itself":
        target = source
    elif link == "symlink":
        target.symlink_to(source)
    elif link == "hardlink":
        target.hardlink_to(source)
    else:
        target = source.parent / "." / ".." / source.parent.name / source.name
    before = digest(source)
    with pytest.raises(CheckpointError, match="is the input itself"):
        checkpoint.bake(source, target, force=True)
    assert digest(source) == before


def test_dangling_link_counts_as_existing(source: Path) -> None:
    target = source.with_name(f"link{source.suffix}")
    target.symlink_to(source.with_name("nowhere"))
    with pytest.raises(OutputExistsError):
        checkpoint.bake(source, target)


def test_target_directory_must_exist(source: Path) -> None:
    with pytest.raises(CheckpointError, match=r"does not exist\. Create it first"):
        checkpoint.bake(source, source.parent / "none" / "out.pt")


def test_target_must_not_be_a_directory(source: Path) -> None:
    with pytest.raises(CheckpointError, match="is a directory"):
        checkpoint.bake(source, source.parent, force=True)


@pytest.mark.skipif(os.name != "posix", reason="permission bits")
def test_new_file_has_the_permissions_of_any_new_file(source: Path) -> None:
    target = source.with_name(f"out{source.suffix}")
    checkpoint.bake(source, target)
    reference = source.with_name("reference")
    reference.touch()
    assert stat.S_IMODE(target.stat().st_mode) == stat.S_IMODE(reference.stat().st_mode)


def test_report_gives_the_size(source: Path) -> None:
    target = source.with_name(f"out{source.suffix}")
    assert checkpoint.bake(source, target).bytes_written == target.stat().st_size


class Full:
    """Stands in for a writer: fails at the second write, as a full disk does."""

    def __init__(self, error: BaseException) -> None:
        self.error = error
        self.calls = 0

    def __call__(self, data: Any) -> int:
        self.calls += 1
        if self.calls > 1:
            raise self.error
        return len(data)


FAULTS = [
    (
        OSError(28, "No space left on device"),
        "could not be written: No space left on device. Nothing was left",
    ),
    (RuntimeError("unexpected pos\nmore"), "could not be written: unexpected pos. Nothing was left"),
    (MemoryError("no room"), "could not be written: no room. Nothing was left"),
]


@pytest.mark.parametrize(("error", "text"), FAULTS, ids=["os", "runtime", "memory"])
def test_failure_while_writing_leaves_nothing(
    error: Exception, text: str, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OutputFile, "write", Full(error))
    with pytest.raises(CheckpointError, match=text):
        checkpoint.bake(source, source.with_name(f"out{source.suffix}"))
    assert list(source.parent.iterdir()) == [source]


def test_interrupt_while_writing_leaves_nothing(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OutputFile, "write", Full(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        checkpoint.bake(source, source.with_name(f"out{source.suffix}"))
    assert list(source.parent.iterdir()) == [source]


@pytest.mark.parametrize("stage", ["_sync", "_sync_directory"])
def test_failure_to_sync_is_reported(stage: str, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(_atomic, stage, fail)
    target = source.with_name(f"out{source.suffix}")
    with pytest.raises(CheckpointError, match="Input/output error"):
        checkpoint.bake(source, target)
    assert not list(source.parent.glob(".*"))
    # Once renamed the file is whole; before that there is none.
    assert target.exists() == (stage == "_sync_directory")


def test_failure_keeps_the_file_that_was_to_be_replaced(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = source.with_name(f"out{source.suffix}")
    target.write_bytes(b"precious")
    monkeypatch.setattr(OutputFile, "write", Full(OSError(28, "full")))
    with pytest.raises(CheckpointError, match="full"):
        checkpoint.bake(source, target, force=True)
    assert target.read_bytes() == b"precious"
    assert sorted(path.name for path in source.parent.iterdir()) == sorted([source.name, target.name])


def test_file_that_appears_meanwhile_is_kept(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = source.with_name(f"out{source.suffix}")
    monkeypatch.setattr(_atomic, "_sync", lambda path: target.write_bytes(b"precious"))
    with pytest.raises(OutputExistsError):
        checkpoint.bake(source, target)
    assert target.read_bytes() == b"precious"


def test_caller_s_errors_come_through(source: Path) -> None:
    def stop(done: int, total: int, key: str) -> None:
        raise LookupError("stop")

    with pytest.raises(LookupError, match="stop"):
        checkpoint.bake(source, source.with_name(f"out{source.suffix}"), progress=stop)
    assert list(source.parent.iterdir()) == [source]


@pytest.mark.parametrize("fails", [False, True])
def test_torch_has_its_threads_back(fails: bool, source: Path) -> None:
    seen: set[int] = set()

    def look(done: int, total: int, key: str) -> None:
        seen.add(torch.get_num_threads())
        if fails:
            raise LookupError("stop")

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with pytest.raises(LookupError) if fails else nullcontext() as error:
            checkpoint.bake(source, source.with_name(f"out{source.suffix}"), progress=look)
        # Where there is an error it is held here, and with it everything that was being computed.
        assert (torch.get_num_threads(), error is not None) == (3, fails)
    finally:
        torch.set_num_threads(before)
    assert 1 in seen or fails


@pytest.mark.skipif(os.name != "posix", reason="file size limits")
def test_real_write_error_leaves_nothing(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    signal = pytest.importorskip("signal")
    source = tmp_path / "in.pt"
    torch.save({**STATE, "big": torch.ones(300_000)}, source)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(CheckpointError, match="could not be written"):
            checkpoint.bake(source, tmp_path / "out.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == [source]
