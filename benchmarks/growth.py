"""How baking grows with the file: time and peak memory at several sizes, beside ``cp`` and the plain script.

    python -m benchmarks.growth --sizes 0.5 2 8 --record

Three files of the size are on the disk at a time. The script needs twice the size in memory, and is left out where
there is less. ``--record`` puts the table into benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks._machine import machine
from benchmarks._report import described
from benchmarks._timing import Sample, Settings
from benchmarks.files import _Job, _source, write_normed

_BEGIN, _END = "<!-- recorded by benchmarks.growth -->\n", "<!-- end of growth -->\n"
_ROWS = _COLUMNS = 4096
_WAYS = {"bake": "torchkiln", "script": "script", "cp": "cp"}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__)
    parser.add_argument(
        "--sizes", type=float, nargs="+", default=[0.1, 0.2], metavar="GB", help="default: 0.1 0.2"
    )
    parser.add_argument("--blocks", type=int, default=5, help="turns for each size (default: 5)")
    parser.add_argument("--record", action="store_true", help="put the table into benchmarks/README.md")
    options = parser.parse_args(arguments)
    lines = [_line(["GB", *_WAYS.values(), "/ script", "/ cp", "peak, torchkiln", "peak, script"])]
    lines.append(_line(["---:"] * 8))
    print("\n".join(lines), flush=True)
    for size in options.sizes:
        with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".benchmarks-") as scratch:
            lines.append(_row(size, Path(scratch), blocks=options.blocks))
        print(lines[-1], flush=True)
    if options.record:
        _record(Path(__file__).with_name("README.md"), lines)


def _row(size: float, folder: Path, *, blocks: int) -> str:
    settings = Settings(quick=False, scratch=folder, blocks=blocks, block_seconds=0, case_seconds=0)
    layers = max(1, round(size * 1e9 / (4 * _ROWS * _COLUMNS)))
    write_normed(_source(folder), layers=layers, rows=_ROWS, columns=_COLUMNS)
    ways = [way for way in _WAYS if way != "script" or _free_memory() > 2.5e9 * size]
    # In turns, so that whatever else the machine does meets them alike.
    turns = [{way: _sample(folder, way, settings) for way in ways} for _ in range(blocks)]
    seconds = {way: statistics.median(turn[way].seconds for turn in turns) for way in ways}
    ratios = {
        way: statistics.median(turn["bake"].seconds / turn[way].seconds for turn in turns) for way in ways
    }
    peaks = {way: max(turn[way].peak_bytes or 0 for turn in turns) for way in ways}
    times = [f"{seconds[way]:.2f} s" if way in ways else "-" for way in _WAYS]
    over = [f"{ratios[way]:.2f}" if way in ways else "-" for way in ("script", "cp")]
    memory = [f"{peaks[way] / 1e6:,.0f} MB" if way in ways else "-" for way in ("bake", "script")]
    return _line([f"{size:g}", *times, *over, *memory])


def _sample(folder: Path, way: str, settings: Settings) -> Sample:
    try:
        return _Job(folder, way).sample(settings)
    finally:
        (folder / f"{way}.safetensors").unlink(missing_ok=True)


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
    found = f"\n{described(machine())}\n\n" + "\n".join(lines) + "\n\n"
    path.write_text(before + begin + found + end + after)


if __name__ == "__main__":
    main()
