"""Merging a LoRA into a base, against PEFT's own merge and against ``cp``: ``python -m benchmarks.adapters``.

Not part of the one command, for it needs peft and transformers (tests/real/requirements-models.txt) and gigabytes of
disk. The base is a Llama of random bfloat16 weights, the adapter a LoRA of rank 16 on all its linear layers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WAYS = ("merge", "peft", "cp")
_HIDDEN = 2048


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.adapters", description=__doc__)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[500, 2000], help="sizes of the base")
    parser.add_argument("--rounds", type=int, default=3, help="how often each way takes its turn")
    options = parser.parse_args(arguments)
    print("| base | way | seconds | / cp | peak memory |\n|---|---|---|---|---|")
    for megabytes in options.megabytes:
        with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".benchmarks-") as scratch:
            source = write(Path(scratch), megabytes)
            rounds = [{way: run(way, source) for way in WAYS} for _ in range(options.rounds)]
            print("\n".join(rows(source.stat().st_size, rounds)), flush=True)


def rows(size: int, rounds: Sequence[dict[str, Any]]) -> list[str]:
    """Return a row for each way: medians, and the median of the ratios within each round."""
    lines = []
    for way in WAYS:
        seconds = statistics.median(one[way]["seconds"] for one in rounds)
        ratio = statistics.median(one[way]["seconds"] / one["cp"]["seconds"] for one in rounds)
        peaks = [one[way]["peak_bytes"] for one in rounds if one[way]["peak_bytes"]]
        peak = f"{max(peaks) / 1e6:,.0f} MB" if peaks else "-"
        lines.append(f"| {size / 1e6:,.0f} MB | {way} | {seconds:.2f} | {ratio:.2f} | {peak} |")
    return lines


def run(way: str, source: Path) -> Any:
    """Merge in a process of its own, so that its peak memory is its own."""
    target = source.with_name(f"{way}.safetensors")
    words = [sys.executable, "-m", "benchmarks._file_job", way, str(source), str(target), "1"]
    done = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    for written in (target, target.with_suffix("")):
        subprocess.run(["rm", "-rf", str(written)], check=True)
    return json.loads(done.stdout.splitlines()[-1])


def write(folder: Path, megabytes: int) -> Path:
    """Write the base and the adapter in another process, whose memory goes with it."""
    script = f"from benchmarks.adapters import build; build({str(folder)!r}, {megabytes})"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)
    return folder / "base" / "model.safetensors"


def build(folder: str, megabytes: int) -> None:
    import peft
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    layer = 2 * (4 * _HIDDEN**2 + 3 * _HIDDEN * 5632)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=_HIDDEN,
        intermediate_size=5632,
        num_hidden_layers=max(1, round((megabytes * 1e6 - 4 * 32000 * _HIDDEN) / layer)),
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


if __name__ == "__main__":
    main()
