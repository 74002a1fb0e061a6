"""The catalogue of parametrizations, grouped by the mathematics they share.

Each is registered without shapes, which are read from the tensor::

    register_parametrization(module, "weight", Orthogonal())

A value that satisfies the constraint is kept; another is projected. Beforehand ``family.residual(X)`` says how far
off the constraint it is, ``family.project(X)`` where it goes, and ``family.displacement(X)`` how far that is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from torchkiln._core.spec import build
from torchkiln.families._compose import Chain, Custom, Product
from torchkiln.families._definite import (
    Correlation,
    DiagonalPlusLowRank,
    FixedRankSemidefinite,
    GraphLaplacian,
    HurwitzStable,
    PositiveDefinite,
    PositiveSemidefinite,
    SchurStable,
)
from torchkiln.families._elementwise import (
    Clamped,
    GreaterThan,
    Interval,
    LessThan,
    Positive,
    UnitCircle,
)
from torchkiln.families._lowrank import PLU, FixedRank, Invertible, LowRank, SpecialLinear
from torchkiln.families._norm import ConvSpectralNorm, SpectralNorm, WeightNorm
from torchkiln.families._orthogonal import (
    AlmostOrthogonal,
    Grassmann,
    Orthogonal,
    OrthogonalProjection,
    SpecialOrthogonal,
    Stiefel,
    Unitary,
)
from torchkiln.families._patterned import (
    Banded,
    BlockCirculant,
    Circulant,
    Diagonal,
    Hankel,
    Masked,
    Toeplitz,
    Triangular,
)
from torchkiln.families._scale import (
    Centered,
    EqualizedRate,
    FrobeniusNorm,
    MaxNorm,
    OperatorNormBound,
    Scaled,
    SigmaReparam,
    Sphere,
    UnitNorm,
    WeightStandardization,
)
from torchkiln.families._simplex import (
    DoublyStochastic,
    L1Ball,
    L2Ball,
    LInfBall,
    Ordered,
    PositiveOrdered,
    Simplex,
    SparseSimplex,
)
from torchkiln.families._structured import BlockDiagonal, Butterfly, Kronecker, Monarch
from torchkiln.families._symmetric import (
    Hermitian,
    SkewHermitian,
    SkewSymmetric,
    Symmetric,
    TraceFree,
    ZeroSum,
)

__all__ = [
    "PLU",
    "AlmostOrthogonal",
    "Banded",
    "BlockCirculant",
    "BlockDiagonal",
    "Butterfly",
    "Centered",
    "Chain",
    "Circulant",
    "Clamped",
    "ConvSpectralNorm",
    "Correlation",
    "Custom",
    "Diagonal",
    "DiagonalPlusLowRank",
    "DoublyStochastic",
    "EqualizedRate",
    "FixedRank",
    "FixedRankSemidefinite",
    "FrobeniusNorm",
    "GraphLaplacian",
    "Grassmann",
    "GreaterThan",
    "Hankel",
    "Hermitian",
    "HurwitzStable",
    "Interval",
    "Invertible",
    "Kronecker",
    "L1Ball",
    "L2Ball",
    "LInfBall",
    "LessThan",
    "LowRank",
    "Masked",
    "MaxNorm",
    "Monarch",
    "OperatorNormBound",
    "Ordered",
    "Orthogonal",
    "OrthogonalProjection",
    "Positive",
    "PositiveDefinite",
    "PositiveOrdered",
    "PositiveSemidefinite",
    "Product",
    "Scaled",
    "SchurStable",
    "SigmaReparam",
    "Simplex",
    "SkewHermitian",
    "SkewSymmetric",
    "SparseSimplex",
    "SpecialLinear",
    "SpecialOrthogonal",
    "SpectralNorm",
    "Sphere",
    "Stiefel",
    "Symmetric",
    "Toeplitz",
    "TraceFree",
    "Triangular",
    "UnitCircle",
    "UnitNorm",
    "Unitary",
    "WeightNorm",
    "WeightStandardization",
    "ZeroSum",
    "from_spec",
]


def from_spec(
    spec: Mapping[str, Any],
    *,
    also: Mapping[str, Callable[..., nn.Module]] | None = None,
    buffers: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Build a family again from what its ``spec()`` returned.

    Args:
        spec: Name, version and arguments, also after a way through JSON.
        also: Classes of your own, by the names in the spec. No other name outside the catalogue is looked up.
        buffers: The buffers that a state dict holds for it, by their names within the family.

    Returns:
        The family; with its originals it computes the tensor, without the model's code.

    Raises:
        ParametrizationError: The version, a name, an argument or a buffer is not known.

    Example:
        >>> from_spec(Interval(0.0, 2.0).spec())
        Interval(upper=2.0)
    """
    return build(spec, {**_catalogue(), **(also or {})}, buffers=buffers)


def _catalogue() -> dict[str, Callable[..., nn.Module]]:
    found = {name: globals()[name] for name in __all__}
    return {name: value for name, value in found.items() if isinstance(value, type)}
