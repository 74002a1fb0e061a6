"""The generated parts of ``docs/distributed.md``: what works on torch and on torchkiln, and the memory it takes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from distributed.training import BUILT_INS
from parametrize.oracle import OURS, TORCH

__all__ = ["Outcome", "rewritten"]

IMPLEMENTATIONS = (TORCH.name, OURS.name)


HEADS = {
    "memory": "| built-in | whole plain model | held before | most that `bake` added | held after |\n"
    + "|---" * 5
    + "|"
}


@dataclass(frozen=True)
class Outcome:
    """How one operation went."""

    engine: str
    operation: str
    norm: str
    implementation: str
    passed: bool


def rewritten(page: str, outcomes: Sequence[Outcome], measured: Mapping[str, Iterable[str]]) -> str:
    """Return ``page`` with the parts between its marks, ``<!-- NAME: begin -->`` and ``end``, written anew."""
    parts = {"operations": _operations(outcomes)} if outcomes else {}
    parts |= {name: "\n".join([HEADS[name], *lines]) for name, lines in measured.items()}
    for name, text in parts.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.S)
        assert pattern.search(page), f"the page has no part {name!r}"
        page = pattern.sub(f"{begin}\n{text}\n{end}", page)
    return page


def _operations(outcomes: Sequence[Outcome]) -> str:
    passed = {(one.engine, one.operation, one.norm, one.implementation): one.passed for one in outcomes}
    heads = [f"{norm}: {name}" for norm in BUILT_INS for name in IMPLEMENTATIONS]
    lines = ["| engine | operation | " + " | ".join(heads) + " |", "|---" * (2 + len(heads)) + "|"]
    for engine, operation in dict.fromkeys((one.engine, one.operation) for one in outcomes):
        cells = [
            {True: "pass", False: "**fail**", None: "-"}[passed.get((engine, operation, norm, name))]
            for norm in BUILT_INS
            for name in IMPLEMENTATIONS
        ]
        lines.append(f"| {engine} | {operation} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
