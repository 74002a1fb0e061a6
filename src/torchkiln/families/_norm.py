"""Families that take the norm out of a tensor: of its slices, of its matrix, of the convolution that it defines."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from torchkiln._core.base import Parametrization
from torchkiln._core.errors import ParametrizationError
from torchkiln._core.state import AdvancingStep
from torchkiln.families._contract import check_argument, check_positive, computed, inverted, largest
from torchkiln.families._maps import norms
from torchkiln.families._maps.convolution import Convolution, peak_of
from torchkiln.families._maps.leading import (
    Operator,
    block_norms,
    leading_vector,
    starting_vector,
    watched_vectors,
)
from torchkiln.families._maps.precision import full_precision, widen
from torchkiln.families._maps.spectral_norm import as_matrix, divisor

__all__ = ["ConvSpectralNorm", "SpectralNorm", "WeightNorm"]

Sizes = int | Sequence[int]
ConvT = TypeVar("ConvT", bound="ConvSpectralNorm")


class WeightNorm(Parametrization):
    r"""Train the length of each slice of a tensor apart from its direction, or keep it fixed.

    .. math:: W = g\, V / \|V\|

    Two originals: the lengths g and the directions V; one, V, where the gain is fixed, as in the last layer of DINO.

    Numerics:
        With learned gains every tensor is reached and kept; a slice of zeros gets gain 0 and a direction of ones, from
        which it can be trained. With a fixed gain, the nearest point but for slices of zeros, which get equal entries.
        A direction that becomes 0 gives 0 and finite gradients.

    Args:
        dim: The dimension that has a length for each index; -1: one length for the whole tensor.
        gain: The fixed length; None: learned.

    Example:
        >>> WeightNorm(gain=1.0)(torch.tensor([[3.0, 4.0], [0.0, 2.0]]))
        tensor([[0.6000, 0.8000],
                [0.0000, 1.0000]])

    References:
        Salimans and Kingma, arXiv:1602.07868.
    """

    accepts = "real"
    sharding = "reduced"

    def __init__(self, dim: int = 0, gain: float | None = None) -> None:
        super().__init__()
        if gain is not None:
            check_positive(self, gain=gain)
        self.dim, self.gain = dim, gain

    def event_dims(self, ndim: int) -> Sequence[int]:
        """Return the dimensions that the norm is taken over."""
        return [dim for dim in range(ndim) if self.dim == -1 or dim != self.dim % ndim]

    @computed
    def forward(self, *originals: Tensor) -> Tensor:
        *given, V = originals
        g = given[0] if given else V.new_full((), self._fixed()).expand(self._shape_of_gain(V))
        return norms.weight_normalize(V, g, self.dim)

    def _fixed(self) -> float:
        assert self.gain is not None
        return self.gain

    def _shape_of_gain(self, V: Tensor) -> tuple[int, ...]:
        return (
            () if self.dim == -1 else tuple(n if d == self.dim % V.ndim else 1 for d, n in enumerate(V.shape))
        )

    @inverted
    def right_inverse(self, W: Tensor) -> Tensor | tuple[Tensor, ...]:
        norm = norms.norm_except(W, self.dim)
        V = norms.directed(W, norm)
        return V if self.gain is not None else (norm, V)

    def residual(self, W: Tensor) -> Tensor:
        if self.gain is None:
            raise NotImplementedError("WeightNorm with learned gains reaches every tensor")
        return largest(norms.norm_except(W, self.dim) - self.gain)

    def _from_normal(self, Z: Tensor) -> Tensor:
        if self.gain is None:
            return Z
        sample: Tensor = self(Z)
        return sample


class _OperatorNorm(AdvancingStep, Parametrization):
    """Divides by the norm of a linear operator, which an iteration finds.

    Where that is, is the buffer ``v``. To a tolerance it would stay at a singular vector, once it is there, though
    another becomes the largest: a second one, ``watch``, looks for that in all other directions.
    """

    state_names = ("v", "watch")
    v: Tensor | None
    watch: Tensor | None
    coefficient: float
    cap: bool
    steps: int | None

    def _operator(self, W: Tensor) -> Operator:
        raise NotImplementedError

    def _domain(self, W: Tensor) -> tuple[int, ...]:
        """Return the shape of the vectors that the operator takes."""
        raise NotImplementedError

    def _blocks(self) -> int:
        """Return how many operators there are, each on its own part of the vectors."""
        return 1

    @property
    def _precision(self) -> float:
        """The tolerance."""
        raise NotImplementedError

    def _register_state(self) -> None:
        self.register_buffer("v", None)
        if self.steps is None:
            self.register_buffer("watch", None)

    def _norm(self, W: Tensor) -> Tensor:
        """Return the norm, differentiable."""
        v = self._vector(W.detach())
        return block_norms(self._operator(W)[0](v), self._blocks()).max()

    def _vector(self, W: Tensor) -> Tensor:
        if self.v is None:
            return self._start(W)[0]
        if torch._C._are_functorch_transforms_active():
            return self.advance(W, *self._state_buffers())[0]
        state = self.current_state(W)
        if self.training:  # it was advanced for W
            return state[0].to(W.dtype)
        # In eval mode nothing is kept, and what has been averaged or loaded is put right for W.
        return self._found(W, state, steps=0)[0]

    def advance(self, x: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        """Return the vectors after ``state``, for the original ``x``."""
        with full_precision(x):
            return self._found(widen(x), state, steps=self.steps)

    def _found(self, W: Tensor, state: tuple[Tensor, ...], *, steps: int | None) -> tuple[Tensor, ...]:
        v, *watch = (vector.to(W.dtype) for vector in state)
        operator, blocks = self._operator(W), self._blocks()
        if not watch:
            return (leading_vector(operator, v, steps=steps or 0, tolerance=None, blocks=blocks),)
        return watched_vectors(operator, v, *watch, tolerance=self._precision, blocks=blocks)

    def _start(self, W: Tensor) -> tuple[Tensor, ...]:
        start = starting_vector(self._domain(W), W)
        v = leading_vector(
            self._operator(W), start, steps=1, tolerance=self._precision, blocks=self._blocks()
        )
        return (v, start) if self.steps is None else (v,)

    @torch.no_grad()
    def reset(self, W: Tensor) -> None:
        """Look for the norm of the original ``W`` anew, from a vector that knows nothing of the past."""
        with full_precision(W):
            self._set(self._start(widen(W.detach())))

    def _set(self, state: tuple[Tensor, ...]) -> None:
        for name, vector in zip(self.state_names, state, strict=False):
            setattr(self, name, vector.clone())

    @computed
    def forward(self, W: Tensor) -> Tensor:
        return W / divisor(self._norm(W), self.coefficient, cap=self.cap)

    @inverted
    def right_inverse(self, W: Tensor) -> Tensor:
        self._set(self._start(W))
        return W

    def _excess(self, norm: Tensor) -> Tensor:
        return largest((norm - self.coefficient).clamp(min=0) if self.cap else norm - self.coefficient)

    def _from_normal(self, Z: Tensor) -> Tensor:
        return self.project(Z)


class SpectralNorm(_OperatorNorm):
    r"""Give a matrix a fixed spectral norm, or cap it.

    .. math:: W = c\, V / \sigma_1(V) \qquad \text{or} \qquad V / \max(1, \sigma_1(V) / c)

    The matrix has ``dim`` as rows and everything else as columns. For a convolution that is not the norm of its
    operator, which :class:`ConvSpectralNorm` has.

    The norm is found by iteration from the buffer ``v``, which follows the original in training and stands still
    in eval mode; there the iteration goes on from it, to the tolerance, without keeping anything: averaged or loaded
    vectors do no harm. The buffer ``watch`` notices when another direction becomes the largest.

    Numerics:
        The estimate is from below; the error is of the order of the tolerance where the two largest singular values
        are close, and of its square otherwise. Zeros stay zeros. A value of the right norm is kept.

    Args:
        coefficient: The norm c.
        cap: Divide only where the norm is above c.
        dim: The dimension of the outputs.
        steps: A fixed number of iterations for each change of the original, in place of the tolerance.
        tolerance: How far the vector may be from a singular one, relative to the norm. Looking at that makes the host
            wait for the device; in graphs and under ``torch.func`` the effort is fixed instead.

    Example:
        >>> SpectralNorm(2.0).project(torch.tensor([[4.0, 0.0], [0.0, 1.0]]))
        tensor([[2.0000, 0.0000],
                [0.0000, 0.5000]])

    References:
        Miyato et al., arXiv:1802.05957; the cap: Gouk et al., arXiv:1804.04368.
    """

    accepts = "any"

    def __init__(
        self,
        coefficient: float = 1.0,
        *,
        cap: bool = False,
        dim: int = 0,
        steps: int | None = None,
        tolerance: float = 1e-3,
    ) -> None:
        super().__init__()
        check_positive(self, coefficient=coefficient, tolerance=tolerance)
        self.coefficient, self.cap, self.dim, self.steps, self.tolerance = (
            coefficient,
            cap,
            dim,
            steps,
            tolerance,
        )
        self._register_state()

    @property
    def _precision(self) -> float:
        return self.tolerance

    def _matrix(self, W: Tensor) -> Tensor:
        return as_matrix(W, self.dim % W.ndim) if W.ndim > 1 else W[:, None]

    def _domain(self, W: Tensor) -> tuple[int, ...]:
        return (self._matrix(W).shape[1],)

    def _operator(self, W: Tensor) -> Operator:
        M = self._matrix(W)
        return (lambda v: torch.mv(M, v)), (lambda u: torch.mv(M.mH, u))

    def residual(self, W: Tensor) -> Tensor:
        wide = W.to(torch.promote_types(W.dtype, torch.float64))
        return self._excess(torch.linalg.matrix_norm(self._matrix(wide), 2))


class ConvSpectralNorm(_OperatorNorm):
    r"""Give a convolution a fixed norm as an operator on images, or cap it: the most by which it can stretch one.

    .. math:: W = c\, V / \sigma_1(A_V) \qquad \text{or} \qquad V / \max(1, \sigma_1(A_V) / c)

    The norm depends on stride, padding, dilation and groups: take them from the module with :meth:`of`. How it is
    found has a name:

    - ``"bound"``: a certified bound for images of every size, from the transfer function on a grid of frequencies. For
      zero padding it is above the norm that large images approach by the tolerance at most; looser for other paddings.
    - ``"exact"``: for circular padding, at one size of images: the transfer function at their frequencies.
    - ``"power"``: iteration on the convolution itself at one size; an estimate from below, within the tolerance but for
      the few steps of training in which another direction becomes the largest.

    Numerics:
        Zeros stay zeros. The gradient takes the singular vectors for constants, as that of :class:`SpectralNorm` does.

    Args:
        coefficient: The norm c.
        cap: Divide only where the norm is above c.
        method: ``"bound"``, ``"exact"`` or ``"power"``.
        input_size: The spatial size of the images, for the last two.
        stride: As the module has it; and so are all below but the last two.
        padding: A number, one for each dimension, ``"same"`` or ``"valid"``.
        padding_mode: ``"zeros"``, ``"circular"``, ``"reflect"`` or ``"replicate"``.
        dilation: The distance of the taps.
        groups: The number of blocks.
        transposed: Whether it is a transposed convolution.
        output_padding: Of a transposed convolution.
        steps: For ``"power"``: a fixed number of iterations for each change, in place of the tolerance.
        tolerance: For ``"bound"`` 0.05 and for ``"power"`` 0.001 where it is None.

    Example:
        >>> from torchkiln.parametrize import register_parametrization
        >>> layer = nn.Conv2d(3, 8, 3, padding=1)
        >>> norm = ConvSpectralNorm.of(layer)
        >>> norm
        ConvSpectralNorm(padding=1)
        >>> x = torch.randn(1, 3, 16, 16)
        >>> y = register_parametrization(layer, "weight", norm)(x) - layer.bias[:, None, None]
        >>> bool(y.norm() <= x.norm())
        True

    References:
        Sedghi, Gupta and Long, arXiv:1805.10408 (exact); Gouk et al., arXiv:1804.04368 (power).
    """

    def __init__(
        self,
        coefficient: float = 1.0,
        *,
        cap: bool = False,
        method: str = "bound",
        input_size: Sequence[int] | None = None,
        stride: Sizes = 1,
        padding: Sizes | str = 0,
        padding_mode: str = "zeros",
        dilation: Sizes = 1,
        groups: int = 1,
        transposed: bool = False,
        output_padding: Sizes = 0,
        steps: int | None = None,
        tolerance: float | None = None,
    ) -> None:
        super().__init__()
        check_positive(self, coefficient=coefficient, tolerance=1.0 if tolerance is None else tolerance)
        check_argument(self, argument="method", value=method, choices=("bound", "exact", "power"))
        modes = ("zeros", "circular", "reflect", "replicate")
        check_argument(self, argument="padding_mode", value=padding_mode, choices=modes)
        if method != "bound" and input_size is None:
            raise ParametrizationError(
                f'ConvSpectralNorm: method "{method}" needs input_size, the spatial size of the images.\n'
                '"bound" holds for every size.'
            )
        self.coefficient, self.cap, self.method, self.input_size = coefficient, cap, method, input_size
        self.stride, self.padding, self.padding_mode, self.dilation = stride, padding, padding_mode, dilation
        self.groups, self.transposed, self.output_padding = groups, transposed, output_padding
        self.steps, self.tolerance = steps, tolerance
        self._register_state()

    @classmethod
    def of(cls: type[ConvT], module: nn.Module, coefficient: float = 1.0, **options: Any) -> ConvT:
        """Return the norm for the weight of a convolution, with the module's stride, padding and so on.

        Args:
            module: ``nn.Conv1d`` to ``nn.ConvTranspose3d``.
            coefficient: The norm c.
            options: ``cap``, ``method``, ``input_size``, ``steps`` and ``tolerance``, as for the class.
        """
        if not isinstance(module, _ConvNd):
            raise ParametrizationError(
                f"ConvSpectralNorm needs a convolution, got a {type(module).__name__}. SpectralNorm is for matrices."
            )
        names = ("stride", "padding", "padding_mode", "dilation", "groups", "transposed", "output_padding")
        return cls(coefficient, **{name: _shortest(getattr(module, name)) for name in names}, **options)

    def _blocks(self) -> int:
        return self.groups

    @property
    def _precision(self) -> float:
        return 1e-3 if self.tolerance is None else self.tolerance

    def _convolution(self, W: Tensor) -> Convolution:
        """Return the operator of a weight.

        Raises:
            ParametrizationError: The weight, or the images, do not fit.
        """
        spatial = W.ndim - 2
        if spatial not in (1, 2, 3):
            raise ParametrizationError(
                f"ConvSpectralNorm needs the weight of a convolution, got shape {tuple(W.shape)}."
            )
        dilation = _each(self.dilation, spatial)
        reach = [d * (k - 1) for d, k in zip(dilation, W.shape[2:], strict=True)]
        of = Convolution(
            kernel=tuple(W.shape[2:]),
            stride=_each(self.stride, spatial),
            dilation=dilation,
            groups=self.groups,
            output_padding=_each(self.output_padding, spatial),
            padding=_sides(self.padding, reach),
            mode=self.padding_mode,
            transposed=self.transposed,
        )
        if self.method == "exact" and not of.is_circulant(self._size(spatial)):
            raise ParametrizationError(
                'ConvSpectralNorm: method "exact" needs circular padding that keeps the size, divided by the stride.\n'
                'Use "power", or "bound".'
            )
        return of

    def _size(self, spatial: int) -> tuple[int, ...]:
        assert self.input_size is not None
        return _each(self.input_size, spatial)

    def _domain(self, W: Tensor) -> tuple[int, ...]:
        return (1, self._convolution(W).input_channels(W), *self._size(W.ndim - 2))

    def _operator(self, W: Tensor) -> Operator:
        of, size = self._convolution(W), self._size(W.ndim - 2)
        return (lambda x: of.apply(W, x)), (lambda y: of.adjoint(W, y, size))

    def _norm(self, W: Tensor) -> Tensor:
        if self.method == "power":
            return super()._norm(W)
        of = self._convolution(W)
        if self.method == "exact":
            return (W * peak_of(W.detach(), of, of.output_size(self._size(W.ndim - 2)))).sum()
        grid, short = of.bounding_grid(0.05 if self.tolerance is None else self.tolerance)
        return (W * peak_of(W.detach(), of.at_any_size(), grid)).sum() * (short * of.spread_of_padding())

    @inverted
    def right_inverse(self, W: Tensor) -> Tensor:
        self._convolution(W)
        if self.method == "power":
            self._set(self._start(W))
        return W

    def residual(self, W: Tensor) -> Tensor:
        wide = W.to(torch.promote_types(W.dtype, torch.float64))
        with torch.no_grad():
            return self._excess(deepcopy(self).eval()._norm(wide))


def _each(sizes: Sizes, spatial: int) -> tuple[int, ...]:
    return (sizes,) * spatial if isinstance(sizes, int) else tuple(sizes)


def _shortest(value: Any) -> Any:
    """Return one number for a tuple of the same, as the arguments are written; anything else as it is."""
    return value[0] if isinstance(value, tuple) and len(set(value)) == 1 else value


def _sides(padding: Sizes | str, reach: Sequence[int]) -> tuple[tuple[int, int], ...]:
    if padding == "same":
        return tuple((r // 2, r - r // 2) for r in reach)
    if isinstance(padding, str):  # "valid"
        return ((0, 0),) * len(reach)
    return tuple((p, p) for p in _each(padding, len(reach)))
