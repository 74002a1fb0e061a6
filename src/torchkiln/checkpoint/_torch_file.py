"""Reading files of torch.save: weights only, structure first, state dicts found wherever they lie."""

from __future__ import annotations

import re
import sys
from collections.abc import Hashable, Iterator, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import Parameter

from torchkiln._core.errors import CheckpointError
from torchkiln._core.spellings.versions import relabel
from torchkiln.checkpoint._bytes import InputFile, nbytes
from torchkiln.checkpoint._io import (
    Change,
    CheckpointFile,
    Content,
    Entry,
    Extent,
    Group,
    Kept,
    Made,
    as_stored,
    placeholder,
    replaced,
    unusual,
)
from torchkiln.checkpoint._safetensors_sink import gathered
from torchkiln.checkpoint._torch_archive import read_archive
from torchkiln.checkpoint._torch_legacy import read_legacy

__all__ = ["open_torch"]

Store = MutableMapping[Any, Any]


def open_torch(path: Path, *, container: str) -> CheckpointFile:
    """Open a file written by ``torch.save``, never running code from it.

    Args:
        path: The file.
        container: ``"torch zip"``, or ``"torch legacy"`` for files as torch wrote them before 1.6.

    Raises:
        CheckpointError: The file is damaged, is not from ``torch.save``, or needs code to load.
    """
    file = InputFile(path)
    try:
        records = read_archive(Extent(file, 0, file.size)) if container == "torch zip" else {}
        content, extents = _load(path, records) if container == "torch zip" else _load_legacy(path, file)
        return _TorchFile(path, container, file=file, content=content, extents=extents)
    except BaseException:
        file.close()
        raise


def _load(path: Path, records: Mapping[str, Extent]) -> tuple[Any, dict[int, Extent]]:
    """Return what the file holds, its tensors without memory where possible, and their bytes by offset."""
    extents = {extent.offset: extent for name, extent in records.items() if name.startswith("data/")}
    if records and _is_native(records):
        try:
            content = _torch_load(path, device="meta")
        except NotImplementedError:
            pass  # torch knows kinds of tensors, quantized ones among them, that cannot be without memory
        else:
            if _all_located(content, extents, path):
                return content, extents
    try:
        return _torch_load(path, device="cpu"), {}
    except NotImplementedError as error:
        raise CheckpointError(_refusal(path, str(error))) from error


def _load_legacy(path: Path, file: InputFile) -> tuple[Any, dict[int, Extent]]:
    """Return the same of a file from before torch 1.6."""
    try:
        content, extents = read_legacy(file)
    except Exception:  # noqa: BLE001  # damaged, or of some older kind: torch says what it is, or reads it
        return _load(path, {})
    return (content, extents) if _all_located(content, extents, path) else _load(path, {})


def _is_native(records: Mapping[str, Extent]) -> bool:
    order = records.get("byteorder")
    return sys.byteorder.encode() == (
        order.file.read(order.offset, min(order.length, 9)) if order else b"little"
    )


def _torch_load(path: Path, *, device: str) -> Any:
    try:
        # A stream, because torch.load takes a suffix for the container, whatever the file is.
        with path.open("rb") as file:
            return torch.load(file, map_location=device, weights_only=True)
    except NotImplementedError:
        raise
    except Exception as error:  # damaged files end in a dozen types, none of them documented
        raise CheckpointError(_refusal(path, str(error))) from error


def _all_located(content: Any, extents: Mapping[int, Extent], path: Path) -> bool:
    """Tell whether every tensor is one whose bytes are those of a record; torch computes offsets by its own rule."""
    for tensor in _Walk(content, path).tensors:
        if unusual(tensor) or type(tensor) not in (Tensor, Parameter):
            return False
        if any(number < 0 for number in (*tensor.shape, *tensor.stride())):
            return False  # which torch refuses as soon as there is memory
        storage = tensor.untyped_storage()
        extent = extents.get(getattr(storage, "_checkpoint_offset", None) or -1)
        if extent is None or storage.nbytes() > extent.length:
            return False
    return True


_BLOCKED = re.compile(
    r"GLOBAL (?P<name>\S*\w) was not an allowed global"
    r"|unsupported GLOBAL (?P<module>\S+) whose module"
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
    # What torch says first is advice to run the code.
    reason = (
        message.partition("WeightsUnpickler error: ")[2] or message.partition("trusted source.")[2] or message
    )
    lines = reason.strip().splitlines()
    return f"{path}: truncated or corrupt torch file ({lines[0][:120] if lines else 'unexpected end'})."


class _TorchFile(CheckpointFile):
    def __init__(
        self, path: Path, container: str, *, file: InputFile, content: Any, extents: Mapping[int, Extent]
    ) -> None:
        self.path = path
        self.container = container
        self.metadata = {}
        self.inputs = (file,)
        self._content, self._held = content, Content()
        self._held.stored_at(extents)
        walk = _Walk(content, path)
        self._mappings = {_group(where, mapping): mapping for where, mapping in walk.mappings}
        # The content changes when it is rewritten; what is computed from it is read after that.
        self._tensors: dict[Group, dict[str, Tensor]] = {
            group: {key: mapping[key] for key in group.entries} for group, mapping in self._mappings.items()
        }
        self.groups = tuple(self._mappings)
        self.loose = tuple(walk.loose)
        in_memory = not all(tensor.is_meta for tensor in walk.tensors)
        self.remarks = tuple(_remarks(container, walk, in_memory=in_memory))

    def read(self, group: Group, key: str) -> Tensor:
        tensor = self._tensors[group][key]
        if not tensor.is_meta:
            return tensor
        extent = cast(Extent, self._held.piece(tensor.untyped_storage()))
        return as_stored(gathered(tensor.detach(), extent), [tensor])

    def extent(self, group: Group, key: str) -> Extent | None:
        tensor = self._tensors[group][key]
        if not tensor.is_meta or not tensor.is_contiguous() or tensor.is_conj() or tensor.is_neg():
            return None
        extent = cast(Extent, self._held.piece(tensor.untyped_storage()))
        return extent.part(int(tensor.storage_offset()) * tensor.element_size(), nbytes(_entry(tensor)))

    def unusual(self, group: Group, key: str) -> str:
        return unusual(self._tensors[group][key])

    def identity(self, group: Group, key: str) -> Hashable:
        tensor = self._tensors[group][key]
        if tensor.layout != torch.strided:
            return id(tensor)  # it has several storages or none
        storage = tensor.untyped_storage()
        where = storage._checkpoint_offset if tensor.is_meta else storage.data_ptr()
        return where, tensor.storage_offset(), tensor.dtype, tensor.shape, tensor.stride()

    def changed(self, changes: Sequence[Change]) -> Content:
        """Change the mappings in place, which keeps whatever else refers to them."""
        for group in self.groups:
            mine = [change for change in changes if change.group is group]
            if mine:
                self._rewrite(group, mine)
        self._held.root = self._content
        return self._held

    def _rewrite(self, group: Group, changes: Sequence[Change]) -> None:
        tensors = self._tensors[group]

        def stand_in(output: Kept | Made) -> Tensor:
            if isinstance(output, Kept):
                return tensors[output.key]
            tensor = self._held.hold(placeholder(output.entry), output)
            return as_stored(tensor, [tensors[key] for key in output.like])

        _rewrite(self._mappings[group], replaced(self._mappings[group], changes, stand_in), changes)


def _rewrite(mapping: Store, items: Mapping[Any, Any], changes: Sequence[Change]) -> None:
    mapping.clear()
    mapping.update(items)
    records = getattr(mapping, "_metadata", None)
    if isinstance(records, MutableMapping):
        for change in changes:
            relabel(records, before=change.before, after=change.after)


class _Walk:
    """Finds every mapping that holds tensors by name, and every tensor that lies elsewhere."""

    def __init__(self, content: Any, file: Path) -> None:
        self._file = file
        self.mappings: list[tuple[tuple[str, ...], Store]] = []
        self.loose: list[Entry] = []
        self.tensors: list[Tensor] = []
        self.has_optimizer = False
        seen: set[int] = set()
        # A stack of its own: a file can nest deeper than Python recurses.
        pending: list[tuple[Any, tuple[str, ...]]] = [(content, ())]
        while pending:
            node, path = pending.pop()
            if isinstance(node, Tensor):
                self._check(node, path)
                self.loose.append(_entry(node))
                self.tensors.append(node)
            elif id(node) not in seen:
                seen.add(id(node))
                pending += [(child, (*path, str(key))) for key, child in reversed(self._open(node, path))]

    def _open(self, node: Any, path: tuple[str, ...]) -> list[tuple[Any, Any]]:
        """Note what the node is, and return the children still to visit."""
        if isinstance(node, (list, tuple)):
            return list(enumerate(node))
        if not isinstance(node, MutableMapping):
            return []
        for key in (key for key, child in node.items() if _is_named_tensor(key, child)):
            self._check(node[key], (*path, key))
        if _entries(node):
            self.mappings.append((path, node))
            self.tensors += [child for key, child in node.items() if _is_named_tensor(key, child)]
        self.has_optimizer |= {"state", "param_groups"} <= node.keys()
        return [(key, child) for key, child in node.items() if not _is_named_tensor(key, child)]

    def _check(self, tensor: Tensor, path: tuple[str, ...]) -> None:
        if unusual(tensor) == "nested":
            raise CheckpointError(
                f"{self._file}: {'.'.join(path)} is a nested tensor, which has no shape.\n"
                "Save the tensors that it consists of: tensor.unbind()."
            )


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


def _remarks(container: str, walk: _Walk, *, in_memory: bool) -> Iterator[str]:
    if container == "torch legacy":
        yield "written by a torch before 1.6; torch files are written in today's zip format"
    if in_memory:
        yield "read whole into memory: it has tensors whose bytes are not simply those in the file"
    if walk.has_optimizer:
        yield "optimizer state is kept as it is, and belongs to the parametrized tensors"
