"""What was copied is looked for in the new file: bytes of another tensor are found out, and nothing is left."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from torchkiln import checkpoint
from torchkiln._core.errors import CheckpointError
from torchkiln.checkpoint import _read_back, _write
from torchkiln.checkpoint._bytes import Extent
from torchkiln.checkpoint._io import Change, CheckpointFile
from torchkiln.checkpoint._open import open_checkpoint

LONG = 5 * _read_back._SAMPLE // 4  # numbers of four bytes, more than there are samples of

OUTPUTS = pytest.mark.parametrize("target", ["out.safetensors", "out.pt", "out-dcp"])


def source(path: Path, *, length: int) -> Path:
    state = {"weight_g": torch.ones(3, 1), "weight_v": torch.randn(3, 4)}
    torch.save({**state, "first": torch.randn(length), "second": torch.randn(length)}, path)
    return path


def bake(path: Path, target: Path) -> None:
    checkpoint.bake(path, target, container="dcp" if target.suffix == "" else None)


@OUTPUTS
def test_bytes_of_another_tensor_are_found_out(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exchanged(file: CheckpointFile, changes: Sequence[Change]) -> dict[str, Extent]:
        found = _read_back.copies(file, changes)
        return {**found, "first": found["second"], "second": found["first"]}

    path = source(tmp_path / "in.pt", length=8)
    monkeypatch.setattr(_write, "copies", exchanged)
    with pytest.raises(CheckpointError, match="first: what was written is not what was read"):
        bake(path, tmp_path / target)
    assert [one.name for one in tmp_path.iterdir()] == ["in.pt"]


@OUTPUTS
@pytest.mark.parametrize("at", [0, LONG // 2, LONG - 1])
def test_the_beginning_the_middle_and_the_end_are_compared(
    at: int, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = source(tmp_path / "in.pt", length=LONG)
    other = torch.load(path)
    other["second"][at] += 1
    torch.save(other, tmp_path / "other.pt")

    with open_checkpoint(tmp_path / "other.pt") as opened:
        monkeypatch.setattr(
            _write, "copies", lambda *_: {"second": opened.extent(opened.groups[0], "second")}
        )
        with pytest.raises(CheckpointError, match="second: what was written"):
            bake(path, tmp_path / target)
    assert not (tmp_path / target).exists()


@OUTPUTS
def test_a_tensor_that_is_missing_is_found_out(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = source(tmp_path / "in.pt", length=8)
    monkeypatch.setattr(
        _write, "copies", lambda *given: {"third": next(iter(_read_back.copies(*given).values()))}
    )
    with pytest.raises(CheckpointError, match="third: what was written"):
        bake(path, tmp_path / target)
