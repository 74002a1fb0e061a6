"""A verb that fails leaves the model as it was: classes, objects, bits, order, hooks, modes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from torchkiln import parametrizations
from torchkiln._core.errors import ParametrizationError
from torchkiln.models import bake, restore

from .build import LAYERS, anatomy, everything, registered


class RefusalError(Exception):
    """Raised by a layer that cannot be changed."""


class Stubborn(nn.Linear):
    """Refuses to have its weight registered once it is told to."""

    refuse = False

    def register_parameter(self, name, param):
        if self.refuse and name == "weight":
            raise RefusalError
        super().register_parameter(name, param)


class Failing(nn.Module):
    def forward(self, X):
        if self.armed:
            raise RefusalError
        return X

    armed = False


def stubborn() -> nn.Module:
    layer = parametrizations.orthogonal(Stubborn(4, 4))
    layer.refuse = True
    return layer


def failing() -> nn.Module:
    step = Failing()
    layer = registered(step)(nn.Linear(4, 4))
    step.armed = True
    return layer


def infinite() -> nn.Module:
    layer = parametrizations.orthogonal(nn.Linear(4, 4))
    with torch.no_grad():
        layer.parametrizations.weight[0].base[0] = float("inf")
    return layer


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    ("last", "error"), [(stubborn, RefusalError), (failing, RefusalError), (infinite, ParametrizationError)]
)
def test_a_bake_that_fails_at_the_last_layer_changes_nothing(last, error, training):
    model = nn.Sequential(*everything(), last()).train(training)
    state = torch.get_rng_state()
    before = anatomy(model)
    with pytest.raises(error):
        bake(model)
    assert anatomy(model) == before
    assert torch.equal(torch.get_rng_state(), state)


def test_the_comparison_sees_a_change():
    model = everything()
    before = anatomy(model)
    bake(model, "0.weight")
    assert anatomy(model) != before


def test_a_model_works_after_a_refused_bake():
    model = nn.Sequential(*everything(), infinite())
    with pytest.raises(ParametrizationError, match="not finite"):
        bake(model)
    assert len(bake(model[:-1])) == len(LAYERS)


def test_a_restore_that_fails_half_way_changes_nothing():
    kinds = ["spectral_norm", "torch_chain", "spectral_norm_hook", "container", "pruned_original"]
    model = nn.Sequential(*(LAYERS[kind][0]() for kind in kinds), stubborn())
    before = anatomy(model)
    with pytest.raises(RefusalError):
        restore(model)
    assert anatomy(model) == before


@pytest.mark.parametrize("kind", ["weight_norm", "weight_norm_hook", "rank_one", "torch_weight_norm"])
def test_a_restore_of_several_originals_is_refused_with_their_names(kind):
    model = nn.Sequential(LAYERS["spectral_norm"][0](), LAYERS[kind][0]())
    before = anatomy(model)
    with pytest.raises(ParametrizationError, match=r"^1\.weight: computed from several tensors"):
        restore(model)
    assert anatomy(model) == before
    assert [row.path for row in restore(model, exclude="1.*")] == ["0.weight"]
