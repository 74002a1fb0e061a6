"""The catalogue page, from the docstrings of the families: one text in one place."""

from __future__ import annotations

import importlib
import inspect
import re

from torchkiln import families
from torchkiln._core.base import Parametrization
from torchkiln.testing._catalogue import names

__all__ = ["page"]

_HEAD = """# The catalogue

Written by `python -m torchkiln.testing --catalogue > docs/catalogue.md` from the docstrings of `torchkiln.families`.
Register a family as `register_parametrization(module, "weight", Family(...))`: shapes are read from the tensor, a
value that satisfies the constraint is kept, and another is projected. `python -m torchkiln.testing` checks every law
for every family.
"""
# The groups in reading order; each is a file of the package.
_GROUPS = (
    *("_elementwise", "_simplex", "_norm", "_scale", "_symmetric", "_patterned", "_structured"),
    *("_definite", "_orthogonal", "_lowrank", "_compose"),
)


def page() -> str:
    """Return the page: for each group its idea, and for each family formula, parameters, numerics and references."""
    parts = [_HEAD]
    for group in _GROUPS:
        found = [name for name in names() if getattr(families, name).__module__.endswith(f".{group}")]
        if found:
            module = importlib.import_module(f"torchkiln.families.{group}")
            title = (inspect.getdoc(module) or "").splitlines()[0]
            parts += [f"## {title.removesuffix('.')}\n", *(_entry(getattr(families, name)) for name in found)]
    return "\n".join(parts)


def _entry(family: type[Parametrization]) -> str:
    text = inspect.getdoc(family) or ""
    text = re.sub(r"\.\. math::[ \n]*((?:.+\n?)+)", lambda found: f"$$\n{_joined(found[1])}\n$$\n", text)
    text = re.sub(r":math:`([^`]+)`", lambda found: f"${_joined(found[1])}$", text)
    text = re.sub(r":class:`~?(?:[\w.]*\.)?(\w+)`", r"[`\1`](#\1)", text).replace("``", "`")
    text = re.sub(r"\nExample:\n.*?(?=\n\S|\Z)", "", text, flags=re.S)
    text = re.sub(r"^(Numerics|References|Args):\n((?:[ ]{4}.*\n?|\n)+)", _section, text, flags=re.M)
    signature = str(inspect.signature(family)).partition(" ->")[0] if "__init__" in vars(family) else "()"
    return f'### <a id="{family.__name__}"></a>{family.__name__}\n\n`{family.__name__}{signature}`\n\n{text.strip()}\n'


def _joined(formula: str) -> str:
    return " ".join(formula.split())


def _section(found: re.Match[str]) -> str:
    title, lines = found[1], inspect.cleandoc(found[2]).splitlines()
    if title != "Args":
        return f"*{title}.* {' '.join(lines)}\n"
    # A line that is indented continues the argument before it.
    items = re.sub(r"\n\s+", " ", "\n".join(lines)).splitlines()
    return "".join(f"- `{item.replace(':', '`:', 1)}\n" for item in items)
