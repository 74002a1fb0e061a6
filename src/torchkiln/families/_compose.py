"""Families made of others: parts of a tensor, one after the other, and a user's own pair of functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from torchkiln._core.base import Parametrization
from torchkiln._core.errors import ParametrizationError
from torchkiln.families._contract import largest

__all__ = ["Chain", "Custom", "Product"]


class Product(Parametrization):
    r"""Put the parts of a tensor along a dimension under families of their own.

    .. math:: W = [f_1(X_1), \dots, f_p(X_p)]

    For fused projections (query, key, value in one weight) or a vector of parameters of different kinds. ``None`` in
    place of a family leaves its part free.

    Numerics:
        Those of its parts.

    Args:
        families: A family, or None, for each part.
        sizes: The length of each part.
        dim: The dimension that is split.

    Example:
        >>> from torchkiln.families import Positive, Simplex
        >>> Product([Simplex(), Positive("exp"), None], [2, 1, 1])(torch.zeros(2), torch.zeros(1), torch.zeros(1))
        tensor([0.5000, 0.5000, 1.0000, 0.0000])
    """

    accepts = "any"
    remembers = ("counts",)

    def __init__(
        self, families: Sequence[Parametrization | None], sizes: Sequence[int], *, dim: int = 0
    ) -> None:
        super().__init__()
        if len(families) != len(sizes):
            raise ParametrizationError(
                f"Product needs one size for each family, got {len(families)} and {len(sizes)}."
            )
        self.families = nn.ModuleList(nn.Identity() if family is None else family for family in families)
        self.sizes, self.dim = tuple(sizes), dim
        self.counts: tuple[int, ...] = (1,) * len(self.sizes)

    def forward(self, *originals: Tensor) -> Tensor:
        parts, rest = [], list(originals)
        for family, count in zip(self.families, self.counts, strict=True):
            parts.append(family(*rest[:count]))
            rest = rest[count:]
        return torch.cat(parts, self.dim)

    @torch.no_grad()
    def right_inverse(self, W: Tensor) -> tuple[Tensor, ...]:
        inverses = [
            _as_tuple(family.right_inverse(part)) if isinstance(family, Parametrization) else (part,)
            for family, part in zip(self.families, self._split(W), strict=True)
        ]
        self.counts = tuple(map(len, inverses))
        return tuple(original.contiguous() for inverse in inverses for original in inverse)

    def _split(self, W: Tensor) -> tuple[Tensor, ...]:
        if not -W.ndim <= self.dim < W.ndim or W.shape[self.dim] != sum(self.sizes):
            raise ParametrizationError(
                f"Product: parts of {self.sizes} do not add up to dim {self.dim} of shape {tuple(W.shape)}."
            )
        return torch.split(W, list(self.sizes), self.dim)

    def _from_normal(self, Z: Tensor) -> Tensor:
        parts = zip(self.families, self._split(Z), strict=True)
        return torch.cat([_from_normal(family, part) for family, part in parts], self.dim)

    def residual(self, W: Tensor) -> Tensor:
        return largest(
            *(_residual(family, part) for family, part in zip(self.families, self._split(W), strict=True))
        )

    def _arguments(self) -> dict[str, Any]:
        return {**super()._arguments(), "families": [_or_none(family) for family in self.families]}


class Chain(Parametrization):
    r"""Apply families one after the other, as one.

    .. math:: W = f_p( \cdots f_1(X))

    The same as registering them one by one; as one it can be a part of a :class:`Product`. The last one's constraint
    holds; earlier ones hold as far as the later ones keep them: a symmetric matrix stays symmetric when it is scaled.
    Only the first may have several originals.

    Numerics:
        Those of its links. The way back is theirs, last to first, so a value is kept where each link keeps it.

    Args:
        families: First to last.

    Example:
        >>> from torchkiln.families import Scaled, Symmetric
        >>> Chain([Symmetric(), Scaled(2.0)])(torch.tensor([[1.0, 2.0], [4.0, 3.0]]))
        tensor([[2., 6.],
                [6., 6.]])
    """

    accepts = "any"

    def __init__(self, families: Sequence[Parametrization]) -> None:
        super().__init__()
        if not families:
            raise ParametrizationError("Chain needs at least one family.")
        self.families = nn.ModuleList(families)

    def forward(self, *originals: Tensor) -> Tensor:
        first, *others = self.families
        W: Tensor = first(*originals)
        for family in others:
            W = family(W)
        return W

    @torch.no_grad()
    def right_inverse(self, W: Tensor) -> Tensor | tuple[Tensor, ...]:
        inverse: Any = W
        for family in reversed(list(self.families)):
            if not isinstance(inverse, Tensor):
                raise ParametrizationError(
                    f"Chain: {type(family).__name__} comes before a family with several originals.\n"
                    "Only the first family may have more than one."
                )
            inverse = family.right_inverse(inverse)  # type: ignore[operator]  # mypy: Tensor | Module
        return inverse  # type: ignore[no-any-return]  # as the first family's

    def _from_normal(self, Z: Tensor) -> Tensor:
        first, *others = self.families
        W = _from_normal(first, Z)
        for family in others:
            W = family(W)
        return W

    @torch.no_grad()
    def residual(self, W: Tensor) -> Tensor:
        """Return the largest residual on the way back, each family's of what the later ones lead back to."""
        last, *earlier = reversed(list(deepcopy(self).families))
        violations = [_residual(last, W)]
        for later, family in pairwise([last, *earlier]):
            W = later.right_inverse(W)  # type: ignore[operator]  # mypy: Tensor | Module
            violations.append(_residual(family, W))
        return largest(*violations)

    def _arguments(self) -> dict[str, Any]:
        return {"families": list(self.families)}


class Custom(Parametrization):
    """Make a family of a function and its inverse, in one line.

    Numerics:
        Those of the functions. ``inverse`` may return one tensor or a tuple, as ``right_inverse`` does. It pickles as
        the functions do; functions have no JSON spec.

    Args:
        function: From originals to the tensor.
        inverse: The way back; None if there is none.
        distance: How far a tensor is from the constraint, 0 on it; None if there is no constraint.

    Example:
        >>> Custom(torch.exp, torch.log).project(torch.tensor([2.0]))
        tensor([2.])
    """

    accepts = "any"

    def __init__(
        self,
        function: Callable[..., Tensor],
        inverse: Callable[[Tensor], Tensor | tuple[Tensor, ...]] | None = None,
        *,
        distance: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.function, self.inverse, self.distance = function, inverse, distance

    def forward(self, *originals: Tensor) -> Tensor:
        return self.function(*originals)

    @torch.no_grad()
    def right_inverse(self, X: Tensor) -> Tensor | tuple[Tensor, ...]:
        if self.inverse is None:
            raise NotImplementedError("Custom: no inverse was passed")
        return self.inverse(X)

    def residual(self, X: Tensor) -> Tensor:
        return super().residual(X) if self.distance is None else largest(self.distance(X))


def _as_tuple(originals: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (originals,) if isinstance(originals, Tensor) else originals


def _or_none(family: nn.Module) -> nn.Module | None:
    return family if isinstance(family, Parametrization) else None


def _from_normal(family: nn.Module, Z: Tensor) -> Tensor:
    return family._from_normal(Z) if isinstance(family, Parametrization) else Z


def _residual(family: nn.Module, W: Tensor) -> Tensor:
    """Return the family's residual; 0 where it constrains nothing."""
    if not isinstance(family, Parametrization):
        return W.new_zeros((), dtype=torch.float64)
    try:
        return family.residual(W)
    except NotImplementedError:
        return torch.zeros((), dtype=torch.float64, device=W.device)
