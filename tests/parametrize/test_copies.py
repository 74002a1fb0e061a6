"""Copies, pickles and saved models are parametrized and independent of what they were made from."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import torch
from torch import nn

from .oracle import Impl, anatomy, beyond_torch, snapshot
from .steps import (
    Based,
    Concrete,
    Gain,
    Halves,
    Noisy,
    Pair,
    Scale,
    Shift,
    WithDeepcopy,
    WithGetattr,
    WithMetaclass,
    WithProperty,
    WithSlots,
    linear,
)

STEPS = [Scale, Shift, Halves, Gain, Based, Noisy]


def layer_with(impl: Impl, *steps: nn.Module) -> nn.Linear:
    """A layer with ``steps`` on its weight."""
    layer = linear()
    for step in steps:
        impl.P.register_parametrization(layer, "weight", step)
    return layer


def remove(impl: Impl, layer: nn.Module) -> None:
    impl.P.remove_parametrizations(layer, "weight")


def register_more(impl: Impl, layer: nn.Module) -> None:
    impl.P.register_parametrization(layer, "weight", Scale(3.0))


def register_another(impl: Impl, layer: nn.Module) -> None:
    impl.P.register_parametrization(layer, "bias", Scale(3.0))


def assign(impl: Impl, layer: nn.Module) -> None:
    layer.weight = torch.ones(3, 4, dtype=torch.float64)


def train(impl: Impl, layer: nn.Module) -> None:
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(torch.ones(2, 4, dtype=torch.float64)).sum().backward()
    optimizer.step()


def restore(impl: Impl, layer: nn.Module) -> None:
    impl.P.remove_parametrizations(layer, "weight", leave_parametrized=False)


SHARED_CLASS = [remove, register_another, restore]
CHANGES = [register_more, assign, train]


@pytest.mark.parametrize("step", STEPS)
def test_deepcopy_is_equal(impl: Impl, step: type[nn.Module]) -> None:
    layer = layer_with(impl, step())
    replica = copy.deepcopy(layer)
    assert snapshot(replica) == snapshot(layer)
    assert impl.P.is_parametrized(replica, "weight")
    assert {id(tensor) for tensor in replica.parameters()}.isdisjoint(map(id, layer.parameters()))
    torch.manual_seed(1)
    expected = layer.weight
    torch.manual_seed(1)
    assert torch.equal(replica.weight, expected)


@pytest.mark.parametrize("turned", [False, True], ids=["copy changes", "source changes"])
@pytest.mark.parametrize("change", CHANGES)
def test_copies_are_independent(impl: Impl, change: Callable[[Impl, nn.Module], None], turned: bool) -> None:
    layers = [layer_with(impl, Scale())]
    layers.append(copy.deepcopy(layers[0]))
    changed, kept = reversed(layers) if turned else layers
    before, value = anatomy(kept), kept.weight
    change(impl, changed)
    assert anatomy(kept) == before
    assert torch.equal(kept.weight, value)
    assert not torch.equal(changed.weight, value)


@pytest.mark.parametrize("turned", [False, True], ids=["copy changes", "source changes"])
@pytest.mark.parametrize("change", SHARED_CLASS)
@beyond_torch("torch changes the class that both share", raises=(AssertionError, AttributeError, KeyError))
def test_copies_are_independent_of_the_class(
    impl: Impl, change: Callable[[Impl, nn.Module], None], turned: bool
) -> None:
    layers = [layer_with(impl, Scale())]
    layers.append(copy.deepcopy(layers[0]))
    changed, kept = reversed(layers) if turned else layers
    before, value, bias = anatomy(kept), kept.weight, kept.bias
    change(impl, changed)
    assert anatomy(kept) == before
    assert torch.equal(kept.weight, value)
    assert kept.bias is bias
    for other in (register_more, train, remove):
        other(impl, kept)
    assert type(kept) is nn.Linear


@beyond_torch("torch makes a class for each module")
@pytest.mark.parametrize("module_class", [nn.Linear, WithSlots, Concrete, WithMetaclass])
def test_equal_layers_share_their_class(impl: Impl, module_class: type[nn.Module]) -> None:
    layers = [module_class(4, 3) if issubclass(module_class, nn.Linear) else module_class() for _ in range(3)]
    for layer in layers:
        impl.P.register_parametrization(layer, "weight", Scale())
    assert len({type(layer) for layer in layers}) == 1
    assert type(copy.deepcopy(layers[0])) is type(layers[0])


@beyond_torch("torch makes a class for each module")
def test_the_class_depends_on_the_names_and_not_on_their_order(impl: Impl) -> None:
    one, other = linear(), linear()
    for layer, names in [(one, ("weight", "bias")), (other, ("bias", "weight"))]:
        for name in names:
            impl.P.register_parametrization(layer, name, Scale())
    assert type(one) is type(other)
    impl.P.remove_parametrizations(other, "bias")
    assert type(one) is not type(other)
    assert type(other) is type(layer_with(impl, Scale()))


def test_another_base_has_another_class(impl: Impl) -> None:
    convolution = nn.Conv1d(4, 3, 1)
    impl.P.register_parametrization(convolution, "weight", Scale())
    layer = layer_with(impl, Scale())
    assert type(convolution) is not type(layer)
    assert isinstance(layer, nn.Linear)
    assert not isinstance(convolution, nn.Linear)


@pytest.mark.parametrize("module_class", [WithSlots, WithProperty, WithGetattr, Concrete, WithMetaclass])
def test_deepcopy_of_user_modules(impl: Impl, module_class: type[nn.Module]) -> None:
    module = module_class(4, 3) if issubclass(module_class, nn.Linear) else module_class()
    impl.P.register_parametrization(module, "weight", Scale())
    replica = copy.deepcopy(module)
    assert snapshot(replica) == snapshot(module)
    assert isinstance(replica, module_class)
    assert torch.equal(replica.weight, module.weight)


def test_deepcopy_of_slots(impl: Impl) -> None:
    module = WithSlots()
    impl.P.register_parametrization(module, "weight", Scale())
    replica = copy.deepcopy(module)
    assert replica.extra == [1, 2]
    assert replica.extra is not module.extra
    assert not hasattr(replica, "unset")


def test_the_deepcopy_of_the_user_is_called(impl: Impl) -> None:
    module = WithDeepcopy(4, 3)
    impl.P.register_parametrization(module, "weight", Scale())
    replica = copy.deepcopy(module)
    assert (module.copies, replica.copies) == (0, 1)
    assert torch.equal(replica.weight, module.weight)
    assert copy.deepcopy(replica).copies == 2


def test_within_a_model(impl: Impl) -> None:
    layer = layer_with(impl, Scale())
    model = copy.deepcopy(nn.ModuleList([layer, layer, linear()]))
    assert model[0] is model[1]
    assert model[0] is not layer
    assert torch.equal(model[0].weight, layer.weight)


def test_cloned_encoder_layers(impl: Impl) -> None:
    block = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    impl.P.register_parametrization(block.linear1, "weight", Scale())
    encoder = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
    first, second = (clone.linear1 for clone in encoder.layers)
    with torch.no_grad():
        first.parametrizations.weight.original.zero_()
    assert not torch.equal(first.weight, second.weight)
    assert torch.equal(second.weight, block.linear1.weight)
    assert encoder(torch.ones(1, 2, 4)).shape == (1, 2, 4)


def test_averaged_model(impl: Impl) -> None:
    layer = layer_with(impl, Scale())
    average = torch.optim.swa_utils.AveragedModel(layer)
    average.update_parameters(layer)
    assert torch.equal(average.module.weight, layer.weight)


@beyond_torch("torch gives the copy the value of its source")
def test_deepcopy_within_a_cache(impl: Impl) -> None:
    layer = layer_with(impl, Scale())
    with impl.P.cached():
        _ = layer.weight
        replica = copy.deepcopy(layer)
        with torch.no_grad():
            replica.parametrizations.weight.original.zero_()
        assert not replica.weight.any()
        assert layer.weight.any()


@beyond_torch("torch reads a tensor that is no leaf out of the flat weights", raises=RuntimeError)
def test_deepcopy_of_a_recurrent_layer_after_forward(impl: Impl) -> None:
    layer = nn.LSTM(4, 3)
    impl.P.register_parametrization(layer, "weight_hh_l0", Scale())
    x = torch.ones(2, 1, 4)
    expected = layer(x)[0]
    replica = copy.deepcopy(layer)
    assert torch.equal(replica(x)[0], expected)


def pickled(module: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(module))


def saved(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def cloudpickled(module: nn.Module) -> nn.Module:
    return pickle.loads(cloudpickle.dumps(module))


ROUND_TRIPS = [pickled, saved, cloudpickled]


@pytest.mark.parametrize("round_trip", ROUND_TRIPS)
@pytest.mark.parametrize("step", STEPS)
@beyond_torch("torch refuses to pickle", raises=RuntimeError)
def test_round_trip(impl: Impl, step: type[nn.Module], round_trip: Callable[[nn.Module], nn.Module]) -> None:
    layer = layer_with(impl, step())
    impl.P.register_parametrization(layer, "bias", Shift())
    replica = round_trip(layer)
    assert snapshot(replica) == snapshot(layer)
    assert type(replica) is type(layer)
    train(impl, replica)
    assert not torch.equal(replica.bias, layer.bias)
    remove(impl, replica)
    assert impl.P.is_parametrized(layer, "weight")


@pytest.mark.parametrize("round_trip", ROUND_TRIPS)
@pytest.mark.parametrize(
    "module_class", [WithProperty, WithGetattr, Concrete, WithMetaclass, WithDeepcopy, Pair]
)
@beyond_torch("torch refuses to pickle", raises=RuntimeError)
def test_round_trip_of_user_modules(
    impl: Impl, module_class: type[nn.Module], round_trip: Callable[[nn.Module], nn.Module]
) -> None:
    module = module_class(4, 3) if issubclass(module_class, nn.Linear) else module_class()
    name = "first" if module_class is Pair else "weight"
    impl.P.register_parametrization(module, name, Halves())
    replica = round_trip(module)
    assert snapshot(replica) == snapshot(module)
    assert torch.equal(getattr(replica, name), getattr(module, name))


@pytest.mark.parametrize("round_trip", ROUND_TRIPS)
@pytest.mark.parametrize("name", ["orthogonal", "weight_norm", "spectral_norm"])
@beyond_torch("torch refuses to pickle", raises=RuntimeError)
def test_round_trip_of_the_built_ins(
    impl: Impl, name: str, round_trip: Callable[[nn.Module], nn.Module]
) -> None:
    layer = getattr(impl.N, name)(linear()).eval()
    replica = round_trip(layer)
    assert snapshot(replica) == snapshot(layer)
    assert torch.equal(replica.weight, layer.weight)


@pytest.mark.parametrize("name", ["orthogonal", "weight_norm", "spectral_norm"])
def test_deepcopy_of_the_built_ins(impl: Impl, name: str) -> None:
    layer = getattr(impl.N, name)(linear()).eval()
    replica = copy.deepcopy(layer)
    assert snapshot(replica) == snapshot(layer)
    assert torch.equal(replica.weight, layer.weight)


@beyond_torch("torch refuses to pickle", raises=RuntimeError)
def test_a_shallow_copy_reads_the_same(impl: Impl) -> None:
    layer = layer_with(impl, Scale())
    replica = copy.copy(layer)
    assert replica is not layer
    assert torch.equal(replica.weight, layer.weight)


@beyond_torch("torch refuses to pickle", raises=RuntimeError)
def test_a_saved_model_opens_in_a_new_process(impl: Impl, tmp_path: Path) -> None:
    layer = impl.N.weight_norm(nn.Linear(4, 3, dtype=torch.float64))
    torch.save(nn.Sequential(layer, nn.ReLU()), tmp_path / "model.pt")
    program = (
        "import sys, torch\n"
        "model = torch.load(sys.argv[1], weights_only=False)\n"
        "print(type(model[0]).__name__, model(torch.ones(1, 4, dtype=torch.float64)).tolist())\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "model.pt")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    expected: Any = layer(torch.ones(1, 4, dtype=torch.float64)).relu().tolist()
    assert done.stdout.strip() == f"ParametrizedLinear {expected}"


def test_state_dict_is_what_torch_saves(impl: Impl, tmp_path: Path) -> None:
    layer = layer_with(impl, Halves())
    torch.save(layer.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert list(state) == ["bias", "parametrizations.weight.original0", "parametrizations.weight.original1"]
    other = layer_with(impl, Halves())
    other.load_state_dict(state)
    assert torch.equal(other.weight, layer.weight)
