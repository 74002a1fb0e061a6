"""Results as Markdown tables, which also read well on a terminal, and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks._timing import FLOOR, OURS, Result, Settings

_PEERS = ("torch", "geotorch", FLOOR)
_BEGIN, _END = "<!-- recorded by --record -->\n", "<!-- end of the record -->\n"
_UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns"))


def tables(results: Sequence[Result]) -> str:
    """Return one table for each group, in order."""
    grouped = groupby(results, key=lambda result: result.case.group)
    return "\n".join(f"### {group}\n\n{table(list(rows))}" for group, rows in grouped)


def table(results: Sequence[Result]) -> str:
    peers = [peer for peer in _PEERS if any(peer in result.samples for result in results)]
    memory = any(result.peak(OURS) is not None for result in results)
    head = ["case", OURS, *peers, *(f"/ {peer}" for peer in peers), "the floor"]
    rows = [_row(result, peers) for result in results]
    if memory:
        head[-1:-1] = [f"peak, {name}" for name in (OURS, "torch")]
        for row, result in zip(rows, results, strict=True):
            row[-1:-1] = [_memory(result.peak(name)) for name in (OURS, "torch")]
    return _markdown(head, rows)


def _row(result: Result, peers: Sequence[str]) -> list[str]:
    there = [peer in result.samples for peer in peers]
    times = [_time(result.median(peer)) if has else "" for peer, has in zip(peers, there, strict=True)]
    ratios = [_ratio(result.ratio(peer)) if has else "" for peer, has in zip(peers, there, strict=True)]
    return [result.case.name, _time(result.median(OURS)), *times, *ratios, result.case.floor]


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    # Words to the left, numbers to the right.
    left = {0, len(head) - 1}

    def line(cells: list[str]) -> str:
        pairs = enumerate(zip(cells, widths, strict=True))
        padded = [cell.ljust(width) if i in left else cell.rjust(width) for i, (cell, width) in pairs]
        return f"| {' | '.join(padded)} |\n"

    rule = ["-" * width if i in left else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return "".join(map(line, [head, rule, *rows]))


def _time(seconds: float) -> str:
    scale, unit = next((each for each in _UNITS if seconds >= each[0]), _UNITS[-1])
    return f"{seconds / scale:.3g} {unit}"


def _ratio(ratio: float) -> str:
    return f"{ratio:.0f}" if ratio >= 10 else f"{ratio:.2f}" if ratio >= 0.1 else f"{ratio:.2g}"


def _memory(peak: int | None) -> str:
    return "" if peak is None else f"{peak / 1e6:.0f} MB"


def to_json(results: Sequence[Result], settings: Settings, where: dict[str, Any]) -> dict[str, Any]:
    """Return everything measured; times in seconds, memory in bytes."""
    return {
        "schema": 1,
        "machine": where,
        "settings": {
            "quick": settings.quick,
            "blocks": settings.blocks,
            "block_seconds": settings.block_seconds,
        },
        "cases": [_case(result) for result in results],
    }


def _case(result: Result) -> dict[str, Any]:
    case = result.case
    return {
        "group": case.group,
        "case": case.name,
        "floor": case.floor,
        "contenders": {name: _contender(result, name) for name in result.samples},
        "ratios": {name: result.ratio(name) for name in result.samples if name != OURS},
    }


def _contender(result: Result, name: str) -> dict[str, Any]:
    seconds = [sample.seconds for sample in result.samples[name]]
    return {
        "median": result.median(name),
        "min": min(seconds),
        "repeats": len(seconds),
        "samples": seconds,
        "peak_bytes": result.peak(name),
    }


def record(readme: Path, results: Sequence[Result], where: dict[str, Any]) -> None:
    """Put the tables of this run in the place of those in ``readme``."""
    before, _, rest = readme.read_text().partition(_BEGIN)
    _, found, after = rest.partition(_END)
    if not found:
        raise SystemExit(
            f"{readme}: the lines {_BEGIN.strip()} and {_END.strip()} are missing; nothing was recorded."
        )
    readme.write_text(f"{before}{_BEGIN}\n{described(where)}\n\n{tables(results)}\n{_END}{after}")


def described(where: dict[str, Any]) -> str:
    """Return the machine in a sentence or two."""
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items() if version)
    return (
        f"{where['date'][:10]}, {where['cpu']}, {where['cores']} cores, {where['threads']} thread(s), "
        f"load {where['load']} at the start.\n{versions}."
    )
