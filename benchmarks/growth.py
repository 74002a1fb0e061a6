"""How making files grows with them: time and peak memory at several sizes, beside ``cp`` and what people do today.

    python -m benchmarks.growth --sizes 0.5 2 8 --record

There is a table of weight norms that are baked, beside the plain script, and one of a LoRA that is merged, beside
PEFT's ``merge_and_unload``; it needs peft and transformers (tests/real/requirements-models.txt). Three files of the
size are on the disk at a time. The script and PEFT need twice the size in memory, and are left out where there is
less. ``--record`` puts the tables into benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from benchmarks import adapters
from benchmarks._machine import machine
from benchmarks._report import described
from benchmarks._timing import Sample, Settings
from benchmarks.files import Job, write_normed

_BEGIN, _END = "<!-- recorded by benchmarks.growth -->\n", "<!-- end of growth -->\n"
_ROWS = _COLUMNS = 4096


@dataclass(frozen=True)
class _Table:
    """One table.

    Attributes:
        title: What is made of what.
        ways: How, in the order of their columns: torchkiln's way, the other one, and ``cp``.
        write: Writes the source of so many GB into a folder, and returns it.
    """

    title: str
    ways: Mapping[str, str]
    write: Callable[[Path, float], Path]

    @property
    def head(self) -> list[str]:
        """The first two lines."""
        ours, other, copy = self.ways.values()
        cells = ["GB", ours, other, copy, f"/ {other}", f"/ {copy}", f"peak, {ours}", f"peak, {other}"]
        return [_line(cells), _line(["---:"] * len(cells))]

    def row(self, size: float, folder: Path, *, blocks: int) -> str:
        """Measure a size, each way in its turn, so that whatever else the machine does meets them alike."""
        settings = Settings(quick=False, scratch=folder, blocks=blocks, block_seconds=0, case_seconds=0)
        source = self.write(folder, size)
        ours, other, copy = self.ways
        ways = [way for way in self.ways if way != other or _free_memory() > 2.5e9 * size]
        turns = [{way: _sample(source, way, settings) for way in ways} for _ in range(blocks)]

        def cell(way: str, form: str, number: Callable[[list[Sample]], float]) -> str:
            return form.format(number([turn[way] for turn in turns])) if way in ways else "-"

        def ratio(way: str) -> str:
            ratios = [turn[ours].seconds / turn[way].seconds for turn in turns if way in ways]
            return f"{statistics.median(ratios):.2f}" if ratios else "-"

        times = [cell(way, "{:.2f} s", _median_seconds) for way in self.ways]
        peaks = [cell(way, "{:,.0f} MB", _highest_megabytes) for way in (ours, other)]
        return _line([f"{size:g}", *times, ratio(other), ratio(copy), *peaks])


def _median_seconds(samples: list[Sample]) -> float:
    return statistics.median(sample.seconds for sample in samples)


def _highest_megabytes(samples: list[Sample]) -> float:
    return max((sample.peak_bytes or 0) / 1e6 for sample in samples)


def _normed(folder: Path, size: float) -> Path:
    layers = max(1, round(size * 1e9 / (4 * _ROWS * _COLUMNS)))
    write_normed(folder / "normed.safetensors", layers=layers, rows=_ROWS, columns=_COLUMNS)
    return folder / "normed.safetensors"


TABLES = {
    "norms": _Table(
        "Weight norms of float32, baked", {"bake": "torchkiln", "script": "script", "cp": "cp"}, _normed
    ),
    "adapter": _Table(
        "A LoRA of rank 16 on all linear layers of a Llama of bfloat16, merged",
        {"merge": "torchkiln", "peft": "PEFT", "cp": "cp"},
        adapters.write,
    ),
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__)
    parser.add_argument(
        "--sizes", type=float, nargs="+", default=[0.1, 0.2], metavar="GB", help="default: 0.1 0.2"
    )
    parser.add_argument("--blocks", type=int, default=5, help="turns for each size (default: 5)")
    parser.add_argument("--only", choices=TABLES, help="one of the tables")
    parser.add_argument("--record", action="store_true", help="put the tables into benchmarks/README.md")
    options = parser.parse_args(arguments)
    if options.record and options.only:
        parser.error("--record takes both tables: leave out --only")
    names = [options.only] if options.only else list(TABLES)
    if "adapter" in names and not (find_spec("peft") and find_spec("transformers")):
        parser.error(
            "peft and transformers are missing: install tests/real/requirements-models.txt, or --only norms"
        )
    lines = []
    for name in names:
        for line in _measured(TABLES[name], options.sizes, blocks=options.blocks):
            print(line, flush=True)
            lines.append(line)
    if options.record:
        _record(Path(__file__).with_name("README.md"), lines)


def _measured(table: _Table, sizes: Sequence[float], *, blocks: int) -> Iterator[str]:
    """Yield the lines of a table, each as soon as it is measured."""
    yield from (f"{table.title}:", "")
    yield from table.head
    for size in sizes:
        with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".benchmarks-") as scratch:
            row = table.row(size, Path(scratch), blocks=blocks)
        yield row
    yield ""


def _sample(source: Path, way: str, settings: Settings) -> Sample:
    job = Job(source, way)
    try:
        return job.sample(settings)
    finally:
        job.remove()


def _free_memory() -> float:
    """Return the bytes of memory that can be had without swapping; none where the system does not say."""
    status = Path("/proc/meminfo")
    lines = status.read_text().splitlines() if status.exists() else []
    return sum(float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _record(path: Path, lines: Sequence[str]) -> None:
    before, begin, rest = path.read_text().partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not end:
        raise SystemExit(
            f"{path}: the lines {_BEGIN.strip()} and {_END.strip()} are missing; nothing was recorded."
        )
    found = f"\n{described(machine())}\n\n" + "\n".join(lines).strip() + "\n\n"
    path.write_text(before + begin + found + end + after)


if __name__ == "__main__":
    main()
