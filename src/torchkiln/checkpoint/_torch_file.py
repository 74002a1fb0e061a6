"""Reading files of torch.save: weights only, mapped from disk, state dicts found wherever they lie."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Hashable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchkiln._core.errors import CheckpointError
from torchkiln._core.spellings.versions import relabel
from torchkiln.checkpoint._io import Change, CheckpointFile, Entry, Group, replaced

__all__ = ["open_torch"]

Store = MutableMapping[Any, Any]


@contextmanager
def open_torch(path: Path, *, container: str) -> Iterator[CheckpointFile]:
    """Open a file written by ``torch.save``, never running code from it.

    Args:
        path: The file.
        container: ``"torch zip"``, or ``"torch legacy"`` for files from before torch 1.6.

    Raises:
        CheckpointError: The file is damaged, is not from ``torch.save``, or needs code to load.
    """
    if container == "torch zip":
        _check_archive(path)
    yield _TorchFile(path, container, _load(path, container=container))


def _check_archive(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.partition("/")[2] for name in archive.namelist()}
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise CheckpointError(f"{path}: truncated or corrupt zip file ({error}).") from error
    if "constants.pkl" in names:
        raise CheckpointError(
            f"{path}: is a TorchScript archive, which holds code.\n"
            "Load it with torch.jit.load and save its state_dict()."
        )
    if "data.pkl" not in names:
        raise CheckpointError(f"{path}: a zip file, but not one that torch.save wrote: it has no data.pkl.")


def _load(path: Path, *, container: str) -> Any:
    # torch.load takes this suffix for the container, whatever the file is, unless it gets a stream.
    misnamed = path.suffix == ".safetensors"
    mapped = container == "torch zip" and not misnamed
    try:
        with path.open("rb") if misnamed else nullcontext(path) as file:
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # damaged files end in a dozen types, none of them documented
        raise CheckpointError(_refusal(path, str(error))) from error


_BLOCKED = re.compile(
    r"GLOBAL (?P<name>\S*\w) was not an allowed global"
    r"|Unsupported class (?P<type>\S+)"
    r"|Trying to (?:call reduce|instantiate)[^.]*? (?P<call>\S+?)\.?$",
    re.MULTILINE,
)


def _refusal(path: Path, message: str) -> str:
    found = _BLOCKED.search(message)
    if found:
        name = next(part for part in found.groups() if part)
        return (
            f"{path}: loading it would run code: {name} is not a plain tensor or container.\n"
            "Load it where you trust it, and save the state dict alone."
        )
    reason = message.partition("WeightsUnpickler error: ")[2] or message
    lines = reason.strip().splitlines()
    return f"{path}: truncated or corrupt torch file ({lines[0][:120] if lines else 'unexpected end'})."


class _TorchFile(CheckpointFile):
    def __init__(self, path: Path, container: str, content: Any) -> None:
        self.path = path
        self.container = container
        self.metadata = {}
        self._content = content
        walk = _Walk(content)
        self._mappings = {_group(where, mapping): mapping for where, mapping in walk.mappings}
        self.groups = tuple(self._mappings)
        self.loose = tuple(walk.loose)
        self.remarks = tuple(_remarks(container, walk))

    def read(self, group: Group, key: str) -> Tensor:
        tensor: Tensor = self._mappings[group][key]
        return tensor

    def identity(self, group: Group, key: str) -> Hashable:
        tensor = self.read(group, key)
        return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()

    def changed(self, changes: Sequence[Change]) -> Any:
        """Change the mappings in place, which keeps whatever else refers to them, and return the whole."""
        for group in self.groups:
            mine = [change for change in changes if change.group is group]
            if mine:
                _rewrite(self._mappings[group], mine)
        return self._content


def _rewrite(mapping: Store, changes: Sequence[Change]) -> None:
    items = replaced(mapping, changes)
    mapping.clear()
    mapping.update(items)
    records = getattr(mapping, "_metadata", None)
    if isinstance(records, MutableMapping):
        for change in changes:
            relabel(records, before=change.before, after=change.after)


class _Walk:
    """Finds every mapping that holds tensors by name, and every tensor that lies elsewhere."""

    def __init__(self, content: Any) -> None:
        self.mappings: list[tuple[tuple[str, ...], Store]] = []
        self.loose: list[Entry] = []
        self.has_optimizer = False
        seen: set[int] = set()
        # A stack of its own: a file can nest deeper than Python recurses.
        pending: list[tuple[Any, tuple[str, ...]]] = [(content, ())]
        while pending:
            node, path = pending.pop()
            if isinstance(node, Tensor):
                self.loose.append(_entry(node))
            elif id(node) not in seen:
                seen.add(id(node))
                pending += [(child, (*path, str(key))) for key, child in reversed(self._open(node, path))]

    def _open(self, node: Any, path: tuple[str, ...]) -> list[tuple[Any, Any]]:
        """Note what the node is, and return the children still to visit."""
        if isinstance(node, (list, tuple)):
            return list(enumerate(node))
        if not isinstance(node, MutableMapping):
            return []
        if _entries(node):
            self.mappings.append((path, node))
        self.has_optimizer |= {"state", "param_groups"} <= node.keys()
        return [(key, child) for key, child in node.items() if not _is_named_tensor(key, child)]


def _is_named_tensor(key: Any, value: Any) -> bool:
    return isinstance(key, str) and isinstance(value, Tensor)


def _entry(tensor: Tensor) -> Entry:
    return Entry(tuple(tensor.shape), tensor.dtype)


def _entries(mapping: Store) -> dict[str, Entry]:
    return {key: _entry(value) for key, value in mapping.items() if _is_named_tensor(key, value)}


def _group(where: tuple[str, ...], mapping: Store) -> Group:
    records = getattr(mapping, "_metadata", None)
    modules = frozenset(map(str, records)) if isinstance(records, MutableMapping) else frozenset()
    return Group(where, _entries(mapping), modules)


def _remarks(container: str, walk: _Walk) -> Iterator[str]:
    if container == "torch legacy":
        yield "written by a torch before 1.6; torch files are written in today's zip format"
    if walk.has_optimizer:
        yield "optimizer state is kept as it is, and belongs to the parametrized tensors"
