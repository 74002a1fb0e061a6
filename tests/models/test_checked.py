"""Baking is checked: finite, equal to the value before, loud where nothing is done; optimizers follow."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import utils

from torchkiln import parametrizations, parametrize
from torchkiln._core.errors import NothingToFoldError, ParametrizationError, TorchkilnWarning
from torchkiln.models import bake, restore, summary

from .build import LAYERS, Scale, anatomy, everything, registered

X = torch.linspace(-1, 1, 8).reshape(2, 4)


def broken(bad: float = float("nan")) -> nn.Module:
    layer = registered(Scale())(nn.Linear(4, 4))
    with torch.no_grad():
        layer.parametrizations.weight.original[1, 2] = bad
    return layer


# --- finite -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_is_refused_by_name(bad):
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4)), broken(bad))
    before = [type(layer) for layer in model]
    with pytest.raises(
        ParametrizationError, match=r"^1\.weight: 1 of 16 values computed by Scale are not finite"
    ):
        bake(model)
    assert [type(layer) for layer in model] == before


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_removal_leaves_it_with_a_warning(bad):
    layer = broken(bad)
    with pytest.warns(TorchkilnWarning, match=r"^Linear\.weight: not all values are finite") as caught:
        parametrize.remove_parametrizations(layer, "weight")
    assert caught[0].filename == __file__
    assert not layer.weight[1, 2].isfinite()
    assert type(layer) is nn.Linear


def test_removal_to_the_original_looks_at_nothing():
    layer = broken()
    parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
    assert layer.weight.isnan().any()


@pytest.mark.parametrize("bakes", [True, False])
def test_tensors_without_numbers_are_not_looked_at(bakes):
    meta = registered(Scale())(nn.Linear(4, 4, device="meta"))
    whole = nn.Module()
    whole.register_buffer("weight", torch.ones(2, 2, dtype=torch.int64))
    registered(Scale(2))(whole)
    for module in (meta, whole):
        bake(module) if bakes else parametrize.remove_parametrizations(module, "weight")
    assert meta.weight.is_meta
    assert whole.weight.tolist() == [[2, 2], [2, 2]]


# --- equal to the value before ------------------------------------------------------------------------------------


class Rounding(nn.Linear):
    """Keeps its weight in another form than it is given."""

    keeps_bits = True

    def register_parameter(self, name, param):
        if name == "weight" and not self.keeps_bits:
            param = nn.Parameter((param.detach() * 64).round() / 64)
        super().register_parameter(name, param)


@pytest.mark.parametrize("norm", [utils.weight_norm, utils.spectral_norm])
def test_a_module_that_does_not_keep_the_value_is_refused_and_left(norm):
    layer = norm(Rounding(4, 4))
    layer.keeps_bits = False
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4)), layer)
    before = anatomy(model)
    with pytest.raises(ParametrizationError, match=r"^weight: the module does not have the baked value"):
        bake(model)
    assert anatomy(model) == before


@pytest.mark.parametrize("kind", LAYERS)
def test_the_layout_is_that_of_the_computed_value(kind):
    layer = LAYERS[kind][0]().eval()
    layer(X)
    layer(X)
    strides = layer.weight.stride()
    bake(layer)
    assert layer.weight.stride() == strides


def test_removal_keeps_the_layout_too():
    class Turned(nn.Module):
        def forward(self, W):
            return W.t().contiguous().t()

    layer = registered(Turned())(nn.Linear(4, 3))
    parametrize.remove_parametrizations(layer, "weight")
    assert layer.weight.stride() == (1, 3)


def test_keys_order_and_kinds_are_those_of_the_plain_model():
    model, plain = everything(), nn.Sequential(*everything())
    bake(model)
    plain = nn.Sequential(*(nn.Linear(layer.in_features, layer.out_features) for layer in model))
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert not list(model.buffers())


# --- rounding -----------------------------------------------------------------------------------------------------


def test_nothing_is_rounded_unless_asked():
    model = nn.Sequential(parametrizations.orthogonal(nn.Linear(4, 4)).double())
    (row,) = report = bake(model)
    assert model[0].weight.dtype is torch.float64
    assert row.rounding == 0
    assert "rounding" not in str(report)


def test_rounding_is_reported():
    layer = parametrizations.weight_norm(nn.Linear(4, 4))
    value = layer.weight.detach()
    (row,) = report = bake(layer, dtype=torch.bfloat16)
    assert layer.weight.dtype is torch.bfloat16
    expected = (layer.weight.double() - value.double()).abs().max() / value.abs().max()
    assert row.rounding == pytest.approx(expected.item(), rel=1e-6)
    assert 0 < row.rounding < 2**-8
    assert "rounding" in str(report).splitlines()[1]
    assert f"{row.rounding:.1e}" in str(report)


def test_values_that_do_not_fit_are_refused():
    layer = registered(Scale(1e6))(nn.Linear(4, 4))
    with pytest.raises(
        ParametrizationError, match=r"^weight: values up to [\d.e+]+ do not fit torch.float16"
    ):
        bake(layer, dtype=torch.float16)
    assert parametrize.is_parametrized(layer)


def test_a_dtype_of_whole_numbers_is_refused():
    with pytest.raises(ParametrizationError, match=r"expected a floating-point dtype, got torch\.int8"):
        bake(LAYERS["weight_norm"][0](), dtype=torch.int8)


# --- loud ---------------------------------------------------------------------------------------------------------


def test_a_bake_that_finds_nothing_warns_at_the_callers_line():
    with pytest.warns(TorchkilnWarning, match="nothing to bake; no tensor of the model") as caught:
        assert not bake(nn.Linear(2, 2))
    assert caught[0].filename == __file__


def test_patterns_that_leave_nothing_warn():
    with pytest.warns(TorchkilnWarning, match="the patterns leave out all 1 computed tensor"):
        bake(LAYERS["weight_norm"][0](), exclude="*")


class Adapter(nn.Module):
    """A low-rank update that is zero until it is trained or loaded."""

    def __init__(self):
        super().__init__()
        self.A, self.B = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.zeros(4, 2))

    def forward(self, W):
        return W + self.B @ self.A


def test_a_bake_that_gives_back_the_base_warns():
    model = nn.Sequential(*(registered(Adapter())(nn.Linear(4, 4)) for _ in range(2)))
    text = r"^bake: every baked value is that of its original, bit for bit \(0\.weight, 1\.weight\)"
    with pytest.warns(TorchkilnWarning, match=text):
        assert len(bake(model)) == 2


def test_one_tensor_that_changes_is_enough():
    model = nn.Sequential(*(registered(Adapter())(nn.Linear(4, 4)) for _ in range(2)))
    with torch.no_grad():
        model[1].parametrizations.weight[0].B.fill_(1)
    assert len(bake(model)) == 2


def test_strict_raises_instead():
    with pytest.raises(NothingToFoldError, match="nothing to restore"):
        restore(nn.Linear(2, 2), strict=True)


def test_a_summary_of_nothing_is_no_reason_to_warn():
    assert not summary(nn.Linear(2, 2))


# --- optimizers ---------------------------------------------------------------------------------------------------


def trained(kind, make):
    model = nn.Sequential(LAYERS[kind][0](), nn.Linear(LAYERS[kind][0]().out_features, 2))
    optimizer = make(model.parameters())
    for _ in range(2):
        step(model, optimizer)
    return model, optimizer


def step(model, optimizer):
    optimizer.zero_grad()
    model(X).square().sum().backward()
    optimizer.step()


MAKE = {
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
    "adamw_fused": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, fused=True),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9),
}


@pytest.mark.parametrize("make", MAKE)
@pytest.mark.parametrize("kind", LAYERS)
def test_optimizers_go_on_with_the_baked_model(kind, make):
    model, optimizer = trained(kind, MAKE[make])
    group = optimizer.param_groups[0]
    bake(model, optimizer=optimizer)
    assert optimizer.param_groups[0] is group
    assert {id(p) for p in group["params"]} == {id(p) for p in model.parameters()}
    # A product of two vectors is the continuation of neither: it starts without state.
    assert set(model.parameters()) - set(optimizer.state) == (
        {model[0].weight} if kind == "rank_one" else set()
    )
    assert set(optimizer.state) <= set(model.parameters())
    before = [p.detach().clone() for p in model.parameters()]
    step(model, optimizer)
    assert not any(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_the_state_is_that_of_the_tensor_with_its_shape():
    model, optimizer = trained("weight_norm_hook", MAKE["adam"])
    expected = optimizer.state[model[0].weight_v]["exp_avg"].clone()
    bake(model, optimizer=optimizer)
    assert torch.equal(optimizer.state[model[0].weight]["exp_avg"], expected)


def test_restore_lets_the_parameters_of_steps_go():
    model, optimizer = trained("parametrized_step", MAKE["adam"])
    restore(model, optimizer=optimizer)
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in model.parameters()}


def test_a_bake_that_fails_leaves_the_optimizer():
    model, optimizer = trained("weight_norm", MAKE["adam"])
    params = list(map(id, optimizer.param_groups[0]["params"]))
    model.append(broken())
    with pytest.raises(ParametrizationError, match="not finite"):
        bake(model, optimizer=optimizer)
    assert list(map(id, optimizer.param_groups[0]["params"])) == params


def test_baking_for_inference_warns_of_no_optimizer():
    model, _ = trained("weight_norm", MAKE["adam"])
    bake(model)
    with torch.no_grad():
        model(X)
