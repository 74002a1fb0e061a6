"""Steps, and a layer under three of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torchkiln import Stack, stack


class Scale(nn.Module):
    """No right inverse, a buffer that is in the state dict."""

    factor: Tensor

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.register_buffer("factor", torch.tensor(factor))

    def forward(self, X: Tensor) -> Tensor:
        return X * self.factor


class Shift(nn.Module):
    """A parameter of its own, and a right inverse."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.tensor(by))

    def forward(self, X: Tensor) -> Tensor:
        return X + self.by

    def right_inverse(self, X: Tensor) -> Tensor:
        return X - self.by


class Halves(nn.Module):
    """Two originals."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b

    def right_inverse(self, X: Tensor) -> tuple[Tensor, Tensor]:
        return X / 4, X * 3 / 4


class Flat(nn.Module):
    """Another shape."""

    def forward(self, X: Tensor) -> Tensor:
        return X.flatten()


class Fails(nn.Module):
    def forward(self, X: Tensor) -> Tensor:
        raise RuntimeError("does not run")


def three() -> tuple[Any, Stack, Tensor]:
    """w -> 2 w -> 2 w + 1 -> 5 (2 w + 1), and w."""
    layer = nn.Linear(3, 3)
    original = layer.weight.detach().clone()
    steps = stack(layer, "weight")
    steps.append(Scale(2.0), name="a")
    steps.append(Shift(1.0), name="b")
    steps.append(Scale(5.0), name="c")
    return layer, steps, original
