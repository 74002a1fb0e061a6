"""Adapters merged into files: names, containers, dtypes, weights, ties; and what is refused before it is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from tests.checkpoint.adapters.build import WRAPPER, folder, lora, merged, write_base
from torchkiln import CheckpointError, checkpoint

Q0 = "layers.0.q"
A0, B0 = f"{WRAPPER}{Q0}.lora_A.weight", f"{WRAPPER}{Q0}.lora_B.weight"


def delta(tensors: dict[str, Tensor], module: str = Q0, scale: float = 2.0) -> Tensor:
    A, B = tensors[f"{WRAPPER}{module}.lora_A.weight"], tensors[f"{WRAPPER}{module}.lora_B.weight"]
    return (scale * B.double() @ A.double()).float()


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("container", ["base.safetensors", "base.pt"])
def test_either_container_of_either(container: str, suffix: str, tmp_path: Path) -> None:
    base = write_base(tmp_path / container)
    tensors = lora(Q0, "layers.1.q")
    adapter = folder(tmp_path / "a", tensors, suffix=suffix)
    result = merged(tmp_path / container, adapter)
    assert result.keys() == base.keys()
    for module in (Q0, "layers.1.q"):
        torch.testing.assert_close(
            result[f"{module}.weight"], base[f"{module}.weight"] + delta(tensors, module)
        )
    untouched = [name for name in base if not name.endswith("q.weight")]
    assert all(torch.equal(result[name], base[name]) for name in untouched)


@pytest.mark.parametrize(
    ("extra", "prefix"),
    [
        ("", ""),
        ("", "model."),
        ("", "base_model.model."),
        ("", "module.net."),
        ("transformer.", ""),
        ("bert.", ""),
        ("transformer.", "model."),
    ],
)
def test_names_may_begin_otherwise_in_the_base(extra: str, prefix: str, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base.safetensors", prefix=prefix)
    tensors = {key.replace(WRAPPER, WRAPPER + extra): value for key, value in lora(Q0).items()}
    result = merged(tmp_path / "base.safetensors", folder(tmp_path / "a", tensors))
    name = f"{prefix}{Q0}.weight"
    assert not torch.equal(result[name], base[name])


@pytest.mark.parametrize(
    ("extra", "prefix"), [("encoder.", ""), ("", "decoder."), ("encoder.", "decoder."), ("bert.", "vit.")]
)
def test_names_of_another_part_are_refused(extra: str, prefix: str, tmp_path: Path) -> None:
    write_base(tmp_path / "base.safetensors", prefix=prefix)
    tensors = {key.replace(WRAPPER, WRAPPER + extra): value for key, value in lora(Q0).items()}
    with pytest.raises(CheckpointError, match=rf"changes {extra}layers\.0\.q\.weight .* is not in the base"):
        merged(tmp_path / "base.safetensors", folder(tmp_path / "a", tensors))


def test_names_that_fit_twice_are_refused(tmp_path: Path) -> None:
    tensors = {f"{side}.{Q0}.weight": torch.randn(6, 4) for side in ("left", "right")}
    safetensors.torch.save_file(tensors, tmp_path / "base.safetensors")
    adapter = folder(tmp_path / "a", lora(Q0))
    with pytest.raises(
        CheckpointError, match=r"layers.0.q.weight could be (left|right).layers.0.q.weight or"
    ):
        merged(tmp_path / "base.safetensors", adapter)


def test_shards_and_a_directory_of_them(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base.safetensors")
    checkpoint.convert(tmp_path / "base.safetensors", tmp_path / "shards", max_shard_size=200)
    tensors = lora(Q0)
    result = merged(tmp_path / "shards", folder(tmp_path / "a", tensors))
    torch.testing.assert_close(result[f"{Q0}.weight"], base[f"{Q0}.weight"] + delta(tensors))


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_rounded_once(stored: torch.dtype, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base.safetensors", dtype=stored)
    tensors = lora(Q0)
    adapter = folder(tmp_path / "a", tensors)
    result = merged(tmp_path / "base.safetensors", adapter)
    exact = base[f"{Q0}.weight"].double() + 2 * tensors[B0].double() @ tensors[A0].double()
    assert torch.equal(result[f"{Q0}.weight"], exact.float().to(stored))
    report = checkpoint.bake(
        tmp_path / "base.safetensors", tmp_path / "again.safetensors", adapters=[adapter]
    )
    assert report.rows[0].notes == ("computed in float32, rounded once",)
    wide = merged(tmp_path / "base.safetensors", adapter, dtype=torch.float32, force=True)
    torch.testing.assert_close(wide[f"{Q0}.weight"], exact.float())


def test_weights_and_order(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base.safetensors")
    one, two = lora(Q0), lora(Q0, rank=3)
    folder(tmp_path / "one", one)
    folder(tmp_path / "two", two, r=3, lora_alpha=3, use_rslora=True)
    adapters = [tmp_path / "one", checkpoint.Adapter(tmp_path / "two", weight=-0.5)]
    result = merged(tmp_path / "base.safetensors", *adapters)
    expected = base[f"{Q0}.weight"] + delta(one) - 0.5 * delta(two, scale=3**0.5)
    torch.testing.assert_close(result[f"{Q0}.weight"], expected)


def test_a_folded_norm_is_merged_into(tmp_path: Path) -> None:
    g, v = torch.rand(6, 1) + 1, torch.randn(6, 4)
    safetensors.torch.save_file({f"{Q0}.weight_g": g, f"{Q0}.weight_v": v}, tmp_path / "base.safetensors")
    tensors = lora(Q0)
    adapter = folder(tmp_path / "a", tensors)
    report = checkpoint.bake(tmp_path / "base.safetensors", tmp_path / "out.safetensors", adapters=[adapter])
    assert report.rows[0].spelling == "legacy weight_norm + LORA"
    result = safetensors.torch.load_file(tmp_path / "out.safetensors")
    norm = g * v / v.norm(dim=1, keepdim=True)
    torch.testing.assert_close(result[f"{Q0}.weight"], norm + delta(tensors))


def test_modules_to_save_and_biases_replace(tmp_path: Path) -> None:
    write_base(tmp_path / "base.safetensors")
    saved = {f"{WRAPPER}head.weight": torch.ones(7, 4), f"{WRAPPER}{Q0}.base_layer.bias": torch.ones(6)}
    saved[f"{WRAPPER}head.original_module.weight"] = torch.zeros(7, 4)
    result = merged(tmp_path / "base.safetensors", folder(tmp_path / "a", {**lora(Q0), **saved}, bias="all"))
    assert torch.equal(result["head.weight"], torch.ones(7, 4))
    assert torch.equal(result[f"{Q0}.bias"], torch.ones(6))


def test_tied_tensors_change_together(tmp_path: Path) -> None:
    weight = torch.randn(7, 4)
    torch.save({"embed.weight": weight, "head.weight": weight}, tmp_path / "base.pt")
    tensors = {
        f"{WRAPPER}embed.lora_embedding_A": torch.randn(2, 7),
        f"{WRAPPER}embed.lora_embedding_B": torch.randn(4, 2),
    }
    adapter = folder(tmp_path / "a", tensors)
    report = checkpoint.bake(tmp_path / "base.pt", tmp_path / "out.pt", adapters=[adapter])
    result = torch.load(tmp_path / "out.pt")
    assert result["embed.weight"].data_ptr() == result["head.weight"].data_ptr()
    assert not torch.equal(result["embed.weight"], weight)
    assert any("embed.weight is tied to head.weight: both are changed" in note.text for note in report.notes)


def test_stacks_of_experts_by_their_shapes(tmp_path: Path) -> None:
    W = torch.randn(3, 6, 4)
    safetensors.torch.save_file({"mlp.experts.up": W}, tmp_path / "base.safetensors")
    A, B = torch.randn(6, 4), torch.randn(6, 6)
    tensors = {f"{WRAPPER}mlp.experts.lora_A.weight": A, f"{WRAPPER}mlp.experts.lora_B.weight": B}
    adapter = folder(tmp_path / "a", tensors, target_parameters=["experts.up"])
    result = merged(tmp_path / "base.safetensors", adapter)
    for expert in range(3):
        own = W[expert] + 2 * B[:, expert::3] @ A[2 * expert : 2 * expert + 2]
        torch.testing.assert_close(result["mlp.experts.up"][expert], own)


def test_a_dry_run_checks_everything_and_writes_nothing(tmp_path: Path) -> None:
    write_base(tmp_path / "base.safetensors")
    adapter = folder(tmp_path / "a", lora(Q0))
    report = checkpoint.bake(
        tmp_path / "base.safetensors", tmp_path / "out.safetensors", adapters=[adapter], dry_run=True
    )
    assert report.rows[0].keys == (f"{Q0}.weight", A0, B0)
    assert not (tmp_path / "out.safetensors").exists()


def test_links_in_a_cache_are_followed(tmp_path: Path) -> None:
    write_base(tmp_path / "base.safetensors")
    folder(tmp_path / "blobs", lora(Q0))
    (tmp_path / "a").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "a" / name).symlink_to(tmp_path / "blobs" / name)
    assert merged(tmp_path / "base.safetensors", tmp_path / "a")


# Refused --------------------------------------------------------------------------------------------------------------

Change = tuple[dict[str, Tensor | None], dict[str, Any], str]


def tensor(*shape: int) -> Tensor:
    return torch.ones(shape)


REFUSED: dict[str, Change] = {
    "a module that is not there": (
        lora("layers.7.q"),
        {},
        r"changes layers\.7\.q\.weight \(base_model\.model\.layers\.7\.q\.lora_A\.weight\), which is not in",
    ),
    "a saved head that is not there": ({f"{WRAPPER}score.weight": tensor(2, 4)}, {}, "changes score.weight"),
    "no partner": ({B0: None}, {}, "layers.0.q: the adapter has no lora_B.weight, only lora_A.weight"),
    "the rank of another": (
        {},
        {"r": 8},
        r"rank mismatch: lora_A.weight has shape 2x4, rank 2, and .* says r = 8",
    ),
    "factors that do not fit": (
        {B0: tensor(6, 3)},
        {},
        "lora_B.weight: expected shape 6x2 for a weight of 6x4, got 6x3",
    ),
    "a layer of another size": (
        {A0: tensor(2, 5)},
        {},
        "lora_A.weight: expected shape 2x4 for a weight of 6x4, got 2x5",
    ),
    "a saved head of another size": (
        {f"{WRAPPER}head.weight": tensor(9, 4)},
        {},
        "head.weight has shape .9, 4., and",
    ),
    "an unknown type": ({}, {"kind": "NEW"}, "the peft_type 'NEW' is not known here. Known are LORA"),
    "a type without weights": ({}, {"kind": "PREFIX_TUNING"}, "PREFIX_TUNING adds to what the model reads"),
    "no type": ({}, {"kind": None}, 'has no "peft_type"'),
    "an unknown switch": (
        {},
        {"use_new": True},
        "use_new is set to True, and how that changes a LORA adapter",
    ),
    "quantization-aware": ({}, {"use_qalora": True}, "use_qalora is set to True"),
    "a base that was changed": (
        {},
        {"init_lora_weights": "pissa_niter_4"},
        "training began by changing the base",
    ),
    "dora without magnitudes": (
        {},
        {"use_dora": True},
        "layers.0.q has no lora_magnitude_vector, and use_dora is true",
    ),
    "magnitudes without dora": (
        {f"{WRAPPER}{Q0}.lora_magnitude_vector": tensor(6)},
        {},
        "has a lora_magnitude_vector, and use_dora is false",
    ),
    "no number": ({}, {"lora_alpha": "16"}, "lora_alpha: expected a number, got '16'"),
    "a slow pattern": ({}, {"alpha_pattern": {"(a+)+b": 1}}, "is too complex to be tried"),
    "no pattern": ({}, {"alpha_pattern": {"(": 1}}, "is no pattern"),
    "nothing for it": ({A0: None, B0: None}, {}, "holds no tensor of a LORA adapter"),
}


@pytest.mark.parametrize(("tensors", "settings", "match"), REFUSED.values(), ids=REFUSED)
def test_refused(
    tensors: dict[str, Tensor | None], settings: dict[str, Any], match: str, tmp_path: Path
) -> None:
    write_base(tmp_path / "base.safetensors")
    given = {key: value for key, value in {**lora(Q0), **tensors}.items() if value is not None}
    given = given or {f"{WRAPPER}head.original_module.weight": tensor(1)}
    adapter = folder(tmp_path / "a", given, **{"kind": "LORA", **settings})
    with pytest.raises(CheckpointError, match=match):
        merged(tmp_path / "base.safetensors", adapter)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "base.safetensors"]


@pytest.mark.parametrize(("flag", "match"), [(False, "layers.0.o: whether its square weight"), (True, "")])
def test_a_square_weight_goes_the_way_that_the_others_show(flag: bool, match: str, tmp_path: Path) -> None:
    square, wide = torch.randn(4, 4), torch.randn(4, 6)  # inputs first
    safetensors.torch.save_file(
        {"layers.0.o.weight": square, f"{Q0}.weight": wide}, tmp_path / "base.safetensors"
    )
    tensors = {**lora(Q0), **lora("layers.0.o", sizes=(4, 4))}
    adapter = folder(tmp_path / "a", tensors, fan_in_fan_out=flag)
    if match:
        with pytest.raises(CheckpointError, match=match):
            merged(tmp_path / "base.safetensors", adapter)
        return
    result = merged(tmp_path / "base.safetensors", adapter)
    torch.testing.assert_close(result["layers.0.o.weight"], square + delta(tensors, "layers.0.o").T)
    torch.testing.assert_close(result[f"{Q0}.weight"], wide + delta(tensors).T)


def test_a_quantized_base_is_refused(tmp_path: Path) -> None:
    safetensors.torch.save_file(
        {f"{Q0}.weight": torch.ones(6, 4, dtype=torch.int8)}, tmp_path / "base.safetensors"
    )
    with pytest.raises(CheckpointError, match=r"layers\.0\.q\.weight: is torch\.int8, quantized"):
        merged(tmp_path / "base.safetensors", folder(tmp_path / "a", lora(Q0)))


@pytest.mark.parametrize("verify", [True, False])
def test_a_damaged_adapter_is_named(verify: bool, tmp_path: Path) -> None:
    write_base(tmp_path / "base.safetensors")
    right = folder(tmp_path / "right", lora(Q0))
    wrong = folder(tmp_path / "wrong", {**lora(Q0), A0: torch.full((2, 4), torch.nan)})
    with pytest.raises(
        CheckpointError, match=rf"wrong/adapter_model\.safetensors: {A0} has values that are not"
    ):
        merged(tmp_path / "base.safetensors", right, wrong, verify=verify)
    assert not (tmp_path / "merged.safetensors").exists()


def test_a_damaged_base_is_refused(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base.safetensors")
    base[f"{Q0}.weight"][3, 1] = torch.inf
    safetensors.torch.save_file(base, tmp_path / "base.safetensors")
    with pytest.raises(
        CheckpointError, match=r"layers\.0\.q\.weight: has values that are not finite, in the base or"
    ):
        merged(tmp_path / "base.safetensors", folder(tmp_path / "a", lora(Q0)))
    assert not (tmp_path / "merged.safetensors").exists()


@pytest.mark.parametrize("verify", [True, False])
def test_sums_that_overflow_are_warned_of(verify: bool, tmp_path: Path) -> None:
    write_base(tmp_path / "base.safetensors")
    adapter = folder(tmp_path / "a", {key: 1e30 * tensor for key, tensor in lora(Q0).items()})
    report = checkpoint.bake(
        tmp_path / "base.safetensors", tmp_path / "out.safetensors", adapters=[adapter], verify=verify
    )
    warned = [note.text for note in report.notes if note.level == "warning"]
    assert warned == ["layers.0.q.weight: has values that are not finite in float32"]


@pytest.mark.parametrize(
    ("weight", "match"),
    [(0.5, "IA3 does not add to layers.0.q.weight"), (float("nan"), "expected a finite weight")],
)
def test_a_weight_that_means_nothing_is_refused(weight: float, match: str, tmp_path: Path) -> None:
    write_base(tmp_path / "base.safetensors")
    adapter = folder(tmp_path / "a", {f"{WRAPPER}{Q0}.ia3_l": tensor(6, 1)}, kind="IA3")
    with pytest.raises(CheckpointError, match=match):
        merged(tmp_path / "base.safetensors", checkpoint.Adapter(adapter, weight))


def test_two_that_replace_one_tensor_are_refused(tmp_path: Path) -> None:
    write_base(tmp_path / "base.safetensors")
    saved = {f"{WRAPPER}head.weight": tensor(7, 4)}
    adapters = [folder(tmp_path / name, {**lora(Q0), **saved}) for name in ("one", "two")]
    with pytest.raises(CheckpointError, match=r"head\.weight: two adapters were trained on the whole tensor"):
        merged(tmp_path / "base.safetensors", *adapters)


FOLDERS = {
    "no folder": (lambda path: None, "expected the folder of a PEFT adapter, got nothing there"),
    "a file": (lambda path: path.write_text("x"), "expected the folder of a PEFT adapter, got a file"),
    "empty": (lambda path: path.mkdir(), "has no adapter_config.json: not the folder of a PEFT adapter"),
    "no weights": (
        lambda path: folder(path, {}),
        "the adapter has no weights: expected adapter_model.safetensors or",
    ),
    "settings that are a list": (
        lambda path: (path.mkdir(), (path / "adapter_config.json").write_text("[1]")),
        "expected settings by name, got a list",
    ),
    "settings that are no JSON": (
        lambda path: (path.mkdir(), (path / "adapter_config.json").write_text("{")),
        "is no JSON",
    ),
}


@pytest.mark.parametrize(("make", "match"), FOLDERS.values(), ids=FOLDERS)
def test_a_folder_that_is_none(make: Any, match: str, tmp_path: Path) -> None:
    write_base(tmp_path / "base.safetensors")
    make(tmp_path / "a")
    with pytest.raises(CheckpointError, match=match):
        merged(tmp_path / "base.safetensors", tmp_path / "a")


class Runs:
    def __reduce__(self) -> Any:
        return (print, ("ran",))


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_base(tmp_path / "base.safetensors")
    adapter = folder(tmp_path / "a", {})
    torch.save({"x": Runs()}, adapter / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="print"):
        merged(tmp_path / "base.safetensors", adapter)
    assert capsys.readouterr().out == ""


def test_the_adapter_is_never_written_to(tmp_path: Path) -> None:
    write_base(tmp_path / "base.safetensors")
    adapter = folder(tmp_path / "a", lora(Q0))
    target = adapter / "adapter_model.safetensors"
    before = target.read_bytes()
    with pytest.raises(CheckpointError, match="is the input itself"):
        checkpoint.bake(tmp_path / "base.safetensors", target, adapters=[adapter], force=True)
    assert target.read_bytes() == before
