"""What a check found, as a value and as text."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["Report", "Result", "matrix"]

_MARKS = {"passed": "+", "failed": "FAIL", "skipped": "."}


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
    laws = [result.law for result in reports[0].results] if reports else []
    width = max((len(report.name) for report in reports), default=0)
    lines = [" " * width + "  " + "  ".join(laws)]
    for report in reports:
        marks = (f"{_MARKS[result.outcome]:^{len(result.law)}}" for result in report.results)
        lines.append(f"{report.name:{width}}  " + "  ".join(marks).rstrip())
    failures = [
        f"{report.name}: {result.law}: {result.detail}" for report in reports for result in report.failed
    ]
    lines += ["", "+ holds   . does not apply", *failures]
    return "\n".join(lines)
