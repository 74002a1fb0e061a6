"""Fold a model whose norms came from three different interfaces, in one call, and save plain weights.

Libraries put such things on in different ways: with hooks (the old `torch.nn.utils.weight_norm`), with torch's
parametrizations, with pruning masks. `bake` folds them all and says what it did.
"""

from __future__ import annotations

import warnings

import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import torchkiln


def decoder() -> nn.Sequential:
    """A small upsampling stack as vocoders have it, normed in three ways."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch deprecates the hooks; libraries still use them
        first = torch.nn.utils.weight_norm(nn.Conv1d(8, 32, 7, padding=3))
    up = parametrizations.weight_norm(nn.ConvTranspose1d(32, 16, 4, stride=2, padding=1))
    last = nn.Conv1d(16, 1, 7, padding=3)
    prune.l1_unstructured(last, "weight", amount=0.5)
    return nn.Sequential(first, nn.LeakyReLU(0.1), up, nn.LeakyReLU(0.1), last)


def main() -> None:
    """Fold, compare, save, and load into a model that never had a norm."""
    torch.manual_seed(0)
    model = decoder().eval()
    mel = torch.randn(1, 8, 40)
    before = model(mel)

    report = torchkiln.bake(model)
    print(report)
    print("largest difference:", (model(mel) - before).abs().max().item())
    assert torch.equal(model(mel), before)

    torch.save(model.state_dict(), "plain.pt")
    plain = nn.Sequential(
        nn.Conv1d(8, 32, 7, padding=3),
        nn.LeakyReLU(0.1),
        nn.ConvTranspose1d(32, 16, 4, stride=2, padding=1),
        nn.LeakyReLU(0.1),
        nn.Conv1d(16, 1, 7, padding=3),
    )
    plain.load_state_dict(torch.load("plain.pt"))
    assert torch.equal(plain(mel), before)


if __name__ == "__main__":
    main()
