"""Families that constrain one number at a time: signs, bounds, the unit circle."""

from __future__ import annotations

import torch
from torch import Tensor

from torchkiln._core.base import Parametrization
from torchkiln._core.errors import ParametrizationError
from torchkiln.families._contract import check_argument, computed, inverted, largest
from torchkiln.families._maps import elementwise as maps

__all__ = ["Clamped", "GreaterThan", "Interval", "LessThan", "Positive", "UnitCircle"]


class Positive(Parametrization):
    r"""Keep every number positive.

    .. math:: y = \log(1 + e^x), \quad e^x \quad \text{or} \quad x^2

    For scales, rates and variances. ``"softplus"`` grows linearly and trains most evenly, ``"exp"`` moves by factors,
    ``"square"`` reaches 0.

    Numerics:
        The inverse is exact for positive numbers of any size, and has the derivative 1 / y near 0; others go to the
        rounding unit of the dtype, where the derivative is tiny. ``"square"`` keeps a 0, where its derivative is 0.
        Differentiable everywhere. ``"exp"`` overflows at 88 in float32.

    Args:
        map: ``"softplus"``, ``"exp"`` or ``"square"``.

    Example:
        >>> Positive("exp")(torch.tensor([0.0, -1e4]))
        tensor([1., 0.])
    """

    event_dim = 0

    def __init__(self, map: str = "softplus") -> None:  # noqa: A002  # the field's word
        super().__init__()
        check_argument(self, argument="map", value=map, choices=maps.POSITIVE)
        self.map = map

    @computed
    def forward(self, x: Tensor) -> Tensor:
        return maps.POSITIVE[self.map][0](x)

    @inverted
    def right_inverse(self, y: Tensor) -> Tensor:
        return maps.POSITIVE[self.map][1](y)

    def residual(self, y: Tensor) -> Tensor:
        return largest(y.clamp(max=0))

    def _from_normal(self, Z: Tensor) -> Tensor:
        return Z.exp()


class GreaterThan(Parametrization):
    r"""Keep every number above a bound.

    .. math:: y = b + p(x), \qquad p \text{ as in } \texttt{Positive}

    Numerics:
        As :class:`Positive`, for :math:`y - b`; near a large bound the difference loses digits.

    Args:
        bound: The bound.
        map: As of :class:`Positive`.

    Example:
        >>> GreaterThan(3.0, "exp")(torch.zeros(2))
        tensor([4., 4.])
    """

    event_dim = 0

    def __init__(self, bound: float, map: str = "softplus") -> None:  # noqa: A002  # the field's word
        super().__init__()
        check_argument(self, argument="map", value=map, choices=maps.POSITIVE)
        self.bound, self.map = bound, map

    @computed
    def forward(self, x: Tensor) -> Tensor:
        return self.bound + maps.POSITIVE[self.map][0](x)

    @inverted
    def right_inverse(self, y: Tensor) -> Tensor:
        return maps.POSITIVE[self.map][1](y - self.bound)

    def residual(self, y: Tensor) -> Tensor:
        return largest((y - self.bound).clamp(max=0))

    def _from_normal(self, Z: Tensor) -> Tensor:
        return self.bound + Z.exp()


class LessThan(Parametrization):
    r"""Keep every number below a bound.

    .. math:: y = b - p(x), \qquad p \text{ as in } \texttt{Positive}

    Numerics:
        As :class:`Positive`, for :math:`b - y`.

    Args:
        bound: The bound.
        map: As of :class:`Positive`.

    Example:
        >>> LessThan(3.0, "exp")(torch.zeros(2))
        tensor([2., 2.])
    """

    event_dim = 0

    def __init__(self, bound: float, map: str = "softplus") -> None:  # noqa: A002  # the field's word
        super().__init__()
        check_argument(self, argument="map", value=map, choices=maps.POSITIVE)
        self.bound, self.map = bound, map

    @computed
    def forward(self, x: Tensor) -> Tensor:
        return self.bound - maps.POSITIVE[self.map][0](x)

    @inverted
    def right_inverse(self, y: Tensor) -> Tensor:
        return maps.POSITIVE[self.map][1](self.bound - y)

    def residual(self, y: Tensor) -> Tensor:
        return largest((y - self.bound).clamp(min=0))

    def _from_normal(self, Z: Tensor) -> Tensor:
        return self.bound - Z.exp()


class Interval(Parametrization):
    r"""Keep every number between two bounds.

    .. math:: y = a + (b - a)\, \sigma(x), \qquad \sigma(x) = \frac{1}{1 + e^{-x}}
        \quad \text{or} \quad \frac{1 + \tanh x}{2}

    Numerics:
        The ends are limits; a value on them or outside goes to one rounding unit inside, where the derivative is
        as small. The inverse has the derivative 1 / distance near the ends, and loses digits near the upper one, as
        every float does near 1. Differentiable everywhere; far out the derivative underflows.

    Args:
        lower: Lower bound.
        upper: Upper bound.
        map: ``"sigmoid"`` or ``"tanh"``, which is the same curve twice as steep.

    Example:
        >>> Interval(-1.0, 3.0)(torch.tensor([-1e4, 0.0, 1e4]))
        tensor([-1.,  1.,  3.])
    """

    event_dim = 0

    def __init__(self, lower: float = 0.0, upper: float = 1.0, *, map: str = "sigmoid") -> None:  # noqa: A002  # the field's word
        super().__init__()
        check_argument(self, argument="map", value=map, choices=maps.INTERVAL)
        _check_order(self, lower, upper)
        self.lower, self.upper, self.map = lower, upper, map

    @computed
    def forward(self, x: Tensor) -> Tensor:
        return self.lower + (self.upper - self.lower) * maps.INTERVAL[self.map][0](x)

    @inverted
    def right_inverse(self, y: Tensor) -> Tensor:
        return maps.INTERVAL[self.map][1]((y - self.lower) / (self.upper - self.lower))

    def residual(self, y: Tensor) -> Tensor:
        return largest((self.lower - y).clamp(min=0), (y - self.upper).clamp(min=0))

    def _from_normal(self, Z: Tensor) -> Tensor:
        result: Tensor = self.lower + (self.upper - self.lower) * torch.special.ndtr(Z)
        return result


class Clamped(Parametrization):
    r"""Clamp every number, and let gradients pass as if it were not (straight-through).

    .. math:: y = \min(\max(x, a), b), \qquad \frac{\partial y}{\partial x} := 1

    For hard bounds that are often touched: a clamped number can come back, where the true derivative would be 0.

    Numerics:
        Exact on the closed interval. The gradient is not the derivative outside of it, on purpose.

    Args:
        lower: Lower bound, or None.
        upper: Upper bound, or None.

    Example:
        >>> Clamped(-1.0, 1.0)(torch.tensor([-3.0, 0.5, 3.0]))
        tensor([-1.0000,  0.5000,  1.0000])

    References:
        Bengio, Leonard, Courville, arXiv:1308.3432.
    """

    event_dim = 0
    differentiable = False

    def __init__(self, lower: float | None = None, upper: float | None = None) -> None:
        super().__init__()
        if lower is None and upper is None:
            raise ParametrizationError("Clamped needs a bound: pass lower, upper or both.")
        if lower is not None and upper is not None:
            _check_order(self, lower, upper)
        self.lower, self.upper = lower, upper

    def forward(self, x: Tensor) -> Tensor:
        return maps.clamp_straight_through(x, self.lower, self.upper)

    @inverted
    def right_inverse(self, y: Tensor) -> Tensor:
        return y.clamp(self.lower, self.upper)

    def residual(self, y: Tensor) -> Tensor:
        return largest(y - y.clamp(self.lower, self.upper))

    def _from_normal(self, Z: Tensor) -> Tensor:
        if self.lower is None or self.upper is None:
            return super()._from_normal(Z)
        result: Tensor = self.lower + (self.upper - self.lower) * torch.special.ndtr(Z)
        return result


class UnitCircle(Parametrization):
    r"""Keep every complex number on the unit circle; trains its angle.

    .. math:: z = e^{i \theta}

    For phases. The original is the real angle, half as many numbers.

    Numerics:
        Differentiable everywhere, also across the cut of the angle. Off the circle the angle is kept and the length
        set to 1, the nearest point; 0 goes to 1.

    Example:
        >>> UnitCircle()(torch.tensor([0.0, torch.pi / 4]))
        tensor([1.0000+0.0000j, 0.7071+0.7071j])
    """

    event_dim = 0
    accepts = "complex"

    def forward(self, theta: Tensor) -> Tensor:
        return torch.complex(theta.cos(), theta.sin())

    @inverted
    def right_inverse(self, z: Tensor) -> tuple[Tensor]:
        # A sequence, since one tensor may not change the dtype.
        return (z.angle(),)

    def residual(self, z: Tensor) -> Tensor:
        return largest(z.abs() - 1)

    def _from_normal(self, Z: Tensor) -> Tensor:
        return torch.where(Z == 0, 1, Z / Z.abs())


def _check_order(family: object, lower: float, upper: float) -> None:
    if not lower < upper:
        raise ParametrizationError(
            f"{type(family).__name__} needs lower < upper, got lower={lower}, upper={upper}."
        )
