"""Train a low-rank update of a frozen layer, then fold it in, or take it out again.

A parametrization may own parameters. This one adds the product of two thin matrices to a weight that stays
frozen, so that only the thin ones are trained: low-rank adaptation (arXiv:2106.09685) in a dozen lines.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

import torchkiln
from torchkiln import parametrize


class LowRankUpdate(nn.Module):
    """The weight plus ``B A``, of rank ``rank``; ``B`` starts at zero, so nothing changes at first."""

    def __init__(self, weight: Tensor, *, rank: int) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.A = nn.Parameter(torch.randn(rank, columns) / columns**0.5)
        self.B = nn.Parameter(torch.zeros(rows, rank))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the updated weight."""
        return weight + self.B @ self.A


def adapt(layer: nn.Linear, *, rank: int) -> nn.Linear:
    """Freeze a layer and put the update on its weight."""
    layer.requires_grad_(False)
    parametrize.register_parametrization(layer, "weight", LowRankUpdate(layer.weight, rank=rank))
    return layer


def train(model: nn.Module, x: Tensor, target: Tensor, *, steps: int = 200) -> float:
    """Fit what is not frozen and return the last loss."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trainable, lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), target)
        loss.backward()
        optimizer.step()
    return loss.item()


def main() -> None:
    """Adapt a layer to a target two ranks away, and show both ways back to a plain layer."""
    torch.manual_seed(0)
    layer = nn.Linear(32, 32)
    base = layer.weight.detach().clone()
    x = torch.randn(256, 32)
    target = x @ (base + torch.randn(32, 2) @ torch.randn(2, 32) / 8).T + layer.bias.detach()

    adapted = adapt(layer, rank=2)
    before = nn.functional.mse_loss(adapted(x), target).item()
    print(f"loss {before:.4f} before training, {train(adapted, x, target):.6f} after")

    original, folded = copy.deepcopy(adapted), copy.deepcopy(adapted)
    torchkiln.restore(original)
    print("restored: the base weight is back:", torch.equal(original.weight, base))
    torchkiln.bake(folded)
    print("baked: a plain layer, the same outputs:", torch.equal(folded(x), adapted(x)))
    assert torch.equal(original.weight, base)
    assert torch.equal(folded(x), adapted(x))
    assert type(folded) is type(original) is nn.Linear


if __name__ == "__main__":
    main()
