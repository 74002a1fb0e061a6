"""One way of making a plain file from another one, timed in this process: ``WAY SOURCE TARGET THREADS``.

The source has weight norms, or an adapter in the folder ``adapter`` beside its own.

The clock runs from the call to the data being on the disk; starting Python and importing torch are not in it.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

Way = Callable[[Path, Path], None]


def _cp() -> Way:
    def run(source: Path, target: Path) -> None:
        subprocess.run(["cp", source, target], check=True)
        _sync(target)

    return run


def _bake() -> Way:
    from torchkiln import checkpoint

    def run(source: Path, target: Path) -> None:
        checkpoint.bake(source, target)  # it syncs by itself

    return run


def _script() -> Way:
    import torch
    from safetensors.torch import load_file, save_file

    def run(source: Path, target: Path) -> None:
        state = load_file(source)
        for key in [key for key in state if key.endswith("original1")]:
            prefix = key.removesuffix(".original1")
            value = torch._weight_norm(state.pop(key), state.pop(f"{prefix}.original0"), 0)
            state[prefix.replace("parametrizations.", "")] = value
        save_file(state, target)
        _sync(target)

    return run


def _adapter(source: Path) -> Path:
    return source.parent.parent / "adapter"


def _merge() -> Way:
    from torchkiln import checkpoint

    def run(source: Path, target: Path) -> None:
        checkpoint.bake(source, target, adapters=[_adapter(source)])

    return run


def _peft() -> Way:
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    def run(source: Path, target: Path) -> None:
        base = LlamaForCausalLM.from_pretrained(source.parent)
        merged = PeftModel.from_pretrained(base, _adapter(source)).merge_and_unload()
        merged.save_pretrained(target.with_suffix(""), max_shard_size="100GB")
        _sync(target.with_suffix("") / "model.safetensors")

    return run


WAYS = {"bake": _bake, "cp": _cp, "merge": _merge, "peft": _peft, "script": _script}


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def peak_bytes() -> int:
    """Return the most memory that this process had resident, its part of mapped files included."""
    status = Path("/proc/self/status")
    if status.exists():
        # Linux counts into ru_maxrss what the parent had resident when it started this process.
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main(way: str, source: str, target: str, threads: str) -> None:
    run = WAYS[way]()
    if way != "cp":
        import torch

        torch.set_num_threads(int(threads))
    os.sync()  # what others left to be written is not this way's to wait for
    start = time.perf_counter()
    run(Path(source), Path(target))
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "peak_bytes": None if way == "cp" else peak_bytes()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
