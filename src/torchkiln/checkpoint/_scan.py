"""One pass over an open file: every parametrized tensor of every group, ready to be computed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from torchkiln._core.errors import CheckpointError
from torchkiln._core.spellings.evaluate import Evaluator
from torchkiln._core.spellings.options import Options
from torchkiln._core.spellings.recognise import Recognised, recognise
from torchkiln._core.spellings.spelled import Spelled
from torchkiln.checkpoint._io import CheckpointFile, Group, Label
from torchkiln.checkpoint._report import Note

__all__ = ["Found", "Scan", "refuse_blocked", "scan"]


@dataclass(frozen=True)
class Found:
    """One parametrized tensor, the keys of the file it is made of, and itself with those nested in it."""

    group: Group
    item: Spelled
    keys: tuple[str, ...]
    parts: tuple[Spelled, ...]
    evaluate: Evaluator
    exact: Evaluator
    file: CheckpointFile

    def read(self, key: str) -> Tensor:
        """Return one tensor of its group."""
        return self.file.read(self.group, key)

    @property
    def name(self) -> str:
        """The tensor's name with those of the mappings around it."""
        return self.group.full_name(self.item.name)

    @property
    def labels(self) -> tuple[Label, ...]:
        """How torch's version records know the tensor and those inside it."""
        return tuple(part.label for part in self.parts)

    @property
    def blocked(self) -> str:
        """Why it cannot be folded; empty if it can."""
        return next((part.blocked for part in self.parts if part.blocked), "")


@dataclass(frozen=True)
class Scan:
    """What a file holds.

    Attributes:
        found: The parametrized tensors, in file order.
        plain: Keys of every other named tensor, by group.
        notes: Remarks on the file and on keys that look like parts of a parametrization and are not.
    """

    found: tuple[Found, ...]
    plain: dict[Group, tuple[str, ...]]
    notes: tuple[Note, ...]


def scan(file: CheckpointFile, options: Options) -> Scan:
    """Recognise what is parametrized in every group of a file.

    Args:
        file: The open checkpoint.
        options: What the caller knows that the file cannot say.

    Raises:
        CheckpointError: `dims` names a dim that does not fit a tensor.
    """
    found: list[Found] = []
    plain: dict[Group, tuple[str, ...]] = {}
    notes = [Note("info", "", remark) for remark in file.remarks]
    for group in file.groups:
        local = options.within(group.path)
        recognised = recognise(group, local)
        mine = list(_found(file, group, recognised, local))
        taken = {key for one in mine for key in one.keys}
        plain[group] = tuple(key for key in group.entries if key not in taken)
        found += mine
        notes += [Note("info", group.full_name(key), text) for key, text in recognised.remarks.items()]
    return Scan(tuple(found), plain, tuple(notes))


def _found(file: CheckpointFile, group: Group, found: Recognised, options: Options) -> Iterator[Found]:
    place = {key: index for index, key in enumerate(group.entries)}
    evaluate = Evaluator(file, group, found=found, options=options)
    exact = Evaluator(file, group, found=found, options=options, exact=True)
    items = [(found.leaves(item), item) for item in found.outermost]
    for keys, item in sorted(items, key=lambda pair: min(place[key] for key in pair[0])):
        for step in item.steps:
            evaluate.choice(step, item)
        ordered = tuple(sorted(keys, key=place.__getitem__))
        yield Found(group, item, ordered, tuple(found.parts(item)), evaluate, exact, file)


def refuse_blocked(scanned: Scan, where: str) -> None:
    """Raise if a tensor cannot be folded.

    Args:
        scanned: What was found.
        where: The file, for the message.

    Raises:
        CheckpointError: Names the first such tensor, why, what to pass, and how many more there are.
    """
    blocked = [text for found in scanned.found if (text := found.blocked)]
    if blocked:
        more = f"\n{len(blocked) - 1} more like it; run inspect for all." if len(blocked) > 1 else ""
        raise CheckpointError(f"{where}: {blocked[0]}{more}")
