"""The one table of family cases: every row of the catalogue, in every kind of tensor that it takes.

A new family is a row in ``torchkiln.testing``'s catalogue and gets all of these.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from torchkiln import Parametrization
from torchkiln.testing._catalogue import Row, example_of, rows

ROWS = list(rows())
# The first row of each family, by its name; the others are its variants.
FIRST = {type(row.family).__name__: row for row in reversed(ROWS)}

# These differ from the others in shape alone, and so run with the slow tests.
SLOW_KINDS = {"not contiguous", "square", "wide"}

# What every case is put to; the other laws do not depend on the kind of tensor, and hold for the rows themselves.
CASE_LAWS = ("shape", "membership", "inverse", "training", "bake", "copy")


class Case(NamedTuple):
    """A family, a tensor for it, and what is special about the tensor."""

    kind: str
    row: Row
    example: Tensor

    @property
    def id(self) -> str:
        return f"{self.row.label}-{self.kind}"


def cases() -> Iterator[Case]:
    for row in ROWS:
        family, example = row
        real = family.accepts != "complex"
        yield Case("float32", row, example.to(torch.float32 if real else torch.complex64))
        if family.accepts == "any" and _takes_complex(row):
            yield Case("complex", row, example_of(family, tuple(example.shape), torch.complex128))
        if real:
            yield Case("bfloat16", row, example.to(torch.bfloat16))
        yield Case("not contiguous", row, example.mT.contiguous().mT)
        yield from _other_shapes(row)


def _other_shapes(row: Row) -> Iterator[Case]:
    family, example = row
    name = type(family).__name__
    if name not in FIXED_SHAPE:
        yield Case("one number", row, example_of(family, (1, 1)))
        if name not in NEEDS_ROWS:
            yield Case(
                "no rows", row, example_of(family, (0, 0) if family.square or name == "Chain" else (0, 3))
            )
        if family.event_dim == 2 and not family.square:
            yield Case("square", row, example_of(family, (4, 4)))
            yield Case("wide", row, example_of(family, (3, 5)))
    if family.event_dim is not None:
        yield Case("batch", row, example_of(family, (2, 3, *example.shape)))
        yield Case("empty", row, example_of(family, (0, *example.shape)))


# Their arguments say which sides they fit.
FIXED_SHAPE = {
    *("BlockCirculant", "BlockDiagonal", "Kronecker", "Monarch", "Butterfly", "Product"),
    *("LowRank", "FixedRank", "PositiveSemidefinite", "FixedRankSemidefinite", "Masked"),
    "ConvSpectralNorm",  # a kernel has three dimensions at least
    "WeightStandardization",  # one weight per channel has no deviation
}


# Without a row they have no norm, no first entry, no rank of 1; they refuse.
NEEDS_ROWS = {"SpectralNorm", "Toeplitz", "Hankel", "DiagonalPlusLowRank"}


def _takes_complex(row: Row) -> bool:
    name = type(row.family).__name__
    parts_are_real = name == "Product"
    return not (parts_are_real or (name == "Triangular" and row.family.diagonal == "positive"))


CASES = list(cases())


def by_name(name: str) -> list[Parametrization]:
    return [row.family for row in ROWS if type(row.family).__name__ == name]
