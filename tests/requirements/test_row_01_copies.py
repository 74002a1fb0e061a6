"""Row 1: a deep copy and its source go their own ways, whatever is done to either of them."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from parametrize.oracle import anatomy
from parametrize.steps import Scale

from .table import Impl, row

X = torch.linspace(-1, 1, 8, dtype=torch.float64).reshape(2, 4)
OWN_CLASS = "torch edits the class that the copy shares with its source"


def scaled(impl: Impl) -> nn.Linear:
    return impl.P.register_parametrization(nn.Linear(4, 3, dtype=torch.float64), "weight", Scale())


def register_a_step(impl: Impl, layer: nn.Linear) -> None:
    impl.P.register_parametrization(layer, "weight", Scale(3.0))


def register_another_tensor(impl: Impl, layer: nn.Linear) -> None:
    impl.P.register_parametrization(layer, "bias", Scale(3.0))


def remove(impl: Impl, layer: nn.Linear) -> None:
    impl.P.remove_parametrizations(layer, "weight")


def restore(impl: Impl, layer: nn.Linear) -> None:
    impl.P.remove_parametrizations(layer, "weight", leave_parametrized=False)


def assign(impl: Impl, layer: nn.Linear) -> None:
    layer.weight = torch.ones(3, 4, dtype=torch.float64)


def train(impl: Impl, layer: nn.Linear) -> None:
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(X).square().sum().backward()
    optimizer.step()


def check_independent(impl: Impl, change: Callable[[Impl, nn.Linear], None], *, source_changes: bool) -> None:
    source = scaled(impl)
    replica = copy.deepcopy(source)
    changed, kept = (source, replica) if source_changes else (replica, source)
    before, output = anatomy(kept), kept(X)
    change(impl, changed)
    assert anatomy(kept) == before
    assert torch.equal(kept(X), output)
    for later in (register_a_step, train, remove):  # and it still can do everything
        later(impl, kept)
    assert type(kept) is nn.Linear


both_ways = pytest.mark.parametrize("source_changes", [False, True], ids=["copy changes", "source changes"])


@both_ways
@pytest.mark.parametrize("change", [register_a_step, assign, train])
@row(1, "pytorch 28594")
def test_01_the_tensors_of_a_copy_are_its_own(
    impl: Impl, change: Callable[[Impl, nn.Linear], None], source_changes: bool
) -> None:
    check_independent(impl, change, source_changes=source_changes)


@both_ways
@pytest.mark.parametrize("change", [register_another_tensor, remove, restore])
@row(1, "pytorch 69413", torch=OWN_CLASS, raises=(AssertionError, AttributeError, KeyError))
def test_01_the_class_of_a_copy_is_safe(
    impl: Impl, change: Callable[[Impl, nn.Linear], None], source_changes: bool
) -> None:
    check_independent(impl, change, source_changes=source_changes)


def sequence() -> Tensor:
    return torch.linspace(-1, 1, 12).reshape(3, 1, 4)


@pytest.mark.parametrize("normed", ["weight_norm", "spectral_norm", "orthogonal"])
@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
@row(1, "pytorch 28594", torch="the flat weights hold a tensor that is no leaf", raises=RuntimeError)
def test_01_a_recurrent_network_is_copied_after_a_forward(
    impl: Impl, kind: type[nn.RNNBase], normed: str
) -> None:
    network = getattr(impl.N, normed)(kind(4, 3), "weight_hh_l0")
    network(sequence())[0].sum().backward()
    network.eval()
    output = network(sequence())[0]
    replica = copy.deepcopy(network)
    assert torch.equal(replica(sequence())[0], output)
    impl.P.remove_parametrizations(replica, "weight_hh_l0")
    with torch.no_grad():
        for tensor in replica.parameters():
            tensor.zero_()
    assert not replica(sequence())[0].any()
    assert torch.equal(network(sequence())[0], output)


@row(1, "pytorch 28594", torch="the cache gives the copy the value of its source")
def test_01_a_copy_made_within_a_cache_has_its_own_values(impl: Impl) -> None:
    layer = scaled(impl)
    with impl.P.cached():
        value = layer.weight
        replica = copy.deepcopy(layer)
        with torch.no_grad():
            replica.parametrizations.weight.original.zero_()
        assert not replica.weight.any()
        assert torch.equal(layer.weight, value)


def two_layers(impl: Impl) -> nn.Sequential:
    return nn.Sequential(impl.N.weight_norm(nn.Linear(4, 3)), nn.Tanh(), impl.N.orthogonal(nn.Linear(3, 2)))


@pytest.mark.parametrize("average", [None, get_ema_multi_avg_fn(0.5)], ids=["mean", "ema"])
@row(1, "pytorch 28594", torch=OWN_CLASS, raises=AttributeError)
def test_01_an_average_of_the_weights_is_folded_while_training_goes_on(impl: Impl, average: object) -> None:
    model = two_layers(impl)
    averaged = AveragedModel(model, multi_avg_fn=average)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(X.float()).square().sum().backward()
        optimizer.step()
        averaged.update_parameters(model)
    output, expected = averaged(X.float()), model(X.float())
    assert not torch.equal(output, expected)
    for layer in (averaged.module[0], averaged.module[2]):
        impl.P.remove_parametrizations(layer, "weight")
    assert torch.equal(averaged(X.float()), output)
    assert torch.equal(model(X.float()), expected)


@row(1, "pytorch 69413", torch=OWN_CLASS, raises=AttributeError)
def test_01_the_layers_that_an_encoder_clones_are_independent(impl: Impl) -> None:
    block = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    impl.N.weight_norm(block.linear1)
    encoder = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
    output = encoder(torch.ones(1, 2, 4))
    impl.P.remove_parametrizations(encoder.layers[0].linear1, "weight")
    torch.testing.assert_close(encoder(torch.ones(1, 2, 4)), output)
    assert impl.P.is_parametrized(encoder.layers[1].linear1, "weight")
    assert impl.P.is_parametrized(block.linear1, "weight")
