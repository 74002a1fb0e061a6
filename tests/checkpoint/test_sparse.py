"""Sparse, quantized and nested tensors: what can be done with them, and what is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from torchkiln import checkpoint
from torchkiln._core.errors import CheckpointError

# What torch says of kinds of tensors that are new or old, as it makes and reads them.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Sparse CS[CR] tensor support is in beta state:UserWarning"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*quantize_per_tensor.*are deprecated:UserWarning"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning"),
]


def normed() -> dict[str, torch.Tensor]:
    return {"weight_g": torch.rand(4, 1) + 0.5, "weight_v": torch.randn(4, 6)}


def unusual(kind: str) -> torch.Tensor:
    """A tensor that is more than its bytes."""
    made: dict[str, Callable[[], torch.Tensor]] = {
        "sparse": lambda: torch.eye(3).to_sparse(),
        "sparse rows": lambda: torch.eye(3).to_sparse_csr(),
        "sparse columns": lambda: torch.eye(3).to_sparse_csc(),
        "quantized": lambda: torch.quantize_per_tensor(torch.eye(3), 0.5, 0, torch.qint8),
        "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    }
    return made[kind]()


SPARSE = pytest.mark.parametrize("kind", ["sparse", "sparse rows", "sparse columns"])


@SPARSE
def test_sparse_tensors_are_copied_and_compared(kind: str, tmp_path: Path) -> None:
    torch.save({**normed(), "other": unusual(kind)}, tmp_path / "in.pt")
    checkpoint.bake(tmp_path / "in.pt", tmp_path / "out.pt")
    assert checkpoint.verify(tmp_path / "in.pt", tmp_path / "out.pt").ok
    assert checkpoint.inspect(tmp_path / "out.pt", deep=True).tensors == 2
    torch.save({**normed(), "other": 2 * unusual(kind)}, tmp_path / "changed.pt")
    report = checkpoint.verify(tmp_path / "in.pt", tmp_path / "changed.pt")
    assert [row.reason for row in report.rows if row.name == "other"] == [
        "relative error 0.5; plain tensors should be equal"
    ]
    torch.save({**normed(), "other": torch.eye(3)}, tmp_path / "plain.pt")
    assert not checkpoint.verify(tmp_path / "in.pt", tmp_path / "plain.pt").ok


@SPARSE
def test_values_of_sparse_tensors_are_looked_at(kind: str, tmp_path: Path) -> None:
    torch.save({"other": torch.nan * unusual(kind)}, tmp_path / "in.pt")
    texts = [note.text for note in checkpoint.inspect(tmp_path / "in.pt", deep=True).notes]
    assert "other: 3 NaN and 0 infinite of its 9 values" in texts


@pytest.mark.parametrize(
    ("target", "options", "match"),
    [
        (
            "out.pt",
            {"dtype": torch.float16},
            r"in\.pt: net\.other: expected a plain tensor to write as float16, got a",
        ),
        ("out.safetensors", {}, "the source has a sparse tensor under 'other'"),
        (
            "out",
            {"container": "dcp"},
            r"net\.other: is a sparse tensor, and a distributed checkpoint holds plain ones",
        ),
    ],
)
@SPARSE
def test_what_a_sparse_tensor_cannot_become(
    kind: str, target: str, options: dict[str, Any], match: str, tmp_path: Path
) -> None:
    state = {**normed(), "other": unusual(kind)}
    torch.save(state if target == "out.safetensors" else {"net": state}, tmp_path / "in.pt")
    with pytest.raises(CheckpointError, match=match) as raised:
        checkpoint.bake(tmp_path / "in.pt", tmp_path / target, **options)
    assert len(str(raised.value).splitlines()) <= 3
    assert not (tmp_path / target).exists()


@SPARSE
def test_a_norm_of_sparse_tensors_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    torch.save({"w_g": torch.ones(3, 1), "w_v": unusual(kind)}, tmp_path / "in.pt")
    assert "w_v: is a sparse tensor" in checkpoint.inspect(tmp_path / "in.pt").rows[0].blocked
    with pytest.raises(
        CheckpointError, match=r"in\.pt: w_v: is a sparse tensor, and legacy weight_norm is computed"
    ):
        checkpoint.verify(tmp_path / "in.pt")
    with pytest.raises(CheckpointError, match=r'"\*" matches no plain tensor'):
        checkpoint.convert(tmp_path / "in.pt", tmp_path / "out.pt", to="torch", weight_norm=["*"])


def test_a_nested_tensor_is_refused_by_name(tmp_path: Path) -> None:
    torch.save({"net": {"other": unusual("nested")}, "list": [unusual("nested")]}, tmp_path / "in.pt")
    with pytest.raises(
        CheckpointError, match=r"in\.pt: (net\.other|list\.0) is a nested tensor, which has no shape"
    ):
        checkpoint.inspect(tmp_path / "in.pt")


def test_quantized_tensors_are_copied_and_compared(tmp_path: Path) -> None:
    torch.save({**normed(), "other": unusual("quantized")}, tmp_path / "in.pt")
    checkpoint.bake(tmp_path / "in.pt", tmp_path / "out.pt", dtype=torch.float64)
    assert checkpoint.verify(tmp_path / "in.pt", tmp_path / "in.pt").ok
    assert torch.load(tmp_path / "out.pt")["other"].is_quantized
