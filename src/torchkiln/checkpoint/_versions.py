"""The version records that torch keeps beside a state dict, kept in step with its keys."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from typing import Any

from torchkiln.checkpoint._io import Change, Label

__all__ = ["relabel"]

Records = MutableMapping[str, Any]


def relabel(records: Records, changes: Iterable[Change]) -> Records:
    """Return the records (``state_dict._metadata``) as a module with the new spelling would have saved them.

    Args:
        records: One entry for each module, by its path. Changed in place.
        changes: What became of the keys.
    """
    for change in changes:
        for label in change.before:
            _forget(records, label)
        for label in change.after:
            _enter(records, label)
    return records


def _forget(records: Records, label: Label) -> None:
    if label.style == "torch":
        every = f"{label.prefix}parametrizations"
        mine = f"{every}.{label.tensor}"
        for path in [p for p in records if p == mine or p.startswith(f"{mine}.")]:
            del records[path]
        if not any(p.startswith(f"{every}.") for p in records):
            records.pop(every, None)
    elif label.norm == "spectral_norm":
        module = records.get(label.prefix[:-1], {})
        versions = module.get("spectral_norm", {})
        versions.pop(f"{label.tensor}.version", None)
        if not versions:
            module.pop("spectral_norm", None)


def _enter(records: Records, label: Label) -> None:
    if label.style == "torch":
        every = f"{label.prefix}parametrizations"
        for path in (every, f"{every}.{label.tensor}", f"{every}.{label.tensor}.0"):
            records.setdefault(path, {"version": 1})
    elif label.norm == "spectral_norm":
        module = records.setdefault(label.prefix[:-1], {"version": 1})
        module.setdefault("spectral_norm", {})[f"{label.tensor}.version"] = 1
