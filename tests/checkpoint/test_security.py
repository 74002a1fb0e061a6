"""No code in a file is run, no file outside of the given paths is touched; docs/security.md lists what holds."""

from __future__ import annotations

import ast
import io
import os
import pickle
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from torchkiln import checkpoint
from torchkiln._core.errors import CheckpointError

ROOT = Path(__file__).resolve().parents[2]
STATE = {"weight_g": torch.ones(3, 1), "weight_v": torch.ones(3, 4), "bias": torch.arange(3.0)}


class Payload:
    """A pickle that makes a file when it is loaded by whatever runs what pickles say."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.marker}",)


def _zip(payload: object, path: Path) -> Path:
    torch.save({"model": {**STATE, "code": payload}}, path)
    return path


def _legacy(payload: object, path: Path) -> Path:
    torch.save({"model": {**STATE, "code": payload}}, path, _use_new_zipfile_serialization=False)
    return path


def _dcp_metadata(payload: object, path: Path) -> Path:
    safetensors.torch.save_file(STATE, path.with_name("plain.safetensors"))
    checkpoint.convert(path.with_name("plain.safetensors"), path, container="dcp")
    (path / ".metadata").write_bytes(pickle.dumps(payload))
    return path


def _dcp_data(payload: object, path: Path) -> Path:
    buffer = io.BytesIO()
    torch.save(payload, buffer)
    return _with_part(buffer.getvalue(), path)


def _with_part(part: bytes, path: Path) -> Path:
    """Write a distributed checkpoint, one value of which is in a part of any bytes."""
    torch.save({**STATE, "value": 1}, path.with_name("plain.pt"))
    checkpoint.convert(path.with_name("plain.pt"), path, container="dcp")
    metadata = pickle.loads((path / ".metadata").read_bytes())
    place = next(one for index, one in metadata.storage_data.items() if index.fqn == "value")
    data = path / "__0_0.distcp"
    place.offset, place.length = data.stat().st_size, len(part)
    with data.open("ab") as file:
        file.write(part)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    return path


@pytest.mark.parametrize("plant", [_zip, _legacy, _dcp_metadata, _dcp_data], ids=lambda plant: plant.__name__)
def test_no_pickled_code_is_run(plant: Callable[[object, Path], Path], tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    path = plant(Payload(marker), tmp_path / "in")
    with pytest.raises(CheckpointError, match=r"run code|needs code"):
        checkpoint.convert(path, tmp_path / "out.pt")
    assert not marker.exists()
    assert not (tmp_path / "out.pt").exists()


def test_the_payload_can_run(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Payload(tmp_path / "marker")))
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "a/b", "..", ""])
def test_a_distributed_checkpoint_leads_nowhere_else(name: str, tmp_path: Path) -> None:
    path = _dcp_metadata(None, tmp_path / "in")
    checkpoint.convert(tmp_path / "plain.safetensors", tmp_path / "again", container="dcp")
    metadata = pickle.loads((tmp_path / "again" / ".metadata").read_bytes())
    for place in metadata.storage_data.values():
        place.relative_path = name
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="which is not one in it"):
        checkpoint.inspect(path)


def test_a_compressed_part_of_a_distributed_checkpoint_could_be_a_bomb(tmp_path: Path) -> None:
    torch.save(torch.zeros(2_000_000), tmp_path / "large.pt")
    buffer = io.BytesIO()
    with zipfile.ZipFile(tmp_path / "large.pt") as archive, zipfile.ZipFile(buffer, "w") as small:
        for info in archive.infolist():
            small.writestr(info.filename, archive.read(info), compress_type=zipfile.ZIP_DEFLATED)
    path = _with_part(buffer.getvalue(), tmp_path / "in")
    with pytest.raises(CheckpointError, match=r"is compressed, which torch\.save never does"):
        checkpoint.convert(path, tmp_path / "out.pt")


_SPY = """
import os, sys
from pathlib import Path
import torch, torch.distributed.checkpoint.filesystem
from torchkiln import checkpoint
from torchkiln.checkpoint import _dcp_file, _dcp_sink
inside, seen = Path(sys.argv[1]).resolve(), []
# Modules that are loaded late are no part of a checkpoint.
CODE = tuple({str(Path(p).resolve()) for p in sys.path if p} | {sys.prefix, sys.base_prefix})
def spy(event, args):
    if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.listdir",
                 "shutil.rmtree", "socket.connect", "subprocess.Popen", "os.system", "os.exec", "ctypes.dlopen"):
        first = args[0]
        if isinstance(first, (str, bytes, os.PathLike)):
            name = os.path.realpath(os.fsdecode(first))
            if name.startswith(CODE) and str(inside) not in name:
                return
            seen.append((event, name))
sys.addaudithook(spy)
for source in ("in.pt", "in.safetensors", "shards", "dcp"):
    checkpoint.inspect(inside / source, deep=True)
    checkpoint.bake(inside / source, inside / f"{source}.out.pt")
    checkpoint.bake(inside / source, inside / f"{source}.out.safetensors")
    checkpoint.bake(inside / source, inside / f"{source}.dcp", container="dcp")
    checkpoint.verify(inside / source, inside / f"{source}.out.pt")
print(len(seen))
print([one for one in seen if not one[1].startswith(str(inside))])
"""


def test_nothing_outside_of_the_given_paths_is_opened(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "in.pt")
    safetensors.torch.save_file(STATE, tmp_path / "in.safetensors")
    checkpoint.convert(tmp_path / "in.pt", tmp_path / "shards", max_shard_size=20)
    checkpoint.convert(tmp_path / "in.pt", tmp_path / "dcp", container="dcp")
    done = subprocess.run(
        [sys.executable, "-c", _SPY, str(tmp_path)], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    count, outside = done.stdout.splitlines()
    assert int(count) > 40
    assert outside == "[]"


def test_every_promise_names_a_test_that_is_there() -> None:
    page = (ROOT / "docs" / "security.md").read_text()
    named = set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page))
    assert len(named) > 10
    for file in {file for file, _ in named}:
        tree = ast.parse((ROOT / file).read_text())
        there = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert {test for one, test in named if one == file} <= there
