"""Conversion between spellings: numbers stay, and what is written loads strictly into torch's own modules."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from tests.checkpoint.cases import CASES, CONTAINERS, Case, ids, read_file, same_bits, save
from torchkiln import checkpoint
from torchkiln._core.errors import CheckpointError, NothingToFoldError

RENAMED = [case for case in CASES if case.name.startswith(("wn", "sn", "legacy"))]


def other(spelling: str) -> str:
    return "legacy" if spelling.startswith("torch") else "torch"


@pytest.mark.parametrize("suffix", CONTAINERS)
@pytest.mark.parametrize("case", RENAMED, ids=ids)
def test_there_and_back_is_the_same_file(case: Case, suffix: str, tmp_path: Path) -> None:
    state = case.build().state_dict()
    source = save(state, tmp_path / f"in{suffix}")
    there, back = tmp_path / f"there{suffix}", tmp_path / f"back{suffix}"
    to = other(case.spelling)
    report = checkpoint.convert(source, there, to=to)  # type: ignore[arg-type]
    checkpoint.convert(there, back, to=case.spelling.split()[0])  # type: ignore[arg-type]
    assert set(read_file(there)) == {*set(state) - set(report.rows[0].keys), *report.rows[0].written}
    returned = read_file(back)
    assert set(returned) == set(state)
    assert all(same_bits(returned[key], state[key]) for key in state)


@pytest.mark.parametrize("case", [c for c in RENAMED if c.name.startswith("legacy")], ids=ids)
def test_legacy_files_load_into_new_modules_and_back(case: Case, tmp_path: Path) -> None:
    legacy = case.build()
    checkpoint.convert(save(legacy.state_dict(), tmp_path / "in.pt"), tmp_path / "torch.pt", to="torch")
    put = parametrizations.weight_norm if "weight" in case.spelling else parametrizations.spectral_norm
    options = {"dim": case.dim}
    new = put(case.plain(), **options)  # type: ignore[operator]
    new.load_state_dict(torch.load(tmp_path / "torch.pt"))
    new.eval()
    assert same_bits(new.weight, case.computed(legacy))
    checkpoint.convert(tmp_path / "torch.pt", tmp_path / "legacy.pt", to="legacy")
    again = case.build()
    again.load_state_dict(torch.load(tmp_path / "legacy.pt"))
    assert same_bits(case.computed(again), case.computed(legacy))


@pytest.mark.parametrize(
    ("old", "new", "to"),
    [
        (nn.utils.spectral_norm, parametrizations.spectral_norm, "torch"),
        (parametrizations.spectral_norm, nn.utils.spectral_norm, "legacy"),
        (nn.utils.weight_norm, parametrizations.weight_norm, "torch"),
        (parametrizations.weight_norm, nn.utils.weight_norm, "legacy"),
        (parametrizations.spectral_norm, lambda module: module, "plain"),
        (nn.utils.spectral_norm, lambda module: module, "plain"),
    ],
)
def test_version_records_are_those_of_the_new_spelling(old, new, to: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    source = nn.Sequential(nn.Linear(3, 4), old(nn.Linear(4, 5)))
    expected = nn.Sequential(nn.Linear(3, 4), new(nn.Linear(4, 5)))
    path = save({"model": source.state_dict()}, tmp_path / "in.pt")
    checkpoint.convert(path, tmp_path / "out.pt", to=to)  # type: ignore[arg-type]
    state = torch.load(tmp_path / "out.pt")["model"]
    assert dict(state._metadata) == dict(expected.state_dict()._metadata)
    expected.load_state_dict(state)


@pytest.mark.parametrize("to", ["torch", "legacy"])
@pytest.mark.parametrize("dim", [0, 1, 2, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_plain_to_weight_norm_keeps_every_bit(
    to: str, dim: int | None, dtype: torch.dtype, tmp_path: Path
) -> None:
    plain = nn.Conv1d(33, 65, 7, dtype=dtype)
    with torch.no_grad():
        plain.weight[3] = 0  # no direction
    source = save(plain.state_dict(), tmp_path / "in.pt")
    path = tmp_path / "norm.pt"
    report = checkpoint.convert(source, path, to=to, weight_norm=["weight"], dims={"weight": dim})  # type: ignore[arg-type]
    assert (report.rows[0].dim, report.rows[0].notes) == (dim, ())
    put = parametrizations.weight_norm if to == "torch" else nn.utils.weight_norm
    module = put(nn.Conv1d(33, 65, 7, dtype=dtype), dim=dim)  # type: ignore[operator, arg-type]
    module.load_state_dict(torch.load(path))
    module(torch.zeros(33, 9, dtype=dtype))
    torch.testing.assert_close(module.weight.detach(), plain.weight.detach(), rtol=0, atol=0)


@pytest.mark.parametrize("to", ["torch", "legacy"])
@pytest.mark.parametrize("dim", [0, 1])
def test_plain_to_spectral_norm_is_converged(to: str, dim: int, tmp_path: Path) -> None:
    plain = nn.ConvTranspose1d(6, 10, 5)
    source = save(plain.state_dict(), tmp_path / "in.safetensors")
    path = tmp_path / "norm.safetensors"
    report = checkpoint.convert(source, path, to=to, spectral_norm=["*"], dims={"*": dim})  # type: ignore[arg-type]
    state = read_file(path)
    put = parametrizations.spectral_norm if to == "torch" else nn.utils.spectral_norm
    module = put(nn.ConvTranspose1d(6, 10, 5), dim=dim)
    module.load_state_dict(state)
    for _ in range(5):  # power iteration has nothing left to do
        module.train()(torch.zeros(6, 3))
    u = next(value for key, value in state.items() if key.endswith("_u"))
    after = next(value for key, value in module.state_dict().items() if key.endswith("_u"))
    torch.testing.assert_close(after.abs(), u.abs(), rtol=0, atol=1e-5)
    matrix = module.weight.detach().movedim(dim, 0).flatten(1)
    torch.testing.assert_close(torch.linalg.matrix_norm(matrix, 2), torch.tensor(1.0))
    assert report.rows[0].notes[0].startswith("reads as the stored value divided by ")


def test_dim_0_is_assumed_and_said(tmp_path: Path) -> None:
    source = save(nn.ConvTranspose1d(6, 10, 5).state_dict(), tmp_path / "in.pt")
    report = checkpoint.convert(source, tmp_path / "out.pt", to="torch", spectral_norm=["weight"])
    assert report.rows[0].dim == 0
    assert report.rows[0].assumptions == (
        "along dim 0, torch's default, but for transposed convolutions (1)",
    )


def test_small_dtypes_say_what_rounding_does(tmp_path: Path) -> None:
    source = save({"weight": torch.randn(64, 64).bfloat16()}, tmp_path / "in.pt")
    report = checkpoint.convert(source, tmp_path / "out.pt", to="torch", weight_norm=["*"])
    assert report.rows[0].notes[0].startswith("rounding to bfloat16 moves values by up to ")
    again = checkpoint.verify(source, tmp_path / "out.pt").rows[0]
    assert 0 < again.max_rel_error < 2**-8


def test_patterns_pick_by_name_and_leave_vectors_alone(tmp_path: Path) -> None:
    state = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 5)).state_dict()
    source = save({"model": state}, tmp_path / "in.pt")
    report = checkpoint.convert(
        source, tmp_path / "out.pt", to="legacy", weight_norm=["*.weight"], spectral_norm=[]
    )
    assert [row.name for row in report.rows] == ["model.0.weight", "model.2.weight"]
    assert report.passed_through == 4


def test_tied_plain_tensors_stay_tied(tmp_path: Path) -> None:
    W = torch.randn(4, 3)
    source = save({"a.weight": W, "b.weight": W}, tmp_path / "in.pt")
    checkpoint.convert(source, tmp_path / "out.pt", to="torch", weight_norm=["*"])
    state = torch.load(tmp_path / "out.pt")
    a, b = (state[f"{name}.parametrizations.weight.original0"] for name in "ab")
    assert a.data_ptr() == b.data_ptr()


def test_to_plain_is_bake(tmp_path: Path) -> None:
    case = CASES[0]
    source = save(case.build().state_dict(), tmp_path / "in.pt")
    checkpoint.convert(source, tmp_path / "a.pt", to="plain")
    checkpoint.bake(source, tmp_path / "b.pt")
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()


def test_what_the_other_style_cannot_spell_is_kept_and_named(tmp_path: Path) -> None:
    model = nn.ModuleDict(
        {
            "plain": nn.utils.weight_norm(nn.Linear(3, 4)),
            "pruned": nn.utils.prune.random_unstructured(nn.Linear(3, 4), "weight", amount=0.5),
        }
    )
    source = save(model.state_dict(), tmp_path / "in.pt")
    report = checkpoint.convert(source, tmp_path / "out.pt", to="torch")
    assert [note.text for note in report.notes] == [
        "pruned.weight: pruning has no torch spelling; its keys are kept"
    ]
    assert "pruned.weight_mask" in torch.load(tmp_path / "out.pt")


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        (
            {"to": "torch"},
            NothingToFoldError,
            "nothing to convert to the torch spelling; nothing was written",
        ),
        ({"to": "torch", "weight_norm": ["bias"]}, CheckpointError, '"bias" matches no plain tensor'),
        ({"to": "torch", "weight_norm": ["*"], "spectral_norm": ["w*"]}, CheckpointError, "Narrow one"),
        ({"to": "plain", "weight_norm": ["*"]}, CheckpointError, 'to="plain" removes norms'),
        ({"to": "onnx"}, CheckpointError, 'expected "torch", "legacy" or "plain", got \'onnx\''),
        ({"to": "torch", "spectral_norm": ["*"], "dims": {"*": 5}}, CheckpointError, "dims says 5"),
    ],
)
def test_refusals(options: dict[str, object], error: type[Exception], text: str, tmp_path: Path) -> None:
    source = save(nn.Linear(3, 4).state_dict(), tmp_path / "in.pt")
    with pytest.raises(error, match=text):
        checkpoint.convert(source, tmp_path / "out.pt", **options)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize(
    ("value", "norm", "text"),
    [
        (torch.zeros(3, 3), "spectral_norm", "a.weight: is all zero"),
        (torch.full((3, 3), torch.nan), "weight_norm", "a.weight: has values that are not finite"),
    ],
)
def test_tensors_without_a_norm_are_named(value: torch.Tensor, norm: str, text: str, tmp_path: Path) -> None:
    source = save({"a.weight": value}, tmp_path / "in.pt")
    with pytest.raises(CheckpointError, match=text):
        checkpoint.convert(source, tmp_path / "out.pt", to="torch", **{norm: ["*"]})  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == [source]


def test_a_taken_key_is_refused(tmp_path: Path) -> None:
    state = {"weight": torch.randn(3, 3), "parametrizations.weight.0.mask": torch.ones(3)}
    state["weight_u"] = torch.ones(3)
    source = save(state, tmp_path / "in.pt")
    with pytest.raises(CheckpointError, match="weight would be written to weight_u, which is there already"):
        checkpoint.convert(source, tmp_path / "out.pt", to="legacy", spectral_norm=["weight"])
