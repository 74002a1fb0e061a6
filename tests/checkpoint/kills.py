"""Killing a process at every moment of its writing: ``python -m tests.checkpoint.kills 200`` for a long row of it.

Each run forks a process that bakes a file, ends it with SIGKILL, and looks at what is there: the input has to be what
it was, the output what it was before or whole and right. Some processes stand still at a step until they are killed,
some are killed while they go on from there, some after a random time.
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
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from torchkiln import checkpoint

__all__ = ["STEPS", "TARGETS", "Folder", "Kill", "kill_at", "kills"]

# What is written, by its name, and the options that make it.
TARGETS: dict[str, dict[str, Any]] = {
    "out.safetensors": {},
    "out.pt": {},
    "shards": {"max_shard_size": 3_000_000},
    "dcp": {"container": "dcp"},
    "replaced.safetensors": {"force": True},
    "replaced.pt": {"force": True},
}

STEPS = ("writing", "syncing", "renaming", "renamed")
"""What happens to an output one after the other; the last is all there is to do once it has its name."""

# What the interpreter tells of, and what it is a step of.
_EVENTS = {
    "open": "writing",
    "os.mkdir": "writing",
    "os.link": "renaming",
    "os.rename": "renaming",
    "os.remove": "renamed",
}
How = Literal["halted", "going on", "at random"]


class Kill(NamedTuple):
    """How a process was killed, and what was found after it.

    Attributes:
        step: One of :data:`STEPS`, ``"done"`` or ``"at random"``.
        how: Whether it stood still.
        found: ``"absent"``, ``"whole"`` or ``"as before"``; anything else is a failure.
    """

    step: str
    how: How
    found: str


class Folder(NamedTuple):
    """A folder with an input, what its baking gives, how long that takes, and in what steps."""

    path: Path
    source: Path
    digest: str
    expected: dict[str, str]
    seconds: dict[str, float]
    steps: dict[str, list[str]]

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
        for name, options in TARGETS.items():
            checkpoint.bake(source, path / name, **options)
            expected[name] = digest(path / name)
            remove(path / name)
        folder = cls(path, source, digest(source), expected, seconds, {})
        for name in TARGETS:
            start = time.perf_counter()
            child, steps = _started(folder, name)
            with steps:
                folder.steps[name] = [line.strip() for line in steps]
            os.waitpid(child, 0)
            seconds[name] = time.perf_counter() - start
            remove(path / name)
        return folder


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


def kill_at(folder: Folder, name: str, step: str, *, how: How, dice: random.Random) -> Kill:
    """Bake in another process, kill it, and say what is there.

    Args:
        folder: Where.
        name: One of :data:`TARGETS`.
        step: One of :data:`STEPS`, of which it is any moment.
        how: ``"halted"`` at that moment, ``"going on"``, or ``"at random"``: after some time, whatever the step.
        dice: Which moment, or which time.
    """
    target = folder.path / name
    replaced = bool(TARGETS[name].get("force"))
    if replaced:
        target.write_bytes(b"precious")
    moments = [moment for moment, one in enumerate(folder.steps[name]) if one == step]
    moment = None if how == "at random" else dice.choice(moments)
    child, steps = _started(folder, name, halt=moment if how == "halted" else None)
    with steps:
        reached = "at random"
        if moment is None:
            time.sleep(dice.uniform(0, 1.3) * folder.seconds[name])
        else:
            lines = [line.strip() for line in islice(steps, moment + 1)]
            reached = lines[moment] if len(lines) > moment else "done"
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return Kill(reached, how, _found(folder, target, replaced=replaced))


def _started(folder: Folder, name: str, *, halt: int | None = None) -> tuple[int, Any]:
    """Fork a process that bakes, and return it with a stream of the steps that it comes to.

    Args:
        folder: Where.
        name: What it writes.
        halt: The moment to stand still at.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        return child, os.fdopen(reading)
    try:
        moments = iter(range(1 << 30))

        def reached(step: str) -> None:
            os.write(writing, f"{step}\n".encode())
            if next(moments) == halt:
                time.sleep(600)

        _bake_watched(folder, name, reached)
    finally:
        os._exit(0)


def _bake_watched(folder: Folder, name: str, reached: Callable[[str], None]) -> None:
    """Bake, and call `reached` with every step before it is made, and after each sync."""
    fsync, renamed = os.fsync, False

    def tell(step: str) -> None:
        nonlocal renamed
        reached("renamed" if renamed else step)
        renamed = renamed or step == "renaming"

    def heard(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _EVENTS and str(arguments[0]).startswith(str(folder.path)):
            tell(_EVENTS[event])

    def synced(descriptor: int) -> None:
        tell("syncing")
        fsync(descriptor)
        tell("syncing")

    os.fsync = synced
    sys.addaudithook(heard)
    checkpoint.bake(folder.source, folder.path / name, progress=lambda *_: tell("writing"), **TARGETS[name])
    tell("renamed")


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


def kills(folder: Folder, name: str, runs: int, *, seed: int) -> Iterator[Kill]:
    """Kill so many processes: a third halted and a third going on, spread over the steps, and a third at random.

    Args:
        folder: Where.
        name: One of :data:`TARGETS`.
        runs: How many.
        seed: Which moments.
    """
    dice, ways = random.Random(seed), ("halted", "going on", "at random")
    for run in range(runs):
        step = STEPS[run // len(ways) % len(STEPS)]
        yield kill_at(folder, name, step, how=ways[run % len(ways)], dice=dice)


def main(runs: str, layers: str = "24") -> None:
    """Kill so many processes, and print what was found."""
    torch.set_num_threads(1)
    found: Counter[tuple[str, ...]] = Counter()
    with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".kills-") as path:
        folder = Folder.make(Path(path), layers=int(layers))
        for seed, name in enumerate(TARGETS):
            share = len(range(seed, int(runs), len(TARGETS)))
            found.update((name, *kill) for kill in kills(folder, name, share, seed=seed))
    for row, count in sorted(found.items()):
        sys.stdout.write("{:22}{:12}{:12}{:12}".format(*row) + f"{count}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
