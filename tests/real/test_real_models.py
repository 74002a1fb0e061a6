"""torchkiln on the models of public libraries: baking, state dicts, and running on our core."""

from __future__ import annotations

import copy
import importlib.util
import math
from contextlib import AbstractContextManager, nullcontext
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import torch
from model_table import CASES, ModelCase, tensors
from torch import Tensor, nn

import torchkiln
from torchkiln import checkpoint

pytestmark = [
    pytest.mark.real,
    # descript-audio-codec compiles its activation with it at import.
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),
]

ALL = [pytest.param(case, id=case.name) for case in CASES]
ON_THE_NEW_API = [pytest.param(case, id=case.name) for case in CASES if case.api == "parametrize"]
# Built with their norms on, so that the library itself can load what it saved. VITS and the vocoders are not.
SELF_NORMED = [
    param for param in ON_THE_NEW_API if param.id in {"wav2vec2", "hubert", "wavlm", "sew", "encodec"}
]
SPEECH_ENCODERS = [param for param in SELF_NORMED if param.id != "encodec"]
LEGACY_HOOKS = ("WeightNorm", "SpectralNorm")
NORM_SUFFIXES = ("_g", "_v", "_orig", "_u")


def build(case: ModelCase, *, seed: int = 0, core: str = "torch") -> nn.Module:
    """Build a model from a seed, on torch's parametrizations or on ours."""
    if importlib.util.find_spec(case.package) is None:
        pytest.skip(f"{case.package} is not installed: see tests/real/requirements-models*.txt")
    torch.manual_seed(seed)
    with on(core):
        return case.build().eval()


def on(core: str) -> AbstractContextManager[object]:
    return torchkiln.installed() if core == "torchkiln" else nullcontext()


def run(model: nn.Module, case: ModelCase) -> list[Tensor]:
    """Run the model with the noise that some of them draw held fixed."""
    torch.manual_seed(0)
    return tensors(model(**case.inputs))


def outputs(model: nn.Module, case: ModelCase) -> list[Tensor]:
    with torch.no_grad():
        return run(model.eval(), case)


def largest_difference(left: list[Tensor], right: list[Tensor]) -> float:
    """Compare outputs; NaN is equal to nothing, and outputs of different lengths are infinitely far apart."""
    if [tensor.shape for tensor in left] != [tensor.shape for tensor in right]:
        return math.inf
    return max((a.double() - b.double()).abs().max().item() for a, b in zip(left, right, strict=True))


def normed_tensors(model: nn.Module) -> set[str]:
    """Find what carries a norm by looking at submodules and hooks, without any function under test."""
    found = set()
    for path, module in model.named_modules():
        lists = module._modules.get("parametrizations")
        names = list(lists._modules) if isinstance(lists, nn.ModuleDict) else []
        hooks = module._forward_pre_hooks.values()
        names += [hook.name for hook in hooks if type(hook).__name__ in LEGACY_HOOKS]
        found |= {f"{path}.{name}" for name in names}
    return found


def parametrization_lists(model: nn.Module) -> list[nn.Module]:
    dicts = [module._modules.get("parametrizations") for module in model.modules()]
    return [one for lists in dicts if isinstance(lists, nn.ModuleDict) for one in lists.values()]


def train_one_step(model: nn.Module, case: ModelCase) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = sum(out.square().mean() for out in run(model.train(), case) if out.is_floating_point())
    assert isinstance(loss, Tensor)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
    optimizer.step()


@pytest.mark.parametrize("case", ALL)
def test_bake_changes_no_output(case: ModelCase) -> None:
    model = build(case)
    before = outputs(model, case)

    torchkiln.bake(model)

    assert largest_difference(before, outputs(model, case)) == 0.0


@pytest.mark.parametrize("case", ALL)
def test_bake_keeps_the_bits_of_every_tensor(case: ModelCase) -> None:
    # Quantizers and saturated activations can hide a changed weight from the outputs.
    model = build(case)
    outputs(model, case)
    before = {path: attrgetter(path)(model).detach().clone() for path in normed_tensors(model)}

    torchkiln.bake(model)

    assert [path for path, value in before.items() if not torch.equal(value, model.get_parameter(path))] == []


@pytest.mark.parametrize("case", ALL)
def test_bake_reports_every_norm_and_leaves_none(case: ModelCase) -> None:
    model = build(case)
    expected, stored = normed_tensors(model), set(model.state_dict())

    report = torchkiln.bake(model)

    assert len(report) == len(expected) > 0
    assert {row.path for row in report} == expected
    assert {row.api for row in report} == {"hook" if case.api == "legacy" else "torch"}
    assert [row for row in report if row.shape != model.get_parameter(row.path).shape] == []
    assert {key for row in report for key in row.keys} == stored - set(model.state_dict())
    assert normed_tensors(model) == set()


@pytest.mark.parametrize("case", ALL)
def test_baked_keys_and_classes_are_plain(case: ModelCase) -> None:
    model = build(case)
    paths = normed_tensors(model)

    torchkiln.bake(model)

    state = model.state_dict()
    assert paths <= set(state)
    assert not [key for key in state if "parametrizations" in key]
    assert not {path + suffix for path in paths for suffix in NORM_SUFFIXES} & set(state)
    assert not [name for name, module in model.named_modules() if "Parametrized" in type(module).__name__]
    assert all(isinstance(model.get_parameter(path), nn.Parameter) for path in paths)


@pytest.mark.parametrize("case", ALL)
def test_baked_state_dict_loads_into_another_baked_model(case: ModelCase, tmp_path: Path) -> None:
    first, second = build(case), build(case, seed=1)
    torchkiln.bake(first)
    torchkiln.bake(second)
    assert largest_difference(outputs(first, case), outputs(second, case)) > 0.0

    torch.save(first.state_dict(), tmp_path / "baked.pt")
    second.load_state_dict(torch.load(tmp_path / "baked.pt", weights_only=True), strict=True)

    assert largest_difference(outputs(first, case), outputs(second, case)) == 0.0


@pytest.mark.parametrize("case", ALL)
def test_baked_model_trains_and_copies(case: ModelCase) -> None:
    model = build(case)
    paths = normed_tensors(model)
    torchkiln.bake(model)
    before = {path: model.get_parameter(path).detach().clone() for path in paths}

    train_one_step(model, case)

    assert any(not torch.equal(value, model.get_parameter(path)) for path, value in before.items())
    assert largest_difference(outputs(model, case), outputs(copy.deepcopy(model), case)) == 0.0


@pytest.mark.parametrize("source", ["torch", "torchkiln"])
@pytest.mark.parametrize("target", ["torch", "torchkiln"])
@pytest.mark.parametrize("case", ON_THE_NEW_API)
def test_parametrized_state_dicts_move_between_cores(case: ModelCase, source: str, target: str) -> None:
    first, second = build(case, core=source), build(case, seed=1, core=target)
    assert largest_difference(outputs(first, case), outputs(second, case)) > 0.0

    second.load_state_dict(first.state_dict(), strict=True)

    assert list(second.state_dict()) == list(first.state_dict())
    assert largest_difference(outputs(first, case), outputs(second, case)) == 0.0


@pytest.mark.parametrize("case", ON_THE_NEW_API)
def test_installed_puts_our_lists_into_the_model(case: ModelCase) -> None:
    ours, theirs = build(case, core="torchkiln"), build(case)

    assert normed_tensors(ours) == normed_tensors(theirs)
    assert all(
        isinstance(one, torchkiln.parametrize.ParametrizationList) for one in parametrization_lists(ours)
    )
    assert not any(
        isinstance(one, torchkiln.parametrize.ParametrizationList) for one in parametrization_lists(theirs)
    )


@pytest.mark.parametrize("case", ON_THE_NEW_API)
def test_one_training_step_is_the_step_on_torch(case: ModelCase) -> None:
    ours, theirs = build(case, core="torchkiln"), build(case)
    before = {name: value.clone() for name, value in theirs.state_dict().items()}
    # The initial values differ on purpose: what transformers writes into a computed weight has no effect on torch.
    ours.load_state_dict(before)
    torch.testing.assert_close(ours.state_dict(), before, rtol=0, atol=0)

    train_one_step(ours, case)
    train_one_step(theirs, case)

    moved = [name for name, value in theirs.state_dict().items() if not torch.equal(value, before[name])]
    assert any("parametrizations" in name for name in moved)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("case", ON_THE_NEW_API)
def test_a_trained_model_on_our_core_saves_for_torch(case: ModelCase, tmp_path: Path) -> None:
    ours, theirs = build(case, core="torchkiln"), build(case, seed=1)
    train_one_step(ours, case)

    torch.save(ours.state_dict(), tmp_path / "state.pt")
    theirs.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True), strict=True)

    assert largest_difference(outputs(ours, case), outputs(theirs, case)) == 0.0


@pytest.mark.parametrize("case", ON_THE_NEW_API)
def test_a_model_on_our_core_saves_whole(case: ModelCase, tmp_path: Path) -> None:
    # Saved before its first forward: there, Xcodec puts hooks on itself that nothing can pickle.
    model = build(case, core="torchkiln")

    torch.save(model, tmp_path / "model.pt")
    # Written just above; a whole module cannot be read weights-only.
    again = torch.load(tmp_path / "model.pt", weights_only=False)

    assert normed_tensors(again) == normed_tensors(model)
    assert largest_difference(outputs(model, case), outputs(again, case)) == 0.0


@pytest.mark.parametrize("case", ON_THE_NEW_API)
def test_a_model_on_our_core_bakes(case: ModelCase) -> None:
    model = build(case, core="torchkiln")
    train_one_step(model, case)
    before = outputs(model, case)
    expected = normed_tensors(model)

    report = torchkiln.bake(model)

    assert {row.path for row in report} == expected
    assert largest_difference(before, outputs(model, case)) == 0.0


@pytest.mark.parametrize("source", ["torch", "torchkiln"])
@pytest.mark.parametrize("target", ["torch", "torchkiln"])
@pytest.mark.parametrize("case", SELF_NORMED)
def test_saved_pretrained_folders_move_between_cores(
    case: ModelCase, source: str, target: str, tmp_path: Path
) -> None:
    model: Any = build(case, core=source)

    model.save_pretrained(tmp_path)
    with on(target):
        again = type(build(case)).from_pretrained(tmp_path)

    assert normed_tensors(again) == normed_tensors(model)
    assert largest_difference(outputs(model, case), outputs(again, case)) == 0.0


@pytest.mark.parametrize("case", SPEECH_ENCODERS)
def test_a_baked_file_gets_back_the_norm_that_its_library_needs(case: ModelCase, tmp_path: Path) -> None:
    # transformers builds these with the norm on, and cannot load a baked file.
    model, fresh = build(case), build(case, seed=1)
    (path,) = normed_tensors(model)
    torchkiln.bake(model)
    torch.save(model.state_dict(), tmp_path / "baked.pt")

    checkpoint.convert(
        tmp_path / "baked.pt", tmp_path / "normed.pt", to="torch", weight_norm=[path], dims={path: 2}
    )
    fresh.load_state_dict(torch.load(tmp_path / "normed.pt", weights_only=True), strict=True)

    assert largest_difference(outputs(model, case), outputs(fresh, case)) == 0.0
