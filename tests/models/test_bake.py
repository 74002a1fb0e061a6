"""bake: every kind of computed tensor becomes the plain tensor that eval mode used, and leaves no trace."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import utils
from torch.nn.utils import parametrizations as torch_parametrizations
from torch.nn.utils import prune

from torchkiln import parametrizations, parametrize
from torchkiln._core.errors import NothingToFoldError, ParametrizationError, TorchkilnWarning
from torchkiln.models import bake, summary

from .build import LAYERS, Noisy, Symmetric, evaluated, everything, registered

SEVERAL = {kind for kind in LAYERS if "weight_norm" in kind or "direction" in kind or kind == "rank_one"}

each_layer = pytest.mark.parametrize("kind", LAYERS)
each_mode = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def layer_of(kind: str) -> nn.Module:
    """A layer after a few steps of training, so that nothing is at its initial value."""
    layer = LAYERS[kind][0]()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05)
    for _ in range(2):
        optimizer.zero_grad()
        layer(torch.randn(3, 4)).square().sum().backward()
        optimizer.step()
    return layer


@each_layer
@each_mode
def test_eval_outputs_stay_bit_for_bit(kind, training):
    layer, x = layer_of(kind), torch.randn(5, 4)
    layer.train(training)
    evaluated(layer, x)  # a hook inside a hook is one forward pass behind
    before = evaluated(layer, x)
    assert bake(layer)
    assert torch.equal(evaluated(layer, x), before)
    assert all(module.training is training for module in layer.modules())


@each_layer
def test_the_module_is_as_if_it_never_had_a_norm(kind):
    layer = layer_of(kind)
    bake(layer)
    plain = nn.Linear(4, layer.out_features)
    assert type(layer) is nn.Linear
    assert list(layer.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]
    assert sorted(vars(layer)) == sorted(vars(plain))
    assert not layer._forward_pre_hooks
    assert not layer._state_dict_hooks
    assert not layer._load_state_dict_pre_hooks
    assert type(layer.weight) is nn.Parameter
    assert layer.weight.requires_grad
    assert layer.weight.is_leaf
    plain.load_state_dict(layer.state_dict())


@each_layer
# torch's orthogonal lays a wide matrix out by columns, and the baked weight keeps the layout, for equal products.
@pytest.mark.filterwarnings("ignore:grad and param do not obey the gradient layout contract")
def test_a_baked_layer_copies_pickles_and_trains(kind):
    layer, x = layer_of(kind), torch.randn(5, 4)
    bake(layer)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert torch.equal(loaded(x), layer(x))
    before = copy.deepcopy(layer).weight
    layer(x).sum().backward()
    torch.optim.SGD(layer.parameters(), lr=0.1).step()
    assert not torch.equal(layer.weight, before)


@each_layer
def test_the_row_says_what_was_there(kind):
    layer = LAYERS[kind][0]()
    keys = [key for key in layer.state_dict() if key != "bias"]
    (row,) = bake(layer)
    assert (row.path, row.what, row.api) == ("weight", LAYERS[kind][1], LAYERS[kind][2])
    assert row.shape == tuple(layer.weight.shape)
    assert sorted(row.keys) == sorted(keys)


@each_layer
def test_one_original_stays_the_same_parameter(kind):
    layer = layer_of(kind)
    stored = ("original", "original_orig", "weight_orig")
    originals = (
        [] if kind in SEVERAL else [p for name, p in layer.named_parameters() if name.endswith(stored)]
    )
    bake(layer)
    assert len(originals) == (kind not in SEVERAL)
    assert all(layer.weight is original for original in originals)


def test_one_call_folds_a_model_of_everything():
    model, x = everything(), torch.randn(5, 4)
    evaluated(model, x)
    before = evaluated(model, x)
    report = bake(model)
    assert len(report) == len(LAYERS)
    assert [row.what for row in report] == [what for _, what, _ in LAYERS.values()]
    assert torch.equal(evaluated(model, x), before)
    assert all(key.split(".")[1:] in (["weight"], ["bias"]) for key in model.state_dict())
    assert not summary(model)


def test_no_random_number_is_drawn():
    model = everything()
    state = torch.get_rng_state()
    bake(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_step_that_draws_numbers_in_eval_mode_does_not_move_the_generator():
    class Dither(nn.Module):
        def forward(self, X):
            return X + torch.rand_like(X)

    layer = registered(Dither())(nn.Linear(4, 4))
    state = torch.get_rng_state()
    bake(layer)
    assert torch.equal(torch.get_rng_state(), state)


def test_no_power_iteration_runs_for_tensors_that_stay():
    model = nn.ModuleDict({"a": parametrizations.spectral_norm(nn.Linear(4, 4)), "b": nn.Linear(4, 4)})
    # One step for two tensors: baking the one must not move the other's vectors.
    parametrize.register_parametrization(model["b"], "weight", model["a"].parametrizations.weight[0])
    before = {key: value.clone() for key, value in model["b"].state_dict().items()}
    bake(model, "a.weight")
    assert all(torch.equal(value, before[key]) for key, value in model["b"].state_dict().items())


@pytest.mark.parametrize("norm", [parametrizations.spectral_norm, torch_parametrizations.spectral_norm])
def test_spectral_norm_in_training_mode_bakes_the_value_of_eval_mode(norm):
    layer = norm(nn.Linear(4, 4))
    layer.eval()
    expected = layer.weight.detach()
    layer.train()
    bake(layer)
    assert torch.equal(layer.weight, expected)


def test_weights_random_in_training_bake_to_their_eval_value():
    layer = registered(Noisy())(nn.Linear(4, 4))
    original = layer.parametrizations.weight.original.detach().clone()
    bake(layer)
    assert torch.equal(layer.weight, original * 3)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_baked_tensors_can_train_wherever_the_call_was_made(context):
    model = everything()
    with context():
        bake(model)
    model(torch.randn(2, 4)).sum().backward()
    assert all(p.requires_grad and p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("requires_grad", [True, False])
@each_layer
def test_requires_grad_is_kept(kind, requires_grad):
    layer = LAYERS[kind][0]().requires_grad_(requires_grad)
    bake(layer)
    assert isinstance(layer.weight, nn.Parameter)
    assert layer.weight.requires_grad is requires_grad


@pytest.mark.parametrize("persistent", [True, False])
def test_a_buffer_stays_a_buffer(persistent):
    module = nn.Module()
    module.register_buffer("state", torch.randn(3, 3), persistent=persistent)
    parametrize.register_parametrization(module, "state", Symmetric())
    expected = module.state.clone()
    bake(module)
    assert list(module._buffers) == ["state"]
    assert list(module.state_dict()) == (["state"] if persistent else [])
    assert torch.equal(module.state, expected)


def test_several_tensors_and_any_name_in_one_module():
    module = nn.Bilinear(3, 3, 3)
    parametrizations.weight_norm(module, "weight", dim=2)
    registered(Noisy(), name="bias")(module)
    assert [row.path for row in bake(module)] == ["weight", "bias"]
    assert list(module.state_dict()) == ["weight", "bias"]


def test_the_order_of_a_torch_layer_returns_whatever_was_normed_first():
    layer = nn.Linear(3, 3)
    prune.identity(layer, "bias")
    utils.weight_norm(layer)
    bake(layer)
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]


def test_a_custom_module_keeps_the_order_that_it_has():
    class BiasFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(3))
            self.weight = nn.Parameter(torch.randn(3, 3))

    module = parametrizations.weight_norm(BiasFirst())
    bake(module)
    assert [name for name, _ in module.named_parameters()] == ["bias", "weight"]


# --- recurrent layers ---------------------------------------------------------------------------------------------


RNN_NORMS = {
    "weight_norm": parametrizations.weight_norm,
    "torch_spectral_norm": torch_parametrizations.spectral_norm,
    "hook": utils.weight_norm,
    "spectral_hook": utils.spectral_norm,
}


@pytest.mark.parametrize("norm", RNN_NORMS)
@pytest.mark.parametrize("make", [nn.RNN, nn.LSTM, nn.GRU])
@pytest.mark.filterwarnings("ignore:.*weights are not part of single contiguous chunk:UserWarning")
def test_recurrent_layers(make, norm):
    rnn, x = make(3, 4, bidirectional=True), torch.randn(5, 2, 3)
    plain = [name for name, _ in rnn.named_parameters()]
    for name in ("weight_hh_l0", "weight_ih_l0_reverse"):
        RNN_NORMS[norm](rnn, name)
    rnn.eval()
    rnn(x)
    before = rnn(x)[0].detach()
    bake(rnn)
    assert [name for name, _ in rnn.named_parameters()] == plain
    assert all(
        flat is getattr(rnn, name)
        for flat, name in zip(rnn._flat_weights, rnn._flat_weights_names, strict=True)
    )
    assert torch.equal(rnn(x)[0], before)
    rnn(x)[0].sum().backward()
    assert all(p.grad is not None for p in rnn.parameters())


# --- shared modules and tied tensors ------------------------------------------------------------------------------


def test_a_shared_module_is_baked_once_and_found_by_each_path():
    layer = parametrizations.weight_norm(nn.Linear(4, 4))
    model = nn.ModuleDict({"a": layer, "b": nn.Sequential(layer)})
    assert [row.path for row in bake(model, "b.0.weight")] == ["a.weight"]
    assert model["a"] is model["b"][0]


def test_a_cycle_of_modules_ends():
    model = nn.Module()
    model.child = parametrizations.weight_norm(nn.Linear(2, 2))
    model.child.owner = model
    assert [row.path for row in bake(model)] == ["child.weight"]


def test_a_plain_parameter_tied_to_an_original_keeps_its_value():
    embedding = nn.Embedding(4, 4)
    head = registered(Symmetric())(nn.Linear(4, 4, bias=False))
    embedding.weight = head.parametrizations.weight.original
    model = nn.ModuleDict({"embedding": embedding, "head": head})
    plain, computed = embedding.weight.detach().clone(), head.weight.detach()
    bake(model)
    assert torch.equal(embedding.weight, plain)
    assert torch.equal(head.weight, computed)
    assert head.weight is not embedding.weight


def test_a_tie_with_equal_values_stays():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    prune.identity(first, "weight")
    with pytest.warns(
        TorchkilnWarning, match=r"every baked value is that of its original, bit for bit \(0\.weight\)"
    ):
        bake(model := nn.ModuleList([first, second]))
    assert first.weight is second.weight
    assert len(list(model.parameters())) == 3


@pytest.mark.parametrize("norm", [registered(Symmetric()), parametrizations.weight_norm, utils.weight_norm])
def test_tensors_with_the_same_originals_share_one_parameter(norm):
    first = norm(nn.Linear(4, 4))
    second = norm(nn.Linear(4, 4))
    for module, twin in zip(first.modules(), second.modules(), strict=True):
        twin._parameters.update(module._parameters)
    bake(nn.ModuleList([first, second]))
    assert first.weight is second.weight


def test_the_same_original_with_different_values_becomes_two_parameters():
    first, second = registered(Symmetric())(nn.Linear(4, 4)), registered(Noisy())(nn.Linear(4, 4))
    second.parametrizations.weight.original = first.parametrizations.weight.original
    model = nn.ModuleList([first, second])
    expected = [layer.weight.detach() for layer in model.eval()]
    bake(model)
    assert first.weight is not second.weight
    assert [torch.equal(layer.weight, value) for layer, value in zip(model, expected, strict=True)] == [
        True,
        True,
    ]


def test_an_original_that_another_chain_still_uses_keeps_its_value():
    first, second = registered(Symmetric())(nn.Linear(4, 4)), registered(Symmetric())(nn.Linear(4, 4))
    second.parametrizations.weight.original = first.parametrizations.weight.original
    model = nn.ModuleDict({"first": first, "second": second})
    expected = second.weight.detach()
    bake(model, "first.weight")
    assert torch.equal(second.weight, expected)
    assert parametrize.is_parametrized(second)


def test_a_value_that_a_step_keeps_is_copied():
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.value = torch.ones(8, 8)

        def forward(self, X):
            return X * 0 + 1 if self.training else self.value[:4, :4]

    step = Constant()
    layer = registered(step)(nn.Linear(4, 4))
    bake(layer)
    with torch.no_grad():
        layer.weight.zero_()
    assert step.value.sum() == 64
    assert layer.weight.untyped_storage().nbytes() == 4 * 4 * 4


# --- patterns -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        (None, None, ["0.weight", "1.weight", "2.weight"]),
        ("1.*", None, ["1.weight"]),
        (["0.*", "2.weight"], None, ["0.weight", "2.weight"]),
        (None, "1.weight", ["0.weight", "2.weight"]),
        ("*.weight", ["0.*", "1.*"], ["2.weight"]),
    ],
)
def test_patterns_select(include, exclude, expected):
    model = nn.Sequential(*(parametrizations.weight_norm(nn.Linear(2, 2)) for _ in range(3)))
    report = bake(model, include, exclude=exclude)
    assert [row.path for row in report] == expected
    assert report.left == 3 - len(expected)
    assert [not parametrize.is_parametrized(layer) for layer in model] == [
        f"{i}.weight" in expected for i in range(3)
    ]


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_warns(argument):
    model = nn.Sequential(*(parametrizations.weight_norm(nn.Linear(2, 2)) for _ in range(2)))
    with pytest.warns(TorchkilnWarning, match=r"the pattern '9\.weight' matches no computed tensor"):
        bake(model, **{argument: ["9.weight", "0.weight"]})


def test_strict_raises_where_there_is_nothing_to_bake():
    with pytest.raises(NothingToFoldError, match="nothing to bake; no tensor of the model is parametrized"):
        bake(nn.Linear(2, 2), strict=True)


def test_strict_says_that_the_patterns_left_all_out():
    layer = parametrizations.weight_norm(nn.Linear(2, 2))
    with pytest.raises(NothingToFoldError, match="the patterns leave out all 1 computed tensor"):
        bake(layer, exclude="*", strict=True)


def test_nothing_is_printed(capsys):
    bake(everything())
    assert capsys.readouterr() == ("", "")


def test_a_modules_own_attribute_named_parametrizations_is_left_alone():
    model = nn.Module()
    model.parametrizations = nn.ModuleDict({"weight": parametrizations.weight_norm(nn.Linear(2, 2))})
    assert [row.path for row in bake(model)] == ["parametrizations.weight.weight"]


@pytest.mark.parametrize("kind", ["weight_norm", "weight_norm_hook", "l1"])
def test_a_model_on_the_meta_device_bakes(kind):
    layer = LAYERS[kind][0]().to("meta")
    assert bake(layer)
    assert layer.weight.is_meta
    assert list(layer.state_dict()) == ["weight", "bias"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_dtype_stays(dtype):
    layer = parametrizations.orthogonal(nn.Linear(4, 3).to(dtype))
    expected = layer.weight.detach()
    bake(layer)
    assert layer.weight.dtype is dtype
    assert torch.equal(layer.weight, expected)


def test_integer_values_bake_to_a_parameter_without_grad():
    class Rounded(nn.Module):
        def forward(self, X):
            return X.round().to(torch.int8)

    layer = registered(Rounded())(nn.Linear(4, 4))
    bake(layer)
    assert layer.weight.dtype is torch.int8
    assert not layer.weight.requires_grad


def test_summary_after_bake_is_empty():
    model = everything()
    bake(model)
    assert not summary(model)


def test_a_row_that_is_not_finite_is_refused_with_its_name():
    model = nn.Sequential(nn.Linear(2, 2), parametrizations.weight_norm(nn.Linear(4, 4)))
    with torch.no_grad():
        model[1].parametrizations.weight.original1[2, 0] = torch.nan
    with pytest.raises(
        ParametrizationError, match=r"1\.weight: 4 of 16 values computed by weight_norm are not finite"
    ):
        bake(model)
    assert parametrize.is_parametrized(model[1])


def test_a_zero_row_is_baked_as_zeros():
    model = nn.Sequential(nn.Linear(2, 2), parametrizations.weight_norm(nn.Linear(4, 4)))
    with torch.no_grad():
        model[1].parametrizations.weight.original1[2] = 0
    bake(model)
    assert model[1].weight[2].eq(0).all()
    assert not model[1].weight[3].eq(0).any()


def test_a_zero_row_that_torch_parametrized_is_refused_with_its_name():
    model = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    with torch.no_grad():
        model[0].parametrizations.weight.original1[2] = 0
    with pytest.raises(
        ParametrizationError, match=r"0\.weight: 4 of 16 values computed by weight_norm are not finite"
    ):
        bake(model)
