"""Baking against torch's own modules: the bits they compute with in eval mode, in both containers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import torchkiln
from tests.checkpoint.cases import CASES, CONTAINERS, Case, Put, ids, read_file, same_bits, save, sn, wn
from torchkiln import checkpoint
from torchkiln._core.errors import CheckpointError, NothingToFoldError


@pytest.mark.parametrize("suffix", CONTAINERS)
@pytest.mark.parametrize("case", CASES, ids=ids)
def test_bake_gives_the_bits_of_the_module(case: Case, suffix: str, tmp_path: Path) -> None:
    module = case.build()
    source = save(module.state_dict(), tmp_path / f"in{suffix}")
    report = checkpoint.bake(source, tmp_path / f"out{suffix}")
    baked = read_file(tmp_path / f"out{suffix}")
    assert same_bits(baked[case.tensor], case.computed(module))
    (row,) = report.rows
    assert (row.name, row.spelling, row.dim) == (case.tensor, case.spelling, case.dim)


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_baked_files_load_strictly_into_the_plain_module(case: Case, tmp_path: Path) -> None:
    module = case.build()
    checkpoint.bake(save(module.state_dict(), tmp_path / "in.pt"), tmp_path / "out.pt")
    plain = case.plain()
    plain.load_state_dict(torch.load(tmp_path / "out.pt"))
    x = torch.randn(case.x)
    case.computed(module)
    torch.testing.assert_close(plain(x), module(x), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["matrix_exp", "cayley", "householder"])
@pytest.mark.parametrize("shape", [(5, 5), (6, 4), (4, 6)], ids=str)
@pytest.mark.parametrize("trivialization", [True, False], ids=["base", "no base"])
def test_orthogonal_with_its_map_passed(
    kind: str, shape: tuple[int, int], trivialization: bool, tmp_path: Path
) -> None:
    module = nn.Linear(shape[1], shape[0]).double()
    parametrizations.orthogonal(module, orthogonal_map=kind, use_trivialization=trivialization)
    with torch.no_grad():
        original = module.parametrizations.weight.original
        original.add_(torch.randn_like(original).tril(-1) * 0.3)
    source = save(module.state_dict(), tmp_path / "in.pt")
    report = checkpoint.bake(source, tmp_path / "out.pt", assume={"*": kind})
    baked = torch.load(tmp_path / "out.pt")["weight"]
    torch.testing.assert_close(baked, module.weight.detach(), rtol=1e-12, atol=1e-12)
    assert report.rows[0].assumptions == (f"{kind}: as passed",)
    assert checkpoint.verify(source, assume={"weight": kind}).ok


@pytest.mark.parametrize(("sign", "lost"), [(1.0, 0), (-1.0, 0), (1.5, 0), (0.99, 1), (-0.5, 1), (0.0, 1)])
def test_columns_that_householder_of_torch_makes_zeros_are_warned_of(
    sign: float, lost: int, tmp_path: Path
) -> None:
    module = parametrizations.orthogonal(
        nn.Linear(5, 5), orthogonal_map="householder", use_trivialization=False
    )
    with torch.no_grad():
        module.parametrizations.weight.original.fill_diagonal_(1)[2, 2] = sign
    source = save(module.state_dict(), tmp_path / "in.pt")
    report = checkpoint.bake(source, tmp_path / "out.pt", assume={"weight": "householder"})
    baked = torch.load(tmp_path / "out.pt")["weight"]
    assert torch.equal(baked, module.weight.detach())
    assert int((baked == 0).all(0).sum()) == lost
    warned = [note.text for note in report.notes if note.level == "warning"]
    assert len(warned) == lost
    assert all("weight.original: 1 of 5 on the diagonal are between -1 and 1" in text for text in warned)


def test_orthogonal_says_whose_map_it_was(tmp_path: Path) -> None:
    module = parametrizations.orthogonal(nn.Linear(5, 5))
    source = save(module.state_dict(), tmp_path / "in.pt")
    (row,) = checkpoint.bake(source, tmp_path / "out.pt", assume={"*": "matrix_exp"}).rows
    assert row.notes == ("computed by torch's map, to the bit; a model under torchkiln's has it to rounding",)
    assert torch.equal(torch.load(tmp_path / "out.pt")["weight"], module.weight.detach())


def test_chain_of_orthogonal_and_spectral_norm_is_applied_in_order(tmp_path: Path) -> None:
    module = parametrizations.orthogonal(nn.Linear(4, 4).double(), orthogonal_map="cayley")
    parametrizations.spectral_norm(module)
    with torch.no_grad():
        module.parametrizations.weight.original.copy_(torch.randn(4, 4))
        module.parametrizations.weight[0].base.mul_(3)
    module.eval()
    source = save(module.state_dict(), tmp_path / "in.pt")
    report = checkpoint.bake(source, tmp_path / "out.pt", assume={"weight": "cayley"})
    baked = torch.load(tmp_path / "out.pt")["weight"]
    torch.testing.assert_close(baked, module.weight.detach(), rtol=1e-12, atol=1e-12)
    assert report.rows[0].spelling == "torch orthogonal + spectral_norm"


@pytest.mark.parametrize("put", [wn(), sn()], ids=["weight norm", "spectral norm"])
def test_a_last_step_without_tensors_shows_in_the_module_records(put: Put, tmp_path: Path) -> None:
    module = put(nn.Linear(4, 4))
    parametrizations.orthogonal(module)  # as a second step it keeps no base
    source = save(module.state_dict(), tmp_path / "in.pt")
    with pytest.raises(CheckpointError, match="weight: step 1 keeps nothing in the file"):
        checkpoint.bake(source, tmp_path / "out.pt")


class Doubled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


class Shifted(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1


def after(step: nn.Module) -> nn.Module:
    """A module whose spectral norm is step 1."""
    module = nn.Linear(6, 4)
    nn.utils.parametrize.register_parametrization(module, "weight", step)
    parametrizations.spectral_norm(module)
    return module.eval()


def test_spectral_norm_after_a_step_that_its_vectors_show_to_be_harmless(tmp_path: Path) -> None:
    module = after(Doubled())  # a factor cancels in W / sigma
    report = checkpoint.bake(save(module.state_dict(), tmp_path / "in.pt"), tmp_path / "out.pt")
    torch.testing.assert_close(torch.load(tmp_path / "out.pt")["weight"], module.weight.detach())
    assert "step 0 keeps nothing" in report.rows[0].assumptions[0]


def test_spectral_norm_after_an_unknown_step_is_refused(tmp_path: Path) -> None:
    source = save(after(Shifted()).state_dict(), tmp_path / "in.pt")
    with pytest.raises(CheckpointError, match="weight: step 0 keeps nothing in the file"):
        checkpoint.bake(source, tmp_path / "out.pt")
    assert not (tmp_path / "out.pt").exists()
    checkpoint.bake(source, tmp_path / "out.pt", assume={"weight": "identity"})


def test_sparsifier_mask_is_multiplied_and_said(tmp_path: Path) -> None:
    W, mask = torch.randn(3, 4), torch.rand(3, 4) > 0.5
    state = {"parametrizations.weight.original": W, "parametrizations.weight.0.mask": mask}
    report = checkpoint.bake(save(state, tmp_path / "in.pt"), tmp_path / "out.pt")
    assert same_bits(torch.load(tmp_path / "out.pt")["weight"], W * mask)
    assert report.rows[0].assumptions == ("step 0 multiplies by its mask: the shapes are equal",)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_small_dtypes_are_computed_in_float32_and_rounded_once(dtype: torch.dtype, tmp_path: Path) -> None:
    g, v = torch.rand(5, 1).to(dtype), torch.randn(5, 64).to(dtype)
    source = save({"weight_g": g, "weight_v": v}, tmp_path / "in.safetensors")
    report = checkpoint.bake(source, tmp_path / "out.safetensors")
    baked = read_file(tmp_path / "out.safetensors")["weight"]
    assert same_bits(baked, torch._weight_norm(v.float(), g.float(), 0).to(dtype))
    assert report.rows[0].notes == ("computed in float32, rounded once",)


def test_mixed_dtypes_fold_to_the_wider(tmp_path: Path) -> None:
    state = {"weight_g": torch.rand(5, 1), "weight_v": torch.randn(5, 4).bfloat16()}
    checkpoint.bake(save(state, tmp_path / "in.pt"), tmp_path / "out.pt")
    assert torch.load(tmp_path / "out.pt")["weight"].dtype == torch.float32


def test_vectors_without_unit_length_are_renormalized_with_a_warning(tmp_path: Path) -> None:
    W = torch.randn(4, 6)
    u, s, v = torch.linalg.svd(W)
    state = {"weight_orig": W, "weight_u": u[:, 0] * 0.87, "weight_v": v[0].contiguous()}
    report = checkpoint.bake(save(state, tmp_path / "in.pt"), tmp_path / "out.pt")
    torch.testing.assert_close(torch.load(tmp_path / "out.pt")["weight"], W / s[0])
    (note,) = report.notes
    assert note.level == "warning"
    assert note.text.startswith("weight_u: length 0.87 instead of 1")


@pytest.mark.parametrize(
    ("dim", "where"),
    [(0, "is zero at 2 of dim 0"), (1, "is zero at 2 of dim 1"), (2, "is zero at 2 of dim 2")],
)
@pytest.mark.parametrize("suffix", CONTAINERS)
def test_zero_slices_are_zeros_as_in_a_model_with_a_warning(
    dim: int, where: str, suffix: str, tmp_path: Path
) -> None:
    layer = torchkiln.parametrizations.weight_norm(nn.Conv1d(5, 6, 3), dim=dim)
    with torch.no_grad():
        layer.parametrizations.weight.original1.select(dim, 2).zero_()
    report = checkpoint.bake(save(layer.state_dict(), tmp_path / f"in{suffix}"), tmp_path / "out.pt")
    (note,) = (note for note in report.notes if note.level == "warning")
    key = "parametrizations.weight.original1"
    assert note.text == f"{key}: {where}, and so is the weight; torch computes NaN there"
    torch.testing.assert_close(torch.load(tmp_path / "out.pt")["weight"], layer.weight.detach())


@pytest.mark.parametrize("norm", ["weight", "spectral"])
def test_a_tensor_of_zeros_is_zeros_with_a_warning(norm: str, tmp_path: Path) -> None:
    W = torch.zeros(3, 4)
    states = {
        "weight": {"weight_g": torch.tensor(2.0), "weight_v": W},
        "spectral": {"weight_orig": W, "weight_u": torch.eye(3)[0], "weight_v": torch.eye(4)[0]},
    }
    (note,) = checkpoint.bake(save(states[norm], tmp_path / "in.pt"), tmp_path / "out.pt").notes
    assert re.fullmatch(r"weight_\w+: is all zero, and so is the weight; torch computes NaN there", note.text)
    assert torch.equal(torch.load(tmp_path / "out.pt")["weight"], W)


@pytest.mark.parametrize("dim", [0, 1])
def test_rows_whose_squares_vanish_are_zeros(dim: int, tmp_path: Path) -> None:
    layer = torchkiln.parametrizations.weight_norm(nn.Linear(6, 4), dim=dim)
    with torch.no_grad():
        layer.parametrizations.weight.original1.select(dim, 2).fill_(1e-30)
    checkpoint.bake(save(layer.state_dict(), tmp_path / "in.pt"), tmp_path / "out.pt")
    torch.testing.assert_close(torch.load(tmp_path / "out.pt")["weight"], layer.weight.detach())


def test_values_that_are_not_finite_stay_so_beside_zeros(tmp_path: Path) -> None:
    v = torch.randn(4, 6)
    v[1, 3], v[2] = torch.nan, 0
    report = checkpoint.bake(
        save({"w_g": torch.ones(4, 1), "w_v": v}, tmp_path / "in.pt"), tmp_path / "out.pt"
    )
    assert [note.level for note in report.notes].count("warning") >= 1
    written = torch.load(tmp_path / "out.pt")["w"]
    assert (written.isnan().all(1).tolist(), written.eq(0).all(1).tolist()) == (
        [False, True, False, False],
        [False, False, True, False],
    )


def test_square_spectral_norm_without_evidence_takes_dim_0_and_says_so(tmp_path: Path) -> None:
    W = torch.eye(3)
    u = torch.tensor([1.0, 0, 0])
    state = {"weight_orig": W, "weight_u": u, "weight_v": u.clone()}
    (row,) = checkpoint.bake(save(state, tmp_path / "in.pt"), tmp_path / "out.pt").rows
    assert row.dim == 0
    assert row.assumptions == ("dims 0 and 1 fit the shapes, and u and v do not tell: took 0",)


def test_dims_override_what_the_shapes_leave_open(tmp_path: Path) -> None:
    module = parametrizations.spectral_norm(nn.Linear(5, 5)).eval()
    source = save(module.state_dict(), tmp_path / "in.pt")
    (row,) = checkpoint.bake(source, tmp_path / "out.pt", dims={"weight": -1}).rows
    assert (row.dim, row.assumptions) == (1, ())


def test_dims_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    source = save({"weight_g": torch.ones(4, 1), "weight_v": torch.ones(4, 6)}, tmp_path / "in.pt")
    with pytest.raises(CheckpointError, match="weight: dims says 1, but the shapes fit 0"):
        checkpoint.bake(source, tmp_path / "out.pt", dims={"weight": 1})


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"assume": {"wieght": "data"}}, 'assume: "wieght" is of no use'),
        ({"assume": {"weight": "householder"}}, 'assume: "weight" is of no use'),
        ({"dims": {"wieght": 0}}, 'dims: "wieght" is of no use'),
        ({"assume": {"weight": "svd"}}, "expected one of cayley"),
    ],
)
def test_options_without_use_are_refused(
    options: dict[str, dict[str, object]], text: str, tmp_path: Path
) -> None:
    source = save({"weight_g": torch.ones(4, 1), "weight_v": torch.ones(4, 6)}, tmp_path / "in.pt")
    with pytest.raises(CheckpointError, match=text):
        checkpoint.bake(source, tmp_path / "out.pt", **options)  # type: ignore[arg-type]
    assert not (tmp_path / "out.pt").exists()


def test_nothing_to_fold_is_an_error_and_writes_nothing(tmp_path: Path) -> None:
    source = save(nn.Linear(3, 4).state_dict(), tmp_path / "in.pt")
    with pytest.raises(NothingToFoldError, match="every tensor is plain already"):
        checkpoint.bake(source, tmp_path / "out.pt")
    assert list(tmp_path.iterdir()) == [source]


def test_progress_counts_to_the_total(tmp_path: Path) -> None:
    model = nn.Sequential(*(parametrizations.weight_norm(nn.Linear(3, 3)) for _ in range(3)))
    calls: list[tuple[int, int, str]] = []
    checkpoint.bake(
        save(model.state_dict(), tmp_path / "in.pt"),
        tmp_path / "out.pt",
        progress=lambda *call: calls.append(call),
    )
    done = [call[0] for call in calls]
    assert {call[1] for call in calls} == {3 * (9 + 3) * 4}  # bytes
    assert done == sorted(done)
    assert done[-1] == calls[-1][1]
    assert [call[2] for call in calls if call[2]] == ["0.weight", "1.weight", "2.weight"]
