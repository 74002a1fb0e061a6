"""How the tests of the command line run it, and the files that they run it on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nn

from torchkiln import parametrizations
from torchkiln._cli import main


class Result(NamedTuple):
    status: int
    out: str
    err: str


Run = Callable[..., Result]
Terminal = Callable[[str], Callable[[], str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command line in the temporary folder, where every file of these tests lies."""
    monkeypatch.chdir(tmp_path)
    for variable in ("FORCE_COLOR", "NO_COLOR", "COLUMNS", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(variable, raising=False)

    def run_here(*words: object) -> Result:
        capsys.readouterr()
        status = main([str(word) for word in words])
        return Result(status, *capsys.readouterr())

    return run_here


@pytest.fixture
def blocks(tmp_path: Path) -> Path:
    """A file of twelve equal weight-normed blocks, a wider one, and one plain layer."""
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {
            "blocks": nn.ModuleList(parametrizations.weight_norm(nn.Linear(4, 3)) for _ in range(12)),
            "last": parametrizations.weight_norm(nn.Conv1d(3, 5, 2)),
            "plain": nn.Linear(2, 2),
        }
    )
    path = tmp_path / "blocks.pt"
    torch.save(model.state_dict(), path)
    return path


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    path = tmp_path / "plain.pt"
    torch.save(nn.Linear(4, 3).state_dict(), path)
    return path
