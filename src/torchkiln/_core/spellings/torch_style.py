"""The spelling of torch's parametrize: ``parametrizations.t.original``, and the state of step N as ``.N.``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torchkiln._core.spellings.described import Described
from torchkiln._core.spellings.entries import Entry
from torchkiln._core.spellings.options import MAPS, Options
from torchkiln._core.spellings.spelled import (
    Spelled,
    Step,
    gained,
    is_number,
    lone,
    spectral_norm_dims,
    weight_norm_dims,
)

__all__ = ["lists", "look_alikes", "no_state"]

_KEY = re.compile(
    r"(?P<prefix>(?:.*\.)?)parametrizations\.(?P<tensor>[^.]+)\.(?P<rest>original\d*|\d+\..+)", re.DOTALL
)


def lists(
    entries: Mapping[str, Entry], options: Options, *, modules: frozenset[str] = frozenset()
) -> list[Spelled]:
    """Return what the innermost parametrization lists of a group compute.

    Args:
        entries: The tensors, by key.
        options: What the caller knows.
        modules: Paths of modules, among which are steps that keep no tensor. Without them such a step shows only
            by a gap before one that does.
    """
    found = [one for one in _collect(entries) if one.originals and not options.says(one.name, "data")]
    depth = max((one.depth for one in found), default=0)
    return [_Reader(one, entries, options, modules).read() for one in found if one.depth == depth]


def look_alikes(entries: Mapping[str, Entry]) -> dict[str, str]:
    """Return remarks on keys that would be part of a list if the rest of it were there."""
    orphans = (
        next(iter(next(iter(one.state.values())).values())) for one in _collect(entries) if not one.originals
    )
    return {key: f"{key} is kept as data: the original that it belongs to is missing" for key in orphans}


def no_state(name: str, skipped: tuple[int, ...]) -> str:
    """Return the message on steps that must exist and keep nothing in the file."""
    steps = ", ".join(map(str, skipped))
    return (
        f"{name}: step {steps} keeps nothing in the file, and what it computes is not known.\n"
        f'Bake it in the model that has its code, or pass assume={{"{name}": "identity"}} if it computes nothing.'
    )


@dataclass
class _List:
    """The keys of one parametrization list: originals by their name, state by step and name."""

    prefix: str
    tensor: str
    originals: dict[str, str] = field(default_factory=dict)
    state: dict[int, dict[str, str]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.prefix + self.tensor

    @property
    def depth(self) -> int:
        return f".{self.prefix}".count(".parametrizations.")


def _collect(entries: Mapping[str, Entry]) -> list[_List]:
    found: dict[tuple[str, str], _List] = {}
    for key in entries:
        match = _KEY.fullmatch(key)
        if match is None:
            continue
        prefix, tensor, rest = match.group("prefix", "tensor", "rest")
        one = found.setdefault((prefix, tensor), _List(prefix, tensor))
        if rest.startswith("original"):
            one.originals[rest] = key
        else:
            index, _, name = rest.partition(".")
            one.state.setdefault(int(index), {})[name] = key
    return list(found.values())


class _Reader:
    """Works out what one list computes."""

    def __init__(
        self, keys: _List, entries: Mapping[str, Entry], options: Options, modules: frozenset[str]
    ) -> None:
        self._keys, self._entries, self._options, self._modules = keys, entries, options, modules
        self._names = sorted(keys.originals)
        self._originals = tuple(keys.originals[name] for name in self._names)

    def read(self) -> Spelled:
        described = self._options.description(self._keys.name)
        if described is None:
            return self._recognised()
        return self._described_norm(described) if described.norm else self._described(described)

    def _described(self, described: Described) -> Spelled:
        state = tuple(
            key for _, own in sorted(self._keys.state.items()) for key in (own[name] for name in sorted(own))
        )
        step = Step("described", state, described=described)
        blocked = described.blocked and f"{self._keys.name}: {described.blocked}"
        return Spelled(self._keys.name, "torch", self._originals, (step,), described.entry, blocked=blocked)

    def _described_norm(self, described: Described) -> Spelled:
        item = self._recognised()
        if item.blocked or len(item.steps) != 1 or described.dim not in item.steps[0].dims:
            shapes = ", ".join(str(self._entries[key].shape) for key in self._originals)
            said = f"{described.names[0]} along {described.dim}"
            return replace(item, blocked=f"{item.name}: is described as {said}, and shapes {shapes} are not.")
        return replace(item, steps=(replace(item.steps[0], dims=(described.dim,)),), assumptions=())

    def _recognised(self) -> Spelled:
        if self._names == ["original0", "original1"]:
            return self._weight_norm()
        if self._names != ["original"]:
            return self._unknown(f"{', '.join(self._names)} alone follow no known rule")
        original = self._originals[0]
        if not self._keys.state:
            return lone(self._keys.name, "torch", original, self._entries[original], self._options)
        return self._chain([], self._entries[original], ())

    def _weight_norm(self) -> Spelled:
        g, v = (self._entries[key] for key in self._originals)
        dims = weight_norm_dims(g.shape, v.shape) if is_number(g) and is_number(v) else ()
        if not dims:
            return self._unknown(f"shapes {g.shape} and {v.shape} are no gain and direction of weight norm")
        if 0 in self._keys.state:
            return self._unknown("weight norm keeps no state, and step 0 does")
        assumed = "original0 and original1 are gain and direction of weight norm: the shapes fit"
        return self._chain([Step("weight_norm", dims=dims)], gained(g, v), (assumed,))

    def _chain(self, steps: list[Step], entry: Entry, assumptions: tuple[str, ...]) -> Spelled:
        skipped = self._skipped(first=len(steps))
        for index, state in sorted(self._keys.state.items()):
            step = self._step(state, entry)
            if step is None:
                return self._unknown(f"{next(iter(state.values()))} is state of no known step")
            if step.map is not None:
                assumptions += (f"{step.map}: as passed",)
            if step.kind == "pruning":
                assumptions += (f"step {index} multiplies by its mask: the shapes are equal",)
            steps.append(step)
        blocked = self._blocked(steps, skipped)
        return Spelled(
            self._keys.name, "torch", self._originals, tuple(steps), entry, skipped, assumptions, blocked
        )

    def _skipped(self, *, first: int) -> tuple[int, ...]:
        """The steps that keep no tensor, from the first one not accounted for."""
        path = f"{self._keys.prefix}parametrizations.{self._keys.tensor}."
        last = max(self._keys.state, default=-1)
        while f"{path}{last + 1}" in self._modules:
            last += 1
        return tuple(index for index in range(first, last + 1) if index not in self._keys.state)

    def _step(self, state: dict[str, str], entry: Entry) -> Step | None:
        """The known step that keeps this state, if its shapes fit."""
        keys = tuple(state[name] for name in sorted(state))
        shapes = {name: self._entries[key].shape for name, key in state.items()}
        if shapes.keys() == {"_u", "_v"}:
            dims = spectral_norm_dims(entry.shape, shapes["_u"], shapes["_v"])
            return Step("spectral_norm", keys, dims) if dims else None
        if shapes.keys() == {"base"} and len(entry.shape) >= 2:
            side = max(entry.shape[-2:])
            fits = shapes["base"] == (*entry.shape[:-2], side, side)
            return Step("orthogonal", keys, map=self._options.says(self._keys.name, *MAPS)) if fits else None
        if shapes.keys() == {"mask"} and shapes["mask"] == entry.shape:
            return Step("pruning", keys)
        return None

    def _blocked(self, steps: list[Step], skipped: tuple[int, ...]) -> str:
        name, state = self._keys.name, self._keys.state
        if skipped and not self._options.says(name, "identity"):
            # Only the vectors of a spectral norm bear witness to what it was computed from.
            after = [min((index for index in state if index > step), default=-1) for step in skipped]
            if not all("_u" in state.get(index, ()) for index in after):
                return no_state(name, skipped)
        for step in steps:
            if step.kind == "orthogonal" and step.map is None:
                return (
                    f"{step.state[0]}: which orthogonal map made {name} is not in the file.\n"
                    f'Pass assume={{"{name}": ...}} with "matrix_exp", "cayley" or "householder".'
                )
        return ""

    def _unknown(self, why: str) -> Spelled:
        # It claims its state too, so that no key of it is left behind looking plain.
        state = tuple(key for step in self._keys.state.values() for key in step.values())
        blocked = (
            f"{self._originals[0]}: unknown parametrization: {why}.\n"
            f'Bake it in the model that has its code, or keep its keys: assume={{"{self._keys.name}": "data"}}.'
        )
        entry = self._entries[self._originals[-1]]
        return Spelled(self._keys.name, "torch", (*self._originals, *state), (), entry, blocked=blocked)
