"""Row 18: recurrent networks, which keep their weights in a list of their own, train, copy and fold."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from parametrize.steps import Scale

from .table import Impl, fails_on, row

KINDS = pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
NORMS = pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm", "orthogonal"])
NAME = "weight_hh_l0"


def sequence() -> Tensor:
    return torch.linspace(-1, 1, 24).reshape(3, 2, 4)


def parametrized(impl: Impl, kind: type[nn.RNNBase], norm: str) -> nn.RNNBase:
    return getattr(impl.N, norm)(kind(4, 3, num_layers=2), NAME)


def originals(network: nn.Module) -> list[nn.Parameter]:
    return list(network.parametrizations[NAME].parameters())


def step(network: nn.Module, *, rate: float = 0.5) -> None:
    optimizer = torch.optim.SGD(network.parameters(), lr=rate)
    network(sequence())[0].square().sum().backward()
    optimizer.step()


@KINDS
@NORMS
@row(18, "pytorch 65688")
def test_18_gradients_reach_the_originals(impl: Impl, kind: type[nn.RNNBase], norm: str) -> None:
    network = parametrized(impl, kind, norm)
    network(sequence())[0].square().sum().backward()
    assert all(original.grad is not None and original.grad.any() for original in originals(network))


@KINDS
@NORMS
@row(18, "pytorch 39311")
def test_18_the_output_follows_the_originals(impl: Impl, kind: type[nn.RNNBase], norm: str) -> None:
    network = parametrized(impl, kind, norm).eval()
    before = network(sequence())[0]
    step(network)
    plain = kind(4, 3, num_layers=2).eval()
    plain.load_state_dict({name: getattr(network, name) for name in plain.state_dict()})
    after = network(sequence())[0]
    assert not torch.equal(after, before)
    torch.testing.assert_close(after, plain(sequence())[0])


@KINDS
@row(18, "pytorch 86457")
def test_18_a_second_forward_has_its_own_graph(impl: Impl, kind: type[nn.RNNBase]) -> None:
    network = parametrized(impl, kind, "weight_norm")
    for _ in range(3):  # torch's older weight norm failed at the second backward
        step(network, rate=0.1)


def flat(network: nn.RNNBase) -> list[Tensor]:
    return [network._flat_weights[network._flat_weights_names.index(NAME)], network.all_weights[0][1]]


STALE = "the flat weights keep the computed tensor until the next forward"
AFTER_A_FORWARD = pytest.param(True, id="after a forward", marks=[fails_on("torch", STALE)])


@KINDS
@pytest.mark.parametrize("ran", [pytest.param(False, id="fresh"), AFTER_A_FORWARD])
@pytest.mark.parametrize("leave", [True, False], ids=["baked", "restored"])
@row(18, "pytorch 86457")
def test_18_removal_restores_the_flat_weights(
    impl: Impl, kind: type[nn.RNNBase], leave: bool, ran: bool
) -> None:
    network = impl.P.register_parametrization(kind(4, 3), NAME, Scale(0.5))
    if ran:
        network(sequence())[0].sum().backward()
    impl.P.remove_parametrizations(network, NAME, leave_parametrized=leave)
    assert type(network) is kind
    assert all(type(weight) is nn.Parameter and weight is network.weight_hh_l0 for weight in flat(network))
    before = network(sequence())[0]
    step(network)
    assert not torch.equal(network(sequence())[0], before)


@KINDS
@NORMS
@row(18, "pytorch 86457", torch="the copy shares the class of its source", raises=RuntimeError)
def test_18_a_copy_trains_alone(impl: Impl, kind: type[nn.RNNBase], norm: str) -> None:
    network = parametrized(impl, kind, norm).eval()
    output = network(sequence())[0].detach()
    replica = copy.deepcopy(network)
    step(replica)
    assert torch.equal(network(sequence())[0], output)
    changed = replica(sequence())[0]
    assert not torch.equal(changed, output)
    impl.P.remove_parametrizations(replica, NAME)
    torch.testing.assert_close(replica(sequence())[0], changed)
    assert all(type(weight) is nn.Parameter and weight is replica.weight_hh_l0 for weight in flat(replica))
    assert torch.equal(network(sequence())[0], output)


@KINDS
@row(18, "pytorch 39311")
def test_18_the_output_follows_a_conversion(impl: Impl, kind: type[nn.RNNBase]) -> None:
    network = parametrized(impl, kind, "weight_norm")
    before = network(sequence())[0]
    network.double()
    after = network(sequence().double())[0]
    assert after.dtype is torch.float64
    torch.testing.assert_close(after.float(), before)


@pytest.mark.parametrize("kind", [nn.RNNCell, nn.GRUCell, nn.LSTMCell])
@row(18, "pytorch 65688")
def test_18_cells(impl: Impl, kind: type[nn.RNNCellBase]) -> None:
    cell = impl.N.weight_norm(kind(4, 3), "weight_hh")
    state = torch.ones(2, 3)
    output = cell(torch.ones(2, 4), (state, state) if kind is nn.LSTMCell else state)
    (output[0] if isinstance(output, tuple) else output).square().sum().backward()
    assert all(original.grad.any() for original in cell.parametrizations.weight_hh.parameters())
