"""The examples in torch's own docstrings run on torchkiln, and print what they say."""

from __future__ import annotations

import contextlib
import inspect
import io
import re
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

import torchkiln

from .oracle import TORCH

SOURCES = {
    f"{module.__name__.rpartition('.')[2]}.{name}": getattr(module, name)
    for module in (TORCH.P, TORCH.N)
    for name in module.__all__
}


@dataclass
class Part:
    """Some lines of code and what they print."""

    code: list[str] = field(default_factory=list)
    output: list[str] = field(default_factory=list)
    compared: bool = True


def prompts(docstring: str) -> list[Part]:
    """Read the ``>>>`` lines of a docstring; a body may be continued by ``>>>`` as well as by ``...``."""
    parts = [Part()]
    inside = compared = False
    for line in inspect.cleandoc(docstring).splitlines():
        prompt = re.match(r"\s*(>>>|\.\.\.) ?(.*)", line)
        if prompt and (inside or prompt[1] == ">>>"):
            if not inside:
                compared = True
            if parts[-1].output:
                parts.append(Part(compared=compared))
            inside = True
            compared = compared and "IGNORE_WANT" not in line
            parts[-1].code.append(prompt[2])
            parts[-1].compared = compared
        elif inside and line.strip() and line.startswith(" "):
            parts[-1].output.append(line.strip())
        elif line.strip():
            inside = False
    return [part for part in parts if part.code]


def blocks(docstring: str) -> Iterator[str]:
    """Yield the ``code-block`` directives of a docstring that are runnable statements."""
    for block in re.findall(
        r"\.\. code-block:: python\n\n((?:[ ]+.*\n|\n)+)", inspect.cleandoc(docstring) + "\n"
    ):
        if not block.lstrip().startswith("def "):
            yield textwrap.dedent(block)


def run(part: Part, namespace: dict[str, Any]) -> list[str]:
    """Run a part as the interactive interpreter does, and return the lines it prints."""
    import ast

    tree = ast.parse("\n".join(part.code))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for statement in tree.body:
            exec(compile(ast.Interactive([statement]), "<docstring>", "single"), namespace)
    return [line.strip() for line in printed.getvalue().splitlines() if line.strip()]


def echo(value: object) -> None:
    """Show a value as the interactive interpreter does, but do not bind it to ``_``."""
    if value is not None:
        sys.stdout.write(f"{value!r}\n")


EXAMPLES = {name: prompts(source.__doc__) for name, source in SOURCES.items() if ">>>" in source.__doc__}


def test_the_examples_are_found() -> None:
    assert sorted(EXAMPLES) == [
        "parametrizations.orthogonal",
        "parametrizations.spectral_norm",
        "parametrizations.weight_norm",
        "parametrize.register_parametrization",
    ]
    compared = {name: sum(len(p.output) for p in parts if p.compared) for name, parts in EXAMPLES.items()}
    assert min(compared[name] for name in compared if name != "parametrizations.spectral_norm") >= 3


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "displayhook", echo)
    with torchkiln.installed():
        builtins = {key: getattr(torch.nn.utils.parametrizations, key) for key in TORCH.N.__all__}
        namespace: dict[str, Any] = {"torch": torch, "nn": nn, **builtins}
        for index, part in enumerate(EXAMPLES[name]):
            printed = run(part, namespace)
            if part.compared and part.output:
                # A registration as the last statement but one prints the module too; the docstring leaves it out.
                assert printed[-len(part.output) :] == part.output, f"part {index}"
    assert namespace.get("P", torchkiln.parametrize) is torchkiln.parametrize


def test_a_wrong_output_is_seen() -> None:
    part = prompts("Example:\n    >>> print(1 + 1)\n    3\n")[0]
    assert run(part, {}) == ["2"] != part.output


@pytest.mark.parametrize(
    "block", list(blocks(TORCH.P.cached.__doc__)), ids=lambda block: block.split("\n")[0].strip()
)
def test_code_block_of_cached(block: str) -> None:
    model = torchkiln.parametrizations.orthogonal(nn.Linear(4, 4))

    class Loop:
        rnn_cell = staticmethod(torchkiln.parametrizations.orthogonal(nn.RNNCell(4, 4), "weight_hh"))

    namespace: dict[str, Any] = {
        "model": model,
        "inputs": torch.ones(2, 4),
        "self": Loop,
        "xs": torch.ones(3, 4),
        "out_rnn": torch.zeros(4),
    }
    with torchkiln.installed():
        import torch.nn.utils.parametrize as P

        namespace["P"] = P
        exec(block, namespace)
    result = namespace["output"] if "output" in namespace else namespace["out_rnn"]
    assert result.requires_grad


def test_the_code_blocks_are_found() -> None:
    assert len(list(blocks(TORCH.P.cached.__doc__))) == 2
