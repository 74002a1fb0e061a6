"""restore gives the stored tensors back; summary and the report say what is there and change nothing."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch.nn import utils
from torch.nn.utils import prune

from torchkiln import parametrizations
from torchkiln._core.errors import NothingToFoldError, TorchkilnWarning
from torchkiln.models import Report, bake, restore, summary

from .build import LAYERS, RankOne, Scale, Symmetric, anatomy, everything, registered

SINGLE = [
    kind
    for kind in LAYERS
    if "weight_norm" not in kind and "direction" not in kind and kind not in ("rank_one",)
]


@pytest.mark.parametrize("kind", SINGLE)
def test_restore_gives_the_original_back(kind):
    layer = LAYERS[kind][0]()
    (original,) = (
        p
        for name, p in layer.named_parameters()
        if name.endswith(("original", "original_orig", "weight_orig"))
    )
    bits = original.detach().clone()
    (row,) = restore(layer)
    assert layer.weight is original
    assert torch.equal(layer.weight, bits)
    assert (row.path, row.what) == ("weight", LAYERS[kind][1])
    assert type(layer) is nn.Linear
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]
    assert not layer._forward_pre_hooks
    assert not list(layer.buffers())


def test_restore_of_pruning_gives_the_weight_before_it():
    layer = nn.Linear(4, 4)
    weight, before = layer.weight, layer.weight.detach().clone()
    prune.l1_unstructured(layer, "weight", amount=0.5)
    prune.random_structured(layer, "weight", amount=1, dim=0)
    restore(layer)
    assert layer.weight is weight
    assert torch.equal(weight, before)


def test_restore_keeps_ties():
    first, second = registered(Symmetric())(nn.Linear(4, 4)), registered(Scale())(nn.Linear(4, 4))
    second.parametrizations.weight.original = first.parametrizations.weight.original
    restore(nn.ModuleList([first, second]))
    assert first.weight is second.weight


def test_restore_strict_raises_where_there_is_nothing():
    with pytest.raises(NothingToFoldError, match="restore: nothing to restore"):
        restore(nn.Linear(2, 2), strict=True)


def test_restore_computes_nothing():
    def never(*_):
        raise AssertionError("evaluated")

    layer = registered(Scale())(nn.Linear(4, 4))
    layer.parametrizations.weight[0].forward = never
    assert restore(layer)


# The other steps may change the shape: they are registered as unsafe.
KNOWN = [
    kind
    for kind, (_, what, _) in LAYERS.items()
    if not {"RankOne", "Scale", "Noisy", "Symmetric"} & set(what.split(", "))
]


# --- summary ------------------------------------------------------------------------------------------------------


def test_summary_agrees_with_bake_and_changes_nothing():
    model = everything()
    before, state = anatomy(model), torch.get_rng_state()
    seen = summary(model)
    assert anatomy(model) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert seen.rows == bake(model).rows


@pytest.mark.parametrize("kind", KNOWN)
def test_summary_of_what_it_knows_computes_nothing(kind, monkeypatch):
    layer = LAYERS[kind][0]()

    def never(*_):
        raise AssertionError("evaluated")

    for step in layer.modules():
        if type(step).__name__.lstrip("_") in ("WeightNorm", "SpectralNorm", "Orthogonal", "Product"):
            monkeypatch.setattr(step, "forward", never)
    assert summary(layer).rows[0].shape == (layer.out_features, 4)


def test_summary_computes_the_shape_that_only_a_step_knows():
    layer = registered(RankOne())(nn.Linear(3, 5))
    assert summary(layer).rows[0].shape == (5, 3)


@pytest.mark.parametrize(
    ("layer", "count"),
    [
        (lambda: parametrizations.weight_norm(nn.Linear(4, 8)), 8 + 32),
        (lambda: parametrizations.spectral_norm(nn.Linear(4, 8)), 32),
        (lambda: utils.weight_norm(nn.Linear(4, 8)), 8 + 32),
        (lambda: utils.spectral_norm(nn.Linear(4, 8)), 32),
        (lambda: prune.identity(nn.Linear(4, 8), "bias"), 8),
        (LAYERS["parametrized_step"][0], 16 + 16 + 4),
    ],
)
def test_summary_counts_the_parameters_that_store_the_tensor(layer, count):
    assert [row.parameters for row in summary(layer())] == [count]


def test_summary_with_patterns():
    model = everything()
    assert [row.path for row in summary(model, "0.*")] == ["0.weight"]
    assert summary(model, exclude="*").left == len(LAYERS)


# --- the report ---------------------------------------------------------------------------------------------------


def test_a_report_is_a_sized_iterable_and_true_where_there_is_something():
    report = summary(everything())
    assert len(report) == len(list(report)) == len(LAYERS)
    assert report
    assert not Report("summary", ())


def test_a_report_goes_to_json_and_back():
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(2, 3)))
    assert json.loads(json.dumps(bake(model).to_dict())) == {
        "verb": "bake",
        "rows": [
            {
                "path": "0.weight",
                "what": "weight_norm",
                "api": "torchkiln",
                "shape": [3, 2],
                "keys": ["0.parametrizations.weight.original0", "0.parametrizations.weight.original1"],
                "parameters": 9,
                "tied": [],
                "rounding": 0.0,
            }
        ],
        "left": 0,
    }


def test_a_report_prints_as_a_table():
    model = nn.Sequential(utils.weight_norm(nn.Linear(2, 3)), parametrizations.orthogonal(nn.Linear(3, 3)))
    assert str(bake(model)).splitlines() == [
        "bake: 2 tensors baked",
        "tensor    computed by         api        shape  parameters",
        "--------  ------------------  ---------  -----  ----------",
        "0.weight  weight_norm (hook)  hook       3 x 2  9",
        "1.weight  orthogonal          torchkiln  3 x 3  9",
    ]


NONE = "no tensor of the model is parametrized, normed by a hook or pruned"


def test_an_empty_summary_says_so():
    assert str(summary(nn.Linear(2, 2))) == f"summary: nothing is computed; {NONE}"


@pytest.mark.parametrize("verb", [bake, restore])
def test_a_verb_that_does_nothing_warns_and_says_so(verb):
    with pytest.warns(TorchkilnWarning, match=f"^{verb.__name__}: nothing to {verb.__name__}; {NONE}$"):
        report = verb(nn.Linear(2, 2))
    assert str(report) == f"{verb.__name__}: nothing to {verb.__name__}; {NONE}"
