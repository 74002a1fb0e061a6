"""Faults: the input stays what it was, the output is absent or whole, and the message names the cause."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from tests.checkpoint.cases import read_file, same_bits
from tests.checkpoint.kills import STEPS, TARGETS, Folder, Kill, digest, kill_at, kills
from torchkiln import checkpoint
from torchkiln._core.errors import CheckpointError, OutputExistsError

STATE = {"weight_g": torch.ones(3, 1), "weight_v": torch.ones(3, 4), "bias": torch.arange(3.0)}
posix = pytest.mark.skipif(os.name != "posix", reason="signals, forks and mounts of POSIX")


@pytest.fixture(params=[".pt", ".safetensors"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / f"in{request.param}"
    save = torch.save if path.suffix == ".pt" else safetensors.torch.save_file
    save(STATE, path)
    return path


# --- killed, asked to end, or two at once -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return Folder.make(tmp_path_factory.mktemp("killed"), layers=8)


@posix
@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_killed_process_leaves_the_output_absent_or_whole(name: str, killed: Folder) -> None:
    before = "as before" if TARGETS[name].get("force") else "absent"
    found = list(kills(killed, name, 9, seed=0))
    assert {kill.found for kill in found} <= {before, "whole"}


@posix
@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_killed_at_a_step_the_output_is_there_once_it_is_renamed(
    name: str, step: str, killed: Folder
) -> None:
    before = "as before" if TARGETS[name].get("force") else "absent"
    kill = kill_at(killed, name, step, how="halted", dice=random.Random(0))
    assert kill == Kill(step, "halted", "whole" if step == "renamed" else before)


def test_what_a_kill_finds_can_be_a_failure(tmp_path: Path) -> None:
    folder = Folder.make(tmp_path, layers=1)
    folder = folder._replace(expected=dict.fromkeys(TARGETS, "another digest"))
    assert kill_one_finished(folder, "out.pt") == "broken"
    folder.source.write_bytes(b"changed")
    assert kill_one_finished(folder, "out.pt") == "the input was changed"


def kill_one_finished(folder: Folder, name: str) -> str:
    """Look at an output as after a kill, without a kill."""
    from tests.checkpoint.kills import _found

    (folder.path / name).write_bytes(b"half")
    return _found(folder, folder.path / name, replaced=False)


@posix
@pytest.mark.slow
@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name
)
def test_a_signal_leaves_nothing_behind(number: signal.Signals, tmp_path: Path) -> None:
    source = tmp_path / "in.pt"
    torch.save({"w_g": torch.ones(6000, 1), "w_v": torch.randn(6000, 6000)}, source)
    # What runs the tests may ignore some of them, and then so would the process.
    code = (
        f"import signal, sys; signal.signal({number}, "
        f"{'signal.default_int_handler' if number == signal.SIGINT else 'signal.SIG_DFL'}); "
        "from torchkiln._cli import main; sys.exit(main())"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, "bake", str(source), "-o", str(tmp_path / "out.pt")],
        stderr=subprocess.PIPE,
        text=True,
    )
    while not list(tmp_path.glob(".out.pt.*")) and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(number)
    _, said = process.communicate(timeout=120)
    assert process.returncode == (130 if number == signal.SIGINT else 128 + number)
    assert said.startswith("error: ")
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize("force", [False, True])
def test_two_writers_of_one_output(force: bool, source: Path) -> None:
    target, start = source.with_name(f"out{source.suffix}"), threading.Barrier(4)
    errors: list[Exception] = []

    def run() -> None:
        start.wait()
        try:
            checkpoint.bake(source, target, force=force)
        except OutputExistsError as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == (0 if force else 3)
    assert set(read_file(target)) == {"weight", "bias"}
    assert sorted(source.parent.iterdir()) == sorted([source, target])


# --- disks --------------------------------------------------------------------------------------------------------


@posix
@pytest.mark.parametrize("options", [{}, {"max_shard_size": 100_000}, {"container": "dcp"}], ids=str)
def test_a_disk_that_fills_up(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, source = tmp_path / "disk", tmp_path / "in.safetensors"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no right to mount a small disk")
    try:
        safetensors.torch.save_file({**STATE, "large": torch.randn(600_000)}, source)
        target = disk / "out"
        with pytest.raises(CheckpointError, match=r"needs [\d,]+ bytes, and [\d,]+ are free on its disk"):
            checkpoint.bake(source, target, **options)
        # Another process can fill it after that.
        monkeypatch.setattr("torchkiln.checkpoint._write.shutil.disk_usage", lambda path: _Plenty)
        with pytest.raises(
            CheckpointError, match=r"could not be written: No space left on device\. Nothing was left"
        ):
            checkpoint.bake(source, target, **options)
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


class _Plenty:
    free = 1 << 60


COMMANDS: dict[str, Callable[[Path], object]] = {
    "inspect": lambda path: checkpoint.inspect(path, deep=True),
    "bake": lambda path: checkpoint.bake(path, path.with_name("out.pt")),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_read_error_names_the_file_and_the_place(
    command: str, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size, preadv = source.stat().st_size, os.preadv

    def failing(descriptor: int, buffers: Any, offset: int) -> int:
        if os.fstat(descriptor).st_size == size and offset + len(buffers[0]) > size // 2:
            raise OSError(errno.EIO, "Input/output error")
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", failing)
    monkeypatch.delattr(os, "copy_file_range", raising=False)
    with pytest.raises(
        CheckpointError, match=rf"{re.escape(str(source))}: cannot be read at byte [\d,]+: Input/output"
    ):
        COMMANDS[command](source)
    assert list(source.parent.iterdir()) == [source]


def test_an_input_that_changes_meanwhile_is_noticed(source: Path) -> None:
    def touch(done: int, total: int, key: str) -> None:
        os.utime(source, ns=(1, 1))

    with pytest.raises(CheckpointError, match="was changed while it was read"):
        checkpoint.bake(source, source.with_name("out.pt"), progress=touch)
    assert list(source.parent.iterdir()) == [source]


def test_an_input_that_shrinks_meanwhile_is_an_error_and_no_crash(tmp_path: Path) -> None:
    source = tmp_path / "in.safetensors"
    safetensors.torch.save_file({**STATE, "z": torch.randn(300_000)}, source)

    def cut(done: int, total: int, key: str) -> None:
        os.truncate(source, 1000)

    with pytest.raises(CheckpointError, match=r"ends before byte|was changed"):
        checkpoint.bake(source, tmp_path / "out.pt", progress=cut)


# --- links and directories ----------------------------------------------------------------------------------------


@posix
def test_a_link_is_replaced_and_what_it_points_to_is_not(source: Path) -> None:
    other, target = source.with_name("other"), source.with_name(f"out{source.suffix}")
    other.write_bytes(b"precious")
    target.symlink_to(other)
    with pytest.raises(OutputExistsError):
        checkpoint.bake(source, target)
    checkpoint.bake(source, target, force=True)
    assert (other.read_bytes(), target.is_symlink()) == (b"precious", False)
    assert set(read_file(target)) == {"weight", "bias"}


@posix
@pytest.mark.parametrize("kind", ["full", "link", "file"])
def test_a_directory_never_replaces_anything(kind: str, source: Path) -> None:
    target = source.with_name("out")
    if kind == "full":
        target.mkdir()
        (target / "precious").write_bytes(b"precious")
    elif kind == "link":
        target.symlink_to(source.parent)
    else:
        target.write_bytes(b"precious")
    with pytest.raises(OutputExistsError, match="a directory is not replaced"):
        checkpoint.bake(source, target, container="dcp", force=True)
    assert len(list(source.parent.iterdir())) == 2


def test_a_shard_of_the_input_is_not_overwritten(tmp_path: Path) -> None:
    safetensors.torch.save_file(STATE, tmp_path / "in.safetensors")
    checkpoint.convert(tmp_path / "in.safetensors", tmp_path / "in", max_shard_size=20)
    before = digest(tmp_path / "in")
    for shard in sorted((tmp_path / "in").iterdir()):
        with pytest.raises(CheckpointError, match="is the input itself"):
            checkpoint.bake(tmp_path / "in", shard, force=True)
    assert digest(tmp_path / "in") == before


# --- damage -------------------------------------------------------------------------------------------------------


def header(fields: object, body: int = 12, *, raw: bytes | None = None) -> bytes:
    text = json.dumps(fields).encode() if raw is None else raw
    return len(text).to_bytes(8, "little") + text + bytes(body)


def field(begin: int, end: int, shape: list[int] | None = None, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": [3] if shape is None else shape, "data_offsets": [begin, end]}


HEADERS = {
    "overlapping": (header({"a": field(0, 12), "b": field(4, 16)}, 16), "a gap or an overlap"),
    "the same bytes twice": (header({"a": field(0, 12), "b": field(0, 12)}), "a gap or an overlap"),
    "a hole": (header({"a": field(4, 16)}, 16), "a gap or an overlap"),
    "backwards": (header({"a": field(12, 0)}), r"has the offsets \[12, 0\]"),
    "negative": (header({"a": field(-12, 0)}), "no list of whole numbers"),
    "huge": (header({"a": field(0, 2**70, [2**68])}), "a shape that no tensor has"),
    "huge and empty": (header({"a": field(0, 0, [2**62, 2**62, 0])}, 0), "a shape that no tensor has"),
    "beyond the file": (header({"a": field(0, 12)}, 8), "the tensors end at byte"),
    "more file than tensors": (header({"a": field(0, 12)}, 20), "the tensors end at byte"),
    "wrong length": (header({"a": field(0, 8)}, 8), "has 8 bytes for 12"),
    "fractions": (header({"a": field(0, 12, [3.0])}), "no list of whole numbers"),  # type: ignore[list-item]
    "booleans": (header({"a": field(0, 4, [True])}, 4), "no list of whole numbers"),
    "unknown dtype": (header({"a": field(0, 12, dtype="F33")}), "has dtype F33, which torch cannot hold"),
    "more fields": (header({"a": {**field(0, 12), "code": "import os"}}), "and nothing else"),
    "names twice": (
        header({}, raw=b'{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,12]},"a":0}'),
        "'a' is there twice",
    ),
    "shapes twice": (
        header({}, raw=b'{"a":{"dtype":"F32","shape":[3],"shape":[3],"data_offsets":[0,12]}}'),
        "there twice",
    ),
    "not UTF-8": (
        header({}, raw=b'{"\xff":{"dtype":"F32","shape":[3],"data_offsets":[0,12]}}'),
        "can't decode byte 0xff",
    ),
    "deep": (header({}, raw=b'{"a":' + b"[" * 100_000), "nested too deeply"),
    "no JSON": (header({}, raw=b"{nothing}"), "truncated or corrupt safetensors file"),
    "a list": (header({}, raw=b"[1,2]"), "not a checkpoint"),
    "NaN": (header({}, raw=b'{"a":NaN}'), "NaN is no number of JSON"),
    "metadata that is no text": (
        header({"__metadata__": {"a": 1}, "a": field(0, 12)}),
        "metadata is not text",
    ),
    "a header longer than the file": (
        b"\xff\0\0\0\0\0\0\0{" + bytes(50),
        "a header of 255 bytes in a file of 59",
    ),
    "a header longer than any": (b"\xff" * 7 + b"\x7f{" + bytes(50), "bytes, the most is 100,000,000"),
}


@pytest.mark.parametrize(("data", "text"), HEADERS.values(), ids=HEADERS)
def test_damaged_headers_are_refused_by_name(data: bytes, text: str, tmp_path: Path) -> None:
    path = tmp_path / "in.safetensors"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=text) as caught:
        checkpoint.bake(path, tmp_path / "out.safetensors")
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 400
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("data", [pair[0] for pair in HEADERS.values()], ids=HEADERS)
def test_safetensors_refuses_no_header_that_is_read_here(data: bytes, tmp_path: Path) -> None:
    """Strictness has an oracle: whatever safetensors refuses is refused here; ours may refuse more."""
    path = tmp_path / "in.safetensors"
    path.write_bytes(data)
    try:
        safetensors.torch.load_file(path)
    except Exception:  # noqa: BLE001  # its own class, and those of the loader behind it
        with pytest.raises(CheckpointError):
            checkpoint.inspect(path)


@pytest.mark.parametrize("position", [0.3, 0.5, 0.7])
def test_a_flipped_bit_in_a_torch_file_is_found_by_its_checksum(position: float, tmp_path: Path) -> None:
    torch.save({**STATE, "large": torch.zeros(5000)}, tmp_path / "in.pt")
    data = bytearray((tmp_path / "in.pt").read_bytes())
    data[int(len(data) * position)] ^= 1
    (tmp_path / "in.pt").write_bytes(data)
    with pytest.raises(CheckpointError, match="do not have their checksum"):
        checkpoint.bake(tmp_path / "in.pt", tmp_path / "out.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["in.pt"]


def rezipped(path: Path, change: Callable[[zipfile.ZipInfo], None]) -> None:
    with zipfile.ZipFile(path) as archive:
        records = [(info, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(path, "w") as archive:
        for info, data in records:
            change(info)
            archive.writestr(info, data, compress_type=info.compress_type)


def test_a_compressed_archive_could_be_a_bomb(tmp_path: Path) -> None:
    torch.save({**STATE, "large": torch.zeros(2_000_000)}, tmp_path / "in.pt")
    rezipped(tmp_path / "in.pt", lambda info: setattr(info, "compress_type", zipfile.ZIP_DEFLATED))
    assert (tmp_path / "in.pt").stat().st_size < 50_000
    with pytest.raises(CheckpointError, match=r"is compressed, which torch\.save never does"):
        checkpoint.inspect(tmp_path / "in.pt")


def test_records_that_share_bytes_could_be_a_bomb(tmp_path: Path) -> None:
    torch.save({f"w{i}": torch.zeros(100) + i for i in range(3)}, tmp_path / "in.pt")
    data = (tmp_path / "in.pt").read_bytes()
    with zipfile.ZipFile(tmp_path / "in.pt") as archive:
        offsets = {info.filename: info.header_offset for info in archive.infolist()}
    first, second = (offsets[f"in/data/{i}"].to_bytes(4, "little") for i in (0, 1))
    directory = data.index(b"PK\x01\x02")
    (tmp_path / "in.pt").write_bytes(data[:directory] + data[directory:].replace(second, first))
    with pytest.raises(CheckpointError, match="overlaps another record"):
        checkpoint.inspect(tmp_path / "in.pt")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_strides_of_zero_could_be_a_bomb(suffix: str, tmp_path: Path) -> None:
    torch.save({**STATE, "huge": torch.zeros(1).expand(1 << 40)}, tmp_path / "in.pt")
    options = {"dtype": torch.float16} if suffix == ".pt" else {}
    with pytest.raises(
        CheckpointError, match=r"4 bytes are said to be a tensor of shape \(1099511627776,\)|needs"
    ):
        checkpoint.bake(tmp_path / "in.pt", tmp_path / f"out{suffix}", **options)


def test_expanded_tensors_are_no_bombs(tmp_path: Path) -> None:
    torch.save({**STATE, "wide": torch.arange(3.0)[:, None].expand(3, 50)}, tmp_path / "in.pt")
    checkpoint.bake(tmp_path / "in.pt", tmp_path / "out.safetensors")
    read = safetensors.torch.load_file(tmp_path / "out.safetensors")
    assert same_bits(read["wide"], torch.arange(3.0)[:, None].expand(3, 50))


# --- indices ------------------------------------------------------------------------------------------------------

INDICES = {
    "up": ("../one.safetensors", "which is not a file beside it"),
    "absolute": ("/etc/passwd", "which is not a file beside it"),
    "drive": ("c:one.safetensors", "which is not a file beside it"),
    "backslash": ("..\\one.safetensors", "which is not a file beside it"),
    "itself": (".", "which is not a file beside it"),
    "nul": ("one\0.safetensors", "which is not a file beside it"),
    "missing": ("two.safetensors", "names the shard two.safetensors, which is not there"),
    "number": (7, "no weight_map from tensors to files"),
}


@pytest.mark.parametrize(("name", "text"), INDICES.values(), ids=INDICES)
def test_an_index_leads_nowhere_else(name: object, text: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for place in (tmp_path, folder):
        safetensors.torch.save_file(STATE, place / "one.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(STATE, name)}))
    with pytest.raises(CheckpointError, match=text):
        checkpoint.inspect(index)


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        (["weight_g", "weight_v"], "does not say that bias is in one"),
        ([*STATE, "more"], "says that more is in one"),
    ],
)
def test_an_index_and_its_shards_agree(keys: list[str], text: str, tmp_path: Path) -> None:
    safetensors.torch.save_file(STATE, tmp_path / "one.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(keys, "one.safetensors")}))
    with pytest.raises(CheckpointError, match=text):
        checkpoint.inspect(index)


@pytest.mark.parametrize("name", [".storage_alignment", ".Storage_Alignment"])
def test_an_alignment_of_0_does_not_end_the_process(name: str, tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "in.pt")
    with zipfile.ZipFile(tmp_path / "in.pt") as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(tmp_path / "in.pt", "w") as archive:
        for record, data in records.items():
            there = record == "in/.storage_alignment"
            archive.writestr(f"in/{name}" if there else record, b"0" if there else data)
    with pytest.raises(CheckpointError, match=r"in\.pt: truncated or corrupt zip file \(an alignment of 0\)"):
        checkpoint.inspect(tmp_path / "in.pt")
