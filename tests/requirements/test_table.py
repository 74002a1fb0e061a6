"""The committed table has the rows of ``table.py``, and results for just those that have tests."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import OPTION
from .table import ROWS, Outcome, document

HERE = Path(__file__).parent
DOCUMENT = HERE.parent.parent / "docs" / "requirements.md"
LINE = re.compile(r"^\| (\d+) \| (.+) \| (.+) \| (.+) \| (.+) \|$", re.M)


@pytest.fixture
def committed(request: pytest.FixtureRequest) -> str:
    """The committed document, unless this run writes it anew."""
    if request.config.getoption(OPTION, default=None) is not None:
        pytest.skip("this run writes the document")
    return DOCUMENT.read_text()


def rows_with_tests() -> Iterator[int]:
    for path in sorted(HERE.glob("test_row_*.py")):
        module = importlib.import_module(f"{__package__}.{path.stem}")
        for value in vars(module).values():
            marks = getattr(value, "pytestmark", []) if callable(value) else []
            yield from (mark.args[0] for mark in marks if mark.name == "row")


def test_the_document_has_every_row(committed: str) -> None:
    found = [(int(number), what, evidence) for number, what, evidence, _, _ in LINE.findall(committed)]
    assert found == [(number, entry.behaviour, entry.evidence) for number, entry in ROWS.items()]


def test_the_document_knows_which_rows_have_tests(committed: str) -> None:
    results = {int(number): cells for number, _, _, *cells in LINE.findall(committed)}
    assert {number for number, cells in results.items() if cells != ["-", "-"]} == set(rows_with_tests())


def test_the_document_around_the_rows_is_the_generators(committed: str) -> None:
    assert LINE.sub("", committed) == LINE.sub("", document([]))


@pytest.mark.parametrize(
    ("results", "cell"),
    [
        (["passed", "passed"], "pass (2)"),
        (["passed", "failed", "skipped"], "fail (1 of 2)"),
        (["passed", "skipped"], "1 not run"),
        ([], "-"),
    ],
)
def test_a_cell(results: list[str], cell: str) -> None:
    text = document([Outcome(3, "torch", result) for result in results])
    cells = {int(number): torchs for number, _, _, torchs, _ in LINE.findall(text)}
    assert cells == {number: cell if number == 3 else "-" for number in ROWS}
