"""Write docs/catalogue.md from the docstrings of the families: ``python docs/catalogue.py``.

One text in one place: what the page says about a family stands beside its code, where its examples are run.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from torch import nn

from torchkiln import families
from torchkiln._core.base import Parametrization
from torchkiln.testing import check
from torchkiln.testing._catalogue import names, rows

DOCS = Path(__file__).resolve().parent
PAGE = DOCS / "catalogue.md"

HEAD = """# The catalogue

{count} families of parametrizations. Each is registered without shapes, which are read from the tensor:

```python
import torch
from torch import nn

from torchkiln.families import Orthogonal
from torchkiln.parametrize import register_parametrization

layer = nn.Linear(8, 8)
family = Orthogonal()
print(family.residual(layer.weight))  # how far off it is
print(family.displacement(layer.weight))  # and how far registering will move it
register_parametrization(layer, "weight", family)
assert family.residual(layer.weight) < 1e-5
```

A value that satisfies the constraint is kept; another is projected, to the nearest point where *Numerics* says nothing
else. Everything is computed in float32 or wider and rounded once. `Chain` applies families one after the other,
`Product` one to each part of a tensor, and `Custom` makes a family of a function and its inverse.

`python -m torchkiln.testing` puts every family to every law (shape and dtype, membership, inverse, gradient, batches,
training, compilation, `torch.func`, copies, baking, refusal, spec, samples), and
`torchkiln.testing.check(family, example)` does so for your own. This page is written by `python docs/catalogue.py`,
its pictures are drawn by `python docs/pictures.py`.
"""
# The groups in reading order; each is a file of the package.
GROUPS = {
    "_elementwise": "Numbers",
    "_simplex": "Vectors",
    "_norm": "Norms",
    "_scale": "Scale",
    "_symmetric": "Subspaces of matrices",
    "_patterned": "Patterns",
    "_structured": "Products of small factors",
    "_definite": "Definite and stable matrices",
    "_orthogonal": "Orthonormal columns",
    "_lowrank": "Rank and determinant",
    "_compose": "Composition",
}
# The laws that say nothing about some families; the others hold for all.
CONDITIONAL = ("membership", "inverse", "gradient", "batch", "spec", "sample")


def page() -> str:
    """Return the page: for each group its idea, and for each family formula, parameters, numerics and references."""
    parts = [HEAD.format(count=len(names())), _contents()]
    skipped = _laws_that_do_not_apply()
    for group, title in GROUPS.items():
        if members := _members(group):
            parts += [f"## {title}\n", *_picture(group)]
            parts += [_entry(getattr(families, name), skipped[name]) for name in members]
    return "\n".join(parts)


def _members(group: str) -> list[str]:
    return [name for name in names() if getattr(families, name).__module__ == f"torchkiln.families.{group}"]


def _contents() -> str:
    linked = {
        title: ", ".join(f"[{name}](#{name})" for name in _members(group)) for group, title in GROUPS.items()
    }
    return "".join(f"- {title}: {links}\n" for title, links in linked.items() if links)


def _picture(group: str) -> list[str]:
    path = DOCS / "pictures" / f"{group.removeprefix('_')}.png"
    text = f"![What they do](pictures/{path.name})\n\n*What they do to random numbers: gray before, blue after.*\n"
    return [text] if path.exists() else []


def _laws_that_do_not_apply() -> dict[str, list[str]]:
    first = {type(row.family).__name__: row for row in reversed(list(rows()))}
    return {
        name: [result.law for result in check(*row, laws=CONDITIONAL).results if result.outcome == "skipped"]
        for name, row in first.items()
    }


def _entry(family: type[Parametrization], skipped: list[str]) -> str:
    text = inspect.getdoc(family) or ""
    text = re.sub(r"\.\. math::[ \n]*((?:.+\n?)+)", lambda found: f"$$\n{_joined(found[1])}\n$$\n", text)
    text = re.sub(r":math:`([^`]+)`", lambda found: f"${_joined(found[1])}$", text)
    text = re.sub(r":class:`~?(?:[\w.]*\.)?(\w+)`", r"[`\1`](#\1)", text).replace("``", "`")
    text = re.sub(r":(?:func|meth|mod):(`[^`]+`)", r"\1", text)
    text = re.sub(r"\nExample:\n.*?(?=\n\S|\Z)", "", text, flags=re.S)
    text = re.sub(r"^(Numerics|References|Args):\n((?:[ ]{4}.*\n?|\n)+)", _section, text, flags=re.M)
    laws = f"*Laws.* All but {' and '.join(skipped)}." if skipped else "*Laws.* All."
    name, text = family.__name__, re.sub(r"\n{3,}", "\n\n", text).strip()
    return f'### <a id="{name}"></a>{name}\n\n`{name}{_signature(family)}`\n\n{text}\n\n{laws}\n'


def _signature(family: type[Parametrization]) -> str:
    if family.__init__ is nn.Module.__init__:
        return "()"
    bare = inspect.signature(family).replace(return_annotation=inspect.Signature.empty)
    parameters = [one.replace(annotation=inspect.Parameter.empty) for one in bare.parameters.values()]
    return str(bare.replace(parameters=parameters))


def _joined(formula: str) -> str:
    return " ".join(formula.split())


def _section(found: re.Match[str]) -> str:
    title, lines = found[1], inspect.cleandoc(found[2]).splitlines()
    if title != "Args":
        return f"*{title}.* {' '.join(lines)}\n\n"
    # A line that is indented continues the argument before it.
    items = re.sub(r"\n\s+", " ", "\n".join(lines)).splitlines()
    return "".join(f"- `{item.replace(':', '`:', 1)}\n" for item in items) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
