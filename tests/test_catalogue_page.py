"""docs/catalogue.md is what the docstrings say today, with every family, formula and picture."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
from torch import nn

from torchkiln import families
from torchkiln.testing._catalogue import names

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE = (DOCS / "catalogue.md").read_text()
ENTRIES = dict(re.findall(r'^### <a id="(\w+)"></a>\w+\n(.*?)(?=^##|\Z)', PAGE, re.M | re.S))


def test_the_page_is_up_to_date() -> None:
    written = runpy.run_path(str(DOCS / "catalogue.py"))["page"]()
    assert written == PAGE, "write it anew: python docs/catalogue.py"


def test_every_family_has_an_entry() -> None:
    assert sorted(ENTRIES) == sorted(names())


@pytest.mark.parametrize("name", sorted(ENTRIES))
def test_an_entry_has_its_parts(name: str) -> None:
    entry = ENTRIES[name]
    parameters = re.findall(r"^- `(\w+)`: ", entry, re.M)
    arguments = getattr(families, name).__init__
    expected = [] if arguments is nn.Module.__init__ else list(arguments.__annotations__)[:-1]
    assert parameters == expected
    assert f"`{name}(" in entry
    assert "*Numerics.* " in entry
    assert "*Laws.* All" in entry
    assert "$$" in entry or name == "Custom"
    assert not re.search(r":\w+:`|``", entry), "a role or a literal of reStructuredText was left over"


def test_pictures_and_links_lead_somewhere() -> None:
    pictures = set(re.findall(r"\]\(pictures/([\w.]+)\)", PAGE))
    assert pictures == {path.name for path in (DOCS / "pictures").glob("*.png")}
    assert set(re.findall(r"\]\(#(\w+)\)", PAGE)) <= set(ENTRIES)
