"""A parametrized tensor as names and shapes describe it, whichever style spells it."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal

import torch

from torchkiln._core.spellings.described import Described
from torchkiln._core.spellings.entries import Entry, Label
from torchkiln._core.spellings.fold import compute_dtype
from torchkiln._core.spellings.options import MAPS, Options

__all__ = [
    "Kind",
    "Norm",
    "Spelled",
    "Step",
    "Style",
    "gained",
    "is_number",
    "lone",
    "norm_keys",
    "spectral_norm_dims",
    "weight_norm_dims",
]

Style = Literal["legacy", "torch"]
Norm = Literal["spectral_norm", "weight_norm"]
Kind = Literal["described", "identity", "orthogonal", "pruning", "spectral_norm", "weight_norm"]

# What a norm's keys end in, after "parametrizations.t." in torch's style and after "t_" in the legacy one.
_ENDINGS: dict[tuple[Style, Norm], tuple[str, ...]] = {
    ("torch", "weight_norm"): ("original0", "original1"),
    ("torch", "spectral_norm"): ("original", "0._u", "0._v"),
    ("legacy", "weight_norm"): ("g", "v"),
    ("legacy", "spectral_norm"): ("orig", "u", "v"),
}


@dataclass(frozen=True)
class Step:
    """One map of a chain, with the keys of the state it keeps."""

    kind: Kind
    state: tuple[str, ...] = ()
    dims: tuple[int | None, ...] = ()
    """The normalized dims that the shapes allow, the one to take first."""
    map: str | None = None
    described: Described | None = None
    """All the steps at once, where the file itself says what they are."""

    @property
    def name(self) -> str:
        """What to call it in a report."""
        return " + ".join(self.described.names) if self.described else self.kind


@dataclass(frozen=True)
class Spelled:
    """One parametrized tensor as the file spells it.

    Attributes:
        name: The key its plain value would have.
        style: ``"torch"`` or ``"legacy"``.
        originals: Keys of what the first step computes from.
        steps: The chain, first to last; empty where it is not known.
        shape: Shape of the tensor.
        dtype: Dtype of the tensor.
        skipped: Indices of steps that must exist but keep nothing in the file.
        assumptions: What names and shapes alone do not prove.
        blocked: Why it cannot be folded, and what to do; empty if it can.
    """

    name: str
    style: Style
    originals: tuple[str, ...]
    steps: tuple[Step, ...]
    entry: Entry
    skipped: tuple[int, ...] = ()
    assumptions: tuple[str, ...] = ()
    blocked: str = ""

    @property
    def spelling(self) -> str:
        """What to call it in a report."""
        kinds = " + ".join(step.name for step in self.steps) or "unknown"
        return kinds if kinds == "pruning" else f"{self.style} {kinds}"

    @property
    def inputs(self) -> tuple[str, ...]:
        """Every key it is computed from, some of which may be recognised tensors themselves."""
        return (*self.originals, *(key for step in self.steps for key in step.state))

    @property
    def label(self) -> Label:
        """How torch's version records know it."""
        prefix, _, tensor = self.name.rpartition(".")
        kind = self.steps[0].kind if self.steps else ""
        return Label(f"{prefix}." if prefix else "", tensor, self.style, kind)


def norm_keys(name: str, style: Style, norm: Norm) -> tuple[str, ...]:
    """Return the keys of the tensor `name` under one norm; both styles have the same tensors in the same order.

    Example:
        >>> norm_keys("conv.weight", "torch", "weight_norm")
        ('conv.parametrizations.weight.original0', 'conv.parametrizations.weight.original1')
    """
    prefix, dot, tensor = name.rpartition(".")
    start = f"{prefix}{dot}parametrizations.{tensor}." if style == "torch" else f"{name}_"
    return tuple(start + ending for ending in _ENDINGS[style, norm])


def weight_norm_dims(g: tuple[int, ...], v: tuple[int, ...]) -> tuple[int | None, ...]:
    """Return the dims that fit a gain of shape `g` and a direction of shape `v`, the likeliest first.

    A gain has the direction's shape with 1 everywhere but at the dim. With one element it is one norm over
    everything: dim None, or any dim of size 1, which mean the same number.
    """
    if not v or 0 in v:
        return ()
    if prod(g) == 1 and len(g) <= len(v):
        sizes_one = tuple(dim for dim, size in enumerate(v) if size == 1) if len(g) == len(v) else ()
        return (*sizes_one, None)
    return tuple(d for d in range(len(v)) if g == tuple(s if i == d else 1 for i, s in enumerate(v)))


def spectral_norm_dims(
    weight: tuple[int, ...], u: tuple[int, ...], v: tuple[int, ...]
) -> tuple[int | None, ...]:
    """Return the dims whose matrix has as many rows as `u` and as many columns as `v` has elements."""
    if len(weight) < 2 or len(u) != 1 or len(v) != 1 or u[0] * v[0] != prod(weight) or 0 in weight:
        return ()
    return tuple(dim for dim, size in enumerate(weight) if size == u[0])


def gained(g: Entry, v: Entry) -> Entry:
    """Return shape and dtype of the weight norm of two tensors."""
    if g.dtype == v.dtype:
        return v
    return Entry(v.shape, torch.promote_types(compute_dtype(g.dtype), compute_dtype(v.dtype)))


def is_number(entry: Entry) -> bool:
    """Tell whether a tensor can be normed."""
    return entry.dtype.is_floating_point or entry.dtype.is_complex


def lone(name: str, style: Style, key: str, entry: Entry, options: Options) -> Spelled:
    """Describe an original with nothing fitting beside it: its rule was stateless, or its state is lost.

    Args:
        name: The tensor's plain key.
        style: Whose spelling the key is.
        key: The original's key.
        entry: Its shape and dtype.
        options: May say what the rule was.
    """
    step = _said(name, entry, options)
    if step is not None:
        rule = step.map or step.kind
        return Spelled(name, style, (key,), (step,), entry, assumptions=(f"{rule}: as passed",))
    return Spelled(name, style, (key,), (), entry, blocked=_lone_text(name, style, key))


def _said(name: str, entry: Entry, options: Options) -> Step | None:
    """The step that the caller says was there, if the tensor's shape allows it."""
    if options.says(name, "identity"):
        return Step("identity")
    if len(entry.shape) >= 2 and (orthogonal := options.says(name, *MAPS)):
        return Step("orthogonal", map=orthogonal)
    if len(entry.shape) == 1 and options.says(name, "spectral_norm"):
        return Step("spectral_norm")
    return None


def _lone_text(name: str, style: Style, key: str) -> str:
    missing = "any step's state" if style == "torch" else f"a fitting {name}_mask, or {name}_u and {name}_v"
    maps = '"matrix_exp", "cayley", "householder" (orthogonal without a base), ' if style == "torch" else ""
    return (
        f"{key}: an original without {missing}; renaming it would drop whatever was computed from it.\n"
        f'Pass assume={{"{name}": ...}} with {maps}"identity" (nothing was) or "data" (keep the key).'
    )
