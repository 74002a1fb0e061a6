"""Adapter folders and bases, written by hand: what PEFT would save, without PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from torchkiln import checkpoint

__all__ = ["BASE", "WRAPPER", "folder", "lora", "merged", "write_base"]

WRAPPER = "base_model.model."

BASE = {
    "embed.weight": (7, 4),
    "layers.0.q.weight": (6, 4),
    "layers.0.q.bias": (6,),
    "layers.0.conv.weight": (6, 4, 3, 3),
    "layers.1.q.weight": (6, 4),
    "head.weight": (7, 4),
}


def write_base(path: Path, *, prefix: str = "", dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A base of random values, as safetensors or as a torch file."""
    tensors = {prefix + name: torch.randn(shape).to(dtype) for name, shape in BASE.items()}
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(tensors, path)
    else:
        torch.save(tensors, path)
    return tensors


def lora(*modules: str, rank: int = 2, sizes: tuple[int, int] = (6, 4)) -> dict[str, Tensor]:
    """The tensors of a LoRA on linear layers."""
    outputs, inputs = sizes
    found: dict[str, Tensor] = {}
    for module in modules:
        found[f"{WRAPPER}{module}.lora_A.weight"] = torch.randn(rank, inputs)
        found[f"{WRAPPER}{module}.lora_B.weight"] = torch.randn(outputs, rank)
    return found


def folder(
    path: Path,
    tensors: dict[str, Tensor],
    *,
    kind: str | None = "LORA",
    suffix: str = "safetensors",
    **settings: Any,
) -> Path:
    """The folder of an adapter."""
    path.mkdir()
    defaults = {"r": 2, "lora_alpha": 4} if kind == "LORA" else {}
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": kind, **defaults, **settings}))
    if suffix == "bin":
        torch.save(tensors, path / "adapter_model.bin")
    elif tensors:
        safetensors.torch.save_file(tensors, path / "adapter_model.safetensors")
    return path


def merged(base: Path, *adapters: Path | checkpoint.Adapter, **options: Any) -> dict[str, Tensor]:
    """What baking the base with the adapters writes."""
    target = base.with_name("merged.safetensors")
    checkpoint.bake(base, target, adapters=adapters, **options)
    return safetensors.torch.load_file(target)
