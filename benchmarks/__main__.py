"""The one command: ``python -m benchmarks``, from the root of the repository."""

from __future__ import annotations

import argparse
import fnmatch
import gc
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

import torch

from benchmarks import (
    batched,
    families,
    files,
    models,
    norms,
    orthogonal,
    orthogonal_ways,
    reads,
    registration,
)
from benchmarks._libraries import geotorch
from benchmarks._machine import machine
from benchmarks._report import described, record, table, to_json
from benchmarks._timing import Case, Result, Settings, measure

GROUPS = (reads, registration, orthogonal, orthogonal_ways, batched, families, norms, models, files)
README = Path(__file__).with_name("README.md")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.record and (options.quick or options.only or options.blocks):
        parser.error("--record takes the whole run: leave out --quick, --only and --blocks")
    # In the current folder rather than in /tmp, which is memory on many machines.
    with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".benchmarks-") as scratch:
        settings = _settings(Path(scratch), quick=options.quick, blocks=options.blocks)
        chosen = [case for group in GROUPS for case in group.cases(settings) if _matches(case, options.only)]
        if not chosen:
            parser.error(f"no case matches {' or '.join(options.only)}; --list shows them all")
        if options.list:
            print("\n".join(case.path for case in chosen))
        else:
            torch.set_num_threads(options.threads)
            _report(chosen, settings, options)


def _report(chosen: Sequence[Case], settings: Settings, options: argparse.Namespace) -> None:
    where = machine()
    print(_heading(described(where)))
    results = list(_run(chosen, settings))
    if options.json:
        options.json.write_text(json.dumps(to_json(results, settings, where), indent=1) + "\n")
    if options.record:
        record(README, results, where)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure torchkiln beside torch, geotorch and the least work there is, and print the ratios.",
    )
    parser.add_argument(
        "--only",
        metavar="PATTERN",
        action="append",
        default=[],
        help="cases whose group/name has it; * and ? work",
    )
    parser.add_argument("--threads", type=int, default=1, help="torch's threads (default: 1)")
    parser.add_argument("--quick", action="store_true", help="small sizes and short blocks, in seconds")
    parser.add_argument("--blocks", type=int, help="blocks for each contender, at most")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write everything measured to FILE")
    parser.add_argument("--record", action="store_true", help="put the tables into benchmarks/README.md")
    parser.add_argument("--list", action="store_true", help="name the cases and stop")
    return parser


def _settings(scratch: Path, *, quick: bool, blocks: int | None) -> Settings:
    # Many short blocks rather than a few long ones: on a busy machine a long block is always interrupted.
    if quick:
        return Settings(
            quick=True, scratch=scratch, blocks=blocks or 3, block_seconds=0.002, case_seconds=0.2
        )
    return Settings(quick=False, scratch=scratch, blocks=blocks or 101, block_seconds=0.001, case_seconds=2.0)


def _matches(case: Case, patterns: Sequence[str]) -> bool:
    return not patterns or any(fnmatch.fnmatchcase(case.path, f"*{pattern}*") for pattern in patterns)


def _heading(text: str) -> str:
    missing = (
        ""
        if geotorch()
        else "geotorch is not installed: its column is left out. It comes with the extra `bench`.\n"
    )
    return f"{text}\n{missing}Ratios are torchkiln's time over the other's: below 1 is faster.\n"


def _run(chosen: Sequence[Case], settings: Settings) -> Iterator[Result]:
    """Measure the cases and print each group's table when it is complete."""
    start = time.perf_counter()
    gc.collect()
    gc.freeze()  # what is loaded by now need not be walked before each block
    for group, members in groupby(enumerate(chosen, 1), key=lambda numbered: numbered[1].group):
        rows = []
        for number, case in members:
            _progress(f"{number}/{len(chosen)}  {case.path}")
            rows.append(measure(case, settings))
        _progress("")
        print(f"### {group}\n\n{table(rows)}", flush=True)
        yield from rows
    gc.unfreeze()
    print(f"{len(chosen)} cases in {time.perf_counter() - start:.0f} s")


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
