"""State dicts of live models: any spelling loads into any, and is written as asked for."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import utils
from torch.nn.utils import parametrizations as torch_parametrizations
from torch.nn.utils import prune

from torchkiln import (
    CheckpointError,
    ParametrizationError,
    TorchkilnWarning,
    load_state_dict,
    parametrizations,
    parametrize,
    state_dict,
)

from .build import RankOne, Scale, Symmetric, registered
from .spellings import ALL_MATCHED, EXACT, MAKE, OURS, PLACES, SELF_EXPLAINING, layer_of, same, value

SOURCES = pytest.mark.parametrize("source", SELF_EXPLAINING)


# --- the matrix ---------------------------------------------------------------------------------------------------


@SOURCES
@pytest.mark.parametrize("target", MAKE)
@pytest.mark.parametrize("place", PLACES)
def test_every_spelling_loads_into_every_other(source: str, target: str, place: str) -> None:
    giver, taker = PLACES[place](MAKE[source]()), PLACES[place](MAKE[target]())
    state = giver.state_dict()
    before = dict(state)
    assert repr(load_state_dict(taker, state)) == ALL_MATCHED
    torch.testing.assert_close(value(taker), value(giver), **EXACT)
    torch.testing.assert_close(layer_of(taker).bias, layer_of(giver).bias, **EXACT)
    assert all(state[key] is before[key] for key in before)
    assert list(state) == list(before)


@SOURCES
@pytest.mark.parametrize("target", OURS)
@pytest.mark.parametrize("place", PLACES)
def test_a_parametrized_module_loads_every_spelling_itself(source: str, target: str, place: str) -> None:
    giver, taker = PLACES[place](MAKE[source]()), PLACES[place](MAKE[target]())
    kept = {id(parameter) for parameter in taker.parameters()}
    assert repr(taker.load_state_dict(giver.state_dict())) == ALL_MATCHED
    torch.testing.assert_close(value(taker), value(giver), **EXACT)
    assert {id(parameter) for parameter in taker.parameters()} == kept


@pytest.mark.parametrize("target", MAKE)
def test_an_orthogonal_map_is_told(target: str) -> None:
    giver, taker = MAKE["orthogonal"](), MAKE[target]()
    assume = None if target == "orthogonal" else {"weight": "matrix_exp"}
    assert repr(load_state_dict(taker, giver.state_dict(), assume=assume)) == ALL_MATCHED
    torch.testing.assert_close(value(taker), value(giver), **EXACT)


PAIRS = [
    ("legacy_weight_norm", "weight_norm"),
    ("legacy_spectral_norm", "spectral_norm"),
    ("legacy_weight_norm", "torch_weight_norm"),
    ("legacy_spectral_norm", "torch_spectral_norm"),
]


@pytest.mark.parametrize(("one", "other"), PAIRS + [(b, a) for a, b in PAIRS])
def test_between_legacy_and_torch_every_bit_stays(one: str, other: str) -> None:
    giver, taker = MAKE[one](), MAKE[other]()
    load_state_dict(taker, giver.state_dict())
    assert {key.rpartition("_")[2] for key in taker.state_dict()} != {
        key.rpartition("_")[2] for key in giver.state_dict()
    }
    stored = {tuple(tensor.flatten().tolist()) for tensor in giver.state_dict().values()}
    assert {tuple(tensor.flatten().tolist()) for tensor in taker.state_dict().values()} == stored


# --- values -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "constraint"),
    [
        ("spectral_norm", lambda W: torch.linalg.matrix_norm(W, 2) - 1),
        ("torch_spectral_norm", lambda W: torch.linalg.matrix_norm(W, 2) - 1),
        ("legacy_spectral_norm", lambda W: torch.linalg.matrix_norm(W, 2) - 1),
        ("orthogonal", lambda W: W.T @ W - torch.eye(4)),
        ("pruned", lambda W: W[:2, 2:]),
    ],
)
def test_a_projection_is_reported(target: str, constraint: Callable[[Tensor], Tensor]) -> None:
    model = nn.Sequential(MAKE[target]())
    W = torch.randn(4, 4, dtype=torch.float64)
    with pytest.warns(TorchkilnWarning, match=r"0\.weight: .* projection, [\d.e-]+ away") as caught:
        load_state_dict(model, {"0.weight": W, "0.bias": torch.zeros(4)})
    loaded = value(model)
    assert float(constraint(loaded).abs().max()) < 1e-12
    reported = float(str(caught[0].message).split("projection, ")[1].split(" away")[0])
    assert reported == pytest.approx(float((loaded - W).abs().max()), rel=1e-2)


def test_a_slice_of_zeros_has_a_direction_in_weight_norm() -> None:
    W = torch.randn(4, 4, dtype=torch.float64)
    W[1] = 0
    for target in ("weight_norm", "torch_weight_norm", "legacy_weight_norm", "weight_norm_columns"):
        model = MAKE[target]()
        load_state_dict(model, {"weight": W, "bias": torch.zeros(4)})
        torch.testing.assert_close(value(model), W, **EXACT)


def test_another_dim_of_weight_norm_goes_through_the_value() -> None:
    old = utils.weight_norm(nn.ConvTranspose1d(3, 5, 2), dim=1)
    new = parametrizations.weight_norm(nn.ConvTranspose1d(3, 5, 2), dim=2)
    new.load_state_dict(old.state_dict())
    x = torch.randn(1, 3, 7)
    torch.testing.assert_close(new(x), old(x))


@pytest.mark.parametrize("make", [nn.Conv1d, nn.ConvTranspose1d])
def test_the_module_tells_the_dim_that_neither_shapes_nor_values_do(make: type[nn.Module]) -> None:
    giver, taker = torch_parametrizations.spectral_norm(make(4, 4, 1)).eval(), make(4, 4, 1)
    state = giver.state_dict()
    for name in ("_u", "_v"):  # random vectors, as before the first step of power iteration
        state[f"parametrizations.weight.0.{name}"] = nn.functional.normalize(torch.randn(4), dim=0)
    load_state_dict(giver, state)
    load_state_dict(taker, state)
    torch.testing.assert_close(taker.weight.detach(), giver.weight.detach())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("target", ["weight_norm", "spectral_norm", "legacy_weight_norm"])
def test_low_precision_rounds_once(dtype: torch.dtype, target: str) -> None:
    giver, taker = MAKE["legacy_weight_norm"](), MAKE[target]().to(dtype)
    expected = value(giver)
    load_state_dict(taker, giver.state_dict())
    got = state_dict(taker, spelling="plain")["weight"]
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=2 * torch.finfo(dtype).eps)


def test_a_wider_module_keeps_what_folding_a_narrow_file_gives() -> None:
    giver, taker = MAKE["weight_norm"]().bfloat16(), MAKE["plain"]()
    with torch.no_grad():  # a gain that is no power of two, so that the product has more bits
        giver.parametrizations.weight.original0.mul_(1.7)
    load_state_dict(taker, giver.state_dict())
    assert not torch.equal(taker.weight, taker.weight.bfloat16().double())
    torch.testing.assert_close(taker.weight.float(), giver.weight.float(), rtol=1e-2, atol=1e-2)


def test_complex_tensors() -> None:
    W = torch.linalg.qr(torch.randn(4, 4, dtype=torch.complex128))[0]
    for norm in (parametrizations.orthogonal, parametrizations.spectral_norm):
        layer = norm(nn.Linear(4, 4, dtype=torch.complex128)).eval()
        layer.load_state_dict({"weight": W, "bias": layer.bias.detach()})
        torch.testing.assert_close(layer.weight, W, **EXACT)


# --- modules ------------------------------------------------------------------------------------------------------


def test_tensors_of_recurrent_layers() -> None:
    old, new = nn.LSTM(3, 4), nn.LSTM(3, 4)
    for name in ("weight_ih_l0", "weight_hh_l0"):
        utils.weight_norm(old, name)
        parametrizations.weight_norm(new, name)
    x = torch.randn(5, 1, 3)
    new.load_state_dict(old.state_dict())
    torch.testing.assert_close(new(x)[0], old(x)[0])
    plain = nn.LSTM(3, 4)
    assert list(state_dict(old, spelling="plain")) == list(plain.state_dict())
    assert list(state_dict(new, spelling="plain")) == list(plain.state_dict())
    plain.load_state_dict(state_dict(new, spelling="plain"))
    torch.testing.assert_close(plain(x)[0], old(x)[0])


def test_only_one_of_two_tensors_is_parametrized() -> None:
    old = utils.weight_norm(utils.weight_norm(nn.LSTMCell(3, 4), "weight_ih"), "weight_hh")
    new = parametrizations.weight_norm(nn.LSTMCell(3, 4), "weight_ih")
    new.load_state_dict(old.state_dict())  # weight_hh becomes plain
    x = torch.randn(1, 3)
    torch.testing.assert_close(new(x)[0], old(x)[0])


def test_a_chain_of_two_norms() -> None:
    new = parametrizations.spectral_norm(parametrizations.weight_norm(MAKE["plain"]()))
    giver = MAKE["legacy_spectral_norm"]()
    new.load_state_dict(giver.state_dict())
    torch.testing.assert_close(value(new), value(giver), **EXACT)


def test_nested_parametrizations() -> None:
    new = registered(Scale())(MAKE["plain"]())
    parametrizations.weight_norm(new.parametrizations.weight, "original")
    Scale.right_inverse = lambda self, X: X / self.factor
    try:
        giver = MAKE["legacy_weight_norm"]()
        new.load_state_dict(giver.state_dict())
    finally:
        del Scale.right_inverse
    torch.testing.assert_close(value(new), value(giver), **EXACT)


def test_a_pruned_direction() -> None:
    def make() -> nn.Module:
        layer = utils.weight_norm(MAKE["plain"]())
        return prune.custom_from_mask(layer, "weight_v", layer.weight_v != 0)

    giver = make()
    assert set(giver.state_dict()) == {"bias", "weight_g", "weight_v_orig", "weight_v_mask"}
    for taker in (MAKE["weight_norm"](), MAKE["plain"](), MAKE["legacy_weight_norm"](), make()):
        load_state_dict(taker, giver.state_dict())
        value(
            taker
        )  # the hook of the norm runs before that of the mask, which prepares the next forward pass
        torch.testing.assert_close(value(taker), value(giver), **EXACT)
    taker, other = make(), MAKE["torch_weight_norm"]()
    load_state_dict(taker, other.state_dict())
    value(taker)
    torch.testing.assert_close(value(taker), value(other), **EXACT)


def test_layers_that_are_not_initialized_yet() -> None:
    def make(norm: str) -> nn.Module:
        return nn.Sequential(nn.LazyLinear(4), MAKE[norm]())

    giver, taker = make("legacy_weight_norm"), make("weight_norm")
    for state in (giver.state_dict(), nn.Sequential(nn.Linear(3, 4), MAKE["plain"]()).state_dict()):
        assert repr(load_state_dict(taker, state)) == ALL_MATCHED
    assert taker[0].weight.shape == (4, 3)


def test_integers_go_through_a_chain() -> None:
    class Half(nn.Module):
        def forward(self, X: Tensor) -> Tensor:
            return X // 2

        def right_inverse(self, X: Tensor) -> Tensor:
            return X * 2

    layer = nn.Module()
    layer.register_buffer("steps", torch.zeros(3, dtype=torch.long))
    parametrize.register_parametrization(layer, "steps", Half())
    layer.load_state_dict({"steps": torch.arange(3)})
    assert torch.equal(layer.steps + 0, torch.arange(3))


def test_a_module_that_is_used_twice() -> None:
    def make(layer: nn.Module) -> nn.Module:
        return nn.ModuleDict({"a": layer, "b": layer})

    giver, taker = make(MAKE["legacy_weight_norm"]()), make(MAKE["weight_norm"]())
    assert repr(taker.load_state_dict(giver.state_dict())) == ALL_MATCHED
    for spelling in ("plain", "legacy", "torch"):
        state = state_dict(taker, spelling=spelling)
        assert [key[2:] for key in state if key[0] == "a"] == [key[2:] for key in state if key[0] == "b"]
    plain = state_dict(taker, spelling="plain")
    assert plain["a.weight"] is plain["b.weight"]


def test_tied_originals_stay_tied_in_the_plain_spelling() -> None:
    a, b = MAKE["weight_norm"](), MAKE["weight_norm"]()
    for name in ("original0", "original1"):
        setattr(b.parametrizations.weight, name, getattr(a.parametrizations.weight, name))
    state = state_dict(nn.Sequential(a, b), spelling="plain")
    assert state["0.weight"] is state["1.weight"]


def test_plain_tensors_with_the_names_of_parts_are_data() -> None:
    class Gates(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 2))
            self.weight_g, self.weight_v = nn.Parameter(torch.randn(3, 1)), nn.Parameter(torch.randn(3, 2))

    giver, taker = Gates(), parametrizations.weight_norm(Gates())
    assert repr(taker.load_state_dict(giver.state_dict())) == ALL_MATCHED
    torch.testing.assert_close(taker.weight.detach(), giver.weight.detach())
    assert torch.equal(taker.weight_v, giver.weight_v)


def test_a_hook_of_the_user_that_renames_keys_comes_first() -> None:
    def rename(state: dict[str, Tensor], prefix: str, *_: object) -> None:
        state[f"{prefix}weight"] = state.pop(f"{prefix}w")

    layer = MAKE["weight_norm"]()
    layer._register_load_state_dict_pre_hook(rename)
    giver = MAKE["plain"]()
    layer.load_state_dict({"w": giver.weight.detach(), "bias": giver.bias.detach()})
    torch.testing.assert_close(value(layer), value(giver), **EXACT)


def test_steps_that_keep_state_of_their_own_keep_it() -> None:
    class Shift(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.by = nn.Parameter(torch.ones(()))

        def forward(self, X: Tensor) -> Tensor:
            return X + self.by

        def right_inverse(self, X: Tensor) -> Tensor:
            return X - self.by

    layer = parametrize.register_parametrization(MAKE["plain"](), "weight", Shift())
    giver = MAKE["legacy_weight_norm"]()
    assert repr(layer.load_state_dict(giver.state_dict())) == ALL_MATCHED
    torch.testing.assert_close(value(layer), value(giver), **EXACT)


# --- assign and meta ----------------------------------------------------------------------------------------------


@SOURCES
@pytest.mark.parametrize("target", ["plain", *OURS])
def test_assigning_to_a_model_without_data(source: str, target: str) -> None:
    giver, taker = MAKE[source](), MAKE[target]().to("meta")
    assert repr(load_state_dict(taker, giver.state_dict(), assign=True)) == ALL_MATCHED
    torch.testing.assert_close(value(taker), value(giver), **EXACT)
    assert all(isinstance(parameter, nn.Parameter) for parameter in taker.parameters())


def test_assigning_takes_the_dtype_of_the_state_dict() -> None:
    layer = parametrizations.weight_norm(nn.Linear(4, 4))
    layer.load_state_dict(MAKE["plain"]().state_dict(), assign=True)
    assert {tensor.dtype for tensor in layer.state_dict().values()} == {torch.float64}


def test_state_that_a_plain_value_does_not_tell_is_missing_in_a_model_without_data() -> None:
    layer = pruned = MAKE["pruned"]().to("meta")
    with pytest.raises(RuntimeError, match=r'Missing key.*"weight_mask"'):
        load_state_dict(layer, MAKE["plain"]().state_dict(), assign=True)
    assert pruned.weight_mask.is_meta


def test_a_model_that_was_emptied() -> None:
    with torch.device("meta"):
        layer = parametrizations.orthogonal(nn.Linear(4, 4, dtype=torch.float64), orthogonal_map="cayley")
    layer.to_empty(device="cpu")
    giver = MAKE["legacy_weight_norm"]()
    layer.load_state_dict(giver.state_dict())
    torch.testing.assert_close(value(layer), value(giver), **EXACT)


# --- refusals -----------------------------------------------------------------------------------------------------


def test_shapes_that_do_not_fit_name_the_tensor() -> None:
    state = nn.Linear(3, 5).state_dict()
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 5)))
    with pytest.raises(
        RuntimeError, match=r"0\.weight: the state dict has it with shape \(5, 3\), .*\(5, 4\)"
    ):
        model.load_state_dict({f"0.{key}": tensor for key, tensor in state.items()})
    with pytest.raises(ParametrizationError, match=r"0\.weight: the state dict has it with shape \(5, 3\)"):
        load_state_dict(model, {f"0.{key}": tensor for key, tensor in state.items()})


def test_a_value_without_a_norm_is_refused() -> None:
    layer = torch.nn.utils.parametrizations.spectral_norm(MAKE["plain"]())
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ParametrizationError, match="weight: its parametrization cannot be that value"):
        load_state_dict(layer, {"weight": torch.zeros(4, 4), "bias": torch.zeros(4)})
    assert same(layer.state_dict(), before)


def test_a_value_that_has_no_singular_vectors_is_refused_by_name() -> None:
    layer = MAKE["spectral_norm"]()
    with pytest.raises(ParametrizationError, match="weight: its spectral norm cannot be computed"):
        load_state_dict(layer, {"weight": torch.full((4, 4), torch.inf), "bias": torch.zeros(4)})


@pytest.mark.parametrize("norm", ["spectral_norm", "weight_norm"])
def test_zeros_are_loaded_as_zeros(norm: str) -> None:
    layer = MAKE[norm]()
    load_state_dict(layer, {"weight": torch.zeros(4, 4), "bias": torch.zeros(4)})
    assert layer.weight.eq(0).all()


def test_a_step_without_an_inverse() -> None:
    layer = registered(Symmetric())(MAKE["plain"]())
    state = MAKE["plain"]().state_dict()
    with pytest.raises(ParametrizationError, match="weight: Symmetric has no right_inverse"):
        load_state_dict(layer, state)
    with pytest.warns(TorchkilnWarning, match="weight: Symmetric has no right_inverse"):
        result = layer.load_state_dict(state, strict=False)
    assert result.unexpected_keys == ["weight"]
    assert result.missing_keys == ["parametrizations.weight.original"]


def test_a_right_inverse_that_says_so_when_called() -> None:
    layer = parametrizations.orthogonal(nn.Linear(4, 4), orthogonal_map="cayley", use_trivialization=False)
    with pytest.raises(ParametrizationError, match="weight: a step has no right_inverse"):
        load_state_dict(layer, nn.Linear(4, 4).state_dict())


def test_a_right_inverse_that_fails_names_tensor_and_cause() -> None:
    class Picky(RankOne):
        def right_inverse(self, Z: Tensor) -> tuple[Tensor, Tensor]:
            if not Z.any():
                raise ArithmeticError("all zero")
            return super().right_inverse(Z)

    layer = registered(Picky())(nn.Linear(4, 4))
    with pytest.raises(
        RuntimeError, match="weight: its parametrization refuses the value: ArithmeticError: all zero"
    ):
        layer.load_state_dict({"weight": torch.zeros(4, 4), "bias": torch.zeros(4)})


def test_an_unknown_parametrization_is_refused_or_left_out() -> None:
    giver, taker = MAKE["orthogonal"](), MAKE["plain"]()
    with pytest.raises(ParametrizationError, match="which orthogonal map made weight is not in the file"):
        load_state_dict(taker, giver.state_dict())
    before = taker.weight.detach().clone()
    with pytest.warns(TorchkilnWarning, match=r"which orthogonal map(?s:.*)It is not loaded"):
        result = load_state_dict(taker, giver.state_dict(), strict=False)
    assert result.missing_keys == ["weight"]
    assert torch.equal(taker.weight, before)


def test_an_option_without_use_is_refused() -> None:
    with pytest.raises(CheckpointError, match='assume: "head" is of no use'):
        load_state_dict(MAKE["plain"](), MAKE["plain"]().state_dict(), assume={"head": "cayley"})


def test_two_spellings_of_one_tensor_are_not_chosen_between() -> None:
    state = {**MAKE["plain"]().state_dict(), **MAKE["legacy_weight_norm"]().state_dict()}
    with pytest.raises(ParametrizationError, match="weight is in the file as well as weight_g"):
        load_state_dict(MAKE["weight_norm"](), state)


def test_averaged_vectors_are_reported() -> None:
    giver = MAKE["legacy_spectral_norm"]()
    giver.weight_u *= 0.9
    with pytest.warns(TorchkilnWarning, match=r"weight_u: length 0\.9 instead of 1"):
        load_state_dict(MAKE["plain"](), giver.state_dict())


def test_missing_and_unexpected_keys_are_torchs() -> None:
    layer = nn.Sequential(MAKE["weight_norm"]())
    state = {**nn.Sequential(MAKE["plain"]()).state_dict(), "0.extra": torch.ones(1)}
    del state["0.bias"]
    result = layer.load_state_dict(state, strict=False)
    assert (result.missing_keys, result.unexpected_keys) == (["0.bias"], ["0.extra"])


# --- what it leaves on modules ------------------------------------------------------------------------------------


def test_nothing_is_kept_on_the_module() -> None:
    layer = MAKE["weight_norm"]()
    assert not layer._load_state_dict_pre_hooks
    layer.load_state_dict(MAKE["plain"]().state_dict())
    assert not layer._load_state_dict_pre_hooks
    with pytest.raises(RuntimeError):
        layer.load_state_dict({})
    assert not layer._load_state_dict_pre_hooks
    parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) is nn.Linear
    with pytest.raises(RuntimeError, match="Missing key"):
        layer.load_state_dict(MAKE["legacy_weight_norm"]().state_dict())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_load_every_spelling_too(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    original = MAKE["weight_norm"]()
    layer, giver = duplicate(original), MAKE["legacy_weight_norm"]()
    before = value(original)
    layer.load_state_dict(giver.state_dict())
    torch.testing.assert_close(value(layer), value(giver), **EXACT)
    assert torch.equal(value(original), before)
