"""The benchmark runner runs, says what it measured in the promised form, and compares like with like."""

from __future__ import annotations

import dataclasses
import importlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.checkpoint.adapters.build import folder as adapter_folder
from tests.checkpoint.adapters.build import lora, write_base

ROOT = Path(__file__).resolve().parent.parent
Load = Callable[[str], ModuleType]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Load:
    """Import from benchmarks/, which is no part of the package; files go to ``tmp_path``."""
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.chdir(tmp_path)
    return lambda name: importlib.import_module(f"benchmarks.{name}")


@pytest.fixture
def settings(load: Load, tmp_path: Path) -> Any:
    return load("_timing").Settings(
        quick=True, scratch=tmp_path, blocks=3, block_seconds=0.0, case_seconds=60.0
    )


# --- a run ------------------------------------------------------------------------------------------------------------


def wrong_case(case: dict[str, Any]) -> list[str]:
    """What is not as ``--json`` promises."""
    complaints = [key for key in ("group", "case", "floor") if not isinstance(case[key], str)]
    contenders, ratios = case["contenders"], case["ratios"]
    # And torch or geotorch, where these can do it.
    if not {"torchkiln", "floor"} <= set(contenders):
        complaints.append("contenders")
    if set(ratios) != set(contenders) - {"torchkiln"}:
        complaints.append("ratios")
    for name, found in contenders.items():
        samples = found["samples"]
        if not (
            len(samples) == found["repeats"] >= 1 and 0 < min(samples) == found["min"] <= found["median"]
        ):
            complaints.append(name)
    return complaints + [f"ratio to {name}" for name, ratio in ratios.items() if not ratio > 0]


def run(load: Load, path: Path, *arguments: str) -> dict[str, Any]:
    load("__main__").main(["--quick", "--blocks", "1", "--json", str(path), *arguments])
    return json.loads(path.read_text())


@pytest.mark.parametrize(
    "group",
    [
        "reads",
        "registration",
        "orthogonal",
        "orthogonal-ways",
        "batched",
        "families",
        "norms",
        "models",
        pytest.param("files", marks=pytest.mark.slow),
    ],
)
def test_a_group_is_measured(
    group: str, load: Load, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = run(load, tmp_path / "report.json", "--only", f"{group}/")
    assert report["schema"] == 1
    assert report["cases"]
    assert {case["group"] for case in report["cases"]} == {group}
    assert [problem for case in report["cases"] for problem in wrong_case(case)] == []
    said = capsys.readouterr().out
    assert f"### {group}" in said
    assert [case["case"] for case in report["cases"] if f"| {case['case']} " not in said] == []
    assert list(tmp_path.iterdir()) == [tmp_path / "report.json"]  # its scratch folder is gone


def test_a_wrong_case_is_found() -> None:
    found = {"median": 1.0, "min": 2.0, "repeats": 1, "samples": [2.0]}
    case = {"group": "g", "case": "c", "floor": None, "contenders": {"torch": found}, "ratios": {"floor": 0}}
    assert wrong_case(case) == ["floor", "contenders", "ratios", "torch", "ratio to floor"]


def test_the_machine_is_described(load: Load, tmp_path: Path) -> None:
    report = run(load, tmp_path / "report.json", "--only", "reads/identity in")
    machine = report["machine"]
    assert set(machine) == {"cpu", "cores", "threads", "load", "system", "versions", "date"}
    assert machine["threads"] == 1
    assert machine["versions"]["torch"].startswith(torch.__version__.partition("+")[0])
    assert [case["case"] for case in report["cases"]] == ["identity in cached()"]


def test_the_documented_command_lists_every_group() -> None:
    command = [sys.executable, "-m", "benchmarks", "--list"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    groups = list(dict.fromkeys(line.partition("/")[0] for line in done.stdout.splitlines()))
    assert groups == [
        "reads",
        "registration",
        "orthogonal",
        "orthogonal-ways",
        "batched",
        "families",
        "norms",
        "models",
        "files",
    ]
    assert "python -m benchmarks\n" in (ROOT / "benchmarks" / "README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--record", "--quick"], "--record takes the whole run"),
        (["--record", "--only", "reads"], "--record takes the whole run"),
        (["--only", "no-such-case"], "no case matches no-such-case; --list shows them all"),
    ],
)
def test_a_run_that_makes_no_sense_is_refused(
    arguments: list[str], complaint: str, load: Load, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        load("__main__").main(arguments)
    assert caught.value.code == 2
    assert complaint in capsys.readouterr().err


# --- how it measures --------------------------------------------------------------------------------------------------


class Scripted:
    """A contender whose times are given; it notes its turns."""

    def __init__(self, name: str, turns: list[str], seconds: Iterator[float], sample: type) -> None:
        self.name, self.turns, self.seconds, self.new = name, turns, seconds, sample

    def sample(self, _settings: object) -> Any:
        self.turns.append(self.name)
        return self.new(next(self.seconds))


@pytest.fixture
def measured(load: Load, settings: Any) -> tuple[Any, list[str]]:
    timing, turns = load("_timing"), []
    times = {
        "torchkiln": [9.0, 1.0, 2.0, 30.0],
        "torch": [9.0, 2.0, 4.0, 40.0],
        "floor": [9.0, 1.0, 1.0, 1.0],
    }
    meters = {name: Scripted(name, turns, iter(each), timing.Sample) for name, each in times.items()}
    return timing.measure(timing.Case("group", "case", "nothing", lambda: meters), settings), turns


def test_contenders_take_turns(measured: tuple[Any, list[str]]) -> None:
    assert measured[1] == ["torchkiln", "torch", "floor"] * 4  # one turn to warm up, three blocks


def test_a_ratio_is_the_median_over_turns(measured: tuple[Any, list[str]]) -> None:
    result = measured[0]
    assert result.median("torchkiln") == 2.0  # the turn to warm up does not count
    assert (result.ratio("torch"), result.ratio("floor")) == (0.5, 2.0)


def test_a_slow_case_stops_early(load: Load, settings: Any) -> None:
    timing = load("_timing")
    turns: list[str] = []
    hurried = timing.Settings(
        quick=True, scratch=settings.scratch, blocks=9, block_seconds=0.0, case_seconds=0.0
    )
    meter = Scripted("torchkiln", turns, iter([1.0] * 20), timing.Sample)
    case = timing.Case("group", "case", "nothing", lambda: {"torchkiln": meter}, least_blocks=4)
    assert len(timing.measure(case, hurried).samples["torchkiln"]) == 4


def test_each_timed_call_gets_a_fresh_object(load: Load, settings: Any) -> None:
    made, used = iter(range(100)), []
    full = load("_timing").Settings(
        quick=False, scratch=settings.scratch, blocks=1, block_seconds=0.0, case_seconds=0.0
    )
    assert load("_timing").Fresh(lambda: next(made), used.append, 4).sample(full).seconds > 0
    assert used == [0, 1, 2, 3]


def test_both_libraries_start_from_the_same_numbers(load: Load) -> None:
    weights = load("_libraries").each(
        lambda library: library.parametrizations.orthogonal(torch.nn.Linear(4, 4)).weight
    )
    torch.testing.assert_close(weights["torchkiln"], weights["torch"])


def test_both_ways_of_baking_a_file_write_the_same_tensors(load: Load, tmp_path: Path) -> None:
    source = tmp_path / "normed.safetensors"
    load("files").write_normed(source, layers=2, rows=1024, columns=3)
    ways = load("_file_job").WAYS
    for name in ("bake", "script"):
        ways[name]()(source, tmp_path / f"{name}.safetensors")
    ours, script = (load_file(tmp_path / f"{name}.safetensors") for name in ("bake", "script"))
    assert sorted(ours) == ["layers.0.bias", "layers.0.weight", "layers.1.bias", "layers.1.weight"]
    torch.testing.assert_close(ours, script, rtol=0, atol=0)


# --- the record -------------------------------------------------------------------------------------------------------


def test_a_run_is_recorded_in_place(load: Load, tmp_path: Path, measured: tuple[Any, list[str]]) -> None:
    readme = tmp_path / "README.md"
    report = load("_report")
    readme.write_text(f"# Title\n\n{report._BEGIN}old table\n{report._END}\nafter\n")
    report.record(readme, [measured[0]], load("_machine").machine())
    text = readme.read_text()
    assert text.startswith("# Title\n\n<!-- recorded")
    assert text.endswith("<!-- end of the record -->\n\nafter\n")
    assert "old table" not in text
    assert "| case | torchkiln | torch | floor | / torch | / floor | the floor |" in text
    assert "| case |       2 s |   4 s |   1 s |    0.50 |    2.00 | nothing   |" in text


def test_a_readme_without_a_place_for_it_is_left_alone(load: Load, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("# Title\n")
    with pytest.raises(SystemExit, match="nothing was recorded"):
        load("_report").record(readme, [], load("_machine").machine())
    assert readme.read_text() == "# Title\n"


@pytest.mark.parametrize(
    ("seconds", "text"), [(2.5, "2.5 s"), (0.0123, "12.3 ms"), (4.567e-6, "4.57 us"), (3e-10, "0.3 ns")]
)
def test_times_are_printed_in_their_unit(seconds: float, text: str, load: Load) -> None:
    assert load("_report")._time(seconds) == text


# --- growth -----------------------------------------------------------------------------------------------------------


def test_growth_has_a_row_for_each_size(
    load: Load, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    growth = load("growth")
    monkeypatch.setattr(growth, "_ROWS", 64)
    monkeypatch.setattr(growth, "_COLUMNS", 64)
    growth.main(["--sizes", "0.00002", "--blocks", "1", "--only", "norms"])
    *_, row, _ = capsys.readouterr().out.splitlines()
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert (len(cells), cells[0]) == (8, "2e-05")
    assert float(cells[5]) > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_growth_leaves_out_what_there_is_no_memory_for(
    load: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def write(folder: Path, gigabytes: float) -> Path:
        base = folder / "base" / "model.safetensors"
        base.parent.mkdir()
        write_base(base)
        adapter_folder(folder / "adapter", lora("layers.0.q"))
        return base

    growth = load("growth")
    monkeypatch.setattr(growth, "_free_memory", lambda: 0.0)
    table = dataclasses.replace(growth.TABLES["adapter"], write=write)
    cells = [cell.strip() for cell in table.row(0.001, tmp_path, blocks=1).strip("|").split("|")]
    assert [cells[at] for at in (0, 2, 4, 7)] == ["0.001", "-", "-", "-"]
    assert all(cells[at] != "-" for at in (1, 3, 5, 6))
    assert [path.name for path in (tmp_path / "base").iterdir()] == ["model.safetensors"]


def test_growth_is_recorded_between_its_marks(load: Load, tmp_path: Path) -> None:
    growth, readme = load("growth"), tmp_path / "README.md"
    readme.write_text(f"before\n{growth._BEGIN}old\n{growth._END}after\n")
    growth._record(readme, ["| new |"])
    assert readme.read_text().startswith(f"before\n{growth._BEGIN}")
    assert readme.read_text().endswith(f"| new |\n\n{growth._END}after\n")
    assert "old" not in readme.read_text()
    readme.write_text("no marks")
    with pytest.raises(SystemExit, match="are missing; nothing was recorded"):
        growth._record(readme, [])
