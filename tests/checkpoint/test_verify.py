"""Verification: rounding passes, anything else is found and named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.checkpoint.cases import CASES, Case, ids, save
from torchkiln import checkpoint
from torchkiln._core.errors import CheckpointError, NothingToFoldError


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_every_spelling_verifies(case: Case, tmp_path: Path) -> None:
    module = case.build()
    source = save(module.state_dict(), tmp_path / "in.pt")
    checkpoint.bake(source, tmp_path / "out.pt")
    alone = checkpoint.verify(source)
    assert alone.ok
    assert alone.rows[0].max_rel_error < 1e-6
    both = checkpoint.verify(source, tmp_path / "out.pt")
    assert both.ok
    assert [row.max_abs_error for row in both.rows] == [0.0] * len(both.rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_rounding_to_the_dtype_is_allowed(dtype: torch.dtype, tmp_path: Path) -> None:
    state = {"weight_g": torch.rand(8, 1).to(dtype) + 1, "weight_v": torch.randn(8, 32).to(dtype)}
    verification = checkpoint.verify(save(state, tmp_path / "in.pt"))
    assert verification.ok
    assert 0 < verification.rows[0].max_rel_error < torch.finfo(dtype).eps


def pair(change: dict[str, Tensor | None], folder: Path) -> checkpoint.Verification:
    """A normed file compared with its baked values after a change; None removes a key."""
    torch.manual_seed(0)
    state = {"weight_g": torch.rand(3, 1), "weight_v": torch.randn(3, 4), "bias": torch.ones(3)}
    source = save(state, folder / "in.pt")
    checkpoint.bake(source, folder / "out.pt")
    baked: dict[str, Any] = {**torch.load(folder / "out.pt"), **change}
    save({key: value for key, value in baked.items() if value is not None}, folder / "changed.pt")
    return checkpoint.verify(source, folder / "changed.pt")


@pytest.mark.parametrize(
    ("change", "name", "reason"),
    [
        ({"weight": None}, "weight", "missing in changed.pt"),
        ({"extra": torch.ones(1)}, "extra", "missing in in.pt"),
        ({"weight": torch.ones(4, 3)}, "weight", "shape (3, 4) and (4, 3)"),
        ({"bias": torch.ones(3).double()}, "bias", "dtype torch.float32 and torch.float64"),
        ({"bias": torch.ones(3) + 1e-6}, "bias", "relative error 9.54e-07; plain tensors should be equal"),
        ({"weight": torch.zeros(3, 4)}, "weight", "relative error inf beyond rounding"),
        ({"weight": torch.full((3, 4), torch.nan)}, "weight", "relative error nan beyond rounding"),
    ],
)
def test_differences_are_found(
    change: dict[str, Tensor | None], name: str, reason: str, tmp_path: Path
) -> None:
    verification = pair(change, tmp_path)
    assert not verification.ok
    assert [(row.name, row.reason) for row in verification.rows if not row.ok] == [(name, reason)]
    json.dumps(verification.to_dict(), allow_nan=False)


def test_equal_nans_and_infinities_are_equal(tmp_path: Path) -> None:
    a = save({"x": torch.tensor([torch.nan, torch.inf])}, tmp_path / "a.pt")
    b = save({"x": torch.tensor([torch.nan, torch.inf])}, tmp_path / "b.safetensors")
    assert checkpoint.verify(a, b).ok


def test_large_integers_are_compared_exactly(tmp_path: Path) -> None:
    a = save({"x": torch.tensor([2**53])}, tmp_path / "a.pt")
    b = save({"x": torch.tensor([2**53 + 1])}, tmp_path / "b.pt")
    assert not checkpoint.verify(a, b).ok


def test_one_state_dict_each_compares_whatever_it_is_called(tmp_path: Path) -> None:
    state = nn.Linear(3, 4).state_dict()
    a = save({"generator": state, "epoch": 3}, tmp_path / "a.pt")
    b = save(state, tmp_path / "b.safetensors")
    assert checkpoint.verify(a, b).ok


def test_several_state_dicts_compare_by_full_name(tmp_path: Path) -> None:
    one, two = nn.Linear(3, 4).state_dict(), nn.Linear(3, 4).state_dict()
    a = save({"g": one, "d": two}, tmp_path / "a.pt")
    b = save({"d": two, "g": one}, tmp_path / "b.pt")
    verification = checkpoint.verify(a, b)
    assert verification.ok
    assert {row.name for row in verification.rows} == {"g.weight", "g.bias", "d.weight", "d.bias"}


def test_nothing_in_common(tmp_path: Path) -> None:
    a, b = save({"a": torch.ones(1)}, tmp_path / "a.pt"), save({"b": torch.ones(1)}, tmp_path / "b.pt")
    with pytest.raises(CheckpointError, match="no tensor name in common"):
        checkpoint.verify(a, b)


def test_plain_file_alone(tmp_path: Path) -> None:
    with pytest.raises(NothingToFoldError, match="there is nothing to recompute"):
        checkpoint.verify(save(nn.Linear(3, 4).state_dict(), tmp_path / "a.pt"))


def zero_row() -> dict[str, Tensor]:
    v = torch.ones(3, 4)
    v[1] = 0
    return {"weight_g": torch.ones(3, 1), "weight_v": v}


def short_vector() -> dict[str, Tensor]:
    W = torch.randn(3, 4)
    u, _, v = torch.linalg.svd(W)
    return {"weight_orig": W, "weight_u": u[:, 0].contiguous(), "weight_v": v[0] * 1.01}


@pytest.mark.parametrize(
    ("state", "text"),
    [
        (zero_row(), "weight_v: is zero at 1 of dim 0"),
        (short_vector(), "weight_v: length 1.01 instead of 1"),
        (
            {"weight_g": torch.full((3, 1), torch.inf), "weight_v": torch.ones(3, 4)},
            "weight: has values that are not",
        ),
        (
            {"weight_orig": torch.zeros(2, 3), "weight_u": torch.zeros(2), "weight_v": torch.ones(3)},
            "length 0 instead",
        ),
    ],
)
def test_bad_values_are_not_ok_in_verify_and_noted_by_deep_inspection(
    state: dict[str, Tensor], text: str, tmp_path: Path
) -> None:
    source = save(state, tmp_path / "in.pt")
    verification = checkpoint.verify(source)
    assert not verification.ok
    assert text in verification.rows[0].reason
    assert any(text in note.text for note in verification.notes)
    assert any(text in note.text for note in checkpoint.inspect(source, deep=True).notes)
    assert not any(text in note.text for note in checkpoint.inspect(source).notes)


def test_float32_error_is_measured_against_float64(tmp_path: Path) -> None:
    torch.manual_seed(0)
    g, v = torch.rand(3, 1), torch.randn(3, 4)
    row = checkpoint.verify(save({"weight_g": g, "weight_v": v}, tmp_path / "in.pt")).rows[0]
    exact = g.double() * v.double() / v.double().norm(dim=1, keepdim=True)
    assert row.max_abs_error == float((torch._weight_norm(v, g, 0).double() - exact).abs().max())
    assert row.max_rel_error == row.max_abs_error / float(exact.abs().max())


def test_progress(tmp_path: Path) -> None:
    state = {"weight_g": torch.ones(3, 1), "weight_v": torch.ones(3, 4), "bias": torch.ones(3)}
    source = save(state, tmp_path / "in.pt")
    calls: list[tuple[int, int, str]] = []
    checkpoint.verify(source, progress=lambda *call: calls.append(call))
    checkpoint.verify(source, source, progress=lambda *call: calls.append(call))
    assert calls == [(1, 1, "weight"), (1, 2, "weight"), (2, 2, "bias")]
