"""What a verb did or found: one row for each tensor, printable and JSON-able."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["Report", "Row"]

_DONE = {
    "bake": ("baked", "nothing to bake"),
    "restore": ("restored", "nothing to restore"),
    "summary": ("computed", "nothing is computed"),
}
_HEADINGS = ("tensor", "computed by", "api", "shape", "parameters", "rounding", "tied to")


@dataclass(frozen=True)
class Row:
    """One computed tensor of a model.

    Attributes:
        path: Where the tensor is, as in ``encoder.layers.0.weight``; the first place where a module is shared.
        what: What computes it, in the order of computation: ``weight_norm``, ``spectral_norm (hook)``,
            ``prune (L1Unstructured)``, ``Symmetric, orthogonal``.
        api: Who put it there: ``torchkiln``, ``torch`` (parametrize), ``hook`` (the older functions) or ``prune``.
        shape: Shape of the tensor, the computed one; after restore, of the original.
        keys: The state-dict keys that store it.
        parameters: Number of scalars in the parameters that store it, those of the steps included.
        tied: The paths of other tensors, plain or computed, that are stored in one of these parameters too.
        rounding: How far the baked tensor is from the computed one, relative to the largest entry; 0 for the same bits.
    """

    path: str
    what: str
    api: str
    shape: tuple[int, ...]
    keys: tuple[str, ...]
    parameters: int
    tied: tuple[str, ...] = ()
    rounding: float = 0.0


@dataclass(frozen=True)
class Report:
    """The rows of one call; false where there are none.

    Attributes:
        verb: The function that made it.
        rows: One for each tensor, in the order of ``model.named_modules()``.
        left: How many computed tensors the patterns left alone.

    Example:
        >>> Report("bake", (), left=2)
        Report(verb='bake', rows=(), left=2)
        >>> print(Report("bake", (), left=2))
        bake: nothing to bake; the patterns leave out all 2 computed tensors
    """

    verb: str
    rows: tuple[Row, ...]
    left: int = field(default=0)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as dicts, lists, strings and numbers."""
        lists = ("shape", "keys", "tied")
        rows = [asdict(row) | {name: list(getattr(row, name)) for name in lists} for row in self.rows]
        return {"verb": self.verb, "rows": rows, "left": self.left}

    def __str__(self) -> str:
        done, nothing = _DONE[self.verb]
        if not self.rows:
            reason = f"the patterns leave out all {self.left} computed tensors" if self.left else _NONE_FOUND
            return f"{self.verb}: {nothing}; {reason}"
        left = f", {self.left} left out by the patterns" if self.left else ""
        count = "1 tensor" if len(self.rows) == 1 else f"{len(self.rows)} tensors"
        return f"{self.verb}: {count} {done}{left}\n" + _table(self.rows)


_NONE_FOUND = "no tensor of the model is parametrized, normed by a hook or pruned"


def _cells(row: Row) -> tuple[str, ...]:
    shape = " x ".join(map(str, row.shape)) or "scalar"
    cells = (row.path, row.what, row.api, shape, f"{row.parameters:,}")
    return (*cells, f"{row.rounding:.1e}" if row.rounding else "", ", ".join(row.tied))


def _table(rows: tuple[Row, ...]) -> str:
    lines = [_HEADINGS, *map(_cells, rows)]
    # The last two say something only where a tensor was rounded or is tied.
    shown = [column for column in zip(*lines, strict=True) if any(column[1:])]
    lines = list(zip(*shown, strict=True))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, tuple("-" * width for width in widths))
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
