"""A tensor that a file describes itself: the steps that made it, by name, and how to take them again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from torchkiln._core.spellings.entries import Entry

__all__ = ["Described"]


@dataclass(frozen=True)
class Described:
    """What a file says of one tensor, besides the keys that every file has.

    Attributes:
        names: What its steps are called, first to last.
        entry: The shape and dtype it is computed in.
        compute: Computes it from its originals, and from the state of the steps by name, such as ``"0.base"``.
        text: The description; two tensors with equal descriptions are computed alike.
        norm: Whether it is one of torch's two norms and nothing else, which keys and shapes describe as well.
        dim: The normalized dim of that norm, None for all dims at once.
        blocked: Why it cannot be computed; empty if it can.
    """

    names: tuple[str, ...]
    entry: Entry
    compute: Callable[[Sequence[Tensor], Mapping[str, Tensor]], Tensor]
    text: str
    norm: bool = False
    dim: int | None = None
    blocked: str = ""
