"""Baking a checkpoint file, against the plain script that does it in memory and against ``cp``."""

from __future__ import annotations

import json
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
class _Job:
    """One way to make the plain file, run in a process of its own so that its peak memory is its own."""

    folder: Path
    way: str

    def sample(self, _settings: Settings) -> Sample:
        target = self.folder / f"{self.way}.safetensors"
        target.unlink(missing_ok=True)
        arguments = (self.way, _source(self.folder), target, torch.get_num_threads())
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks._file_job", *map(str, arguments)],
            cwd=Path(__file__).resolve().parent.parent,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        found = json.loads(done.stdout)
        return Sample(found["seconds"], found["peak_bytes"])


def _contenders(folder: Path, megabytes: int, columns: int) -> dict[str, Meter]:
    layers = max(1, round(megabytes * 1e6 / (4 * _ROWS * columns)))
    write_normed(_source(folder), layers=layers, rows=_ROWS, columns=columns)
    return {OURS: _Job(folder, "bake"), "torch": _Job(folder, "script"), FLOOR: _Job(folder, "cp")}


def _source(folder: Path) -> Path:
    return folder / "normed.safetensors"


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
