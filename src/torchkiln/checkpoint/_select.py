"""What the caller wants of the copy besides the folding: which tensors, and under which names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from torchkiln._core.errors import CheckpointError
from torchkiln._core.spellings.options import Patterns
from torchkiln.checkpoint._io import Change, Group
from torchkiln.checkpoint._scan import Found

__all__ = ["Renaming", "picked"]


def picked(
    found: Sequence[Found], include: Sequence[str], exclude: Sequence[str], *, where: str
) -> tuple[list[Found], list[Found]]:
    """Return the tensors to fold, and those to leave as they are.

    Args:
        found: The parametrized tensors.
        include: Name patterns; without any, all are included.
        exclude: Name patterns of tensors to leave, whatever includes them.
        where: The file, for messages.

    Raises:
        CheckpointError: A pattern matches none of them.
    """
    wanted, unwanted = Patterns(include), Patterns(exclude)
    folded: list[Found] = []
    left: list[Found] = []
    for one in found:
        names = (one.item.name, one.name)
        yes, no = wanted.match(*names), unwanted.match(*names)
        for patterns, pattern in ((wanted, yes), (unwanted, no)):
            if pattern is not None:
                patterns.use(pattern)
        (folded if (yes or not include) and not no else left).append(one)
    for argument, patterns in (("include", wanted), ("exclude", unwanted)):
        if patterns.unused:
            raise CheckpointError(
                f'{argument}: "{patterns.unused[0]}" matches no parametrized tensor of {where}.\n'
                "Run inspect for the names."
            )
    return folded, left


class Renaming:
    """Beginnings of names to what they become; of several that fit, the longest counts.

    Args:
        beginnings: Old to new, such as ``{"module.": ""}``.

    Example:
        >>> Renaming({"module.": "", "": "net."})("module.conv.weight")
        'conv.weight'
    """

    def __init__(self, beginnings: Mapping[str, str] | None) -> None:
        self._beginnings = sorted((beginnings or {}).items(), key=lambda pair: -len(pair[0]))
        self._used: set[str] = set()

    def __call__(self, name: str) -> str:
        """Return the new name."""
        for old, new in self._beginnings:
            if name.startswith(old):
                self._used.add(old)
                return new + name.removeprefix(old)
        return name

    def check_all(self, groups: Sequence[Group], changes: Sequence[Change], where: str) -> None:
        """Raise if two tensors would have one name, or none, or if a beginning is that of no name.

        Raises:
            CheckpointError: Names it.
        """
        for group in groups:
            self._check(group, [change for change in changes if change.group is group])
        for old, _ in self._beginnings:
            if old not in self._used:
                raise CheckpointError(f'rename: no tensor of {where} begins with "{old}".')

    def _check(self, group: Group, changes: Sequence[Change]) -> None:
        gone = {key for change in changes for key in change.keys}
        names = Counter(key for key in group.entries if key not in gone)
        names.update(name for change in changes for name in change.outputs)
        if names and (names[""] or max(names.values()) > 1):
            name = "" if names[""] else max(names, key=lambda name: names[name])
            raise CheckpointError(f"rename: {names[name]} tensors would have the name {name!r}.")
