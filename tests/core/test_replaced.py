"""An optimizer that was not passed, and still holds what was replaced, warns at its next step; no other does."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn, optim

import torchkiln
from torchkiln import TorchkilnWarning, parametrize
from torchkiln.parametrizations import weight_norm

X = torch.linspace(-1, 1, 8).reshape(2, 4)
STALE = r"^SGD: holds parameters that are no longer in use, so it does not train Linear\.weight\.\n"


class PositiveParts(nn.Module):
    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a - b

    def right_inverse(self, X: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return X.relu(), (-X).relu()


def train(layer: nn.Module, optimizer: optim.Optimizer) -> None:
    optimizer.zero_grad()
    layer(X).square().sum().backward()
    optimizer.step()


def trained() -> tuple[nn.Linear, optim.Optimizer]:
    layer = nn.Linear(4, 3)
    optimizer = optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    train(layer, optimizer)
    return layer, optimizer


def test_an_optimizer_left_behind_by_a_registration_warns_at_its_step() -> None:
    layer, optimizer = trained()
    weight_norm(layer)
    with pytest.warns(TorchkilnWarning, match=STALE) as caught:
        train(layer, optimizer)
    assert caught[0].filename == __file__
    train(layer, optimizer)  # once is enough


def test_an_optimizer_left_behind_by_a_removal_warns_at_its_step() -> None:
    layer = weight_norm(nn.Linear(4, 3))
    optimizer = optim.SGD(layer.parameters(), lr=0.1)
    parametrize.remove_parametrizations(layer, "weight")
    with pytest.warns(TorchkilnWarning, match=STALE):
        train(layer, optimizer)


def test_an_optimizer_left_behind_by_a_bake_warns_with_paths() -> None:
    model = nn.Sequential(weight_norm(nn.Linear(4, 3)), weight_norm(nn.Linear(3, 3)))
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    torchkiln.bake(model)
    with pytest.warns(TorchkilnWarning, match=r"does not train 0\.weight, 1\.weight\."):
        train(model, optimizer)


def test_replaced_twice() -> None:
    layer = nn.Linear(4, 3)
    optimizer = optim.SGD(layer.parameters(), lr=0.1)
    weight_norm(layer)
    parametrize.remove_parametrizations(layer, "weight")
    gc.collect()
    with pytest.warns(TorchkilnWarning, match=STALE):
        train(layer, optimizer)


def test_nobody_is_warned_who_has_the_new_parameters() -> None:
    layer, optimizer = trained()
    weight_norm(layer)
    optimizer.add_param_group({"params": list(layer.parametrizations.parameters())})
    train(layer, optimizer)


def test_nobody_is_warned_of_a_frozen_tensor_or_of_one_that_is_gone() -> None:
    frozen, gone, kept = (nn.Linear(4, 3) for _ in range(3))
    frozen.requires_grad_(False)
    optimizer = optim.SGD([*frozen.parameters(), *gone.parameters(), *kept.parameters()], lr=0.1)
    weight_norm(frozen)
    weight_norm(gone)
    del gone
    gc.collect()
    train(kept, optimizer)


def test_another_models_optimizer_is_not_warned() -> None:
    layer, optimizer = trained()
    weight = (other := nn.Linear(4, 3)).weight
    weight_norm(other)
    train(layer, optimizer)
    assert weight.requires_grad


def test_an_optimizer_that_holds_none_of_it_is_pointed_out() -> None:
    layer = nn.Linear(4, 3)
    optimizer = optim.SGD([layer.bias], lr=0.1)
    with pytest.warns(
        TorchkilnWarning, match=r"^optimizer: holds none of the parameters of Linear\.weight"
    ) as caught:
        parametrize.register_parametrization(layer, "weight", PositiveParts(), optimizer=optimizer)
    assert caught[0].filename == __file__
