"""What every family does around its maths: refuse unsuitable tensors, compute in full precision, round once."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from torchkiln._core.base import Parametrization
from torchkiln._core.errors import ParametrizationError
from torchkiln.families._maps.precision import full_precision, widen

__all__ = [
    "Projection",
    "check_argument",
    "check_not_empty",
    "check_positive",
    "check_tensor",
    "computed",
    "inverted",
    "largest",
    "square_or_tall",
]

Method = TypeVar("Method", bound=Callable[..., Any])


def computed(forward: Method) -> Method:
    """Let a ``forward`` compute in float32 or wider, without autocast, and round its result once."""

    @wraps(forward)
    def method(self: Parametrization, *originals: Tensor) -> Tensor:
        dtype = originals[0].dtype
        with full_precision(originals[0]):
            X: Tensor = forward(self, *[widen(original) for original in originals])
        # LAPACK's columns lie one after the other; products round alike where the layout is that of a weight.
        return (X.to(dtype) if dtype.itemsize == 2 else X).contiguous()

    return cast(Method, method)


def inverted(right_inverse: Method) -> Method:
    """Let a ``right_inverse`` refuse tensors that are not for it, and compute as :func:`computed` does."""

    @wraps(right_inverse)
    @torch.no_grad()
    def method(self: Parametrization, X: Tensor) -> Tensor | tuple[Tensor, ...]:
        check_tensor(self, X)
        with full_precision(X):
            originals = right_inverse(self, widen(X))
        if isinstance(originals, Tensor):
            return originals.to(X.dtype).contiguous()
        return tuple(
            (original.to(X.dtype) if X.dtype.itemsize == 2 else original).contiguous()
            for original in originals
        )

    return cast(Method, method)


class Projection(Parametrization):
    """A family whose forward *is* the projection onto the constraint: the same map leads there and back.

    The original has the tensor's shape, and for an orthogonal projection the gradient is the Riemannian one. A family
    says what its projection is; that a third of the catalogue is of this kind is why there is a second abstract class.
    """

    def _nearest(self, X: Tensor) -> Tensor:
        """Return the point of the constraint that ``X`` is sent to, ``X`` itself where it is one."""
        raise NotImplementedError(type(self).__name__)

    @computed
    def forward(self, X: Tensor) -> Tensor:
        """Return the point of the constraint that ``X`` is sent to."""
        return self._nearest(X)

    @inverted
    def right_inverse(self, X: Tensor) -> Tensor:
        """Return the same point: ``forward`` keeps it."""
        return self._nearest(X)

    def residual(self, X: Tensor) -> Tensor:
        """Return the largest difference between ``X`` and its projection."""
        wide = X.to(torch.promote_types(X.dtype, torch.float64))
        return largest(wide - self._nearest(wide))

    def _from_normal(self, Z: Tensor) -> Tensor:
        return self._nearest(Z)


def check_tensor(family: Parametrization, X: Tensor) -> None:
    """Raise unless ``X`` has the dimensions and the kind of numbers that ``family`` is made for.

    Raises:
        ParametrizationError: Says what is needed and what was got.
    """
    name, shape = type(family).__name__, tuple(X.shape)
    if X.ndim < (family.event_dim or 0):
        raise ParametrizationError(
            f"{name} needs at least {family.event_dim} dimensions, got shape {shape}.\n"
            'Register it on "weight", not on "bias".'
        )
    if family.square and X.shape[-1] != X.shape[-2]:
        raise ParametrizationError(f"{name} needs square matrices, got shape {shape}.")
    kind = "complex" if X.is_complex() else "real" if X.is_floating_point() else "integer"
    if kind == "integer" or family.accepts not in ("any", kind):
        wanted = "real or complex" if family.accepts == "any" else family.accepts
        raise ParametrizationError(f"{name} needs {wanted} numbers, got {X.dtype}.")


def check_argument(family: object, *, argument: str, value: object, choices: object) -> None:
    """Raise unless the value of an argument is one of its choices.

    Raises:
        ParametrizationError: Names the choices.
    """
    if value not in choices:  # type: ignore[operator]  # any container
        names = ", ".join(repr(choice) for choice in choices)  # type: ignore[attr-defined]  # the same
        raise ParametrizationError(
            f"{type(family).__name__}: {argument} must be one of {names}, got {value!r}."
        )


def check_positive(family: object, **arguments: float) -> None:
    """Raise unless every one of these arguments is above 0.

    Raises:
        ParametrizationError: Names the first that is not.
    """
    for name, value in arguments.items():
        if not value > 0:
            raise ParametrizationError(f"{type(family).__name__} needs {name} > 0, got {value}.")


def check_not_empty(family: object, X: Tensor) -> tuple[int, int]:
    """Return the numbers of rows and columns of the matrices ``X``.

    Raises:
        ParametrizationError: One of them is 0.
    """
    n, m = X.shape[-2:]
    if not n * m:
        raise ParametrizationError(
            f"{type(family).__name__} needs at least one row and column, got {tuple(X.shape)}."
        )
    return n, m


@torch.no_grad()
def largest(*violations: Tensor) -> Tensor:
    """Return the largest absolute value in ``violations`` as a float64 scalar; 0 where they are empty.

    Example:
        >>> largest(torch.tensor([1.0, -3.0]), torch.empty(0))
        tensor(3., dtype=torch.float64)
    """
    zero = torch.zeros((), dtype=torch.float64, device=violations[0].device)
    found = [violation.abs().max().double() for violation in violations if violation.numel()]
    return torch.stack([zero, *found]).max()


def square_or_tall(X: Tensor) -> tuple[Tensor, bool]:
    """Return ``X``, transposed where it is wide, and whether it was."""
    wide = X.shape[-2] < X.shape[-1]
    return (X.mT if wide else X), wide
