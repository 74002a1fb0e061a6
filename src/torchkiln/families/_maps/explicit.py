"""Maps of a matrix whose derivative is written by hand: less work and less memory than differentiating each operation.

A map f is evaluated around a *base*: B f(X), or f(X) where there is none. It is given three times, by pure functions:
its *value* with what the derivative needs of it, its *pullback* (the product of a cotangent and the derivative), and a
*plain* form of f alone, made of operations that torch differentiates.

=========================  =====================================================================
eager, reverse mode        value and pullback, as a ``torch.autograd.Function``
small matrices             the plain form, where its few operations take less than a Function's call
second derivatives         the plain form, differentiated twice
forward mode, torch.func   the plain form
``torch.compile``          value and pullback, as operators that the compiler does not look into
export, tracing, subclass  the plain form, so that what is recorded has torch's operators alone
=========================  =====================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _python_dispatch

__all__ = ["ExplicitMap", "around", "around_adjoint", "with_value"]

Kept = Sequence[Tensor]
Base = Tensor | None

_dispatch_modes = torch._C._len_torch_dispatch_stack
_tracing_state = torch._C._get_tracing_state
# Any: mypy would take from its type that it is never true.
_is_subclass: Any = _python_dispatch.is_traceable_wrapper_subclass
_transforms_active = torch._C._are_functorch_transforms_active
_is_batched = torch._C._functorch.is_legacy_batchedtensor


class ExplicitMap:
    """A differentiable function of matrices (..., n, k), with a hand-written derivative, around a base (..., n, n).

    Args:
        name: Names the operators under ``torch.compile``.
        value: Returns the value, from X and the base, and a tuple of tensors to keep for ``pullback``. An empty one
            among them stands for the value itself, which then is not held twice; one without dimensions is about the
            batch as a whole.
        pullback: Returns the gradient by X, from X, the base, what was kept, and the gradient by the value.
        plain: Returns the value without a base, by differentiable operations.
        kept_like: Returns tensors of the shapes of what ``value`` keeps.
        is_small: Returns whether the plain form is quicker for X.
    """

    def __init__(
        self,
        name: str,
        *,
        value: Callable[[Tensor, Base], tuple[Tensor, tuple[Tensor, ...]]],
        pullback: Callable[[Tensor, Base, Kept, Tensor], Tensor],
        plain: Callable[[Tensor], Tensor],
        kept_like: Callable[[Tensor, Base], tuple[Tensor, ...]],
        is_small: Callable[[Tensor], bool] = lambda _X: False,
    ) -> None:
        self.value = value
        self.pullback = pullback
        self.plain = plain
        self.is_small = is_small
        self._operator = _operators(name, self, kept_like)

    def __call__(self, X: Tensor, base: Base = None) -> Tensor:
        """Return the value of the map at ``X``, times ``base`` from the left."""
        if base is not None and (base.requires_grad or base.shape[:-1] != X.shape[:-1]):
            return base @ self(X)
        if X.numel() == 0 or self.is_small(X):
            return around(base, self.plain(X))
        if torch.compiler.is_compiling():
            exporting = torch.compiler.is_exporting()
            result: Tensor = around(base, self.plain(X)) if exporting else self._operator(X, base)[0]
            return result
        if (
            X.is_meta
            or _transforms_active()
            or forward_ad._current_level >= 0
            or _dispatch_modes()
            or _tracing_state() is not None
            or _is_subclass(X)
        ):
            return around(base, self.plain(X))
        if not (X.requires_grad and torch.is_grad_enabled()):
            return self.value(X, base)[0]
        return _Explicit.apply(X, base, self)  # type: ignore[no-untyped-call, no-any-return]  # torch's


class _Explicit(torch.autograd.Function):
    # In the older form, with the context in forward: the newer one binds the signature anew at each call, which takes
    # as long as the maps of small matrices do. torch.func, which asks for the newer one, gets the plain form.

    @staticmethod
    def forward(ctx: Any, X: Tensor, base: Base, map: ExplicitMap) -> Tensor:  # noqa: A002  # what it is
        Y, kept = map.value(X, base)
        ctx.map = map
        ctx.save_for_backward(X, base, *with_value(kept, Y))
        return Y

    @staticmethod
    def backward(ctx: Any, G: Tensor) -> tuple[Tensor, None, None]:
        X, base, *kept = ctx.saved_tensors
        # Whoever differentiates this again, or by a batch of cotangents, needs operations that torch knows.
        if torch.is_grad_enabled() or forward_ad._current_level >= 0 or _is_batched(G):
            gradient: Tensor = torch.func.vjp(ctx.map.plain, X)[1](around_adjoint(base, G))[0]
            return gradient, None, None
        return ctx.map.pullback(X, base, kept, G), None, None


def with_value(kept: Kept, Y: Tensor) -> list[Tensor]:
    """Return what was kept, with ``Y`` where an empty tensor stands for it."""
    return [Y if tensor.numel() == 0 else tensor for tensor in kept]


def around(base: Base, Q: Tensor) -> Tensor:
    """Return the base times ``Q``."""
    return Q if base is None else base @ Q


def around_adjoint(base: Base, G: Tensor) -> Tensor:
    """Return the gradient by ``Q``, from ``G``, that by :func:`around`."""
    return G if base is None else base.mH @ G


# --- torch.compile ------------------------------------------------------------------------------------------------


def _operators(
    name: str,
    map: ExplicitMap,  # noqa: A002  # what it is
    kept_like: Callable[[Tensor, Base], tuple[Tensor, ...]],
) -> Any:
    """Define the operators ``torchkiln::NAME`` and ``torchkiln::NAME_backward``, and return the first."""

    def value(X: Tensor, base: Base) -> list[Tensor]:
        # They have to be laid out as is said below.
        Y, kept = map.value(X, base)
        return [Y.contiguous(), *(tensor.contiguous() for tensor in kept)]

    def pullback(X: Tensor, base: Base, kept: list[Tensor], G: Tensor) -> Tensor:
        return map.pullback(X, base, kept, G).contiguous()

    define: Any = torch.library.custom_op
    forward = define(
        f"torchkiln::{name}", value, mutates_args=(), schema="(Tensor X, Tensor? base) -> Tensor[]"
    )
    backward = define(
        f"torchkiln::{name}_backward",
        pullback,
        mutates_args=(),
        schema="(Tensor X, Tensor? base, Tensor[] kept, Tensor G) -> Tensor",
    )

    def like(X: Tensor) -> Tensor:
        return torch.empty_like(X, memory_format=torch.contiguous_format)

    forward.register_fake(lambda X, base: [like(X), *kept_like(like(X), base)])
    backward.register_fake(lambda X, _base, _kept, _G: like(X))

    def setup_context(ctx: Any, inputs: tuple[Tensor, Base], output: list[Tensor]) -> None:
        ctx.save_for_backward(*inputs, *with_value(output[1:], output[0]))

    def gradient(ctx: Any, grads: list[Tensor]) -> tuple[Tensor, None]:
        X, base, *kept = ctx.saved_tensors
        return backward(X, base, kept, grads[0]), None

    forward.register_autograd(gradient, setup_context=setup_context)
    return forward
