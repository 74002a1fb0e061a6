"""Killing a process at a random moment of its writing: ``python -m tests.checkpoint.kills 200`` for a long row of it.

Each run forks a process that bakes a file, ends it with SIGKILL after a random time, and looks at what is there: the
input has to be what it was, the output what it was before or whole and right.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch

from torchkiln import checkpoint

__all__ = ["TARGETS", "Folder", "kill_one"]

# What is written, by its name, and the options that make it.
TARGETS: dict[str, dict[str, Any]] = {
    "out.safetensors": {},
    "out.pt": {},
    "shards": {"max_shard_size": 3_000_000},
    "dcp": {"container": "dcp"},
    "replaced.safetensors": {"force": True},
}


class Folder(NamedTuple):
    """A folder with an input, what its baking gives, and how long that takes."""

    path: Path
    source: Path
    digest: str
    expected: dict[str, str]
    seconds: dict[str, float]

    @classmethod
    def make(cls, path: Path, *, layers: int) -> Folder:
        """Write an input of so many megabytes, and bake it once into each target."""
        torch.manual_seed(0)
        state: dict[str, torch.Tensor] = {}
        for index in range(layers):
            state[f"{index}.weight_g"] = torch.rand(512, 1)
            state[f"{index}.weight_v"] = torch.randn(512, 512)
        source = path / "in.pt"
        torch.save(state, source)
        expected, seconds = {}, {}
        checkpoint.bake(source, path / "first.pt")  # which loads what later ones find loaded
        remove(path / "first.pt")
        for name, options in TARGETS.items():
            start = time.perf_counter()
            checkpoint.bake(source, path / name, **options)
            seconds[name] = time.perf_counter() - start
            expected[name] = digest(path / name)
            remove(path / name)
        return cls(path, source, digest(source), expected, seconds)


def digest(path: Path) -> str:
    """Return a digest of a file, or of the files in a directory with their names."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    parts = [
        (file.name if path.is_dir() else "", hashlib.sha256(file.read_bytes()).hexdigest()) for file in files
    ]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def remove(path: Path) -> None:
    """Remove a file or a directory, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def kill_one(folder: Folder, name: str, part: float) -> str:
    """Bake in another process, kill it after a part of the usual time, and say what is there.

    Returns:
        ``"absent"``, ``"whole"`` or ``"as before"``; anything else is a failure.
    """
    target = folder.path / name
    replaced = bool(TARGETS[name].get("force"))
    if replaced:
        target.write_bytes(b"precious")
    child = os.fork()
    if child == 0:
        try:
            checkpoint.bake(folder.source, target, **TARGETS[name])
        finally:
            os._exit(0)
    time.sleep(part * folder.seconds[name])
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return _found(folder, target, replaced=replaced)


def _found(folder: Folder, target: Path, *, replaced: bool) -> str:
    try:
        if digest(folder.source) != folder.digest:
            return "the input was changed"
        if not target.exists():
            return "lost" if replaced else "absent"
        if replaced and target.read_bytes() == b"precious":
            return "as before"
        return "whole" if digest(target) == folder.expected[target.name] else "broken"
    finally:
        remove(target)
        # What a killed process leaves is hidden, and says whose it is.
        for left in folder.path.glob(f".{target.name}.*.tmp"):
            remove(left)


def main(runs: str, layers: str = "24") -> None:
    """Kill so many processes, and print what was found."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".kills-") as path:
        folder = Folder.make(Path(path), layers=int(layers))
        names = list(TARGETS)
        dice = random.Random(0)
        found = Counter(
            (name := names[run % len(names)], kill_one(folder, name, dice.uniform(0, 2)))
            for run in range(int(runs))
        )
    for (name, what), count in sorted(found.items()):
        sys.stdout.write(f"{name:22} {what:10} {count}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
