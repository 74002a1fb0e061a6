"""What the command line shows of a report: a headline, one table line for each group of equal blocks, the notes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from torchkiln._cli._console import in_options, printable
from torchkiln.checkpoint import (
    Checked,
    FileReport,
    Folded,
    Inspection,
    Module,
    Note,
    Parametrized,
    Verification,
)

__all__ = ["inspection_table", "pattern", "show_file_report", "show_inspection", "show_verification"]

Row = TypeVar("Row")
Cells = tuple[str | Text, ...]

_MOST_LINES = 30
_LONGEST_WHOLE = 40
_MOST_PARTS = 8
_WRAPS = frozenset({"made by", "was", "shape", "holds"})
_RIGHT = frozenset({"count", "abs error", "rel error", "size"})


def show_inspection(screen: Console, file: Path, report: Inspection) -> None:
    """Print what a file holds."""
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in report.dtypes.items())
    tensors = _plural(report.tensors, "tensor") + (f" ({dtypes})" if dtypes else "")
    _say(screen, f"{file}: {report.container}, {_bytes(report.size_bytes)}, {tensors}")
    if report.rows:
        screen.print(Text("\nparametrized", style="bold"), inspection_table(report), sep="\n")
    if report.modules:
        screen.print(Text("\nmodules", style="bold"), _module_table(report), sep="\n")
        screen.print()
    _show_tied(screen, report.tied)
    assumed = [(row.name, text) for row in report.rows for text in row.assumptions]
    _show_notes(screen, (*_shared(assumed), *report.notes))


def show_file_report(screen: Console, out: Path, report: FileReport) -> None:
    """Print what was written to ``out``."""
    if report.rows:
        screen.print(_folded_table(report))
    said = [(row.name, text) for row in report.rows for text in (*row.assumptions, *row.notes)]
    _show_notes(screen, (*_shared(said), *report.notes))
    verbs = ("would be rewritten", "would pass") if report.dry_run else ("rewritten", "passed")
    written = f"{_plural(len(report.rows), 'tensor')} {verbs[0]}, {report.passed_through} {verbs[1]} through"
    _say(screen, f"{out}: {written}, {_bytes(report.bytes_written)}")


def show_verification(screen: Console, report: Verification) -> None:
    """Print the errors that a verification found, and its answer."""
    if report.rows:
        screen.print(_verification_table(report))
    _show_notes(screen, (*_reasons(report), *report.notes))
    tensors = _plural(len(report.rows), "tensor")
    if report.ok:
        screen.print(Text(f"ok: {tensors} verified", style="bold green"))
    else:
        failed = sum(not row.ok for row in report.rows)
        screen.print(Text(f"not ok: {failed} of {tensors}", style="bold red"))


def _reasons(report: Verification) -> Iterator[Note]:
    """Yield why rows are not ok, but for what the notes say anyway."""
    for row in report.rows:
        said = "; ".join(
            note.text for note in report.notes if (note.level, note.name) == ("warning", row.name)
        )
        if row.reason and row.reason != said:
            yield Note("warning", row.name, f"{row.name}: {row.reason}")


def inspection_table(report: Inspection) -> Table:
    """Return the parametrized tensors of a file, one line for each group of equal blocks."""
    groups = _grouped(report.rows, lambda row: (pattern(row.name), row.spelling, row.dtype, row.dim))

    def cells(rows: Sequence[Parametrized]) -> Cells:
        dim = "" if rows[0].dim is None else str(rows[0].dim)
        return (rows[0].spelling, _shapes([row.shape for row in rows]), rows[0].dtype, dim)

    return _table(("made by", "shape", "dtype", "dim"), groups, cells)


def _module_table(report: Inspection) -> Table:
    """Return what every module holds, one line for each group of equal blocks."""

    def shape_of(module: Module) -> tuple[object, ...]:
        return (
            pattern(module.name),
            *((part.name, part.made_by, part.dtype, len(part.shape)) for part in module.parts),
        )

    def cells(rows: Sequence[Module]) -> Cells:
        parts = [
            f"{parts[0].name} {_shapes([part.shape for part in parts])}"
            + ("" if parts[0].made_by == "plain" else f" ({parts[0].made_by})")
            for parts in zip(*(row.parts for row in rows), strict=True)
        ]
        more = f", and {len(parts) - _MOST_PARTS} more" if len(parts) > _MOST_PARTS else ""
        return (printable(", ".join(parts[:_MOST_PARTS]) + more), _bytes(sum(row.size_bytes for row in rows)))

    return _table(("holds", "size"), _grouped(report.modules, shape_of), cells, first="module")


def _show_tied(screen: Console, tied: Sequence[tuple[str, ...]]) -> None:
    for alike in _grouped(tied, lambda names: tuple(map(pattern, names))):
        more = f" (and {len(alike) - 1} more like it)" if len(alike) > 1 else ""
        _say(screen, f"tied: {' = '.join(alike[0])}{more}")


def _folded_table(report: FileReport) -> Table:
    """Return the tensors that a bake or a conversion rewrote."""
    groups = _grouped(report.rows, lambda row: (pattern(row.name), row.spelling, row.dtype))

    def cells(rows: Sequence[Folded]) -> Cells:
        return (rows[0].spelling, _shapes([row.shape for row in rows]), rows[0].dtype)

    return _table(("was", "shape", "dtype"), groups, cells)


def _verification_table(report: Verification) -> Table:
    """Return the largest errors: failures first and never merged, the rest one line for each group."""
    failed = [[row] for row in report.rows if not row.ok]
    passed = _grouped([row for row in report.rows if row.ok], lambda row: (pattern(row.name), row.spelling))

    def cells(rows: Sequence[Checked]) -> Cells:
        absolute, relative = max(row.max_abs_error for row in rows), max(row.max_rel_error for row in rows)
        verdict = Text("ok", style="green") if rows[0].ok else Text("NOT OK", style="bold red")
        return (rows[0].spelling, f"{absolute:.3g}", f"{relative:.3g}", verdict)

    return _table(("made by", "abs error", "rel error", "verdict"), [*failed, *passed], cells)


def pattern(name: str) -> str:
    """Return ``name`` with each numbered component as ``*``, which is also a pattern that the options accept.

    Example:
        >>> pattern("resblocks.11.convs1.2.weight")
        'resblocks.*.convs1.*.weight'
    """
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def _grouped(rows: Iterable[Row], key: Callable[[Row], object]) -> list[list[Row]]:
    groups: dict[object, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return list(groups.values())


def _table(
    headings: Sequence[str],
    groups: Sequence[Sequence[Row]],
    cells: Callable[[Sequence[Row]], Cells],
    *,
    first: str = "tensor",
) -> Table:
    """Return a line for each group: its name, how many tensors it stands for, its cells.

    Columns that would be empty are left out, and so is a dtype that is the same everywhere: 80 columns are few.
    """
    lines = [(_name(rows), f"x {len(rows)}" if len(rows) > 1 else "", *cells(rows)) for rows in groups]
    table = Table(
        box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold"
    )
    shown = []
    for heading, column in zip((first, "count", *headings), zip(*lines, strict=True), strict=True):
        if not any(column) or (heading == "dtype" and len(set(column)) == 1):
            continue
        shown.append(column[:_MOST_LINES])
        # What has no blank to wrap at keeps its width while anything else can give way; long names have to fold.
        whole = heading not in _WRAPS and max(map(len, column)) <= _LONGEST_WHOLE
        justify: Literal["right", "left"] = "right" if heading in _RIGHT else "left"
        table.add_column(heading, justify=justify, overflow="fold", no_wrap=whole)
    for line in zip(*shown, strict=True):
        table.add_row(*line)
    left = sum(map(len, groups[_MOST_LINES:]))
    if left:
        table.caption = f"... and {left} more; --json lists every one"
    return table


def _name(rows: Sequence[Any]) -> Text:
    name = (rows[0].name if len(rows) == 1 else pattern(rows[0].name)) or "(top)"
    return Text(printable(name), style="cyan")


def _shapes(shapes: Sequence[Sequence[int]]) -> str:
    """Return one shape for all: ``512 x 3-11`` where the last size runs from 3 to 11.

    Example:
        >>> _shapes([(512, 3), (512, 11)])
        '512 x 3-11'
    """
    if len({len(shape) for shape in shapes}) > 1:
        return "various"
    sizes = [(min(column), max(column)) for column in zip(*shapes, strict=True)]
    return " x ".join(str(low) if low == high else f"{low}-{high}" for low, high in sizes) or "scalar"


def _shared(remarks: Iterable[tuple[str, str]]) -> Iterator[Note]:
    """Turn pairs of a tensor's name and what is said of it into one note for all that it is said of."""
    for alike in _grouped(remarks, lambda remark: remark[1]):
        names = list(dict.fromkeys(pattern(name) if len(alike) > 1 else name for name, _ in alike))
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        yield Note("info", "", f"{', '.join(names[:3])}{more}: {alike[0][1]}")


def _show_notes(screen: Console, notes: Iterable[Note]) -> None:
    """Print the notes, those that differ by a number alone as one with a count."""
    for alike in _grouped(notes, lambda note: (note.level, re.sub(r"\d+", "*", note.text))):
        first = alike[0]
        more = f" (and {len(alike) - 1} more like it)" if len(alike) > 1 else ""
        kind = ("warning: ", "bold yellow") if first.level == "warning" else ("note: ", "bold")
        screen.print(Text.assemble(kind, printable(in_options(first.text)), more))


def _say(screen: Console, text: str) -> None:
    screen.print(Text(printable(text)))


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _bytes(count: int) -> str:
    """Return a file size as people read it.

    Example:
        >>> _bytes(1_234_567)
        '1.2 MB'
    """
    if count < 1000:
        return f"{count} bytes"
    power = min(int(math.log10(count)) // 3, 4)
    return f"{count / 1000**power:.1f} {('', 'kB', 'MB', 'GB', 'TB')[power]}"
