"""The demo: what it claims is what it measured, it leaves nothing behind, and it says no when predictions change."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

pytest.importorskip("sklearn")

from torchkiln import checkpoint
from torchkiln._cli import main
from torchkiln._core.errors import OutputExistsError
from torchkiln.demo import DemoReport, run_demo


@pytest.fixture(scope="module")
def told() -> tuple[DemoReport, str]:
    """One short run and what it printed on an 80-column screen."""
    screen = Console(file=io.StringIO(), width=80)
    report = run_demo(epochs=4, console=screen)
    return report, screen.file.getvalue()  # type: ignore[attr-defined]


def test_the_plain_networks_predict_what_the_trained_one_predicts(told: tuple[DemoReport, str]) -> None:
    report, _ = told
    assert report.identical
    assert report.from_file.differing_predictions == report.from_model.differing_predictions == 0
    assert report.from_file.max_abs_logit_difference < 1e-4
    assert report.from_model.max_abs_logit_difference < 1e-4
    assert report.from_file.accuracy == report.from_model.accuracy == report.accuracy


def test_the_network_learns(told: tuple[DemoReport, str]) -> None:
    assert told[0].accuracy > 0.85


def test_the_control_shows_that_the_comparison_can_fail(told: tuple[DemoReport, str]) -> None:
    report, _ = told
    assert report.renamed.differing_predictions > report.test_images // 10
    assert report.renamed.accuracy < report.accuracy


def test_every_parametrized_tensor_was_folded(told: tuple[DemoReport, str]) -> None:
    report, _ = told
    assert report.folded == ("conv1.weight", "conv2.weight", "hidden.weight", "head.weight")
    assert (report.missing_keys, report.unexpected_keys) == (4, 9)
    assert report.train_images + report.test_images == 1797


def test_the_story_fits_a_screen_and_ends_with_the_verdict(told: tuple[DemoReport, str]) -> None:
    report, text = told
    lines = text.splitlines()
    assert lines[-1] == f"PASS: baking changed none of the {report.test_images} predictions."
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 80
    assert f"{report.accuracy:.2%}" in text


def test_the_same_seed_gives_the_same_numbers_and_the_global_state_stays(tmp_path: Path) -> None:
    torch.manual_seed(7)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    first, second = run_demo(epochs=1, seed=3), run_demo(epochs=1, seed=3)
    assert (first.accuracy, first.renamed) == (second.accuracy, second.renamed)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads


def test_nothing_is_left_behind_unless_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    run_demo(epochs=1)
    assert os.listdir(tmp_path) == []


def test_kept_files_are_the_ones_compared_and_are_not_overwritten(tmp_path: Path) -> None:
    report = run_demo(epochs=1, keep=tmp_path / "kept")
    assert [row.name for row in checkpoint.inspect(tmp_path / "kept" / "digits.pt").rows] == list(
        report.folded
    )
    assert checkpoint.inspect(tmp_path / "kept" / "digits.plain.pt").rows == ()
    with pytest.raises(OutputExistsError, match=r"digits\.pt: the demo writes this file"):
        run_demo(epochs=1, keep=tmp_path / "kept")


def test_the_command_prints_the_report_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--epochs", "1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["identical"] is True
    assert report["epochs"] == 1


def test_a_changed_prediction_is_status_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = checkpoint.bake

    def bake_wrongly(source: Path, target: Path, **options: Any) -> checkpoint.FileReport:
        report = real(source, target, **options)
        state = torch.load(target)
        state["hidden.weight"] = state["hidden.weight"].flip(0)
        torch.save(state, target)
        return report

    monkeypatch.setattr(checkpoint, "bake", bake_wrongly)
    assert main(["demo", "--epochs", "1"]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "FAIL: baking changed predictions."


def test_without_scikit_learn_the_demo_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert main(["demo"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "error: the demo needs scikit-learn: pip install 'torchkiln[demo]'\n"


@pytest.mark.slow
def test_the_full_demo_reaches_its_accuracy() -> None:
    report = run_demo()
    assert report.identical
    assert report.accuracy >= 0.97
