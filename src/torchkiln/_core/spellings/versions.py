"""The version records that torch keeps beside a state dict, kept in step with its keys."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from typing import Any

from torchkiln._core.spellings.entries import Label

__all__ = ["relabel"]

Records = MutableMapping[str, Any]


def relabel(records: Records, *, before: Iterable[Label], after: Iterable[Label]) -> None:
    """Make the records (``state_dict._metadata``) those that a module with the new spelling would have saved.

    Args:
        records: One entry for each module, by its path. Changed in place.
        before: The tensors as they were spelled.
        after: The tensors as they are spelled now.
    """
    for label in before:
        _forget(records, label)
    for label in after:
        _enter(records, label)


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
