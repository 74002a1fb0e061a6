"""What the verbs report: frozen rows, a table to read, a dictionary for machines."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

__all__ = [
    "Checked",
    "FileReport",
    "Folded",
    "Inspection",
    "Module",
    "Note",
    "Parametrized",
    "Part",
    "Verification",
]


@dataclasses.dataclass(frozen=True)
class Note:
    """Something to know about a file or one of its tensors.

    Attributes:
        level: ``"warning"`` where values are or will be wrong, ``"info"`` otherwise.
        name: The tensor or key, empty for the file.
        text: One sentence.
    """

    level: Literal["info", "warning"]
    name: str
    text: str

    def __str__(self) -> str:
        return f"{'note' if self.level == 'info' else self.level}: {self.text}"


class _Report:
    """Shared by the reports, which are dataclasses."""

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON can hold it; numbers that are not finite become their names."""
        plain: dict[str, Any] = _plain(dataclasses.asdict(self))  # type: ignore[call-overload]  # each subclass is a dataclass
        return plain


@dataclasses.dataclass(frozen=True)
class Parametrized:
    """A parametrized tensor of a file.

    Attributes:
        name: The key of its plain value, with the names of the mappings around it.
        spelling: Style and steps, such as ``"legacy weight_norm"``.
        shape: Its shape.
        dtype: Its dtype.
        keys: The keys it is computed from.
        dim: The normalized dim; None for all dims at once, or where there is none, or where values must decide.
        assumptions: What names and shapes do not prove.
        blocked: Why it cannot be baked without being told more; empty if it can.
    """

    name: str
    spelling: str
    shape: tuple[int, ...]
    dtype: str
    keys: tuple[str, ...]
    dim: int | None
    assumptions: tuple[str, ...] = ()
    blocked: str = ""


@dataclasses.dataclass(frozen=True)
class Part:
    """A tensor of a module, as the model sees it.

    Attributes:
        name: Its name in the module.
        made_by: How the file spells it, ``"plain"`` if it is not parametrized.
        shape: Its shape.
        dtype: Its dtype.
    """

    name: str
    made_by: str
    shape: tuple[int, ...]
    dtype: str


@dataclasses.dataclass(frozen=True)
class Module:
    """What a file holds of one module.

    Attributes:
        name: Its path, with the names of the mappings around it; empty for the model itself.
        parts: Its tensors.
        size_bytes: What they take in the file, originals and state instead of what is computed from them.
    """

    name: str
    parts: tuple[Part, ...]
    size_bytes: int


@dataclasses.dataclass(frozen=True)
class Inspection(_Report):
    """What :func:`inspect` found.

    Attributes:
        path: The file.
        container: ``"safetensors"``, ``"sharded safetensors"``, ``"torch zip"``, ``"torch legacy"`` or ``"dcp"``.
        size_bytes: Its size.
        metadata: The text that safetensors files carry.
        tensors: How many tensors it holds.
        dtypes: How many of each dtype.
        rows: The parametrized ones.
        notes: What else to know.
        modules: What there is of each module.
        tied: Names of tensors that are one tensor, a tuple for each.
    """

    path: str
    container: str
    size_bytes: int
    metadata: dict[str, str]
    tensors: int
    dtypes: dict[str, int]
    rows: tuple[Parametrized, ...]
    notes: tuple[Note, ...] = ()
    modules: tuple[Module, ...] = ()
    tied: tuple[tuple[str, ...], ...] = ()

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} {dtype}" for dtype, count in self.dtypes.items())
        head = f"{self.path}: {self.container}, {self.size_bytes:,} bytes, {_count(self.tensors)}"
        head += f" ({kinds})" if kinds else ""
        cells = [
            (r.name, r.spelling, _size(r.shape), r.dtype, _dim(r.dim), " ".join(r.keys)) for r in self.rows
        ]
        table = _table(("tensor", "spelling", "shape", "dtype", "dim", "keys"), cells)
        return _text(head, table, (*_said(self.rows), *self.notes))


@dataclasses.dataclass(frozen=True)
class Folded:
    """A tensor that was rewritten.

    Attributes:
        name: The key of its plain value, with the names of the mappings around it.
        spelling: What it was before.
        shape: Its shape.
        dtype: Its dtype.
        keys: The keys it was read from.
        written: The keys that took their place.
        dim: The normalized dim; None for all dims at once or where there is none.
        assumptions: What the file does not prove.
        notes: How it was computed, where that is not plain.
    """

    name: str
    spelling: str
    shape: tuple[int, ...]
    dtype: str
    keys: tuple[str, ...]
    written: tuple[str, ...]
    dim: int | None = None
    assumptions: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class FileReport(_Report):
    """What :func:`bake` or :func:`convert` wrote.

    Attributes:
        source: The file read.
        target: The file written.
        rows: The tensors rewritten.
        passed_through: How many tensors were written as they were.
        notes: What else to know; level ``"warning"`` means wrong values.
        bytes_written: The size of the new file.
        dry_run: Whether nothing was written, and the rest is what would be.
    """

    source: str
    target: str
    rows: tuple[Folded, ...]
    passed_through: int
    notes: tuple[Note, ...]
    bytes_written: int
    dry_run: bool = False

    def __str__(self) -> str:
        head = (
            f"{self.source} -> {self.target}: {_count(len(self.rows))} rewritten, "
            f"{self.passed_through} kept as they were, {self.bytes_written:,} bytes"
        )
        cells = [
            (r.name, r.spelling, _size(r.shape), r.dtype, _dim(r.dim), " ".join(r.written)) for r in self.rows
        ]
        table = _table(("tensor", "was", "shape", "dtype", "dim", "written"), cells)
        return _text(head, table, (*_said(self.rows), *self.notes))


@dataclasses.dataclass(frozen=True)
class Checked:
    """A tensor that was recomputed or compared.

    Attributes:
        name: Its key, with the names of the mappings around it where those matter.
        spelling: How the file spells it, ``"plain"`` if it is not parametrized.
        max_abs_error: Largest difference of an element.
        max_rel_error: That difference over the largest magnitude in the tensor.
        ok: Whether the difference is rounding and nothing else is wrong.
        reason: Why not; empty if it is.
    """

    name: str
    spelling: str
    max_abs_error: float
    max_rel_error: float
    ok: bool
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Verification(_Report):
    """What :func:`verify` found.

    Attributes:
        rows: One for each tensor checked.
        notes: What else to know.
        ok: Whether every row is.
    """

    rows: tuple[Checked, ...]
    notes: tuple[Note, ...]
    ok: bool

    def __str__(self) -> str:
        bad = sum(not row.ok for row in self.rows)
        largest = max((row.max_rel_error for row in self.rows), default=0.0)
        head = f"{_count(len(self.rows))} checked, {bad} wrong; largest relative error {largest:.3g}"
        cells = [
            (r.name, r.spelling, f"{r.max_abs_error:.3g}", f"{r.max_rel_error:.3g}", r.reason or "ok")
            for r in self.rows
        ]
        return _text(head, _table(("tensor", "spelling", "abs", "rel", "verdict"), cells), self.notes)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _said(rows: Iterable[Parametrized | Folded]) -> list[str]:
    """What rows assume and note, once for each text with the tensors it is said of."""
    names: dict[str, list[str]] = {}
    for row in rows:
        for text in (*row.assumptions, *(row.notes if isinstance(row, Folded) else ())):
            names.setdefault(text, []).append(row.name)
    return [
        f"note: {said[0] if len(said) == 1 else f'{len(said)} tensors'}: {text}"
        for text, said in names.items()
    ]


def _count(tensors: int) -> str:
    return f"{tensors} tensor" + "s" * (tensors != 1)


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _dim(dim: int | None) -> str:
    return "-" if dim is None else str(dim)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    if not rows:
        return []
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (header, *rows)
    ]


def _text(head: str, table: Iterable[str], notes: Iterable[object]) -> str:
    return "\n".join([head, *table, *map(str, notes)])
