"""Families that set the scale of a tensor: norms fixed or bounded, means removed, factors put in front."""

from __future__ import annotations

from collections.abc import Sequence

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
from torchkiln.families._maps import scale as maps
from torchkiln.families._maps.linear import remove_mean
from torchkiln.families._maps.simplex import project_l2, uniform_in_l2

__all__ = [
    "Centered",
    "EqualizedRate",
    "FrobeniusNorm",
    "MaxNorm",
    "OperatorNormBound",
    "Scaled",
    "SigmaReparam",
    "Sphere",
    "UnitNorm",
    "WeightStandardization",
]


class SigmaReparam(Parametrization):
    r"""Train the spectral norm of a matrix apart from the rest.

    .. math:: W = \gamma\, V / \sigma_1(V)

    Against collapsing attention entropy. Two originals: the gain and the matrix. The singular value is exact, at the
    price of an SVD for each change.

    Numerics:
        Every matrix is reached, and a value is kept. Differentiable where the largest singular value is simple; a
        repeated one gives a subgradient, no NaN.

    Example:
        >>> SigmaReparam()(Tensor([2])[0], Tensor([[7, 0], [0, 7]]))
        tensor([[2., 0.],
                [0., 2.]])

    References:
        Zhai et al., arXiv:2303.06296.
    """

    event_dim = 2
    accepts = "any"

    @computed
    def forward(self, gain: Tensor, V: Tensor) -> Tensor:
        return maps.rescale(V, maps.spectral(V), to=1.0, dims=(-2, -1)) * gain[..., None, None]

    @inverted
    def right_inverse(self, W: Tensor) -> tuple[Tensor, Tensor]:
        return maps.spectral(W)[..., 0, 0], W


class FrobeniusNorm(Projection):
    r"""Keep the Euclidean norm of the whole tensor, or of each row, at a fixed value.

    .. math:: W = r\, V / \|V\|_F

    Numerics:
        Off the constraint the nearest point; 0, and what squares to 0, goes to equal entries. Differentiable but at 0,
        where the gradient passes as it is; elsewhere it is orthogonal to the value, and grows as the original shrinks.

    Args:
        norm: The value r.
        per: ``"tensor"``, or ``"row"``: for each index of the first dimension.

    Example:
        >>> FrobeniusNorm(10.0)(Tensor([[3.0], [4.0]]))
        tensor([[6.],
                [8.]])
    """

    accepts = "any"

    def __init__(self, norm: float = 1.0, per: str = "tensor") -> None:
        super().__init__()
        check_argument(self, argument="per", value=per, choices=("tensor", "row"))
        check_positive(self, norm=norm)
        self.norm, self.per = norm, per

    def event_dims(self, ndim: int) -> Sequence[int]:
        """Return the dimensions that the norm is taken over."""
        return range(int(self.per == "row"), ndim)

    def _nearest(self, X: Tensor) -> Tensor:
        return maps.onto_sphere(X, self.norm, tuple(range(int(self.per == "row"), X.ndim)))


class UnitNorm(Projection):
    r"""Keep every vector along a dimension at length 1: rows by default, columns with ``dim=-2`` (oblique).

    .. math:: w = v / \|v\|

    Numerics:
        As :class:`FrobeniusNorm`.

    Args:
        dim: The dimension along which the norm is taken.

    Example:
        >>> UnitNorm()(Tensor([[3.0, 4.0], [0.0, 2.0]]))
        tensor([[0.6000, 0.8000],
                [0.0000, 1.0000]])
    """

    accepts = "any"

    def __init__(self, dim: int = -1) -> None:
        super().__init__()
        self.dim = dim

    def event_dims(self, ndim: int) -> Sequence[int]:  # noqa: ARG002  # the same for every number of them
        """Return the dimension along which the norm is taken."""
        return (self.dim,)

    def _nearest(self, X: Tensor) -> Tensor:
        return maps.onto_sphere(X, 1.0, (self.dim,))


class Sphere(Projection):
    r"""Keep the last dimension on a sphere around 0.

    .. math:: w = r\, v / \|v\|

    Numerics:
        As :class:`FrobeniusNorm`. Samples are uniform.

    Args:
        radius: The radius r.

    Example:
        >>> Sphere(10.0)(Tensor([3.0, 4.0]))
        tensor([6., 8.])
    """

    event_dim = 1
    accepts = "any"

    def __init__(self, radius: float = 1.0) -> None:
        super().__init__()
        check_positive(self, radius=radius)
        self.radius = radius

    def _nearest(self, X: Tensor) -> Tensor:
        return maps.onto_sphere(X, self.radius, (-1,))


class OperatorNormBound(Projection):
    r"""Keep the operator norm of a matrix at most ``bound``: the Lipschitz constant of a linear layer.

    .. math:: W = V / \max(1, \|V\|_p / \lambda)

    ``order=1`` is the largest column sum, ``inf`` the largest row sum (of absolute values), 2 the largest singular
    value.

    Numerics:
        The identity inside, a point of the bound outside (scaled, not the nearest). Not differentiable on the bound,
        nor where the largest sum or singular value is not unique; no NaN there. The gradient of the singular value
        needs the first pair of vectors alone.

    Args:
        order: ``1``, ``2`` or ``"inf"``.
        bound: The bound.

    Example:
        >>> OperatorNormBound("inf")(Tensor([[3.0, 1.0], [0.0, 2.0]]))
        tensor([[0.7500, 0.2500],
                [0.0000, 0.5000]])

    References:
        Gouk et al., arXiv:1804.04368.
    """

    event_dim = 2
    accepts = "any"

    def __init__(self, order: int | str = 2, bound: float = 1.0) -> None:
        super().__init__()
        check_argument(self, argument="order", value=order, choices=(1, 2, "inf"))
        check_positive(self, bound=bound)
        self.order, self.bound = order, bound

    def _nearest(self, X: Tensor) -> Tensor:
        return X * (self.bound / maps.operator_norm(X, self.order).clamp(min=self.bound))

    # A bounded normal matrix is no natural distribution.
    _from_normal = Parametrization._from_normal


class MaxNorm(Projection):
    r"""Keep the Euclidean norm along a dimension at most ``bound``.

    .. math:: w = v / \max(1, \|v\| / c)

    Numerics:
        The identity inside, the nearest point outside. Not differentiable on the bound.

    Args:
        bound: The bound c.
        dim: The dimension along which the norm is taken: -1 for the rows of a linear layer.

    Example:
        >>> MaxNorm(1.0)(Tensor([[3.0, 4.0], [0.0, 0.5]]))
        tensor([[0.6000, 0.8000],
                [0.0000, 0.5000]])

    References:
        Srivastava et al., "Dropout", Journal of Machine Learning Research 15 (2014), section 5.1.
    """

    accepts = "any"

    def __init__(self, bound: float = 2.0, dim: int = -1) -> None:
        super().__init__()
        check_positive(self, bound=bound)
        self.bound, self.dim = bound, dim

    def event_dims(self, ndim: int) -> Sequence[int]:  # noqa: ARG002  # the same for every number of them
        """Return the dimension along which the norm is taken."""
        return (self.dim,)

    def _nearest(self, X: Tensor) -> Tensor:
        return project_l2(X, self.bound, self.dim)

    def _from_normal(self, Z: Tensor) -> Tensor:
        return uniform_in_l2(Z.movedim(self.dim, -1), self.bound).movedim(-1, self.dim)


class Centered(Projection):
    r"""Keep the mean of each output channel's weights at 0.

    .. math:: W_i = V_i - \mathrm{mean}(V_i)

    Numerics:
        Linear; exact to the rounding of the mean, and the nearest point off the constraint.

    Example:
        >>> Centered()(Tensor([[1.0, 3.0], [5.0, 5.0]]))
        tensor([[-1.,  1.],
                [ 0.,  0.]])
    """

    accepts = "any"

    def event_dims(self, ndim: int) -> Sequence[int]:
        """Return the dimensions of the inputs of a channel."""
        return range(1, ndim)

    def _nearest(self, X: Tensor) -> Tensor:
        return remove_mean(X, maps.inputs(X))


class WeightStandardization(Projection):
    r"""Keep each output channel's weights at mean 0 and a fixed deviation.

    .. math:: W_i = s\, \frac{V_i - \mu_i}{\sigma_i}, \qquad s = 1 \text{ or } \gamma / \sqrt{N}

    ``scale="plain"`` is arXiv:1903.10520; ``"fan_in"`` divides by the root of the number N of inputs, which keeps the
    signal's variance (arXiv:2101.08692, where gamma makes up for the nonlinearity).

    Numerics:
        Off the constraint the nearest point. A constant channel has no direction and becomes 0, off the constraint,
        with a finite gradient. Differentiable elsewhere; the gradient grows as the deviation shrinks. One input per
        channel is refused: its deviation is always 0.

    Args:
        scale: ``"plain"`` or ``"fan_in"``.
        gamma: The factor for ``"fan_in"``.

    Example:
        >>> WeightStandardization()(Tensor([[1.0, 3.0], [5.0, 15.0]]))
        tensor([[-1.,  1.],
                [-1.,  1.]])

    References:
        Qiao et al., arXiv:1903.10520; Brock, De, Smith, arXiv:2101.08692.
    """

    accepts = "any"

    def __init__(self, scale: str = "plain", gamma: float = 1.0) -> None:
        super().__init__()
        check_argument(self, argument="scale", value=scale, choices=("plain", "fan_in"))
        check_positive(self, gamma=gamma)
        self.scale, self.gamma = scale, gamma

    def event_dims(self, ndim: int) -> Sequence[int]:
        """Return the dimensions of the inputs of a channel."""
        return range(1, ndim)

    def _nearest(self, X: Tensor) -> Tensor:
        if X.ndim < 2 or X[:1].numel() == 1:
            raise ParametrizationError(
                f"WeightStandardization needs at least 2 weights per channel, got shape {tuple(X.shape)}.\n"
                'Register it on "weight", not on "bias".'
            )
        return maps.standardize(X, self._deviation(X), maps.inputs(X))

    def _deviation(self, X: Tensor) -> float:
        return self.gamma / max(X[:1].numel(), 1) ** 0.5 if self.scale == "fan_in" else 1.0

    def residual(self, W: Tensor) -> Tensor:
        # Not from the projection, which leaves a constant channel at 0.
        W = W.to(torch.promote_types(W.dtype, torch.float64))
        if not W.numel():
            return largest(W)
        inputs = maps.inputs(W)
        deviation = W.abs().square().mean(inputs).sqrt()
        return largest(W.mean(inputs), deviation - self._deviation(W))


class EqualizedRate(Parametrization):
    r"""Scale weights at run time by the constant of He's initialization, so that all layers learn at one rate.

    .. math:: W = g\, V / \sqrt{N}

    with N inputs for each output. Adaptive optimizers then move every layer by the same relative amount.

    Numerics:
        Linear and a bijection; exact to the rounding.

    Args:
        gain: The factor g; the root of 2 suits ReLU.

    Example:
        >>> EqualizedRate(1.0)(Tensor([[1, 1, 1, 1]]))
        tensor([[0.5000, 0.5000, 0.5000, 0.5000]])

    References:
        Karras et al., arXiv:1710.10196, section 4.1.
    """

    accepts = "any"

    def __init__(self, gain: float = 2**0.5) -> None:
        super().__init__()
        check_positive(self, gain=gain)
        self.gain = gain

    def event_dims(self, ndim: int) -> Sequence[int]:
        """Return the dimensions of the inputs of a channel."""
        return range(1, ndim)

    @computed
    def forward(self, V: Tensor) -> Tensor:
        return V * self._factor(V)

    @inverted
    def right_inverse(self, W: Tensor) -> Tensor:
        return W / self._factor(W)

    def _factor(self, V: Tensor) -> float:
        result: float = self.gain / max(V[:1].numel(), 1) ** 0.5
        return result


class Scaled(Parametrization):
    r"""Put a factor in front of a tensor: fixed, or learned for the whole tensor or for each output.

    .. math:: W = c V

    Numerics:
        A bijection for a fixed factor that is not 0; exact to the rounding. A learned factor starts at ``scale``
        and is an original of its own, before the tensor; it may pass 0, where the tensor has no gradient. Smooth.

    Args:
        scale: The factor, or where it starts.
        learned: ``"no"``, ``"scalar"`` or ``"diagonal"``.

    Example:
        >>> Scaled(2.0)(Tensor([1, 1]))
        tensor([2., 2.])
    """

    accepts = "any"

    def __init__(self, scale: float = 1.0, learned: str = "no") -> None:
        super().__init__()
        check_argument(self, argument="learned", value=learned, choices=("no", "scalar", "diagonal"))
        if scale == 0:
            raise ParametrizationError("Scaled needs a factor that is not 0.")
        self.scale, self.learned = scale, learned

    def event_dims(self, ndim: int) -> Sequence[int]:  # noqa: ARG002  # the same for every number of them
        """Return no dimension: each number is scaled by itself."""
        return ()

    @computed
    def forward(self, *originals: Tensor) -> Tensor:
        factor, V = originals if len(originals) == 2 else (self.scale, originals[0])
        return V * factor

    @inverted
    def right_inverse(self, W: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        if self.learned == "no":
            return W / self.scale
        shape = [1] * W.ndim
        if self.learned == "diagonal" and W.ndim:
            shape[0] = W.shape[0]
        return W.new_full(shape, self.scale), W / self.scale
