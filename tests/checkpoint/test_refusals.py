"""What names and shapes cannot prove is refused or kept, naming the key and what to pass."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.checkpoint.cases import same_bits
from torchkiln import checkpoint
from torchkiln._core.errors import CheckpointError

W = torch.arange(12.0).reshape(3, 4) + 1
ONE = torch.ones(1)


def write(state: dict[str, Tensor], folder: Path) -> Path:
    torch.save(state, folder / "in.pt")
    return folder / "in.pt"


BLOCKED = {
    "lone original": (
        {"a.parametrizations.weight.original": W},
        r"a\.parametrizations\.weight\.original: an original without any step's state",
    ),
    "lone legacy original": (
        {"a.weight_orig": W},
        r"a\.weight_orig: an original without a fitting a\.weight_mask, or a\.weight_u and a\.weight_v",
    ),
    "one partner missing": (
        {"weight_orig": W, "weight_u": torch.ones(3)},
        "weight_orig: an original without",
    ),
    "mask of another shape": (
        {"weight_orig": W, "weight_mask": torch.ones(4)},
        "weight_orig: an original without",
    ),
    "vectors of other lengths": (
        {"weight_orig": W, "weight_u": torch.ones(5), "weight_v": torch.ones(4)},
        "weight_orig: an original without",
    ),
    "orthogonal": (
        {"parametrizations.weight.original": W, "parametrizations.weight.0.base": torch.eye(4)},
        "which orthogonal map made weight is not in the file",
    ),
    "unknown state": (
        {"parametrizations.weight.original": W, "parametrizations.weight.0.scale": ONE},
        r"unknown parametrization: parametrizations\.weight\.0\.scale is state of no known step",
    ),
    "two originals of no weight norm": (
        {"parametrizations.weight.original0": W, "parametrizations.weight.original1": W.t()},
        r"shapes \(3, 4\) and \(4, 3\) are no gain and direction",
    ),
    "three originals": (
        {f"parametrizations.weight.original{i}": W for i in range(3)},
        "original0, original1, original2 alone follow no known rule",
    ),
    "second original alone": (
        {"parametrizations.weight.original1": W},
        "original1 alone follow no known rule",
    ),
    "weight norm with state": (
        {
            "parametrizations.weight.original0": torch.ones(3, 1),
            "parametrizations.weight.original1": W,
            "parametrizations.weight.0.mask": W,
        },
        "weight norm keeps no state, and step 0 does",
    ),
    "plain value too": (
        {"weight_g": torch.ones(3, 1), "weight_v": W, "weight": W},
        "weight is in the file as well as weight_g",
    ),
    "nested in an unknown one": (
        {
            "parametrizations.weight.parametrizations.original0.original": torch.ones(3, 1),
            "parametrizations.weight.original1": W,
        },
        r"parametrizations\.original0\.original: an original without",
    ),
}


@pytest.mark.parametrize(("state", "text"), BLOCKED.values(), ids=BLOCKED)
def test_bake_and_verify_refuse(state: dict[str, Tensor], text: str, tmp_path: Path) -> None:
    source = write({**state, "bias": ONE}, tmp_path)
    with pytest.raises(CheckpointError, match=text) as caught:
        checkpoint.bake(source, tmp_path / "out.pt")
    assert len(str(caught.value).splitlines()) <= 3
    assert str(source) in str(caught.value)
    assert list(tmp_path.iterdir()) == [source]
    with pytest.raises(CheckpointError, match=text):
        checkpoint.verify(source)


@pytest.mark.parametrize(("state", "text"), BLOCKED.values(), ids=BLOCKED)
def test_inspect_reports(state: dict[str, Tensor], text: str, tmp_path: Path) -> None:
    inspection = checkpoint.inspect(write({**state, "bias": ONE}, tmp_path), deep=True)
    (row,) = inspection.rows
    assert row.blocked
    (note,) = (note for note in inspection.notes if note.level == "warning")
    assert note.text == row.blocked


def test_several_are_counted(tmp_path: Path) -> None:
    source = write({"a.weight_orig": W, "b.weight_orig": W, "c.weight_orig": W}, tmp_path)
    with pytest.raises(CheckpointError, match=r"a\.weight_orig.*\n.*\n2 more like it"):
        checkpoint.bake(source, tmp_path / "out.pt")


DATA = {
    "lone mask": {"gaussian_blurred_cent_mask": W},
    "lone gain": {"weight_g": W},
    "lone vectors": {"state_u": ONE, "state_v": ONE},
    "pair of other shapes": {"gate_g": W, "gate_v": W.t().contiguous()},
    "pair of vectors": {"gate_g": torch.ones(3), "gate_v": torch.ones(3)},
    "pair of scalars": {"lr_g": torch.tensor(1.0), "lr_v": torch.tensor(1.0)},
    "pair of integers": {"count_g": torch.tensor([[1]]), "count_v": torch.tensor([[1, 2]])},
    "integer original": {"size_orig": torch.tensor([3, 4])},
    "scalar original": {"rate_orig": torch.tensor(0.5)},
    "original beside its plain value": {"image_orig": W, "image": W},
    "state without original": {"parametrizations.weight.0._u": ONE},
    "suffix alone": {"_g": torch.ones(3, 1), "_v": W, "x._orig": W},
}


@pytest.mark.parametrize("data", DATA.values(), ids=DATA)
def test_look_alikes_pass_through(data: dict[str, Tensor], tmp_path: Path) -> None:
    source = write({**data, "weight_norm.weight_g": torch.ones(3, 1), "weight_norm.weight_v": W}, tmp_path)
    report = checkpoint.bake(source, tmp_path / "out.pt")
    baked = torch.load(tmp_path / "out.pt")
    assert set(baked) == {*data, "weight_norm.weight"}
    assert all(same_bits(baked[key], value) for key, value in data.items())
    assert report.passed_through == len(data)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("pair of other shapes", "gate_g and gate_v are kept as data"),
        ("original beside its plain value", "image_orig is kept as data: image is in the file too"),
        ("state without original", "is kept as data: the original that it belongs to is missing"),
    ],
)
def test_look_alikes_are_noted(name: str, text: str, tmp_path: Path) -> None:
    (note, _) = checkpoint.inspect(write(DATA[name], tmp_path)).notes
    assert text in note.text


ASSUMED = {
    "identity": ({"parametrizations.weight.original": W}, "identity", {"weight": W}),
    "legacy identity": ({"weight_orig": W}, "identity", {"weight": W}),
    "data": ({"weight_orig": W}, "data", {"weight_orig": W}),
    "torch data": ({"parametrizations.weight.original": W}, "data", {"parametrizations.weight.original": W}),
    "pruned data": ({"weight_orig": W, "weight_mask": W}, "data", {"weight_orig": W, "weight_mask": W}),
    "pair data": (
        {"weight_g": torch.ones(3, 1), "weight_v": W},
        "data",
        {"weight_g": torch.ones(3, 1), "weight_v": W},
    ),
    "vectors": (
        {"weight_g": torch.tensor([2.0, 3.0]), "weight_v": torch.tensor([-4.0, 5.0])},
        "weight_norm",
        {"weight": torch.tensor([-2.0, 3.0])},
    ),
    "vector spectral norm": (
        {"parametrizations.weight.original": torch.tensor([3.0, 4.0])},
        "spectral_norm",
        {"weight": nn.functional.normalize(torch.tensor([3.0, 4.0]), dim=0)},
    ),
}


@pytest.mark.parametrize(("state", "value", "expected"), ASSUMED.values(), ids=ASSUMED)
@pytest.mark.parametrize("pattern", ["weight", "w*", "model.weight"])
def test_assume_settles(
    state: dict[str, Tensor], value: str, expected: dict[str, Tensor], pattern: str, tmp_path: Path
) -> None:
    other = {"other_g": torch.ones(3, 1), "other_v": W}
    torch.save({"model": {**state, **other}}, tmp_path / "in.pt")
    checkpoint.bake(tmp_path / "in.pt", tmp_path / "out.pt", assume={pattern: value})
    baked = torch.load(tmp_path / "out.pt")["model"]
    del baked["other"]
    assert baked.keys() == expected.keys()
    assert all(same_bits(baked[key], expected[key]) for key in expected)


def test_an_exact_name_goes_before_a_wildcard(tmp_path: Path) -> None:
    source = write({"a_orig": W, "b_orig": W, "c_orig": W}, tmp_path)
    checkpoint.bake(source, tmp_path / "out.pt", assume={"*": "identity", "b": "data"})
    assert list(torch.load(tmp_path / "out.pt")) == ["a", "b_orig", "c"]
