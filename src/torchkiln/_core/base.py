"""The abstract class of the families: a parametrization that knows its inverse and can describe itself."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from copy import deepcopy
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from torchkiln._core.spec import VERSION, encode

__all__ = ["Parametrization"]


class Parametrization(nn.Module):
    """A parametrization of the catalogue: computes a tensor from originals, and knows the way back.

    Any module with a ``forward`` can be registered. One that derives from this class says more about itself, and is
    then checked by :mod:`torchkiln.testing`, described in files and baked from them without the model's code.

    A subclass is final, keeps each argument of its constructor in an attribute of the same name (:meth:`spec` and the
    repr read them there), and defines ``forward`` and what else it has.

    Attributes:
        event_dim: On how many trailing dimensions it acts: 0 for one number at a time, 1 for vectors, 2 for matrices.
            The dimensions before them are a batch. None: on the tensor as a whole.
        square: Whether its matrices must be square.
        accepts: The numbers it is made for.
        differentiable: False where the gradient is not the derivative on purpose (straight-through).
        remembers: Plain attributes that ``right_inverse`` sets and ``forward`` reads; they go into the spec.
        sharding: How it runs on a tensor that is sharded over processes: see ``_core/sharded.py``. By default on each
            shard, where no dimension of an event is cut, and otherwise on the gathered tensor.
    """

    event_dim: ClassVar[int | None] = None
    square: ClassVar[bool] = False
    accepts: ClassVar[Literal["real", "complex", "any"]] = "real"
    differentiable: ClassVar[bool] = True
    remembers: ClassVar[tuple[str, ...]] = ()
    sharding: ClassVar[str] = "local"

    def event_dims(self, ndim: int) -> Sequence[int]:
        """Return the dimensions of a tensor with ``ndim`` dimensions that it acts along; the others are a batch."""
        return range(0 if self.event_dim is None else ndim - self.event_dim, ndim)

    def right_inverse(self, X: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Return originals that ``forward`` sends to ``X``, or to a point near it where it cannot reach ``X``.

        Raises:
            NotImplementedError: this parametrization has no inverse.
        """
        raise NotImplementedError(f"{type(self).__name__} has no right inverse")

    @torch.no_grad()
    def project(self, X: Tensor) -> Tensor:
        """Return the value that a tensor with the value ``X`` takes when this is registered on it.

        ``X`` itself, to the rounding, where it satisfies the constraint.
        """
        twin = deepcopy(self)
        originals = twin.right_inverse(X)
        projected: Tensor = twin(originals) if isinstance(originals, Tensor) else twin(*originals)
        return projected

    def displacement(self, X: Tensor) -> Tensor:
        """Return how far registering this moves a tensor of value ``X``: a float64 scalar, the Euclidean distance.

        Ask before registering, while the value is there: ``Orthogonal().displacement(layer.weight)``.
        """
        wide = torch.promote_types(X.dtype, torch.float64)
        distance: Tensor = torch.linalg.vector_norm(X.detach().to(wide) - self.project(X).to(wide))
        return distance

    def residual(self, X: Tensor) -> Tensor:
        """Return how far ``X`` is from the constraint: a float64 scalar, the largest violation; 0 on the constraint.

        Raises:
            NotImplementedError: every tensor satisfies it.
        """
        raise NotImplementedError(f"{type(self).__name__} constrains nothing")

    @torch.no_grad()
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
        dtype = dtype or torch.get_default_dtype()
        wide = torch.promote_types(dtype, torch.float32)
        Z = torch.randn(shape, generator=generator, dtype=wide, device=device)
        return self._from_normal(Z).to(dtype)

    def _from_normal(self, Z: Tensor) -> Tensor:
        """Make a sample of independent standard normal numbers: all that :meth:`sample` leaves to the families."""
        raise NotImplementedError(f"{type(self).__name__} has no natural distribution to sample from")

    def spec(self) -> dict[str, Any]:
        """Return name, version and arguments, JSON-able: enough to build this parametrization again.

        Raises:
            ParametrizationError: an argument is a function, or something else that JSON does not have.
        """
        name = type(self).__name__
        arguments = {key: encode(value, f"{name}({key}=...)") for key, value in self._arguments().items()}
        state = {key: encode(getattr(self, key), name) for key in self.remembers}
        return {
            "name": name,
            "version": VERSION,
            "arguments": arguments,
            **({"state": state} if state else {}),
        }

    def _arguments(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._parameters_of_init()}

    def _parameters_of_init(self) -> dict[str, inspect.Parameter]:
        # A class without a constructor has nn.Module's, which takes anything.
        found = inspect.signature(type(self)).parameters
        return {
            name: one for name, one in found.items() if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)
        }

    def __repr__(self) -> str:
        # One line also where it is made of others: what it is built from is in the arguments.
        return f"{type(self).__name__}({self.extra_repr()})"

    def extra_repr(self) -> str:
        """Return the constructor's arguments that are neither the default nor shown as tensors or modules."""
        parameters = self._parameters_of_init()
        given = {
            name: value
            for name, value in self._arguments().items()
            if not isinstance(value, (Tensor, nn.Module)) and value != parameters[name].default
        }
        return ", ".join(f"{name}={_shown(value)}" for name, value in given.items())


def _shown(value: object) -> str:
    """Return an argument's repr; that of a function without its address, which differs from run to run."""
    if callable(value):
        return getattr(value, "__name__", type(value).__name__)
    return repr(value)
