"""What torchrun starts prints what the documentation shows: the example, and the bytes that are sent."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
SHOWN = [
    block.strip()
    for block in re.findall(r"^```text\n(.*?)^```$", (ROOT / "docs/distributed.md").read_text(), re.M | re.S)
]


def torchrun(*arguments: str, processes: int, folder: Path) -> str:
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={processes}",
    ]
    done = subprocess.run(
        [*launcher, *arguments], capture_output=True, text=True, timeout=200, check=False, cwd=folder
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def shown(beginning: str) -> str:
    (found,) = [block for block in SHOWN if block.startswith(beginning)]
    return found


def test_the_example_prints_what_is_shown(tmp_path: Path) -> None:
    printed = torchrun(str(ROOT / "examples" / "fsdp2_train.py"), processes=2, folder=tmp_path)
    command, expected = shown("$ torchrun").split("\n", 1)
    assert command == "$ torchrun --nproc-per-node 2 examples/fsdp2_train.py"
    assert rounded(printed) == rounded(expected)
    assert {path.name for path in tmp_path.iterdir()} == {"trained", "plain"}


def rounded(text: str) -> str:
    """Leave out the digits in which machines differ."""
    return re.sub(r"(\d\.\d)\d+|\de-\d+|0e\+00", r"\1", text)


def test_the_bytes_that_are_sent_are_those_that_are_shown() -> None:
    assert torchrun("-m", "benchmarks.communication", processes=4, folder=ROOT) == shown(
        "4 processes, a 256 x 256"
    )
