"""A base and an adapter to merge into it, for :mod:`benchmarks.growth`: a Llama of random bfloat16 weights, and a LoRA.

They are made with peft and transformers (tests/real/requirements-models.txt).
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_HIDDEN, _WIDE, _WORDS = 2048, 5632, 32000


def write(folder: Path, gigabytes: float) -> Path:
    """Write both in another process, whose memory goes with it, and return the file of the base."""
    script = f"from benchmarks.adapters import build; build({str(folder)!r}, {gigabytes})"
    root = Path(__file__).resolve().parent.parent
    subprocess.run([sys.executable, "-c", script], cwd=root, check=True)
    return folder / "base" / "model.safetensors"


def build(folder: str, gigabytes: float) -> None:
    """Write a base of about this size and its adapter; the smallest has one layer and 0.4 GB."""
    import peft
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    layer, words = 2 * (4 * _HIDDEN**2 + 3 * _HIDDEN * _WIDE), 2 * 2 * _WORDS * _HIDDEN
    config = LlamaConfig(
        vocab_size=_WORDS,
        hidden_size=_HIDDEN,
        intermediate_size=_WIDE,
        num_hidden_layers=max(1, round((gigabytes * 1e9 - words) / layer)),
        num_attention_heads=16,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(config)
    model.save_pretrained(Path(folder, "base"), max_shard_size="100GB")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=16, target_modules="all-linear"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    adapted.save_pretrained(Path(folder, "adapter"))
