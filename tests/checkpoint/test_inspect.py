"""Inspection and the reports: what they say, as text and as JSON."""

from __future__ import annotations

import dataclasses
import inspect as python_inspect
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from tests.checkpoint.cases import CASES, CONTAINERS, Case, ids, save
from torchkiln import checkpoint
from torchkiln._core.errors import CheckpointError


@pytest.mark.parametrize("suffix", CONTAINERS)
@pytest.mark.parametrize("case", CASES, ids=ids)
def test_every_spelling_is_named(case: Case, suffix: str, tmp_path: Path) -> None:
    state = case.build().state_dict()
    inspection = checkpoint.inspect(save(state, tmp_path / f"in{suffix}"), deep=True)
    (row,) = inspection.rows
    assert (row.name, row.spelling, row.dim) == (case.tensor, case.spelling, case.dim)
    assert set(row.keys) <= set(state)
    assert inspection.tensors == len(state)
    assert inspection.size_bytes == (tmp_path / f"in{suffix}").stat().st_size


@pytest.mark.parametrize("deep", [False, True])
def test_square_spectral_norm_is_settled_by_values_alone(deep: bool, tmp_path: Path) -> None:
    module = parametrizations.spectral_norm(nn.Linear(8, 8), dim=1)
    (row,) = checkpoint.inspect(save(module.state_dict(), tmp_path / "in.pt"), deep=deep).rows
    assert row.dim == (1 if deep else None)
    expected = "u and v fit dim 1" if deep else "the values may tell (deep=True)"
    assert row.assumptions == (f"dims 0 and 1 fit the shapes; {expected}",)


@pytest.mark.parametrize("deep", [False, True])
def test_gain_of_one_number_is_said(deep: bool, tmp_path: Path) -> None:
    state = {"weight_g": torch.ones(1, 1), "weight_v": torch.ones(1, 4)}
    (row,) = checkpoint.inspect(save(state, tmp_path / "in.pt"), deep=deep).rows
    assert (row.dim, row.assumptions) == (0, ("the gain is one number: one norm over the whole tensor",))


def test_torch_weight_norm_says_what_its_keys_do_not(tmp_path: Path) -> None:
    module = parametrizations.weight_norm(nn.Linear(3, 4))
    (row,) = checkpoint.inspect(save(module.state_dict(), tmp_path / "in.pt")).rows
    assert row.assumptions == (
        "original0 and original1 are gain and direction of weight norm: the shapes fit",
    )


def test_plain_file_has_nothing_to_fold(tmp_path: Path) -> None:
    inspection = checkpoint.inspect(save(nn.Linear(3, 4).state_dict(), tmp_path / "in.safetensors"))
    assert inspection.rows == ()
    assert [note.text for note in inspection.notes] == ["every tensor is plain: there is nothing to fold"]
    assert inspection.dtypes == {"float32": 2}
    assert inspection.metadata == {"made by": "a test"}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    layers = nn.Sequential(*(parametrizations.weight_norm(nn.Linear(3, 3)) for _ in range(2)))
    return save({"model": layers.bfloat16().state_dict(), "epoch": 1}, tmp_path / "in.pt")


def test_inspection_reads_as_a_table(model: Path) -> None:
    first, header, row, *_, note = str(checkpoint.inspect(model)).splitlines()
    assert first == f"{model}: torch zip, {model.stat().st_size:,} bytes, 6 tensors (6 bfloat16)"
    assert header.split() == ["tensor", "spelling", "shape", "dtype", "dim", "keys"]
    assert row.split()[:6] == ["model.0.weight", "torch", "weight_norm", "3x3", "bfloat16", "0"]
    assert note.startswith("note: 2 tensors: original0 and original1 are gain and direction")


def test_file_report_reads_as_a_table(model: Path, tmp_path: Path) -> None:
    report = checkpoint.bake(model, tmp_path / "out.pt")
    first, header, row, *notes = str(report).splitlines()
    assert first == (
        f"{model} -> {tmp_path / 'out.pt'}: 2 tensors rewritten, 2 kept as they were, "
        f"{report.bytes_written:,} bytes"
    )
    assert header.split() == ["tensor", "was", "shape", "dtype", "dim", "written"]
    assert row.split()[-1] == "0.weight"
    assert "note: 2 tensors: computed in float32, rounded once" in notes


def test_verification_reads_as_a_table(model: Path) -> None:
    verification = checkpoint.verify(model)
    first, header, row, _ = str(verification).splitlines()
    assert first.startswith("2 tensors checked, 0 wrong; largest relative error 0.00")
    assert header.split() == ["tensor", "spelling", "abs", "rel", "verdict"]
    assert row.split()[-1] == "ok"


Make = Callable[[Path, Path], checkpoint.Inspection | checkpoint.FileReport | checkpoint.Verification]

VERBS: dict[str, Make] = {
    "inspect": lambda source, _: checkpoint.inspect(source),
    "bake": checkpoint.bake,
    "convert": lambda source, target: checkpoint.convert(source, target, to="legacy"),
    "verify": lambda source, _: checkpoint.verify(source),
}


@pytest.mark.parametrize("make", VERBS.values(), ids=VERBS)
def test_reports_are_frozen_and_go_through_json(make: Make, model: Path, tmp_path: Path) -> None:
    report = make(model, tmp_path / "out.pt")
    again = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert again == report.to_dict()
    assert again["rows"][0]["name"] == "model.0.weight"
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.rows = ()  # type: ignore[misc]


def test_public_names() -> None:
    assert checkpoint.__all__ == sorted(checkpoint.__all__)
    assert all(python_inspect.getdoc(getattr(checkpoint, name)) for name in checkpoint.__all__)


def test_modules_say_what_each_tensor_is_made_of(tmp_path: Path) -> None:
    module = nn.ModuleDict({"a": parametrizations.weight_norm(nn.Linear(3, 4)), "b": nn.LayerNorm(2)})
    inspection = checkpoint.inspect(save(module.state_dict(), tmp_path / "in.safetensors"))
    found = {one.name: one for one in inspection.modules}
    parts = {
        name: [(part.name, part.made_by, part.shape) for part in one.parts] for name, one in found.items()
    }
    assert parts["b"] == [("bias", "plain", (2,)), ("weight", "plain", (2,))]
    assert parts["a"] == [("bias", "plain", (4,)), ("weight", "torch weight_norm", (4, 3))]
    assert found["a"].size_bytes == 4 * (4 + 4 + 12)
    assert sum(one.size_bytes for one in inspection.modules) == sum(
        tensor.numel() * 4 for tensor in module.state_dict().values()
    )


def test_tied_tensors_are_named(tmp_path: Path) -> None:
    tied = torch.ones(3)
    torch.save(
        {"m": {"a": tied, "b": tied, "c": tied[:2], "d": torch.ones(3), "e": torch.ones(0)}},
        tmp_path / "in.pt",
    )
    assert checkpoint.inspect(tmp_path / "in.pt").tied == (("m.a", "m.b"),)


@pytest.mark.parametrize("suffix", CONTAINERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2], ids=str)
def test_values_that_are_not_finite_are_counted(dtype: torch.dtype, suffix: str, tmp_path: Path) -> None:
    bad = torch.tensor([[1.0, torch.nan], [torch.inf, -torch.inf], [2.0, 3.0]]).to(dtype)
    state = {"bad": bad, "good": torch.ones(3), "count": torch.ones(3, dtype=torch.int64)}
    path = save(state, tmp_path / f"in{suffix}")
    assert not [note for note in checkpoint.inspect(path).notes if note.level == "warning"]
    (warning,) = (note for note in checkpoint.inspect(path, deep=True).notes if note.level == "warning")
    assert (warning.name, warning.text) == ("bad", "bad: 1 NaN and 2 infinite of its 6 values")


def test_a_directory_is_opened_by_what_is_in_it(tmp_path: Path) -> None:
    save({"a": torch.ones(3)}, tmp_path / "model.safetensors")
    assert checkpoint.inspect(tmp_path).tensors == 1
    save({"a": torch.ones(3)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"or one \*\.safetensors, found 2 of them"):
        checkpoint.inspect(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="holds an adapter, which is nothing without its base"):
        checkpoint.inspect(tmp_path)
