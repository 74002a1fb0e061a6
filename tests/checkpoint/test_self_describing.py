"""Files that describe themselves: saved from a model, folded without its code, restored into another one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations as torchs

import torchkiln
from torchkiln import (
    CheckpointError,
    OutputExistsError,
    ParametrizationError,
    checkpoint,
    families,
    parametrizations,
)
from torchkiln.checkpoint._description import KEY
from torchkiln.parametrize import register_parametrization
from torchkiln.testing._catalogue import Row, rows

SAVEABLE = [row for row in rows() if type(row.family) is not families.Custom]


class Holder(nn.Module):
    """One tensor that is computed, and others that are not."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.before = nn.Parameter(torch.ones(2))
        self.weight = nn.Parameter(weight.clone())
        self.register_buffer("count", torch.tensor(3))


def moved(model: nn.Module) -> nn.Module:
    """The model with originals that are not what registering made of them."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "original" in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def example_of(row: Row) -> Tensor:
    # safetensors has one complex dtype.
    return row.example.to(torch.complex64) if row.example.is_complex() else row.example


def holding(row: Row) -> nn.Module:
    family = families.from_spec(row.family.spec(), buffers=dict(row.family.named_buffers()))
    return register_parametrization(Holder(example_of(row)), "weight", family).eval()


def saved(model: nn.Module, folder: Path, **options: Any) -> Path:
    checkpoint.save(model, folder / "model.safetensors", **options)
    return folder / "model.safetensors"


def folded(path: Path, **options: Any) -> dict[str, Tensor]:
    target = path.with_name("plain.safetensors")
    checkpoint.bake(path, target, **options)
    return safetensors.torch.load_file(target)


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert different == []


def rewritten(path: Path, change: Callable[[Any], object]) -> Path:
    """The file with another description."""
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    said = json.loads(metadata[KEY])
    metadata[KEY] = json.dumps(change(said) or said)
    safetensors.torch.save_file(safetensors.torch.load_file(path), path, metadata=metadata)
    return path


# Every family ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", SAVEABLE, ids=lambda row: row.label)
def test_a_file_folds_to_what_the_model_folds_to(row: Row, tmp_path: Path) -> None:
    model = moved(holding(row))
    path = saved(model, tmp_path)
    report = checkpoint.inspect(path)
    assert [(one.name, one.blocked) for one in report.rows] == [("weight", "")]
    assert type(row.family).__name__ in report.rows[0].spelling
    plain = folded(path)
    torchkiln.bake(model)
    assert_same(plain, model.state_dict())


@pytest.mark.parametrize("row", SAVEABLE, ids=lambda row: row.label)
def test_a_file_restores_what_was_saved(row: Row, tmp_path: Path) -> None:
    model = moved(holding(row))
    path = saved(model, tmp_path)
    plain = Holder(example_of(row)).eval()
    assert checkpoint.load(plain, path) is plain
    assert_same(plain.state_dict(), model.state_dict())
    assert torch.equal(plain.weight, model.weight)
    # And into one that is parametrized already.
    again = checkpoint.load(holding(row), path)
    assert torch.equal(again.weight, model.weight)


BUILT_INS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight norm": parametrizations.weight_norm,
    "weight norm along 1": lambda layer: parametrizations.weight_norm(layer, dim=1),
    "weight norm of all": lambda layer: parametrizations.weight_norm(layer, dim=None),
    "spectral norm": lambda layer: parametrizations.spectral_norm(layer, n_power_iterations=2),
    "spectral norm along 1": lambda layer: parametrizations.spectral_norm(layer, dim=1),
    "spectral norm of a vector": lambda layer: parametrizations.spectral_norm(layer, "bias"),
    "orthogonal": parametrizations.orthogonal,
    "cayley": lambda layer: parametrizations.orthogonal(layer, orthogonal_map="cayley"),
    "householder": lambda layer: parametrizations.orthogonal(layer, orthogonal_map="householder"),
    "without a base": lambda layer: parametrizations.orthogonal(
        layer, orthogonal_map="cayley", use_trivialization=False
    ),
    "two steps": lambda layer: parametrizations.spectral_norm(parametrizations.weight_norm(layer)),
    "a family on a norm": lambda layer: register_parametrization(
        parametrizations.weight_norm(layer), "weight", families.Scaled(0.5)
    ),
    "torch's weight norm": torchs.weight_norm,
    "torch's orthogonal": lambda layer: torchs.orthogonal(layer, orthogonal_map="cayley"),
}


@pytest.mark.parametrize("put", BUILT_INS.values(), ids=BUILT_INS)
def test_built_ins_need_no_option(put: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    model = moved(nn.Sequential(put(nn.Linear(4, 4))))
    path = saved(model, tmp_path)
    plain = folded(path)
    restored = checkpoint.load(nn.Sequential(nn.Linear(4, 4)).eval(), path)
    assert_same(restored.state_dict(), model.state_dict())
    torchkiln.bake(model)
    assert plain.keys() == model.state_dict().keys()
    # torch's own maps round otherwise than ours.
    torch.testing.assert_close(plain, dict(model.state_dict()))


# What a file may hold -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "family", [families.Orthogonal(), families.Positive(), families.Symmetric()], ids=repr
)
def test_dtypes_stay(family: nn.Module, dtype: torch.dtype, tmp_path: Path) -> None:
    model = moved(register_parametrization(Holder(torch.randn(4, 4, dtype=dtype)), "weight", family))
    plain = folded(saved(model, tmp_path))
    torchkiln.bake(model)
    assert_same(plain, model.state_dict())


class Doubled(torchkiln.Parametrization):
    """Changes the shape: two copies, one after the other."""

    def forward(self, X: Tensor) -> Tensor:
        return torch.cat([X, X])

    def right_inverse(self, X: Tensor) -> Tensor:
        return X[: X.shape[0] // 2]


class Shifted(torchkiln.Parametrization):
    """A user's own class, with an argument and a buffer."""

    def __init__(self, by: float = 1.0) -> None:
        super().__init__()
        self.by = by
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, X: Tensor) -> Tensor:
        return X + self.by + self.seen

    def right_inverse(self, X: Tensor) -> Tensor:
        return X - self.by


@pytest.mark.parametrize("own", [Doubled, Shifted])
def test_a_class_of_ones_own_is_found_in_the_mapping(own: type[nn.Module], tmp_path: Path) -> None:
    unsafe = own is Doubled
    model = moved(register_parametrization(Holder(torch.randn(4, 3)), "weight", own(), unsafe=unsafe))
    path = saved(model, tmp_path)
    also = {own.__name__: own}
    assert checkpoint.inspect(path).rows[0].blocked.startswith(f"weight: {own.__name__!r} is no family")
    assert checkpoint.verify(path, also=also).ok
    with pytest.raises(CheckpointError, match=f"{own.__name__!r} is no family of the catalogue"):
        checkpoint.bake(path, tmp_path / "out.safetensors")
    restored = checkpoint.load(Holder(torch.randn(4, 3)).eval(), path, also=also)
    assert restored.parametrizations.weight.unsafe is unsafe
    assert torch.equal(restored.weight, model.weight)
    plain = folded(path, also=also)
    torchkiln.bake(model)
    assert_same(plain, model.state_dict())


def test_tied_tensors_are_written_under_each_key_and_restored_tied(tmp_path: Path) -> None:
    def tied() -> nn.Module:
        model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False))
        model[1].weight = model[0].weight
        return model.eval()

    model = tied()
    register_parametrization(model[0], "weight", families.UnitNorm(), tied_in=model)
    path = saved(model, tmp_path)
    assert set(safetensors.torch.load_file(path)) == set(model.state_dict())
    restored = checkpoint.load(tied(), path)
    chains = [layer.parametrizations.weight for layer in restored]
    assert chains[0].original is chains[1].original
    assert torch.equal(restored[1].weight, model[1].weight)
    plain = folded(path)
    assert torch.equal(plain["0.weight"], plain["1.weight"])


def test_shards_describe_themselves(tmp_path: Path) -> None:
    model = moved(nn.Sequential(*[parametrizations.orthogonal(nn.Linear(4, 4)) for _ in range(3)]))
    checkpoint.save(model, tmp_path / "sharded", max_shard_size=100)
    assert len(list((tmp_path / "sharded").iterdir())) > 3
    checkpoint.bake(tmp_path / "sharded", tmp_path / "plain.safetensors")
    plain = safetensors.torch.load_file(tmp_path / "plain.safetensors")
    restored = checkpoint.load(
        nn.Sequential(*[nn.Linear(4, 4) for _ in range(3)]).eval(), tmp_path / "sharded"
    )
    torchkiln.bake(model)
    assert_same(plain, model.state_dict())
    torchkiln.bake(restored)
    assert_same(plain, restored.state_dict())


def test_a_parametrized_original_is_described_too(tmp_path: Path) -> None:
    model = register_parametrization(Holder(torch.rand(3, 3)), "weight", families.Symmetric())
    register_parametrization(model.parametrizations.weight, "original", families.Positive())
    path = saved(moved(model), tmp_path)
    with pytest.raises(CheckpointError, match="originals that are computed themselves must be so already"):
        checkpoint.load(Holder(torch.rand(3, 3)).eval(), path)
    plain = folded(path)
    torchkiln.bake(model)
    assert_same(plain, model.state_dict())


# The description follows the tensors ----------------------------------------------------------------------------------


def two() -> nn.Module:
    layers = [parametrizations.orthogonal(nn.Linear(3, 3), orthogonal_map="cayley") for _ in range(2)]
    return moved(nn.Sequential(*layers))


def test_what_is_not_folded_stays_described_under_its_new_name(tmp_path: Path) -> None:
    model = two()
    path = saved(model, tmp_path)
    checkpoint.bake(path, tmp_path / "half.safetensors", exclude=["1.*"], rename={"1.": "head."})
    (row,) = checkpoint.inspect(tmp_path / "half.safetensors").rows
    assert (row.name, row.spelling, row.blocked) == ("head.weight", "torch orthogonal", "")
    checkpoint.bake(tmp_path / "half.safetensors", tmp_path / "plain.safetensors")
    plain = safetensors.torch.load_file(tmp_path / "plain.safetensors")
    assert torch.equal(plain["head.weight"], model[1].weight)
    with safetensors.safe_open(tmp_path / "plain.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_cast_is_described(tmp_path: Path) -> None:
    path = saved(two(), tmp_path)
    checkpoint.convert(path, tmp_path / "low.safetensors", dtype=torch.bfloat16)
    plain = folded(tmp_path / "low.safetensors")
    assert plain["0.weight"].dtype == torch.bfloat16


def test_a_torch_file_says_nothing(tmp_path: Path) -> None:
    report = checkpoint.convert(saved(two(), tmp_path), tmp_path / "model.pt")
    assert any("metadata has no place" in note.text for note in report.notes)
    assert "which orthogonal map" in checkpoint.inspect(tmp_path / "model.pt").rows[0].blocked


# Refused --------------------------------------------------------------------------------------------------------------


class Plain(nn.Module):
    def forward(self, X: Tensor) -> Tensor:
        return X.relu()


class Orthogonal(torchkiln.Parametrization):
    """Has a family's name and is none."""

    def forward(self, X: Tensor) -> Tensor:
        return X


@pytest.mark.parametrize(
    ("step", "match"),
    [
        (Plain(), r"^weight: Plain does not say what it is, so no file can.\nDerive it from"),
        (families.Custom(torch.sinh, torch.asinh), r"^Custom\(function=...\) has no JSON spec"),
        (Orthogonal(), r"has the name of a family of the catalogue. Rename the class"),
    ],
    ids=["no spec", "a function", "a name that is taken"],
)
def test_what_cannot_be_described_is_not_saved(step: nn.Module, match: str, tmp_path: Path) -> None:
    model = register_parametrization(Holder(torch.randn(3, 3)), "weight", step)
    with pytest.raises(ParametrizationError, match=match):
        checkpoint.save(model, tmp_path / "model.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_is_not_replaced(tmp_path: Path) -> None:
    path = saved(two(), tmp_path)
    before = path.read_bytes()
    with pytest.raises(OutputExistsError, match="exists already"):
        checkpoint.save(two(), path)
    assert path.read_bytes() == before
    saved(two(), tmp_path, force=True)


DAMAGES: dict[str, tuple[Callable[[Any], object], str]] = {
    "version": (
        lambda said: said | {"version": 2},
        "describes itself in version 2, and 1 is the one known here",
    ),
    "list": (lambda said: [1], "its description of itself cannot be read"),
    "no steps": (lambda said: said["tensors"]["0.weight"].update(steps=[]), "a tensor without steps"),
    "shape": (lambda said: said["tensors"]["0.weight"].update(shape=["x"]), "no tensor has shape"),
    "dtype": (lambda said: said["tensors"]["0.weight"].update(dtype="nn"), "no tensor has shape"),
}


@pytest.mark.parametrize(("change", "match"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_description_is_refused(
    change: Callable[[Any], object], match: str, tmp_path: Path
) -> None:
    path = rewritten(saved(two(), tmp_path), change)
    with pytest.raises(CheckpointError, match=match):
        checkpoint.bake(path, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def step_of(said: Any) -> Any:
    return said["tensors"]["0.weight"]["steps"][0]


STEPS: dict[str, tuple[Callable[[Any], object], str]] = {
    "name": (
        lambda said: step_of(said).update(name="os.system"),
        "'os.system' is no family of the catalogue",
    ),
    "a function": (lambda said: step_of(said).update(name="from_spec"), "'from_spec' is no family"),
    "version": (
        lambda said: step_of(said).update(version=7),
        "this spec has version 7, and 1 is the one known",
    ),
    "argument": (
        lambda said: step_of(said)["arguments"].update(map="eval"),
        "orthogonal does not take the arguments",
    ),
    "another family": (
        lambda said: step_of(said).update(name="Interval", arguments={"lower": "a"}),
        "0.weight: ",
    ),
    "buffer": (
        lambda said: step_of(said).update(name="Symmetric", arguments={}),
        "Symmetric has no buffer 'base'",
    ),
    "another shape": (lambda said: said["tensors"]["0.weight"].update(shape=[9]), "its steps make one of"),
}


@pytest.mark.parametrize(("change", "match"), STEPS.values(), ids=STEPS)
def test_a_step_that_is_not_known_is_refused_by_name(
    change: Callable[[Any], object], match: str, tmp_path: Path
) -> None:
    path = rewritten(saved(two(), tmp_path), change)
    with pytest.raises(CheckpointError, match=match):
        checkpoint.bake(path, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def linear(*, bias: bool = True, size: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(size, size, bias=bias), nn.Linear(size, size))


OTHERS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "lacks a key": (lambda: linear(bias=False), "has 0.bias, which the model has not"),
    "has a key more": (
        lambda: nn.Sequential(*linear(), nn.Linear(1, 1)),
        "has no 2.weight, which the model has",
    ),
    "has no module": (
        lambda: nn.Sequential(nn.Linear(3, 3)),
        "describes 1.weight, and the model has no module '1'",
    ),
    "has another map": (
        lambda: nn.Sequential(parametrizations.orthogonal(nn.Linear(3, 3)), nn.Linear(3, 3)),
        "0.weight is orthogonal in the file and orthogonal in the model, or their arguments differ",
    ),
    "has another size": (lambda: linear(size=4), "has shape"),
    "has a norm more": (
        lambda: nn.Sequential(*linear()[:1], parametrizations.weight_norm(nn.Linear(3, 3), "bias")),
        "does not say that 1.bias is computed",
    ),
}


@pytest.mark.parametrize(("build", "match"), OTHERS.values(), ids=OTHERS)
def test_a_model_that_does_not_fit_is_unchanged(
    build: Callable[[], nn.Module], match: str, tmp_path: Path
) -> None:
    path = saved(two(), tmp_path)
    model = build()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    kinds = [type(module) for module in model.modules()]
    with pytest.raises((CheckpointError, ParametrizationError), match=match):
        checkpoint.load(model, path)
    assert_same(before, model.state_dict())
    assert [type(module) for module in model.modules()] == kinds
