"""The parametrizations and modules that the conformance tests use, each with one property of interest."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Scale(nn.Module):
    """Multiplication by a constant; invertible."""

    def __init__(self, factor: float = 2.0) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, X: Tensor) -> Tensor:
        return X * self.factor

    def right_inverse(self, X: Tensor) -> Tensor:
        return X / self.factor


class Shift(nn.Module):
    """Addition of a constant; no right inverse."""

    def forward(self, X: Tensor) -> Tensor:
        return X + 1.5


class Refusing(nn.Module):
    """Addition of a constant, with a right inverse that says it does not exist."""

    def forward(self, X: Tensor) -> Tensor:
        return X + 0.5

    def right_inverse(self, X: Tensor) -> Tensor:
        raise NotImplementedError("there is no inverse")


class Tanh(nn.Module):
    """A bounded map; invertible where |X| < 1, and clamped there."""

    def forward(self, X: Tensor) -> Tensor:
        return X.tanh()

    def right_inverse(self, X: Tensor) -> Tensor:
        return X.clamp(-0.9, 0.9).atanh()


class Triangular(nn.Module):
    """Keep the lower triangle; the right inverse is a projection."""

    def forward(self, X: Tensor) -> Tensor:
        return X.tril()

    def right_inverse(self, X: Tensor) -> Tensor:
        return X.tril()


class Symmetric(nn.Module):
    """Square matrices, symmetric."""

    def forward(self, X: Tensor) -> Tensor:
        return X.triu() + X.triu(1).mT

    def right_inverse(self, X: Tensor) -> Tensor:
        return X.triu()


class Halves(nn.Module):
    """A sum of two originals."""

    def forward(self, X: Tensor, Y: Tensor) -> Tensor:
        return X + Y

    def right_inverse(self, X: Tensor) -> tuple[Tensor, Tensor]:
        return 0.25 * X, 0.75 * X


class HalvesAsList(Halves):
    """A sum of two originals, whose right inverse returns a list."""

    def right_inverse(self, X: Tensor) -> list[Tensor]:  # type: ignore[override]
        return [0.25 * X, 0.75 * X]


class Polar(nn.Module):
    """Length and direction: two originals of different shapes."""

    def forward(self, length: Tensor, direction: Tensor) -> Tensor:
        return length * direction / direction.norm()

    def right_inverse(self, X: Tensor) -> tuple[Tensor, Tensor]:
        return X.norm(), X.clone()


class Single(nn.Module):
    """A sequence of one original, which torch stores as ``original0``."""

    def forward(self, X: Tensor) -> Tensor:
        return X * 3

    def right_inverse(self, X: Tensor) -> tuple[Tensor]:
        return (X / 3,)


class Transpose(nn.Module):
    """Changes the shape of a matrix; needs ``unsafe``."""

    def forward(self, X: Tensor) -> Tensor:
        return X.mT

    def right_inverse(self, X: Tensor) -> Tensor:
        return X.mT


class Widen(nn.Module):
    """Changes the dtype; needs ``unsafe``."""

    def forward(self, X: Tensor) -> Tensor:
        return X.double()


class Gain(nn.Module):
    """Owns a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(1.25))

    def forward(self, X: Tensor) -> Tensor:
        return X * self.gain

    def right_inverse(self, X: Tensor) -> Tensor:
        return X / self.gain


class Masked(nn.Module):
    """Owns a buffer; no right inverse."""

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.register_buffer("mask", torch.arange(torch.Size(shape).numel()).reshape(shape) % 3 != 0)

    def forward(self, X: Tensor) -> Tensor:
        return X * self.mask


class Noisy(nn.Module):
    """Behaves differently in training and evaluation; holds a submodule."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, X: Tensor) -> Tensor:
        return self.drop(X) + (1.0 if self.training else 0.0)


class Counted(nn.Module):
    """Counts its evaluations outside the state."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, X: Tensor) -> Tensor:
        self.calls += 1
        return X * 2


class Based(nn.Module):
    """Moves its own base in ``right_inverse`` and starts again from zero, as a trivialization does."""

    base: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("base", None)

    def forward(self, X: Tensor) -> Tensor:
        return self.base + X

    def right_inverse(self, X: Tensor) -> Tensor:
        self.base = X.clone()
        return torch.zeros_like(X)


class Lambda(nn.Module):
    """Whatever the test needs, from plain functions."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.function = forward

    def forward(self, *originals: Tensor) -> Any:
        return self.function(*originals)


class Invertible(Lambda):
    """A ``Lambda`` with a right inverse."""

    def __init__(self, forward: Callable[..., Any], inverse: Callable[[Tensor], Any]) -> None:
        super().__init__(forward)
        self.inverse = inverse

    def right_inverse(self, X: Tensor) -> Any:
        return self.inverse(X)


class Pair(nn.Module):
    """Two matrices, a vector and two buffers in a fixed order, with a forward that uses them all."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(3, 4))
        self.second = nn.Parameter(torch.randn(3, 4))
        self.third = nn.Parameter(torch.randn(3))
        self.register_buffer("mean", torch.randn(4))
        self.register_buffer("scale", torch.rand(4) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return ((x - self.mean) / self.scale) @ self.first.T * (x @ self.second.T) + self.third


class WithDeepcopy(nn.Linear):
    """Copies itself."""

    copies = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> WithDeepcopy:
        from copy import deepcopy

        replica = self.__new__(type(self))
        memo[id(self)] = replica
        replica.__dict__ = deepcopy(self.__dict__, memo)
        replica.copies = self.copies + 1
        return replica


class WithSlots(nn.Module):
    """Keeps part of its state in slots."""

    __slots__ = ("extra", "unset")

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4))
        object.__setattr__(self, "extra", [1, 2])

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


class WithProperty(nn.Linear):
    """Reads its weight through a property of its own."""

    @property
    def kernel(self) -> Tensor:
        return self.weight.T

    @kernel.setter
    def kernel(self, value: Tensor) -> None:
        self.weight = value.T


class WithGetattr(nn.Module):
    """Answers for names of a wrapped module."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Flatten()
        self.weight = nn.Parameter(torch.randn(3, 4))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)


class Abstract(nn.Module, ABC):
    """Has the metaclass of abstract classes."""

    @abstractmethod
    def width(self) -> int: ...


class Concrete(Abstract):
    """Implements the abstract class."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4))

    def width(self) -> int:
        return self.weight.shape[0]


class CallsMeta(type):
    """A metaclass that marks the classes it makes."""

    def __new__(mcls, name: str, bases: tuple[type, ...], namespace: dict[str, Any]) -> CallsMeta:
        return super().__new__(mcls, name, bases, {**namespace, "marked": True})


class WithMetaclass(nn.Linear, metaclass=CallsMeta):
    """Has a metaclass of its own."""


class Ordered(nn.Module):
    """Several parameters of one shape, to follow their order."""

    def __init__(self, names: str = "abcd", *, buffers: bool = False) -> None:
        super().__init__()
        for name in names:
            value = torch.randn(2, 3)
            if buffers:
                self.register_buffer(name, value)
            else:
                self.register_parameter(name, nn.Parameter(value))


def linear() -> nn.Linear:
    """The small layer most tests use."""
    return nn.Linear(4, 3, dtype=torch.float64)


def square() -> nn.Linear:
    """A layer whose weight is square."""
    return nn.Linear(3, 3, dtype=torch.float64)
