"""What a check found, as a value and as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["Report", "Result", "matrix"]

_MARKS = {"passed": "+", "failed": "X", "skipped": "."}
_WIDEST = 44  # with thirteen laws the table then fits a terminal of 80


@dataclass(frozen=True)
class Result:
    """One law on one parametrization.

    Attributes:
        law: Its name.
        outcome: ``"passed"``, ``"failed"`` or ``"skipped"``.
        detail: How it failed, or why it does not apply.
    """

    law: str
    outcome: str
    detail: str = ""


@dataclass(frozen=True)
class Report:
    """What :func:`torchkiln.testing.check` found; ``str(report)`` is a table.

    Attributes:
        name: The parametrization.
        results: One for each law.
    """

    name: str
    results: tuple[Result, ...]

    @property
    def failed(self) -> tuple[Result, ...]:
        """The laws that are broken."""
        return tuple(result for result in self.results if result.outcome == "failed")

    @property
    def ok(self) -> bool:
        """Whether no law is broken."""
        return not self.failed

    def __str__(self) -> str:
        width = max((len(result.law) for result in self.results), default=0)
        rows = [
            f"  {result.law:{width}}  {result.outcome:7}  {result.detail}".rstrip() for result in self.results
        ]
        return "\n".join([self.name, *rows])


def matrix(reports: Iterable[Report]) -> str:
    """Return a table of parametrizations and laws, with the failures in full below it."""
    reports = list(reports)
    names = [_shortened(report.name) for report in reports]
    width = max(map(len, names), default=0)
    lines = _stairs([result.law for result in reports[0].results], indent=width + 1) if reports else []
    for name, report in zip(names, reports, strict=True):
        lines.append(f"{name:{width}} " + " ".join(_MARKS[result.outcome] for result in report.results))
    failures = [
        f"{report.name}: {result.law}: {result.detail}" for report in reports for result in report.failed
    ]
    return "\n".join([*lines, "", _tally(reports), *failures])


def _shortened(name: str) -> str:
    return name if len(name) <= _WIDEST else f"{name[: _WIDEST - 3]}..."


def _stairs(laws: list[str], *, indent: int) -> list[str]:
    """Return the laws one below the other, each with a line down to its column."""
    return [" " * indent + "| " * column + law for column, law in enumerate(laws)]


def _tally(reports: list[Report]) -> str:
    found = Counter(result.outcome for report in reports for result in report.results)
    words = {"passed": "holds", "skipped": "does not apply", "failed": "broken"}
    return "   ".join(f"{_MARKS[outcome]} {word}: {found[outcome]}" for outcome, word in words.items())
