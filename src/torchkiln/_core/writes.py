"""Writes to a computed tensor reach its originals: ``nn.init.zeros_(m.weight)``, ``m.weight.data.normal_()``.

A computed tensor is new at each read, so that a write into it would be lost without a word. What is read outside of a
``forward`` is therefore a :class:`ComputedTensor`: after an in-place method, and again when it is dropped, it looks at
its version counter, and if somebody wrote into it, in whatever way (a method, a view, ``out=``), the chain's right
inverse takes the new value.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from torchkiln._core.chain import enabled_steps
from torchkiln._core.errors import TorchkilnWarning
from torchkiln._core.sharded import is_sharded

__all__ = ["ComputedTensor", "watched"]


_PARAMETER_NEW = nn.Parameter.__new__.__code__
_in_transform = torch._C._are_functorch_transforms_active


class ComputedTensor(Tensor):
    """A value of a chain that carries writes back to it. Every operation on it gives plain tensors."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # torch's own way to say so

    # The chain, the tensor's name in its module, and the version and grad_fn it had; a plain tuple for speed.
    _read: tuple[nn.Module, str, int, Any]

    @property
    def data(self) -> Tensor:
        """The same memory without autograd; writes into it count as well."""
        data: Tensor = Tensor.data.__get__(self)  # type: ignore[attr-defined]  # a C descriptor
        _watch(data, *self._read[:2])
        return data

    @data.setter
    def data(self, value: Tensor) -> None:
        self._read[0].right_inverse(value)  # type: ignore[operator]  # mypy: Tensor | Module

    def __getattr__(self, name: str) -> Any:
        """Find what is said of all originals: transformers marks loaded parameters, and initializes the rest."""
        originals = self.__dict__["_read"][0]._parameters.values()
        said = [original.__dict__.get(name) for original in originals if original is not None]
        if said and said[0] is not None and all(one is said[0] for one in said):
            return said[0]
        raise AttributeError(f"'Tensor' object has no attribute '{name}'")

    def __del__(self) -> None:
        if self._version != self._read[2]:
            self.settle()

    def settle(self) -> None:
        """Hand what was written since the read to the chain."""
        chain, name, version, grad_fn = self._read
        if self._version == version or self.grad_fn is not grad_fn:
            return  # nothing written, or by a differentiable operation of the caller's own
        self._read = (chain, name, self._version, grad_fn)
        step = _without_inverse(chain)
        if step is not None:
            warnings.warn(
                f"A write into the computed tensor {name!r} is lost: {type(step).__name__} has no "
                f"right_inverse.\nWrite to parametrizations.{name}.original, or define right_inverse.",
                TorchkilnWarning,
                stacklevel=2,
            )
            return
        chain.right_inverse(self.detach())  # type: ignore[operator]  # mypy: Tensor | Module

    def detach(self) -> Tensor:
        """Return the same memory without autograd, as any tensor does."""
        if sys._getframe(1).f_code is _PARAMETER_NEW:
            # nn.Parameter(m.weight) demands that both are of one type; from here on this one carries nothing back.
            self.__class__ = Tensor  # type: ignore[assignment]  # a plain tensor again
            return Tensor.detach(self)
        return Tensor.detach(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        plain: Any = self.detach().requires_grad_(self.requires_grad)
        return plain.__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        plain = self if self.grad_fn is not None else self.detach()
        return Tensor.__deepcopy__(plain, memo)  # type: ignore[no-any-return,no-untyped-call]  # unannotated


def _settling(name: str) -> Callable[..., Any]:
    """Return the in-place method ``name`` of tensors that carries the write back at once."""
    method = getattr(Tensor, name)

    @functools.wraps(method)
    def write(self: ComputedTensor, *arguments: Any, **keywords: Any) -> Any:
        result = method(self, *arguments, **keywords)
        self.settle()
        return result

    return write


for _name in dir(Tensor):
    if (_name.endswith("_") and not _name.startswith("_")) or _name == "__setitem__":
        setattr(ComputedTensor, _name, _settling(_name))
ComputedTensor.__name__ = "tensor"  # it prints as any tensor does


def _without_inverse(chain: nn.Module) -> nn.Module | None:
    return next((step for step in enabled_steps(chain) if not hasattr(step, "right_inverse")), None)


def watched(value: Tensor, chain: nn.Module, name: str) -> Tensor:
    """Return ``value``, which ``chain`` has just computed, as one that carries writes back.

    Not so for what somebody else holds too (a buffer that a step returns), other kinds of tensors, and values of
    ``torch.func`` transforms.
    """
    if is_sharded(value):
        value.__dict__["_warning"] = _ShardedWrite(value, name)
        return value
    # Held by the caller's name, this argument and getrefcount's own.
    if type(value) is Tensor and sys.getrefcount(value) <= 3 and not _in_transform():
        _watch(value, chain, name)
    return value


class _ShardedWrite:
    """Warns of a write into a sharded computed tensor, which is lost, when the tensor is dropped.

    Handing it to the chain may take all processes, and a tensor may be dropped at another time on each.
    """

    def __init__(self, value: Tensor, name: str) -> None:
        self.alias = value.detach()  # with the same version counter
        self.version, self.name = value._version, name

    def __del__(self) -> None:
        if self.alias._version != self.version:
            warnings.warn(
                f"A write into the computed tensor {self.name!r}, which is sharded, is lost.\n"
                f"Assign the new value on every process: module.{self.name} = value.",
                TorchkilnWarning,
                stacklevel=2,
            )


def _watch(value: Tensor, chain: nn.Module, name: str) -> None:
    try:
        read = (chain, name, value._version, value.grad_fn)
    except RuntimeError:  # made in inference mode, where writes are not counted
        return
    value.__class__ = ComputedTensor
    value._read = read  # type: ignore[attr-defined]  # a ComputedTensor now
