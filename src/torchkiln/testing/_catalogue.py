"""An example for each family of the catalogue, and for each of its maps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchkiln import families
from torchkiln._core.base import Parametrization

__all__ = ["Row", "example_of", "label", "names", "rows"]


class Row(NamedTuple):
    """A family as a user makes it, and a tensor for it."""

    family: Parametrization
    example: Tensor

    @property
    def label(self) -> str:
        """The family with its arguments, on one line."""
        return label(self.family)


def label(step: nn.Module) -> str:
    """Return the class with its arguments, on one line."""
    return f"{type(step).__name__}({step.extra_repr()})"


_POSITIVE_MAPS: list[dict[str, Any]] = [{"map": name} for name in ("softplus", "exp", "square")]
_RANK: list[dict[str, Any]] = [{"rank": 2}]

# The arguments that a family needs, and its variants; every other family has one row, without arguments.
_ARGUMENTS: dict[str, list[dict[str, Any]]] = {
    "AlmostOrthogonal": [{"radius": 0.3}],
    "Banded": [{"lower": 1, "upper": 0}],
    "BlockCirculant": [{"block": 2}],
    "BlockDiagonal": [{"blocks": 2}],
    "Chain": [{"families": [families.Symmetric(), families.Scaled(2.0)]}],
    "Clamped": [{"lower": -1.0, "upper": 1.0}],
    "ConvSpectralNorm": [
        {"padding": 1},
        {"padding": 1, "padding_mode": "circular", "method": "exact", "input_size": (4, 4)},
        {"padding": 1, "stride": 2, "method": "power", "input_size": (4, 4), "tolerance": 1e-7},
    ],
    "Custom": [{"function": torch.sinh, "inverse": torch.asinh}],
    "DiagonalPlusLowRank": [{"rank": 1}],
    "FixedRank": _RANK,
    "FixedRankSemidefinite": _RANK,
    "FrobeniusNorm": [{"per": "tensor"}, {"per": "row"}],
    "GreaterThan": [{"bound": 1.0, **one} for one in _POSITIVE_MAPS],
    "HurwitzStable": [{}, {"decay": 0.5}],
    "Interval": [{"map": "sigmoid"}, {"lower": -2.0, "upper": 3.0, "map": "tanh"}],
    "Kronecker": [{"rows": 2, "columns": 2}, {"rows": 2, "columns": 2, "terms": 2}],
    "LessThan": [{"bound": -1.0, **one} for one in _POSITIVE_MAPS],
    "LowRank": _RANK,
    "Masked": [{"mask": torch.tensor([[True, False, True]])}],
    "MaxNorm": [{"bound": 1.0}, {"bound": 1.0, "dim": 0}],
    "Monarch": [{"blocks": 2}],
    "OperatorNormBound": [{"order": 1}, {"order": 2}, {"order": "inf"}],
    "Orthogonal": [{"map": name} for name in ("exponential", "cayley", "householder")],
    "OrthogonalProjection": [
        {"method": name} for name in ("polar", "qr", "bjorck", "newton_schulz", "cholesky")
    ],
    "Positive": _POSITIVE_MAPS,
    "PositiveDefinite": [{"map": name} for name in ("cholesky", "exponential", "softplus")],
    "PositiveSemidefinite": [{}, {"rank": 2}],
    "Product": [{"families": [families.Simplex(), None, families.Positive()], "sizes": [2, 1, 1]}],
    "Scaled": [{"scale": 2.0, "learned": name} for name in ("no", "scalar", "diagonal")],
    "SchurStable": [{}, {"radius": 0.5}],
    "Simplex": [{"map": "softmax"}, {"map": "stick_breaking"}],
    "SpectralNorm": [
        {"tolerance": 1e-7},
        {"coefficient": 2.0, "cap": True, "tolerance": 1e-7},
        {"dim": 1, "tolerance": 1e-7},
    ],
    "SpecialOrthogonal": [{"map": "exponential"}, {"map": "cayley"}],
    "Triangular": [
        {"side": side, "diagonal": kind}
        for side, kind in [("lower", "free"), ("upper", "zero"), ("lower", "unit"), ("upper", "positive")]
    ],
    "UnitNorm": [{}, {"dim": 0}],
    "Unitary": [{"map": "exponential"}, {"map": "cayley"}],
    "WeightNorm": [{}, {"dim": -1}, {"gain": 2.0}],
    "WeightStandardization": [{}, {"scale": "fan_in", "gamma": 1.7}],
    "ZeroSum": [{}, {"dim": 0}],
}
# The structured ones want sides with divisors.
_SHAPES: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("BlockCirculant", "BlockDiagonal", "Kronecker", "Monarch"), (4, 6)),
    "ConvSpectralNorm": (3, 2, 3, 3),
}


def names() -> list[str]:
    """Return the names of the families."""
    return [name for name in families.__all__ if isinstance(getattr(families, name), type)]


def rows() -> Iterator[Row]:
    """Yield a row for each family and each of its maps."""
    for name in names():
        for arguments in _ARGUMENTS.get(name, [{}]):
            family: Parametrization = getattr(families, name)(**arguments)
            yield Row(family, example_of(family))


def example_of(
    family: Parametrization, shape: tuple[int, ...] | None = None, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Return a tensor of random numbers for ``family``, the same each time."""
    shape = shape or _SHAPES.get(type(family).__name__) or ((4, 4) if family.square else (4, 3))
    if type(family).__name__ == "Chain":
        shape = (4, 4)
    if family.accepts == "complex":
        dtype = torch.complex128 if dtype == torch.float64 else dtype.to_complex()
    generator = torch.Generator().manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)
    return torch.randn(shape, generator=generator, dtype=wide).to(dtype)
