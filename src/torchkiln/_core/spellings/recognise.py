"""Recognising parametrized tensors by the names and shapes of what a file holds, without reading values.

Two styles are known, each in a file of its own. A recognised tensor stands in for its keys, so that a parametrized
original, or a pruned ``weight_v``, is found from the inside out.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torchkiln._core.spellings import legacy_style, torch_style
from torchkiln._core.spellings.entries import Entry, Group
from torchkiln._core.spellings.options import Options
from torchkiln._core.spellings.spelled import Spelled

__all__ = ["Recognised", "recognise"]


@dataclass
class Recognised:
    """What one group of keys holds: parametrized tensors, inner ones first, and remarks on look-alikes."""

    spelled: dict[str, Spelled] = field(default_factory=dict)
    remarks: dict[str, str] = field(default_factory=dict)

    @property
    def outermost(self) -> list[Spelled]:
        """The tensors that a plain module would have."""
        inner = {key for item in self.spelled.values() for key in item.inputs}
        return [item for item in self.spelled.values() if item.name not in inner]

    def parts(self, item: Spelled) -> list[Spelled]:
        """The tensor and those it is computed from, innermost first."""
        inner = [self.spelled[key] for key in item.inputs if key in self.spelled]
        return [*(part for one in inner for part in self.parts(one)), item]

    def leaves(self, item: Spelled) -> list[str]:
        """The keys of the file that a tensor is computed from."""
        return [key for part in self.parts(item) for key in part.inputs if key not in self.spelled]


def recognise(group: Group, options: Options) -> Recognised:
    """Find every parametrized tensor of one group.

    Args:
        group: The keys, and what is known of the modules they were saved from.
        options: What the caller knows that a file cannot say.
    """
    left = dict(group.entries)
    found = Recognised()
    while True:
        # The order makes it inside out: masks and vectors sit on g, v and originals more often than under them.
        batch = (
            legacy_style.originals(left, options)
            or torch_style.lists(left, options, modules=group.modules)
            or legacy_style.pairs(left, options)
        )
        if not batch:
            break
        for item in batch:
            _accept(item, left, found)
    for item in legacy_style.lone_originals(left, options):
        _accept(item, left, found)
    found.remarks = {**torch_style.look_alikes(left), **legacy_style.look_alikes(left)}
    return found


def _accept(item: Spelled, left: dict[str, Entry], found: Recognised) -> None:
    for key in item.inputs:
        left.pop(key, None)
    if item.name in left:
        item = replace(
            item, blocked=f"{item.name} is in the file as well as {item.originals[0]}. Remove one."
        )
    left[item.name] = item.entry
    found.spelled[item.name] = item
