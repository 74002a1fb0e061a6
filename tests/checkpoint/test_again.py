"""The second formulas: they agree with the definitions, a fault does not pass them, and they need no memory."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor
from torch.nn.functional import normalize

from torchkiln._core.errors import CheckpointError
from torchkiln._core.spellings.options import Options
from torchkiln.checkpoint import _again
from torchkiln.checkpoint._check import check, errors
from torchkiln.checkpoint._open import open_checkpoint
from torchkiln.checkpoint._scan import scan

WEIGHT = "layer.parametrizations.weight"
MEGABYTE = 1_000_000


def weight_norm(shape: tuple[int, ...], dim: int | None) -> dict[str, Tensor]:
    gains = [n if d == dim else 1 for d, n in enumerate(shape)]
    return {
        f"{WEIGHT}.original0": torch.rand(gains if dim is not None else []) + 0.5,
        f"{WEIGHT}.original1": torch.randn(shape),
    }


def spectral_norm(shape: tuple[int, ...], dim: int) -> dict[str, Tensor]:
    W = torch.randn(shape)
    rows = W.movedim(dim, 0).flatten(1).shape
    u, v = (normalize(torch.randn(n), dim=0) for n in rows)
    return {f"{WEIGHT}.original": W, f"{WEIGHT}.0._u": u, f"{WEIGHT}.0._v": v}


CASES = {
    "weight norm, dim 0": (weight_norm((9, 4, 3), 0), 0),
    "weight norm, dim 1": (weight_norm((9, 4, 3), 1), 1),
    "weight norm, dim 2": (weight_norm((9, 4, 3), 2), 2),
    "weight norm, whole": (weight_norm((9, 4, 3), None), None),
    "spectral norm, dim 0": (spectral_norm((9, 4, 3), 0), 0),
    "spectral norm, dim 1": (spectral_norm((9, 4, 3), 1), 1),
    "spectral norm, dim 1 of a matrix": (spectral_norm((9, 4), 1), 1),
    "spectral norm, dim 2": (spectral_norm((9, 4, 3), 2), 2),
    "spectral norm, dim 2 of 4": (spectral_norm((9, 4, 3, 2), 2), 2),
    "spectral norm, dim 3": (spectral_norm((9, 4, 3, 2), 3), 3),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_a_second_formula_agrees_and_finds_a_fault(
    name: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_again, "BLOCK", 24)  # two rows
    state, dim = CASES[name]
    safetensors.torch.save_file(
        {key: one.to(dtype) for key, one in state.items()}, tmp_path / "in.safetensors"
    )
    with open_checkpoint(tmp_path / "in.safetensors") as file:
        (found,) = scan(file, Options(None, {"layer.weight": dim})).found
        result = found.evaluate(found.item)
        value = result.tensor.to(dtype)
        formula = _again.expected(found, value, result)
        assert formula is not None
        again = torch.cat([formula(rows) for rows in _again.slices(value)])
        assert errors(again, found.exact(found.item).tensor)[1] < (1e-12 if dtype == torch.float64 else 1e-5)
        check(found, value, result)
        value[5, 2] += 0.3 * value.abs().max()
        with pytest.raises(CheckpointError, match="computed twice, with different results"):
            check(found, value, result)


@pytest.mark.parametrize(("factor", "passes"), [(1, True), (1.5, False)])
def test_one_long_sum_of_squares_may_round(factor: float, passes: bool, tmp_path: Path) -> None:
    # The model's own norm of so many floats, added up in float32, lacks the last digits, and the file keeps its value.
    state = weight_norm((4096, 2048), None)
    safetensors.torch.save_file(state, tmp_path / "in.safetensors")
    with open_checkpoint(tmp_path / "in.safetensors") as file:
        (found,) = scan(file, Options()).found
        result = found.evaluate(found.item)
        value = result.tensor * factor * (1 + 1e-3)
        if passes:
            check(found, value, result)
        else:
            with pytest.raises(CheckpointError, match="computed twice, with different results"):
                check(found, value, result)


@pytest.mark.parametrize("error", [0.0, 1e-3])
@pytest.mark.parametrize(
    ("shape", "size"), [((256, 256), 8), ((256, 40), 8), ((40, 256), 8), ((600, 20), 0.1)], ids=str
)
def test_rounding_of_orthogonal_matrices_grows_with_their_norms(
    shape: tuple[int, int], size: float, error: float, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    state = {f"{WEIGHT}.original": size * torch.randn(shape), f"{WEIGHT}.0.base": torch.eye(max(shape))}
    safetensors.torch.save_file(state, tmp_path / "in.safetensors")
    with open_checkpoint(tmp_path / "in.safetensors") as file:
        (found,) = scan(file, Options({"layer.weight": "matrix_exp"})).found
        result = found.evaluate(found.item)
        value = result.tensor.contiguous()
        value[3, 5] += error
        if not error:
            check(found, value, result)
            return
        with pytest.raises(CheckpointError, match="computed twice, with different results"):
            check(found, value, result)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(9, 9), (12, 5), (5, 12), (3, 6, 4)], ids=str)
@pytest.mark.parametrize("based", [True, False], ids=["base", "no base"])
@pytest.mark.parametrize("name", ["cayley", "householder", "matrix_exp"])
def test_orthogonal_matrices_are_checked_by_other_maps(
    name: str, based: bool, shape: tuple[int, ...], dtype: torch.dtype, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    X, side = torch.randn(shape), max(shape[-2:])
    X.diagonal(dim1=-2, dim2=-1).copy_(torch.ones(()))
    base = torch.linalg.qr(torch.randn(*shape[:-2], side, side))[0].contiguous()
    state = {f"{WEIGHT}.original": X.to(dtype)} | ({f"{WEIGHT}.0.base": base.to(dtype)} if based else {})
    safetensors.torch.save_file(state, tmp_path / "in.safetensors")
    with open_checkpoint(tmp_path / "in.safetensors") as file:
        (found,) = scan(file, Options({"layer.weight": name})).found
        result = found.evaluate(found.item)
        value = result.tensor.to(dtype).contiguous()
        formula = _again.expected(found, value, result)
        assert formula is not None
        again = torch.cat([formula(rows) for rows in _again.slices(value)])
        assert errors(again, found.exact(found.item).tensor)[1] < 1e-12
        check(replace(found, exact=None), value, result)  # type: ignore[arg-type]  # is not asked for
        value[-1, 2] += 0.3
        with pytest.raises(CheckpointError, match="computed twice, with different results"):
            check(found, value, result)


MEASURE = """
import sys
from pathlib import Path
from torchkiln import checkpoint

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024

before = peak()
checkpoint.bake(sys.argv[1], sys.argv[2])
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "name",
    [
        "weight norm, dim 0",
        "weight norm, dim 1",
        "weight norm, whole",
        "spectral norm",
        "one after the other",
    ],
)
def test_memory_is_that_of_two_tensors_whatever_the_file_has(name: str, tmp_path: Path) -> None:
    shape, dims = (4096, 3072), {"weight norm, dim 1": 1, "weight norm, whole": None}
    state: dict[str, Tensor] = {}
    for index in range(5):
        one = spectral_norm(shape, 0) if name == "spectral norm" else weight_norm(shape, dims.get(name, 0))
        if name == "one after the other":
            vectors = spectral_norm(shape, 0)
            one |= {f"{WEIGHT}.1._{side}": vectors[f"{WEIGHT}.0._{side}"] for side in ("u", "v")}
        state.update({key.replace("layer", f"layer{index}"): tensor for key, tensor in one.items()})
    safetensors.torch.save_file(state, tmp_path / "in.safetensors")
    command = [
        sys.executable,
        "-c",
        MEASURE,
        str(tmp_path / "in.safetensors"),
        str(tmp_path / "out.safetensors"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    size = 4 * shape[0] * shape[1]
    # Of each of two tensors what is read and what every step makes of it; nearly nothing where that goes by rows.
    tensors = {"weight norm, dim 0": 0, "one after the other": 6}.get(name, 4)
    assert int(done.stdout) < tensors * size + 64 * MEGABYTE
