"""The abstract class of the families: a parametrization that knows its inverse and can describe itself."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Parametrization"]


class Parametrization(nn.Module):
    """A parametrization of the catalogue: computes a tensor from originals, and knows the way back.

    Any module with a ``forward`` can be registered. One that derives from this class says more about itself, and is
    then checked by :mod:`torchkiln.testing`, described in files and baked from them without the model's code.

    A subclass is final, keeps each argument of its constructor in an attribute of the same name (:meth:`spec` and the
    repr read them there), and defines ``forward`` and what else it has.
    """

    def right_inverse(self, X: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Return originals that ``forward`` sends to ``X``, or to the point nearest to it that it can reach.

        Raises:
            NotImplementedError: this parametrization has no inverse.
        """
        raise NotImplementedError(f"{type(self).__name__} has no right inverse")

    def residual(self, X: Tensor) -> Tensor:
        """Return how far ``X`` is from the constraint: a float64 scalar, the largest violation; 0 on the constraint.

        Raises:
            NotImplementedError: every tensor satisfies it.
        """
        raise NotImplementedError(f"{type(self).__name__} constrains nothing")

    def sample(
        self,
        shape: tuple[int, ...],
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> Tensor:
        """Return a random tensor of ``shape`` that satisfies the constraint.

        Raises:
            NotImplementedError: there is no natural distribution.
        """
        raise NotImplementedError(f"{type(self).__name__} has no natural distribution to sample from")

    def spec(self) -> dict[str, Any]:
        """Return name, version and arguments, JSON-able: enough to build this parametrization again."""
        return {"name": type(self).__name__, "version": 1, "arguments": self._arguments()}

    def _arguments(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def extra_repr(self) -> str:
        """Return the constructor's arguments that are not the default."""
        parameters = inspect.signature(type(self)).parameters
        given = {
            name: value for name, value in self._arguments().items() if value != parameters[name].default
        }
        return ", ".join(f"{name}={value!r}" for name, value in given.items())
