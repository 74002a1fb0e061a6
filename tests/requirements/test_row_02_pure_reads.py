"""Row 2: reading a tensor, its shape, the repr or the state dict changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from .table import Impl, row


def buffers(model: nn.Module) -> list[torch.Tensor]:
    return [buffer.clone() for buffer in model.buffers()]


def trained_a_step(impl: Impl) -> nn.Module:
    """A layer in training whose weight an optimizer has just changed: the next use will advance its vectors."""
    torch.manual_seed(0)
    layer: nn.Module = impl.N.spectral_norm(nn.Linear(6, 5))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    layer(torch.randn(3, 6)).square().sum().backward()
    optimizer.step()
    return layer


READS: dict[str, Callable[[Any], object]] = {
    "tensor": lambda layer: layer.weight,
    "shape": lambda layer: layer.weight.shape,
    "dtype without grad": torch.no_grad()(lambda layer: layer.weight.dtype),
}


@row(2, "57784, 68421", torch="every read in training mode runs a power iteration")
@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_02_a_read_changes_no_buffer(impl: Impl, read: Callable[[Any], object]) -> None:
    layer = trained_a_step(impl)
    before = buffers(layer)
    read(layer)
    assert all(map(torch.equal, buffers(layer), before))


@row(2, "57784, 68421")
@pytest.mark.parametrize("look", [repr, nn.Module.state_dict], ids=["repr", "state_dict"])
def test_02_looking_changes_no_buffer(impl: Impl, look: Callable[[nn.Module], object]) -> None:
    layer = trained_a_step(impl)
    before = buffers(layer)
    look(layer)
    assert all(map(torch.equal, buffers(layer), before))


@row(2, "57784, 68421", torch="every read in training mode runs a power iteration")
def test_02_two_reads_are_equal(impl: Impl) -> None:
    layer: Any = trained_a_step(impl)
    assert torch.equal(layer.weight, layer.weight)


@row(2, "57784, 68421")
def test_02_a_read_draws_no_random_number(impl: Impl) -> None:
    layer: Any = trained_a_step(impl)
    state = torch.get_rng_state()
    _ = layer.weight
    assert torch.equal(torch.get_rng_state(), state)


@row(2, "57784, 68421")
def test_02_the_state_dict_has_the_vectors_in_use(impl: Impl) -> None:
    """Where a weight is used without its owner's forward, what is saved is what was used."""
    layer: Any = trained_a_step(impl)
    used = layer.weight.detach()
    saved: Any = impl.N.spectral_norm(nn.Linear(6, 5))
    saved.load_state_dict(layer.state_dict())
    assert torch.equal(saved.eval().weight, used)


@row(2, "57784, 68421")
def test_02_the_weight_of_eval_mode_is_the_last_one_used(impl: Impl) -> None:
    layer: Any = trained_a_step(impl)
    used = layer.weight.detach()
    assert torch.equal(layer.eval().weight, used)


@row(2, "57784, 68421")
def test_02_a_training_run_equals_torch_step_for_step(impl: Impl) -> None:
    """One forward, one optimizer step: the state advances exactly when it does on torch."""
    oracle: nn.Module = torch.nn.utils.parametrizations.spectral_norm(nn.Linear(6, 5).double())
    layer = impl.N.spectral_norm(nn.Linear(6, 5).double())
    layer.load_state_dict(oracle.state_dict())
    optimizers = [torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9) for module in (oracle, layer)]
    for x in torch.randn(8, 3, 6).double():
        outputs = [module(x) for module in (oracle, layer)]
        torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(buffers(layer), buffers(oracle), rtol=1e-12, atol=1e-12)
        for optimizer, output in zip(optimizers, outputs, strict=True):
            optimizer.zero_grad()
            output.square().sum().backward()
            optimizer.step()


@row(2, "57784, 68421")
def test_02_a_weight_used_without_its_owner_is_tracked(impl: Impl) -> None:
    """``F.linear`` with the weight, and multi-head attention's ``out_proj``, never call the owner."""
    torch.manual_seed(0)
    layer: Any = impl.N.spectral_norm(nn.Linear(6, 5).double())
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05)
    for x in torch.randn(60, 3, 6).double():
        optimizer.zero_grad()
        nn.functional.linear(x, layer.weight).square().sum().backward()
        optimizer.step()
    sigma = torch.linalg.matrix_norm(layer.weight.detach(), 2).item()
    assert sigma == pytest.approx(1.0, abs=0.02)


@row(2, "57784, 68421")
def test_02_a_fused_optimizer_advances_the_state(impl: Impl) -> None:
    """Fused kernels move no version counter."""
    layer = impl.N.spectral_norm(nn.Linear(6, 5))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, fused=True)
    vectors = [buffers(layer)[0]]
    for x in torch.randn(3, 3, 6):
        optimizer.zero_grad()
        layer(x).square().sum().backward()
        optimizer.step()
        vectors.append(buffers(layer)[0])
    assert not any(torch.equal(one, other) for one, other in pairwise(vectors))


@row(2, "57784, 68421")
def test_02_attention_projection_is_tracked(impl: Impl) -> None:
    torch.manual_seed(0)
    attention: Any = nn.MultiheadAttention(8, 2).double()
    impl.N.spectral_norm(attention.out_proj)
    optimizer = torch.optim.SGD(attention.parameters(), lr=0.05)
    for x in torch.randn(60, 3, 1, 8).double():
        optimizer.zero_grad()
        attention(x, x, x)[0].square().sum().backward()
        optimizer.step()
    sigma = torch.linalg.matrix_norm(attention.out_proj.weight.detach(), 2).item()
    assert sigma == pytest.approx(1.0, abs=0.02)
