"""Families of vectors: simplices, orders, balls; and of the matrices whose rows and columns lie on a simplex."""

from __future__ import annotations

import torch
from torch import Tensor

from torchkiln._core.base import Parametrization
from torchkiln._core.errors import ParametrizationError
from torchkiln.families._contract import (
    Projection,
    check_argument,
    check_positive,
    computed,
    inverted,
    largest,
)
from torchkiln.families._maps import simplex as maps
from torchkiln.families._maps.elementwise import POSITIVE

__all__ = [
    "DoublyStochastic",
    "L1Ball",
    "L2Ball",
    "LInfBall",
    "Ordered",
    "PositiveOrdered",
    "Simplex",
    "SparseSimplex",
]

_EXP, _LOG = POSITIVE["exp"]


class Ordered(Parametrization):
    r"""Keep the last dimension increasing.

    .. math:: y_1 = x_1, \qquad y_i = y_{i-1} + e^{x_i}

    For thresholds, knots, cut points.

    Numerics:
        Exact for increasing vectors, to the rounding of the sums: gaps far smaller than the numbers lose digits.
        Others are sorted; equal neighbours are moved apart by the rounding unit. Differentiable everywhere.

    Example:
        >>> Ordered()(torch.zeros(4))
        tensor([0., 1., 2., 3.])
    """

    event_dim = 1

    @computed
    def forward(self, x: Tensor) -> Tensor:
        return maps.gaps_to_ordered(x[..., :1], x[..., 1:].exp())

    @inverted
    def right_inverse(self, y: Tensor) -> Tensor:
        first, gaps = maps.ordered_to_gaps(y)
        return torch.cat([first, _LOG(gaps)], -1)

    def residual(self, y: Tensor) -> Tensor:
        return largest(y.diff(dim=-1).clamp(max=0))

    def _from_normal(self, Z: Tensor) -> Tensor:
        return Z.sort(-1).values


class PositiveOrdered(Parametrization):
    r"""Keep the last dimension positive and increasing.

    .. math:: y_i = \sum_{j \le i} e^{x_j}

    Numerics:
        As :class:`Ordered`; numbers that are not positive go to the rounding unit.

    Example:
        >>> PositiveOrdered()(torch.zeros(4))
        tensor([1., 2., 3., 4.])
    """

    event_dim = 1

    @computed
    def forward(self, x: Tensor) -> Tensor:
        return x.exp().cumsum(-1)

    @inverted
    def right_inverse(self, y: Tensor) -> Tensor:
        return _LOG(torch.cat(maps.ordered_to_gaps(y.clamp(min=0)), -1))

    def residual(self, y: Tensor) -> Tensor:
        return largest(y.clamp(max=0), y.diff(dim=-1).clamp(max=0))

    def _from_normal(self, Z: Tensor) -> Tensor:
        return Z.exp().sort(-1).values


class Simplex(Parametrization):
    r"""Keep the last dimension a probability vector: not negative, with sum 1.

    .. math:: y = \mathrm{softmax}(x) \quad \text{or} \quad y_i = z_i \prod_{j<i} (1 - z_j),\
        z_i = \sigma(x_i - \log(n - i))

    ``"softmax"`` treats all entries alike and has one redundant number; ``"stick_breaking"`` is a bijection from
    n - 1 numbers, as densities need.

    Numerics:
        Exact inside; on the boundary a 0 becomes the rounding unit and hardly moves. Other values go to the
        nearest point of the simplex. Differentiable everywhere.

    Args:
        map: ``"softmax"`` or ``"stick_breaking"``.

    Example:
        >>> Simplex().project(torch.tensor([0.3, 0.5, 1.4]))
        tensor([1.1921e-07, 5.0000e-02, 9.5000e-01])
    """

    event_dim = 1

    def __init__(self, map: str = "softmax") -> None:  # noqa: A002  # the field's word
        super().__init__()
        check_argument(self, argument="map", value=map, choices=("softmax", "stick_breaking"))
        self.map = map

    @computed
    def forward(self, x: Tensor) -> Tensor:
        return x.softmax(-1) if self.map == "softmax" else maps.stick_breaking(x)

    @inverted
    def right_inverse(self, y: Tensor) -> Tensor:
        if not y.shape[-1]:
            raise ParametrizationError(f"Simplex needs at least one entry, got shape {tuple(y.shape)}.")
        y = _nearest_on_simplex(y)
        if self.map == "softmax":
            return _LOG(y)
        return maps.stick_breaking_inverse(y)

    def residual(self, y: Tensor) -> Tensor:
        return largest(y.clamp(max=0), _excess(y))

    def _from_normal(self, Z: Tensor) -> Tensor:
        return maps.uniform_on_simplex(Z)


class SparseSimplex(Projection):
    r"""Keep the last dimension a probability vector with exact zeros.

    .. math:: y = \arg\min_{p \in \Delta} \|p - x\|^2 = \max(x - \tau, 0)

    Numerics:
        The nearest point of the simplex, and exact on it. An entry at 0 has no gradient until others fall. Not
        differentiable where an entry reaches 0.

    Example:
        >>> SparseSimplex()(torch.tensor([0.5, 2.0, 1.8]))
        tensor([0.0000, 0.6000, 0.4000])

    References:
        Martins and Astudillo, arXiv:1602.02068.
    """

    event_dim = 1

    def _nearest(self, X: Tensor) -> Tensor:
        return maps.sparsemax(X)

    @inverted
    def right_inverse(self, X: Tensor) -> Tensor:
        return _nearest_on_simplex(X)

    def _from_normal(self, Z: Tensor) -> Tensor:
        return maps.uniform_on_simplex(Z)


def _excess(y: Tensor) -> Tensor:
    return y.double().sum(-1) - 1 if y.shape[-1] else y.new_zeros(())


def _nearest_on_simplex(y: Tensor) -> Tensor:
    """Return ``y`` itself where it is on the simplex to the rounding: projecting would move it by as much."""
    n, eps = y.shape[-1], torch.finfo(y.dtype).eps
    on = (y >= 0).all(-1, keepdim=True) & ((y.sum(-1, keepdim=True) - 1).abs() <= 2 * n * eps)
    return torch.where(on, y, maps.sparsemax(y))


class L1Ball(Projection):
    r"""Keep the sum of absolute values over the last dimension at most ``radius``.

    .. math:: y = \arg\min_{\|p\|_1 \le r} \|p - x\|_2

    Numerics:
        The identity inside, the nearest point outside, which is sparse. Not differentiable on the sphere.

    Args:
        radius: The bound.

    Example:
        >>> L1Ball(1.0)(torch.tensor([0.8, -0.6]))
        tensor([ 0.6000, -0.4000])

    References:
        Duchi et al., "Efficient Projections onto the l1-Ball", doi:10.1145/1390156.1390191.
    """

    event_dim = 1

    def __init__(self, radius: float = 1.0) -> None:
        super().__init__()
        check_positive(self, radius=radius)
        self.radius = radius

    def _nearest(self, X: Tensor) -> Tensor:
        return maps.project_l1(X, self.radius)

    def _from_normal(self, Z: Tensor) -> Tensor:
        return maps.uniform_in_l1(Z, self.radius)


class L2Ball(Projection):
    r"""Keep the Euclidean norm of the last dimension at most ``radius``.

    .. math:: y = x / \max(1, \|x\| / r)

    Numerics:
        The identity inside, the nearest point outside. Not differentiable on the sphere.

    Args:
        radius: The bound.

    Example:
        >>> L2Ball(1.0)(torch.tensor([3.0, 4.0]))
        tensor([0.6000, 0.8000])
    """

    event_dim = 1

    def __init__(self, radius: float = 1.0) -> None:
        super().__init__()
        check_positive(self, radius=radius)
        self.radius = radius

    def _nearest(self, X: Tensor) -> Tensor:
        return maps.project_l2(X, self.radius, -1)

    def _from_normal(self, Z: Tensor) -> Tensor:
        return maps.uniform_in_l2(Z, self.radius)


class LInfBall(Projection):
    r"""Keep every number within ``radius`` of 0.

    .. math:: y = \min(\max(x, -r), r)

    Numerics:
        The identity inside, the nearest point outside, where the derivative is 0: see :class:`Clamped` for one that
        can come back. Not differentiable on the bounds.

    Args:
        radius: The bound.

    Example:
        >>> LInfBall(1.0)(torch.tensor([0.5, -3.0]))
        tensor([ 0.5000, -1.0000])
    """

    event_dim = 0

    def __init__(self, radius: float = 1.0) -> None:
        super().__init__()
        check_positive(self, radius=radius)
        self.radius = radius

    def _nearest(self, X: Tensor) -> Tensor:
        return X.clamp(-self.radius, self.radius)

    def _from_normal(self, Z: Tensor) -> Tensor:
        result: Tensor = self.radius * (2 * torch.special.ndtr(Z) - 1)
        return result


class DoublyStochastic(Parametrization):
    r"""Keep a square matrix doubly stochastic: not negative, with rows and columns that sum to 1.

    .. math:: Y = D_1\, e^X D_2

    with the diagonal matrices that Sinkhorn's iteration finds, in logarithms. For soft permutations.

    Numerics:
        A matrix without negative entries goes to its logarithm, with zeros at the rounding unit: exact if it is
        doubly stochastic, scaled otherwise. Any other matrix is taken as X itself. Columns sum to 1 exactly, rows to
        the convergence of the iteration, which is slow where X spreads over more than 10 or so. Differentiable
        everywhere.

    Args:
        steps: Number of iterations.

    Example:
        >>> DoublyStochastic()(torch.zeros(2, 2))
        tensor([[0.5000, 0.5000],
                [0.5000, 0.5000]])

    References:
        Sinkhorn and Knopp, doi:10.2140/pjm.1967.21.343; Mena et al., arXiv:1802.08665.
    """

    event_dim = 2
    square = True

    def __init__(self, steps: int = 50) -> None:
        super().__init__()
        self.steps = steps

    @computed
    def forward(self, X: Tensor) -> Tensor:
        return maps.sinkhorn(X, self.steps)

    @inverted
    def right_inverse(self, Y: Tensor) -> Tensor:
        usable = (Y >= 0).all(-1, keepdim=True).all(-2, keepdim=True)
        return torch.where(usable, torch.where(Y > 0, Y, torch.finfo(Y.dtype).eps).log(), Y)

    def residual(self, Y: Tensor) -> Tensor:
        return largest(Y.clamp(max=0), _excess(Y), _excess(Y.mT))

    def _from_normal(self, Z: Tensor) -> Tensor:
        return maps.sinkhorn(Z, self.steps)
