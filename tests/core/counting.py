"""A parametrized layer that counts its evaluations."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from torchkiln import parametrize


class Counted(nn.Module):
    """Multiplication by an attribute; counts in a list, since a counter that changes would make the value void."""

    def __init__(self, factor: float = 2.0) -> None:
        super().__init__()
        self.factor = factor
        self.calls: list[None] = []

    def forward(self, X: Tensor) -> Tensor:
        self.calls.append(None)
        return X * self.factor


def counted(layer: nn.Module | None = None, name: str = "weight") -> tuple[Any, list[None]]:
    """A layer and the list that grows with each evaluation."""
    layer, step = layer or nn.Linear(3, 3), Counted()
    parametrize.register_parametrization(layer, name, step)
    step.calls.clear()
    return layer, step.calls


def is_kept(layer: Any) -> bool:
    return layer.weight is layer.weight
