"""Several processes bake one checkpoint: the result is that of one process, and one that fails stops all of them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from distributed.ranks import Ranks
from torchkiln import CheckpointError, checkpoint
from torchkiln.checkpoint._bytes import InputFile
from torchkiln.parametrizations import spectral_norm, weight_norm

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning"),  # by dcp, without a group
]


def model() -> nn.Module:
    """Return a model with norms, of about 4 MB."""
    return nn.Sequential(
        *(weight_norm(nn.Linear(400, 400)) for _ in range(6)), spectral_norm(nn.Linear(400, 400))
    )


@pytest.fixture
def source(tmp_path: Path) -> Path:
    dcp.save({"model": model().state_dict(), "step": 7}, checkpoint_id=tmp_path / "source")
    return tmp_path / "source"


def loaded(folder: Path) -> dict[str, Any]:
    file = folder.with_suffix(".pt")
    dcp_to_torch_save(folder, file)
    result: dict[str, Any] = torch.load(file)
    return result


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    tensors: list[dict[str, Tensor]] = [one["model"], other["model"]]
    return (
        one["step"] == other["step"]
        and tensors[0].keys() == tensors[1].keys()
        and all(torch.equal(value, tensors[1][key]) for key, value in tensors[0].items())
    )


def bake(source: Path, target: Path, **options: Any) -> checkpoint.FileReport:
    return checkpoint.bake(source, target, group=dist.group.WORLD, **options)


def bytes_read(source: Path, target: Path) -> tuple[int, checkpoint.FileReport]:
    total = 0
    fill, send = InputFile.fill, InputFile.send

    def counted_fill(self: InputFile, view: memoryview, offset: int) -> None:
        nonlocal total
        total += len(view)
        fill(self, view, offset)

    def counted_send(self: InputFile, *arguments: int) -> int:
        nonlocal total
        count = send(self, *arguments)
        total += count
        return count

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InputFile, "fill", counted_fill)
        patch.setattr(InputFile, "send", counted_send)
        report = bake(source, target)
    return total, report


@pytest.mark.parametrize("world", [2, 4])
def test_each_does_its_part_and_the_result_is_that_of_one(
    ranks: Ranks, source: Path, tmp_path: Path, world: int
) -> None:
    alone = checkpoint.bake(source, tmp_path / "alone")
    results = ranks.run(bytes_read, world=world, source=source, target=tmp_path / "together")
    assert same(loaded(tmp_path / "together"), loaded(tmp_path / "alone"))
    files = [file.stat().st_size for file in (tmp_path / "together").glob("*.distcp")]
    size = sum(file.stat().st_size for file in source.iterdir())
    assert len(files) == world
    assert max(files) < 1.5 * sum(files) / world
    assert (
        max(read for read, _ in results) < 1.5 * size / world + 1_000_000
    )  # where each tensor lies, which each reads
    for _, report in results:
        assert report.rows == alone.rows
        assert report.notes == alone.notes


def test_shards_of_safetensors_are_shared_out(ranks: Ranks, tmp_path: Path) -> None:
    source = tmp_path / "source"
    dcp.save(model().state_dict(), checkpoint_id=source)
    checkpoint.bake(source, tmp_path / "alone", max_shard_size=1_000_000)
    ranks.run(bake, source=source, target=tmp_path / "together", max_shard_size=1_000_000)
    names = sorted(file.name for file in (tmp_path / "alone").iterdir())
    assert len(names) > 3
    assert sorted(file.name for file in (tmp_path / "together").iterdir()) == names
    for name in names:
        assert (tmp_path / "together" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


def test_a_single_file_is_written_by_the_first(ranks: Ranks, source: Path, tmp_path: Path) -> None:
    checkpoint.bake(source, tmp_path / "alone.pt")
    ranks.run(bake, source=source, target=tmp_path / "together.pt")
    assert (tmp_path / "together.pt").read_bytes() == (tmp_path / "alone.pt").read_bytes()


def dies(source: Path, target: Path, rank: int) -> None:
    def progress(done: int, total: int, name: str) -> None:
        if dist.get_rank() == rank:
            os._exit(9)

    bake(source, target, progress=progress)


@pytest.mark.parametrize("rank", [0, 1])
def test_the_death_of_one_ends_the_others_and_leaves_nothing(
    ranks: Ranks, source: Path, tmp_path: Path, rank: int
) -> None:
    outcomes = ranks.outcomes(dies, source=source, target=tmp_path / "together", rank=rank)
    assert outcomes[rank].failure == "died with exit status 9"
    assert "CheckpointError: process" in str(outcomes[1 - rank].failure)
    assert "another process has ended. Nothing was written." in str(outcomes[1 - rank].failure)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def fails(source: Path, target: Path, rank: int) -> str:
    def progress(done: int, total: int, name: str) -> None:
        if dist.get_rank() == rank:
            raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError) as caught:
        bake(source, target, progress=progress)
    return str(caught.value)


@pytest.mark.parametrize("rank", [0, 1])
def test_the_failure_of_one_is_known_to_all_and_leaves_nothing(
    ranks: Ranks, source: Path, tmp_path: Path, rank: int
) -> None:
    messages = ranks.run(fails, source=source, target=tmp_path / "together", rank=rank)
    assert "No space left on device" in messages[rank]
    assert messages[1 - rank].startswith(f"process {rank} of 2 failed: ")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_target_that_exists_is_refused_by_all(ranks: Ranks, source: Path, tmp_path: Path) -> None:
    (tmp_path / "together").mkdir()
    (tmp_path / "together" / "mine").write_text("keep")
    outcomes = ranks.outcomes(bake, source=source, target=tmp_path / "together")
    assert all("OutputExistsError" in str(outcome.failure) for outcome in outcomes)
    assert (tmp_path / "together" / "mine").read_text() == "keep"


def torchrun(*arguments: object, processes: int = 2) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
    return subprocess.run(
        [*command, "--standalone", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_command_under_torchrun(source: Path, tmp_path: Path) -> None:
    checkpoint.bake(source, tmp_path / "alone")
    done = torchrun("-m", "torchkiln", "bake", source, "-o", tmp_path / "together")
    assert done.returncode == 0, done.stderr
    assert len(re.findall("7 tensors rewritten", done.stdout)) == 1
    assert len(list((tmp_path / "together").glob("*.distcp"))) == 2
    assert same(loaded(tmp_path / "together"), loaded(tmp_path / "alone"))
