"""Baking a checkpoint file, against the plain script that does it in memory and against ``cp``."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path

import torch

from benchmarks._timing import FLOOR, OURS, Case, Meter, Sample, Settings

GROUP = "files"
_ROWS = 1024


def cases(settings: Settings) -> Iterator[Case]:
    megabytes, columns = (2, 64) if settings.quick else (200, 2560)
    yield Case(
        GROUP,
        f"bake {megabytes} MB of weight-normed safetensors",
        "cp and fsync",
        partial(_contenders, settings.scratch, megabytes, columns),
        least_blocks=11,  # the time that a disk takes varies
    )


@dataclass
class Job:
    """One way to make a plain file of another, run in a process of its own so that its peak memory is its own."""

    source: Path
    way: str

    @property
    def target(self) -> Path:
        """The file that it makes, beside its source."""
        return self.source.with_name(f"{self.way}.safetensors")

    def remove(self) -> None:
        """Remove what it made."""
        self.target.unlink(missing_ok=True)
        shutil.rmtree(self.target.with_suffix(""), ignore_errors=True)

    def sample(self, _settings: Settings) -> Sample:
        """Make the file, and say how long that took in what memory."""
        self.remove()
        arguments = (self.way, self.source, self.target, torch.get_num_threads())
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks._file_job", *map(str, arguments)],
            cwd=Path(__file__).resolve().parent.parent,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        found = json.loads(done.stdout.splitlines()[-1])
        return Sample(found["seconds"], found["peak_bytes"])


def _contenders(folder: Path, megabytes: int, columns: int) -> dict[str, Meter]:
    layers = max(1, round(megabytes * 1e6 / (4 * _ROWS * columns)))
    source = folder / "normed.safetensors"
    write_normed(source, layers=layers, rows=_ROWS, columns=columns)
    return {OURS: Job(source, "bake"), "torch": Job(source, "script"), FLOOR: Job(source, "cp")}


def write_normed(path: Path, *, layers: int, rows: int, columns: int) -> None:
    """Write so many weight-normed layers, one after another: the file may be larger than memory."""
    shapes = {
        "parametrizations.weight.original0": (rows, 1),
        "parametrizations.weight.original1": (rows, columns),
    }
    shapes["bias"] = (rows,)
    fields, end = {}, 0
    for index in range(layers):
        for name, shape in shapes.items():
            begin, end = end, end + 4 * prod(shape)
            fields[f"layers.{index}.{name}"] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    header = json.dumps(fields).encode()
    header += b" " * (-len(header) % 8)
    torch.manual_seed(0)
    base = {name: torch.randn(shape) for name, shape in shapes.items()}
    base["parametrizations.weight.original0"] = torch.rand(rows, 1) + 0.5
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for index in range(layers):
            for tensor in base.values():
                file.write((tensor * (1 + index / 1000)).numpy().data)
