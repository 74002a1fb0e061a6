"""Baking a checkpoint file, against the plain script that does it in memory and against ``cp``."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file

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
    _write(
        _source(folder),
        layers=max(1, round(megabytes * 1e6 / (4 * _ROWS * columns))),
        columns=columns,
    )
    return {OURS: _Job(folder, "bake"), "torch": _Job(folder, "script"), FLOOR: _Job(folder, "cp")}


def _source(folder: Path) -> Path:
    return folder / "normed.safetensors"


def _write(path: Path, *, layers: int, columns: int) -> None:
    torch.manual_seed(0)
    state: dict[str, torch.Tensor] = {}
    for index in range(layers):
        prefix = f"layers.{index}.parametrizations.weight"
        state[f"{prefix}.original0"] = torch.rand(_ROWS, 1) + 0.5
        state[f"{prefix}.original1"] = torch.randn(_ROWS, columns)
        state[f"layers.{index}.bias"] = torch.randn(_ROWS)
    save_file(state, path)
