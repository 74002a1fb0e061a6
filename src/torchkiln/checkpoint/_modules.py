"""What a file holds, module by module, and which of its tensors are one."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from math import prod

from torchkiln.checkpoint._bytes import nbytes
from torchkiln.checkpoint._io import CheckpointFile, Entry, Group
from torchkiln.checkpoint._report import Module, Part
from torchkiln.checkpoint._scan import Scan

__all__ = ["modules_of", "tied_in"]


def modules_of(scanned: Scan) -> tuple[Module, ...]:
    """Return the modules of a scanned file, in the order of their first tensors."""
    parts: dict[str, list[Part]] = {}
    sizes: dict[str, int] = {}
    for group, key, name, made_by, entry, keys in _tensors(scanned):
        path, _, tensor = group.full_name(name).rpartition(".")
        dtype = str(entry.dtype).removeprefix("torch.")
        parts.setdefault(path, []).append(Part(tensor, made_by, entry.shape, dtype))
        sizes[path] = sizes.get(path, 0) + sum(nbytes(group.entries[one]) for one in (keys or (key,)))
    return tuple(Module(path, tuple(mine), sizes[path]) for path, mine in parts.items())


def _tensors(scanned: Scan) -> Iterator[tuple[Group, str, str, str, Entry, tuple[str, ...]]]:
    """Yield every tensor of the plain model: where it begins, its name, what made it, and the keys it is made of."""
    folded = {(found.group, found.keys[0]): found for found in scanned.found}
    taken = {(found.group, key) for found in scanned.found for key in found.keys}
    for group in scanned.plain:
        for key, entry in group.entries.items():
            found = folded.get((group, key))
            if found is not None:
                yield group, key, found.item.name, found.item.spelling, found.item.entry, found.keys
            elif (group, key) not in taken:
                yield group, key, key, "plain", entry, ()


def tied_in(file: CheckpointFile) -> tuple[tuple[str, ...], ...]:
    """Return the names of tensors that have the same memory."""
    names: dict[Hashable, list[str]] = {}
    for group in file.groups:
        for key, entry in group.entries.items():
            if prod(entry.shape):  # without elements there is nothing to share
                names.setdefault(file.identity(group, key), []).append(group.full_name(key))
    return tuple(tuple(tied) for tied in names.values() if len(tied) > 1)
