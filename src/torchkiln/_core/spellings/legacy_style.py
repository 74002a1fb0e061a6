"""The spelling of torch's hooks: ``t_g, t_v`` for weight norm, ``t_orig, t_u, t_v`` and ``t_orig, t_mask``."""

from __future__ import annotations

from collections.abc import Mapping

from torchkiln._core.spellings.entries import Entry
from torchkiln._core.spellings.options import Options
from torchkiln._core.spellings.spelled import (
    Spelled,
    Step,
    gained,
    is_number,
    lone,
    spectral_norm_dims,
    weight_norm_dims,
)

__all__ = ["lone_originals", "look_alikes", "originals", "pairs"]


def _stem(key: str, suffix: str) -> str | None:
    stem = key.removesuffix(suffix)
    return stem if stem != key and stem and not stem.endswith(".") else None


def originals(entries: Mapping[str, Entry], options: Options) -> list[Spelled]:
    """Return the tensors with an original and all partners of one rule: pruning or spectral norm."""
    found: list[Spelled] = []
    for key, entry in entries.items():
        name = _stem(key, "_orig")
        if name is not None and is_number(entry) and not options.says(name, "data"):
            step = _step(name, entry, entries)
            found += [Spelled(name, "legacy", (key,), (step,), entry)] if step else []
    return found


def _step(name: str, entry: Entry, entries: Mapping[str, Entry]) -> Step | None:
    u, v, mask = (name + suffix for suffix in ("_u", "_v", "_mask"))
    if mask in entries and entries[mask].shape == entry.shape:
        return Step("pruning", (mask,))
    if u in entries and v in entries:
        dims = spectral_norm_dims(entry.shape, entries[u].shape, entries[v].shape)
        return Step("spectral_norm", (u, v), dims) if dims else None
    return None


def pairs(entries: Mapping[str, Entry], options: Options) -> list[Spelled]:
    """Return the tensors with a gain and a direction whose shapes are those of weight norm."""
    found: list[Spelled] = []
    for key, g in entries.items():
        name = _stem(key, "_g")
        v = entries.get(f"{name}_v")
        if name is None or v is None or not (is_number(g) and is_number(v)) or options.says(name, "data"):
            continue
        dims = weight_norm_dims(g.shape, v.shape)
        # Of one vector and another of its length, weight norm would keep the signs alone: two gates more likely.
        gates = len(v.shape) == 1 and g.shape == v.shape
        if dims and (not gates or options.says(name, "weight_norm") or options.expects(name)):
            step = Step("weight_norm", dims=dims)
            found.append(Spelled(name, "legacy", (key, f"{name}_v"), (step,), gained(g, v)))
    return found


def lone_originals(entries: Mapping[str, Entry], options: Options) -> list[Spelled]:
    """Return the originals without the partners that say what is computed from them."""
    found: list[Spelled] = []
    for key, entry in entries.items():
        name = _stem(key, "_orig")
        if name is None or name in entries or not is_number(entry) or not entry.shape:
            continue
        if not options.says(name, "data"):
            found.append(lone(name, "legacy", key, entry, options))
    return found


def look_alikes(entries: Mapping[str, Entry]) -> dict[str, str]:
    """Return remarks on keys that end like parts of a parametrization and are kept."""
    remarks: dict[str, str] = {}
    for key in entries:
        name = _stem(key, "_g")
        if name is not None and f"{name}_v" in entries:
            remarks[key] = f"{key} and {name}_v are kept as data: their shapes are not those of weight norm"
        name = _stem(key, "_orig")
        if name is not None and name in entries:
            remarks[key] = f"{key} is kept as data: {name} is in the file too"
    return remarks
