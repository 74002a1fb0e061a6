"""The 26 behaviours, the decorator that ties a test to one of them, and the document made from a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest

from parametrize.oracle import OURS, TORCH, Impl

__all__ = ["IMPLEMENTATIONS", "ROWS", "Impl", "Outcome", "Row", "document", "fails_on", "row"]

IMPLEMENTATIONS = (TORCH.name, OURS.name)


@dataclass(frozen=True)
class Row:
    """One behaviour: what holds, and the public issues (numbers alone are pytorch/pytorch's)."""

    behaviour: str
    evidence: str


ROWS: Mapping[int, Row] = {
    1: Row("Deep copies are independent", "28594, 69413"),
    2: Row("Reads are pure", "57784, 68421"),
    3: Row("Recomputation gives the same gradients", "reproduced on torch 2.13"),
    4: Row("The cache is never stale", "geotorch 34"),
    5: Row("Writes are never lost", "180968, hifi-gan 145"),
    6: Row("Optimizers follow", "tutorials 2824"),
    7: Row("Tied weights stay tied, or registration refuses", "reproduced on torch 2.13"),
    8: Row("Orthogonal stays orthogonal", "spd_learn 33"),
    9: Row("Spectral norm is honest", "99149, 13505, 51800, 25092"),
    10: Row(
        "Any spelling loads into any spelling, strictly",
        "102999; transformers 26796, 27605, 30628, 31633, 32433, 33995; TTS 3177",
    ),
    11: Row("Saving writes the spelling asked for", "transformers 31633, speechbrain 3074, RAVE 304"),
    12: Row("Pickle, torch.save(model), copy.copy, spawn", "ZEST 4, ray 23894, geotorch 6"),
    13: Row(
        "A whole model is folded in one call, every spelling", "125064, vllm-omni 6927, executorch 22078"
    ),
    14: Row("One step of a stack is removed, disabled or switched", "PEFT 2665, 2710, 3304, 3340"),
    15: Row("One class per type and set of names", "torchtitan 2754"),
    16: Row("Type tables keep working", "74846, 74848, opacus 646"),
    17: Row("One evaluation per forward", "speechbrain 3074, torchlip 20"),
    18: Row("Recurrent networks train", "65688, 39311, 86457"),
    19: Row("Low precision", "80599, 114746, 191141; adapters 772; PEFT 3601"),
    20: Row("Meta device, to_empty, swap_tensors", "96409, 145529"),
    21: Row("Compile, export, ONNX", "113415, 167645"),
    22: Row("torch.func", "186565"),
    23: Row("Distributed", "DeepSpeed 1045"),
    24: Row("Nothing half done, causes named", "58488, 125064, ao 2062"),
    25: Row("No leaks", "reproduced on torch 2.13"),
    26: Row("Baking is checked", "verl 7285"),
}


@dataclass(frozen=True)
class Outcome:
    """What one test said: row, implementation, and "passed", "failed" or "skipped"."""

    row: int
    implementation: str
    result: str


def fails_on(
    implementation: str,
    reason: str,
    raises: type[BaseException] | tuple[type[BaseException], ...] = AssertionError,
) -> pytest.MarkDecorator:
    """Mark one parameter set of a ``row`` test as one that must fail on one implementation.

    The condition is looked at when the test is set up, because the mark is on a parameter and does not know it yet.
    """
    return pytest.mark.fails_on(implementation, reason, raises)


def row(
    number: int,
    issue: str,
    *,
    torch: str | None = None,
    torchkiln: str | None = None,
    raises: type[BaseException] | tuple[type[BaseException], ...] = AssertionError,
) -> Any:
    """Run a test of row ``number`` on both implementations; it must fail where a reason is given.

    Args:
        number: The row of ``ROWS``.
        issue: The public issue the test shows, such as "torchtitan 2754".
        torch: Why torch fails.
        torchkiln: Why torchkiln fails, so far.
        raises: What the failing implementation raises.
    """
    assert number in ROWS

    def mark(test: Any) -> Any:
        reasons = {TORCH: torch, OURS: torchkiln}
        params = [
            pytest.param(impl, marks=[fails_on(impl.name, reason, raises)] if reason else [])
            for impl, reason in reasons.items()
        ]
        test = pytest.mark.parametrize("impl", params, ids=str)(test)
        return pytest.mark.row(number, issue)(test)

    return mark


def document(outcomes: Iterable[Outcome]) -> str:
    """Return the Markdown table of ``ROWS`` with the results of ``outcomes``."""
    counts = Counter((outcome.row, outcome.implementation, outcome.result) for outcome in outcomes)
    lines = [
        f"| {number} | {entry.behaviour} | {entry.evidence} | "
        + " | ".join(_cell(counts, number, name) for name in IMPLEMENTATIONS)
        + " |"
        for number, entry in ROWS.items()
    ]
    return "\n".join([HEADING, *lines, ""])


def _cell(counts: Counter[tuple[int, str, str]], number: int, implementation: str) -> str:
    passed, failed, skipped = (
        counts[number, implementation, result] for result in ("passed", "failed", "skipped")
    )
    if failed:
        return f"fail ({failed} of {passed + failed})"
    if skipped:
        return f"{skipped} not run"
    return f"pass ({passed})" if passed else "-"


HEADING = """\
# What torch does not give

Each behaviour has tests in `tests/requirements`, which run on torch's own implementation and on torchkiln. A cell says
whether all of them pass, and how many there are or how many fail; `-` stands for a behaviour without a test so far.
Numbers alone are issues of pytorch/pytorch. This file is written by a test run:

```text
python -m pytest tests/requirements --requirements-table docs/requirements.md
```

| # | Behaviour | Evidence | torch | torchkiln |
|---|---|---|---|---|"""
