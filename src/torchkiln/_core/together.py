"""Equal layers evaluate their tensors as one batched call, in a scope that keeps the values."""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils import _python_dispatch

from torchkiln._core.cache import Key, Scope, entered
from torchkiln._core.chain import ParametrizationList, chains_of, enabled_steps, is_parametrized, steps_of

__all__ = ["evaluate_together"]


# Any: mypy would take from its type that it is never true.
_is_subclass: Any = _python_dispatch.is_traceable_wrapper_subclass


class _Batchable(Protocol):
    """A step of which several can be evaluated by one call."""

    def likeness(self, original: Tensor) -> Hashable:
        """Return what has to be equal to be evaluated together, beside the originals' shape, dtype and device.

        None where it has to be evaluated alone.
        """

    @staticmethod
    def forward_together(steps: Sequence[Any], originals: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return what ``forward`` of each step returns for its original."""


class _Together(Scope):
    """A scope that, asked for the value of one chain, computes those of all its like."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(frozenset(map(id, model.modules())))
        self.chains: weakref.WeakValueDictionary[Key, ParametrizationList] = weakref.WeakValueDictionary()
        for module in model.modules():
            if is_parametrized(module):
                for name, chain in chains_of(module).items():
                    if isinstance(chain, ParametrizationList):
                        self.chains[id(module), name] = chain

    def evaluate(self, key: Key, chain: nn.Module) -> dict[Key, tuple[nn.Module, Tensor]]:
        kind = _kind(chain)
        if kind is None:
            return super().evaluate(key, chain)
        alike = {
            other: each
            for other, each in self.chains.items()
            if each is chain or (_kind(each) == kind and not self.holds(other, each))
        }
        if len(alike) == 1:
            return super().evaluate(key, chain)
        for each in alike.values():
            if each._advances and each.training:
                each.announce_change()
        steps = [each._modules["0"] for each in alike.values()]
        originals = [each._parameters["original"] for each in alike.values()]
        together = cast(_Batchable, steps[0]).forward_together
        if torch.is_inference_mode_enabled():  # its tensors have no version counter, and could not be kept
            with torch.inference_mode(False), torch.no_grad():
                values = together(steps, cast(list[Tensor], originals))
        else:
            values = together(steps, cast(list[Tensor], originals))
        return {other: (each, value) for (other, each), value in zip(alike.items(), values, strict=True)}


def _kind(chain: nn.Module) -> Hashable:
    """Return what chains that can be evaluated together have in common; None where a chain cannot be."""
    original = chain._parameters.get("original")
    steps = enabled_steps(chain)
    hooked = (
        chain._forward_hooks or chain._forward_pre_hooks or chain._backward_hooks or chain._backward_pre_hooks
    )
    if (
        original is None
        or _is_subclass(original)
        or original.is_inference()
        or hooked
        or len(steps) != 1
        or len(steps_of(chain)) != 1
        or not hasattr(steps[0], "likeness")
    ):
        return None
    step: Any = steps[0]
    if step._forward_hooks or step._forward_pre_hooks or step._backward_hooks or step._backward_pre_hooks:
        return None
    likeness = step.likeness(original)
    if likeness is None:
        return None
    return (
        *(type(step), likeness, step.training, original.requires_grad),
        *(original.shape, original.dtype, original.device),
    )


@contextmanager
def evaluate_together(model: nn.Module) -> Iterator[None]:
    """Evaluate the equal layers of ``model`` as one batched call, and each of its tensors once, while it is open.

    The first of them that is read computes all: one call instead of dozens, where many small layers have the same
    parametrization, shape and dtype. Values, gradients and guarantees are those of
    :func:`~torchkiln.parametrize.cached`; ``orthogonal`` and ``spectral_norm`` are evaluated so, other parametrizations
    one by one. It pays for small orthogonal layers (48 of 64x64: 1.4 to 1.9 times as fast). It does not for large ones,
    nor, on a CPU, for spectral norm, where it costs 1.5 times as much and more: measure (``benchmarks/batched.py``).

    Layers evaluated together share a graph. A backward pass from some of them frees it for the others: what was
    computed with those before needs ``retain_graph=True``, what is computed after is evaluated anew.

    Args:
        model: The layers are its modules, as it has them on entry.

    Raises:
        TypeError: ``model`` is no module.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import torchkiln
        >>> layers = [torchkiln.parametrizations.orthogonal(nn.Linear(8, 8)) for _ in range(6)]
        >>> model = nn.Sequential(*layers)
        >>> with torchkiln.evaluate_together(model):  # one evaluation of a batch of six
        ...     model(torch.ones(1, 8)).sum().backward()
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"evaluate_together() expected a module, got {type(model).__name__}.")
    with entered(_Together(model)):
        yield
