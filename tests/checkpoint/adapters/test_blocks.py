"""Products added block by block: a right block is not computed again, and no wrong entry passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from tests.checkpoint.adapters.build import folder, lora, merged, write_base
from torchkiln._core.errors import CheckpointError
from torchkiln.checkpoint import _rows
from torchkiln.checkpoint._adapters import blocks
from torchkiln.checkpoint._adapters.edits import Product, add_products
from torchkiln.checkpoint._adapters.projection import Projection
from torchkiln.checkpoint._check import tolerance

ALL = slice(0, 40)
ENTRIES = [(0, 0), (7, 63), (39, 127)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
TWICE = "layer.weight: was merged twice, with different results: relative error"


def products(columns: int, dtype: torch.dtype) -> list[Product]:
    torch.manual_seed(1)
    return [(torch.randn(40, 3).to(dtype), torch.randn(3, columns).to(dtype), scale) for scale in (0.5, -2.0)]


@pytest.mark.parametrize("columns", [1, 7, 64, 97, 130, 4096])
def test_projections_of_a_sum_follow_from_those_of_its_terms(columns: int) -> None:
    W, terms = torch.randn(40, columns).double(), products(columns, torch.float64)
    projection = Projection(terms, columns)
    expected = projection.of_sum(W, ALL)
    found = projection(add_products(W.clone(), terms, ALL))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert found.numel() <= 40 * columns // min(columns, 10) or columns == 97  # a prime has no parts


def test_one_wrong_entry_is_as_large_in_its_projection() -> None:
    projection = Projection(products(128, torch.float64), 128)
    found = projection(torch.eye(128).double())
    assert torch.equal(found.count_nonzero(1), torch.ones(128, dtype=torch.int64))
    sizes = found.abs().amax(1)
    assert sizes.min() >= 1
    assert sizes.max() <= 2
    assert 32 < (found > 0).sum() < 96  # random signs


class Case:
    """One block, right, and the check of it."""

    def __init__(self, dtype: torch.dtype, columns: int = 128) -> None:
        wide = torch.promote_types(dtype, torch.float32)
        self.W = torch.randn(40, columns).to(dtype)
        terms = products(columns, wide)
        self.check = blocks._Check(
            "layer.weight", lambda own: products(columns, own), wide=wide, columns=columns
        )
        self.projected = self.check.projection.of_sum(self.W.to(wide), ALL)
        self.value = add_products(self.W.to(wide, copy=True), terms, ALL)
        self.rows = self.value.to(dtype)
        self.error = 2 * tolerance(dtype, folded=True) * float(self.rows.abs().max())

    def judge(self) -> bool:
        return self.check(self.W, self.value, self.rows, block=ALL, projected=self.projected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 97, 128, 4096])
def test_a_right_block_is_not_computed_again(
    columns: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    def again(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(blocks._Check, "_compare", again)
    case = Case(dtype, columns)
    assert case.judge() is True


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("at", ENTRIES, ids=str)
def test_one_entry_that_was_computed_wrong_is_found(at: tuple[int, int], dtype: torch.dtype) -> None:
    case = Case(dtype)
    case.value[at] += case.error
    case.rows = case.value.to(dtype)
    with pytest.raises(CheckpointError, match=TWICE):
        case.judge()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("at", ENTRIES, ids=str)
def test_one_entry_that_was_rounded_wrong_is_found(at: tuple[int, int], dtype: torch.dtype) -> None:
    case = Case(dtype)
    case.rows[at] += case.error
    with pytest.raises(CheckpointError, match=TWICE):
        case.judge()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "wrong",
    [
        lambda value: value.flip(1),
        lambda value: value.roll(1, 0),
        lambda value: value[:, torch.randperm(128)],
        lambda value: value * 1.1,
        torch.zeros_like,
    ],
    ids=["columns turned round", "rows shifted", "columns shuffled", "scaled", "zeros"],
)
def test_a_wrong_block_is_found(wrong: Any, dtype: torch.dtype) -> None:
    case = Case(dtype)
    case.value = wrong(case.value).contiguous()
    case.rows = case.value.to(dtype)
    with pytest.raises(CheckpointError, match=TWICE):
        case.judge()


def test_a_doubt_that_is_unfounded_is_dropped() -> None:
    case = Case(torch.float32)
    case.projected += 1  # as if rounding had been worse than it ever is
    assert case.judge() is True


@pytest.mark.parametrize("factor", [1e-3, 1.0, 1e3])
def test_blocks_of_other_magnitudes_go_on(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(torch.bfloat16)
    assert case.judge()
    case.value = add_products(case.W.float() * factor, products(128, torch.float32), ALL)
    case.projected = case.check.projection.of_sum(case.W.float() * factor, ALL)
    case.rows = case.value.bfloat16()
    monkeypatch.delattr(blocks._Check, "_compare")
    assert case.judge()


@pytest.mark.parametrize("verify", [True, False])
def test_a_fault_in_one_block_of_a_file(
    verify: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a broken processor would write: found where it is checked, written where it is not."""
    monkeypatch.setattr(_rows, "_BLOCK_BYTES", 32)  # two rows
    base = write_base(tmp_path / "base.safetensors")
    adapter = folder(tmp_path / "a", lora("layers.0.q"))
    right = merged(tmp_path / "base.safetensors", adapter, verify=verify)["layers.0.q.weight"]

    def faulty(W: Tensor, terms: list[Product], rows: slice) -> Tensor:
        value = add_products(W, terms, rows)
        # Only what is computed first of all: the second computation is right.
        return value.add_(0.25 if rows.start == 2 and W.dtype == torch.float32 else 0)

    monkeypatch.setattr(blocks, "add_products", faulty)
    if verify:
        with pytest.raises(CheckpointError, match=r"layers\.0\.q\.weight: was merged twice"):
            merged(tmp_path / "base.safetensors", adapter, force=True)
        assert torch.equal(
            safetensors.torch.load_file(tmp_path / "merged.safetensors")["layers.0.q.weight"], right
        )
    else:
        wrong = merged(tmp_path / "base.safetensors", adapter, force=True, verify=False)["layers.0.q.weight"]
        assert (wrong != right).any(1).nonzero().flatten().tolist() == [2, 3]
    assert base["layers.0.q.weight"].shape == right.shape
