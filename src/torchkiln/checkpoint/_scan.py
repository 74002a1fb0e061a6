"""One pass over an open file: every parametrized tensor of every group, ready to be computed."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from torchkiln._core.errors import CheckpointError
from torchkiln._core.spellings.evaluate import Evaluator
from torchkiln._core.spellings.options import Options
from torchkiln._core.spellings.recognise import Recognised, recognise
from torchkiln._core.spellings.spelled import Spelled
from torchkiln.checkpoint._description import described, read_descriptions
from torchkiln.checkpoint._io import CheckpointFile, Extent, Group, Label
from torchkiln.checkpoint._report import Note
from torchkiln.checkpoint._specs import Also

__all__ = ["Found", "Recent", "Scan", "known_dim", "refuse_blocked", "scan"]


class Recent:
    """A file whose tensors stay in memory until they are forgotten: what checks a tensor reads what made it."""

    def __init__(self, file: CheckpointFile) -> None:
        self._file = file
        self._kept: dict[tuple[Group, str], Tensor] = {}

    def read(self, group: Group, key: str) -> Tensor:
        """Return one tensor; reading it again gives the same memory."""
        if (group, key) not in self._kept:
            self._kept[group, key] = self._file.read(group, key)
        return self._kept[group, key]

    def identity(self, group: Group, key: str) -> Hashable:
        """Return a value that is equal for two keys exactly when they hold the same memory."""
        return self._file.identity(group, key)

    def extent(self, group: Group, key: str) -> Extent | None:
        """Return the bytes of one tensor where they lie together and in order."""
        return self._file.extent(group, key)

    def unusual(self, group: Group, key: str) -> str:
        """Return what a tensor is whose values are not simply its elements; mostly empty."""
        return self._file.unusual(group, key)

    def forget(self) -> None:
        """Give the memory back."""
        self._kept.clear()


@dataclass(frozen=True)
class Found:
    """One parametrized tensor, the keys of the file it is made of, and itself with those nested in it."""

    group: Group
    item: Spelled
    keys: tuple[str, ...]
    parts: tuple[Spelled, ...]
    evaluate: Evaluator
    exact: Evaluator
    recent: Recent

    def read(self, key: str) -> Tensor:
        """Return one tensor of its group."""
        return self.recent.read(self.group, key)

    def extent(self, key: str) -> Extent | None:
        """Return the bytes of one tensor of its group where they lie together and in order."""
        return self.recent.extent(self.group, key)

    def forget(self) -> None:
        """Give back the memory of everything that was read."""
        self.recent.forget()

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
        blocked = next((part.blocked for part in self.parts if part.blocked), "")
        unusual = ((key, self.recent.unusual(self.group, key)) for key in self.keys)
        for key, kind in unusual if not blocked else ():
            if kind:
                blocked = (
                    f"{key}: is a {kind} tensor, and {self.item.spelling} is computed from plain ones.\n"
                    f"Save it as one: {'tensor.dequantize()' if kind == 'quantized' else 'tensor.to_dense()'}."
                )
                break
        return blocked and self.group.full_name(blocked)


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


def scan(file: CheckpointFile, options: Options, *, also: Also | None = None) -> Scan:
    """Recognise what is parametrized in every group of a file.

    Args:
        file: The open checkpoint.
        options: What the caller knows that the file cannot say.
        also: The caller's own classes, by the names in the file's description of itself.

    Raises:
        CheckpointError: `dims` names a dim that does not fit a tensor, or the file's description cannot be read.
    """
    found: list[Found] = []
    plain: dict[Group, tuple[str, ...]] = {}
    notes = [Note("info", "", remark) for remark in file.remarks]
    recent = Recent(file)
    said = described(read_descriptions(file.metadata, where=str(file.path)), also=also)
    for group in file.groups:
        local = options.within(group.path).describing(said)
        recognised = recognise(group, local)
        mine = list(_found(recent, group, recognised, local))
        taken = {key for one in mine for key in one.keys}
        plain[group] = tuple(key for key in group.entries if key not in taken)
        found += mine
        notes += [Note("info", group.full_name(key), text) for key, text in recognised.remarks.items()]
        notes += [
            Note("warning", name, f"{name}: the file describes its steps, and does not hold it")
            for name in said
            if name not in recognised.spelled
        ]
    return Scan(tuple(found), plain, tuple(notes))


def _found(recent: Recent, group: Group, found: Recognised, options: Options) -> Iterator[Found]:
    place = {key: index for index, key in enumerate(group.entries)}
    evaluate = Evaluator(recent, group, found=found, options=options, fresh=True)
    exact = Evaluator(recent, group, found=found, options=options, exact=True, fresh=True)
    items = [(found.leaves(item), item) for item in found.outermost]
    for keys, item in sorted(items, key=lambda pair: min(place[key] for key in pair[0])):
        for step in item.steps:
            evaluate.choice(step, item)
        ordered = tuple(sorted(keys, key=place.__getitem__))
        yield Found(group, item, ordered, tuple(found.parts(item)), evaluate, exact, recent)


def known_dim(found: Found) -> int | None:
    """Return the normalized dim where names and shapes settle it."""
    choices = [step.dims for step in found.item.steps if step.dims]
    settled = choices and (len(choices[-1]) == 1 or found.item.steps[0].kind == "weight_norm")
    return choices[-1][0] if settled else None


def refuse_blocked(found: Sequence[Found], where: str) -> None:
    """Raise if a tensor cannot be folded.

    Args:
        found: The tensors.
        where: The file, for the message.

    Raises:
        CheckpointError: Names the first such tensor, why, what to pass, and how many more there are.
    """
    blocked = [text for one in found if (text := one.blocked)]
    if blocked:
        more = f"\n{len(blocked) - 1} more like it; run inspect for all." if len(blocked) > 1 else ""
        raise CheckpointError(f"{where}: {blocked[0]}{more}")
