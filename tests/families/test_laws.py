"""Every family obeys every law, on every kind of tensor."""

from __future__ import annotations

import pytest

from cases import CASE_LAWS, CASES, FIRST, ROWS, SLOW_KINDS, Case
from torchkiln.testing import check
from torchkiln.testing._catalogue import Row, names

SLOW = [pytest.mark.slow]


@pytest.mark.parametrize(
    "row",
    # The variants of a family have the cases below; that each is also traced by the compiler takes seconds.
    [
        pytest.param(row, id=row.label, marks=[] if row is FIRST[type(row.family).__name__] else SLOW)
        for row in ROWS
    ],
)
def test_every_law_holds_for_every_family(row: Row) -> None:
    report = check(row.family, row.example)
    assert report.ok, str(report)


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=case.id, marks=SLOW if case.kind in SLOW_KINDS else []) for case in CASES],
)
def test_the_laws_hold_for_every_kind_of_tensor(case: Case) -> None:
    report = check(case.row.family, case.example, laws=CASE_LAWS)
    assert report.ok, str(report)


def test_every_family_has_a_row() -> None:
    assert sorted(FIRST) == sorted(names())
