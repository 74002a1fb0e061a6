"""The generated parts of ``docs/distributed.md`` are those of the operations that there are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from distributed.page import Outcome, rewritten
from distributed.test_operations import CASES, ENGINES

PAGE = Path(__file__).parent.parent.parent / "docs" / "distributed.md"


@pytest.mark.parametrize(("passed", "cell"), [(True, "pass"), (False, "**fail**")])
def test_a_cell(passed: bool, cell: str) -> None:
    page = "a\n<!-- operations: begin -->\nold\n<!-- operations: end -->\nb\n"
    text = rewritten(page, [Outcome("DDP", "train", "orthogonal", "torch", passed)], {})
    assert f"| DDP | train | - | - | - | - | {cell} | - |" in text
    assert "old" not in text
    assert rewritten(text, [], {}) == text


def test_the_page_has_every_operation_and_torchkiln_passes() -> None:
    table = (
        PAGE.read_text().partition("<!-- operations: begin -->")[2].partition("<!-- operations: end -->")[0]
    )
    rows = re.findall(rf"^\| ({'|'.join(ENGINES)}) \| (.+?) \| (\S.*) \|$", table, re.M)
    assert [(engine, operation) for engine, operation, _ in rows] == CASES
    assert {cell for *_, cells in rows for cell in cells.split(" | ")[1::2]} == {"pass"}
