"""State dicts of live models, written in the spelling asked for."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations as torch_parametrizations

import torchkiln
from torchkiln import ParametrizationError, load_state_dict, parametrizations, state_dict

from .build import Scale, registered
from .spellings import ALL_MATCHED, EXACT, MAKE, PLACES, SELF_EXPLAINING, same, value

SPELLED_AS = {
    "plain": MAKE["plain"],
    "torch": {"weight": MAKE["torch_weight_norm"], "spectral": MAKE["torch_spectral_norm"]},
    "legacy": {"weight": MAKE["legacy_weight_norm"], "spectral": MAKE["legacy_spectral_norm"]},
}
NORMED = [name for name in SELF_EXPLAINING if name.endswith("norm")]


@pytest.mark.parametrize("source", NORMED)
@pytest.mark.parametrize("spelling", SPELLED_AS)
@pytest.mark.parametrize("place", PLACES)
def test_the_matching_module_loads_what_is_written(source: str, spelling: Any, place: str) -> None:
    giver = PLACES[place](MAKE[source]())
    matching = SPELLED_AS[spelling]
    make = (
        matching["weight" if "weight" in source else "spectral"] if isinstance(matching, dict) else matching
    )
    taker = PLACES[place](make())
    before = copy.deepcopy(giver.state_dict())
    state = state_dict(giver, spelling=spelling)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert repr(taker.load_state_dict(state)) == ALL_MATCHED
    assert same(giver.state_dict(), before)
    torch.testing.assert_close(value(taker), value(giver), **EXACT)
    assert sorted(state) == sorted(taker.state_dict())
    assert state._metadata.keys() == taker.state_dict()._metadata.keys()


@pytest.mark.parametrize("source", NORMED)
def test_writing_and_back_is_the_same_to_the_bit(source: str) -> None:
    model = MAKE[source]()
    own = "legacy" if "legacy" in source else "torch"
    assert same(state_dict(model, spelling=own), model.state_dict())
    other = state_dict(model, spelling="torch" if own == "legacy" else "legacy")
    stored = {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert {tensor.data_ptr() for tensor in other.values()} == stored


@pytest.mark.parametrize("source", [source for source in MAKE if source != "plain"])
def test_plain_is_what_bake_leaves(source: str) -> None:
    model = MAKE[source]()
    state = state_dict(model, spelling="plain")
    torchkiln.bake(model)
    assert same(state, model.state_dict())
    assert state._metadata == model.state_dict()._metadata


def test_plain_values_in_training_are_those_of_the_last_read() -> None:
    layer = MAKE["spectral_norm"]().train()
    layer(torch.ones(1, 4, dtype=torch.float64))
    before = copy.deepcopy(layer.state_dict())
    state = state_dict(layer, spelling="plain")
    assert layer.training
    assert same(layer.state_dict(), before)
    assert torch.equal(state["weight"], layer.eval().weight)


@pytest.mark.parametrize("spelling", ["legacy", "torch"])
def test_pruning_has_one_spelling(spelling: Any) -> None:
    model = nn.Sequential(MAKE["pruned"](), MAKE["weight_norm"]())
    state = state_dict(model, spelling=spelling)
    assert {"0.weight_orig", "0.weight_mask"} <= set(state)
    assert ("1.weight_g" in state) == (spelling == "legacy")


def test_what_has_no_such_spelling_is_refused() -> None:
    model = nn.Sequential(MAKE["orthogonal"](), registered(Scale())(MAKE["plain"]()))
    with pytest.raises(
        ParametrizationError, match=r"0\.weight: orthogonal has no legacy spelling(?s:.*)1 more like it"
    ):
        state_dict(model, spelling="legacy")
    assert same(state_dict(model, spelling="torch"), model.state_dict())
    chain = parametrizations.spectral_norm(MAKE["weight_norm"]())
    with pytest.raises(
        ParametrizationError, match=r"weight: weight_norm, spectral_norm has no legacy spelling"
    ):
        state_dict(chain, spelling="legacy")


def test_an_unknown_spelling_is_refused() -> None:
    with pytest.raises(
        ParametrizationError, match='spelling: expected "plain", "torch" or "legacy", got \'old\''
    ):
        state_dict(nn.Linear(2, 2), spelling="old")  # type: ignore[arg-type]


def test_values_that_are_not_finite_are_refused() -> None:
    layer = MAKE["weight_norm"]()
    with torch.no_grad():
        layer.parametrizations.weight.original1[0, 0] = torch.nan
    with pytest.raises(
        ParametrizationError, match="weight: 4 of 16 values computed by weight_norm are not finite"
    ):
        state_dict(layer, spelling="plain")
    assert list(state_dict(layer, spelling="legacy")) == ["bias", "weight_g", "weight_v"]


def test_buffers_that_no_state_dict_has() -> None:
    layer = nn.Module()
    layer.register_buffer("W", torch.randn(3, 3), persistent=False)
    registered(Scale(), name="W")(layer)
    assert list(state_dict(layer, spelling="plain")) == []


def test_keys_that_a_hook_renames_are_named() -> None:
    layer = MAKE["weight_norm"]()

    def rename(module: nn.Module, state: dict[str, Tensor], prefix: str, _: object) -> None:
        state["renamed"] = state.pop("parametrizations.weight.original0")

    layer._register_state_dict_hook(rename)
    with pytest.raises(
        ParametrizationError, match=r"parametrizations\.weight\.original0: model\.state_dict\(\) has no"
    ):
        state_dict(layer, spelling="plain")


def test_torchs_own_modules_are_written_and_read() -> None:
    theirs = torch_parametrizations.orthogonal(MAKE["plain"]())
    plain = nn.Linear(4, 4, dtype=torch.float64)
    plain.load_state_dict(state_dict(theirs, spelling="plain"))
    torch.testing.assert_close(value(plain), value(theirs), **EXACT)
    other = torch_parametrizations.orthogonal(nn.Linear(4, 4, dtype=torch.float64))
    load_state_dict(other, plain.state_dict())
    torch.testing.assert_close(value(other), value(theirs), **EXACT)
