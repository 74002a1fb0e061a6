"""A parameter's class and attributes go to the originals, and back to the tensor that is left."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import torchkiln
from torchkiln import parametrize


class Turned(nn.Module):
    """The value lies in memory by columns."""

    def forward(self, X: Tensor) -> Tensor:
        return X.t().contiguous().t()


class Failing(nn.Module):
    def forward(self, X: Tensor) -> Tensor:
        return X[:1]


class Tagged(nn.Parameter):
    """A parameter class, as engines for sharded training have them."""


class Recast(nn.Parameter):
    """A parameter class with a ``detach()`` that gives another one."""

    def detach(self) -> Tensor:
        return Tensor.detach(self).as_subclass(Cast)


class Cast(Tensor):
    """What is left of a ``Recast``."""


class Copies(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b

    def right_inverse(self, X: Tensor) -> tuple[Tensor, Tensor]:
        return X * 0.5, X * 0.5


class Keeps(nn.Module):
    """Its inverse returns the weight itself."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b

    def right_inverse(self, X: Tensor) -> tuple[Tensor, Tensor]:
        return X, torch.zeros_like(X)


@pytest.mark.parametrize("swap", [True, False])
@pytest.mark.parametrize("step", [nn.Identity, Turned, Copies, Keeps])
@pytest.mark.parametrize("kind", [Tagged, Recast])
def test_attributes_and_the_class_go_there_and_back(
    kind: type[nn.Parameter], step: type[nn.Module], swap: bool
) -> None:
    layer = nn.Linear(4, 3)
    layer.weight = kind(layer.weight.detach())
    layer.weight._no_weight_decay = True
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        parametrize.register_parametrization(layer, "weight", step())
        originals = list(layer.parametrizations.weight.parameters())
        assert [(type(p), vars(p)) for p in originals] == [(kind, {"_no_weight_decay": True})] * len(
            originals
        )
        originals[-1].partition_dim = 1
        del originals
        parametrize.remove_parametrizations(layer, "weight")
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
    assert type(layer.weight) is kind
    assert vars(layer.weight) == {"_no_weight_decay": True, "partition_dim": 1}


def test_attributes_survive_a_refused_registration() -> None:
    layer = nn.Linear(4, 3)
    layer.weight._no_weight_decay = True
    with pytest.raises(torchkiln.ParametrizationError, match="may not change the shape"):
        parametrize.register_parametrization(layer, "weight", Failing())
    assert vars(layer.weight) == {"_no_weight_decay": True}
