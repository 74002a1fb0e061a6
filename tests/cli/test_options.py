"""The options of the commands that write files, and what inspect shows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tests.cli.conftest import Run
from torchkiln import checkpoint


def test_bake_takes_every_option_of_the_copy(run: Run, blocks: Path, tmp_path: Path) -> None:
    words = [
        "--include",
        "blocks.*",
        "--exclude",
        "blocks.3.*",
        "--rename",
        "blocks.=layers.",
        "--dtype",
        "bfloat16",
    ]
    assert run("bake", blocks, "-o", "out.safetensors", *words, "--no-verify").status == 0
    report = checkpoint.inspect(tmp_path / "out.safetensors")
    assert {row.name for row in report.rows} == {"layers.3.weight", "last.weight"}
    assert report.dtypes == {"bfloat16": 30}


def test_shards_and_distributed_checkpoints_are_written(run: Run, blocks: Path, tmp_path: Path) -> None:
    assert run("bake", blocks, "-o", "shards", "--max-shard-size", "0.1kB").status == 0
    assert run("convert", "shards", "-o", "dcp", "--format", "dcp").status == 0
    assert run("convert", "dcp", "-o", "again.pt").status == 0
    assert run("verify", blocks, "again.pt").status == 0
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3


def test_a_dry_run_says_what_it_would_do(run: Run, blocks: Path, tmp_path: Path) -> None:
    result = run("bake", blocks, "-o", "out.pt", "--dry-run")
    assert (result.status, result.err) == (0, "")
    assert "13 tensors would be rewritten" in result.out
    assert re.search(
        r"dry run: nothing was written\. It would be [\d,]+ bytes of torch, of which .* in about \d+ MB of memory",
        result.out,
    )
    assert not (tmp_path / "out.pt").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["convert", "blocks.pt", "-o", "o.pt", "--to", "torch"],
            "need --weight-norm or --spectral-norm patterns",
        ),
        (["bake", "blocks.pt", "-o", "o.pt", "--rename", "nothing"], "expected OLD=NEW, got 'nothing'"),
        (
            ["bake", "blocks.pt", "-o", "o", "--max-shard-size", "huge"],
            "expected a size such as 5GB, got 'huge'",
        ),
        (["bake", "blocks.pt", "-o", "o.pt", "--dtype", "int8"], "for '--dtype': 'int8' is not one of"),
        (
            ["bake", "blocks.pt", "-o", "o.pt", "--include", "c.*"],
            '--include: "c.*" matches no',
        ),
        (["bake", "blocks.pt", "-o", "o.pt", "--rename", "x=y"], "--rename: no tensor of"),
        (
            ["convert", "blocks.pt", "-o", "o.pt", "--weight-norm", "*"],
            "--weight-norm: needs --to torch or --to",
        ),
    ],
)
def test_options_that_make_no_sense_are_named_as_they_are_typed(
    run: Run, blocks: Path, words: list[str], said: str
) -> None:
    result = run(*words)
    assert (result.status in (1, 2), result.out) == (True, "")
    assert said in result.err


def test_inspect_shows_modules_and_ties(run: Run, tmp_path: Path) -> None:
    shared = torch.ones(4)
    layers = {f"layers.{i}.{name}": torch.ones(i + 1, 4) for i in range(3) for name in ("weight", "scale")}
    torch.save({**layers, "head.a": shared, "head.b": shared}, tmp_path / "net.pt")
    out = run("inspect", "net.pt").out
    assert re.search(r"^layers\.\* +x 3 +weight 1-3 x 4, scale 1-3 x 4 +192 bytes", out, flags=re.MULTILINE)
    assert "tied: head.a = head.b" in out
