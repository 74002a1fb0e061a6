"""Reading safetensors: one file, or the shards that an index names."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from pathlib import Path

from torch import Tensor

from torchkiln._core.errors import CheckpointError
from torchkiln.checkpoint._bytes import InputFile
from torchkiln.checkpoint._io import (
    Change,
    CheckpointFile,
    Content,
    Extent,
    Group,
    Kept,
    Made,
    placeholder,
    replaced,
)
from torchkiln.checkpoint._safetensors_header import Header, read_header, strict_json

__all__ = ["open_index", "open_safetensors"]

# An index is a few dozen bytes for each tensor.
_MOST_INDEX_BYTES = 100_000_000


def open_safetensors(path: Path) -> CheckpointFile:
    """Open a safetensors file.

    Raises:
        CheckpointError: The file is damaged, or holds a dtype that this torch does not have.
    """
    file = InputFile(path)
    try:
        return _SafetensorsFile(path, "safetensors", {path.name: file})
    except BaseException:
        file.close()
        raise


def open_index(path: Path) -> CheckpointFile:
    """Open the shards that an index (``*.safetensors.index.json``) names; all of them lie beside it.

    Raises:
        CheckpointError: The index or a shard is damaged, they disagree, or a name leads out of the directory.
    """
    index = InputFile(path)
    files = {path.name: index}
    try:
        weight_map = _weight_map(index)
        for name in dict.fromkeys(weight_map.values()):
            if not (path.parent / name).exists():
                raise CheckpointError(
                    f"{path}: names the shard {name}, which is not there. Fetch all of them."
                )
            files[name] = InputFile(path.parent / name)
        return _SafetensorsFile(path, "sharded safetensors", files, weight_map)
    except BaseException:
        for file in files.values():
            file.close()
        raise


def _weight_map(index: InputFile) -> dict[str, str]:
    try:
        if index.size > _MOST_INDEX_BYTES:
            raise ValueError(f"{index.size:,} bytes, the most is {_MOST_INDEX_BYTES:,}")
        found = strict_json(index.read(0, index.size)).get("weight_map")
        if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
            raise ValueError("it has no weight_map from tensors to files")
    except ValueError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{index.path}: truncated or corrupt index ({error}).") from error
    for name in found.values():
        if not name or name in (".", "..") or any(sign in name for sign in "/\\:\0"):
            raise CheckpointError(
                f"{index.path}: names the shard {name[:80]!r}, which is not a file beside it.\n"
                "An index that leads elsewhere is not followed."
            )
    return dict(found)


class _SafetensorsFile(CheckpointFile):
    def __init__(
        self,
        path: Path,
        container: str,
        files: dict[str, InputFile],
        weight_map: dict[str, str] | None = None,
    ) -> None:
        self.path, self.container = path, container
        self.inputs = tuple(files.values())
        names = [path.name] if weight_map is None else list(dict.fromkeys(weight_map.values()))
        headers = {name: read_header(files[name]) for name in names}
        if weight_map is not None:
            _check_index(path, headers, weight_map)
        self.metadata = {key: value for one in headers.values() for key, value in one.metadata.items()}
        entries = {key: entry for one in headers.values() for key, entry in one.entries.items()}
        self._extents = {key: extent for one in headers.values() for key, extent in one.extents.items()}
        self.groups = (Group((), entries),)

    def read(self, group: Group, key: str) -> Tensor:
        return self._extents[key].tensor(group.entries[key])

    def identity(self, group: Group, key: str) -> Hashable:  # noqa: ARG002  # there is one group
        return key

    def extent(self, group: Group, key: str) -> Extent:  # noqa: ARG002
        return self._extents[key]

    def changed(self, changes: Sequence[Change]) -> Content:
        (group,) = self.groups
        content = Content()

        def stand_in(output: Kept | Made) -> Tensor:
            entry = group.entries[output.key] if isinstance(output, Kept) else output.entry
            piece = self._extents[output.key] if isinstance(output, Kept) else output
            return content.hold(placeholder(entry), piece)

        kept = {key: Kept(key) for key in group.entries}
        # First what stays and what comes, then one placeholder for each.
        items = replaced(kept, changes, lambda output: output)
        content.root = {key: stand_in(output) for key, output in items.items()}
        return content


def _check_index(path: Path, headers: dict[str, Header], weight_map: dict[str, str]) -> None:
    for key, name in weight_map.items():
        if key not in headers[name].entries:
            raise CheckpointError(f"{path}: says that {key} is in {name}, where it is not.")
    for name, header in headers.items():
        for key in header.entries:
            if weight_map.get(key) != name:
                raise CheckpointError(f"{path}: does not say that {key} is in {name}, where it is.")
