"""Row 3: a recomputed forward gives the gradients and the state of one that was kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .table import Impl, row


def model_of(impl: Impl) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)]
    model = nn.Sequential(*layers).double()
    for layer in (model[0], model[2]):
        impl.N.spectral_norm(layer)
        with torch.no_grad():  # as after an optimizer step: the vectors lag behind
            layer.parametrizations.weight.original.normal_()  # type: ignore[union-attr]  # Tensor | Module
    return model


def results(model: nn.Module) -> list[Tensor]:
    return [*(parameter.grad.clone() for parameter in model.parameters()), *map(torch.clone, model.buffers())]  # type: ignore[union-attr]  # after a backward


def step(model: nn.Module, x: Tensor, *, mode: bool | None) -> None:
    """Run a forward and a backward, kept (None) or recomputed by the reentrant mode or the other."""
    x = x.clone().requires_grad_()
    output = model(x) if mode is None else checkpoint(model, x, use_reentrant=mode)
    output.square().sum().backward()


@row(3, "seen on 2.13", torch="the recomputation runs a power iteration more")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("steps", [1, 3])
def test_03_checkpointed_equals_kept(impl: Impl, reentrant: bool, steps: int) -> None:
    kept, recomputed = model_of(impl), model_of(impl)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (kept, recomputed)]
    for x in torch.randn(steps, 4, 6).double():
        for optimizer in optimizers:
            optimizer.zero_grad()
        step(kept, x, mode=None)
        step(recomputed, x, mode=reentrant)
        assert all(map(torch.equal, results(kept), results(recomputed)))
        for optimizer in optimizers:
            optimizer.step()


@row(3, "seen on 2.13", torch="each forward runs a power iteration")
def test_03_accumulated_gradients_are_those_of_the_whole_batch(impl: Impl) -> None:
    whole, parts = model_of(impl), model_of(impl)
    x = torch.randn(4, 6).double()
    whole(x).square().sum().backward()
    for part in x.split(1):
        parts(part).square().sum().backward()
    for one, other in zip(results(whole), results(parts), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@row(3, "seen on 2.13", torch="the second forward sees other vectors")
def test_03_a_critic_is_one_function_within_a_step(impl: Impl) -> None:
    critic = model_of(impl)
    x = torch.randn(4, 6).double()
    assert torch.equal(critic(x), critic(x))


@row(3, "seen on 2.13")
def test_03_two_forwards_then_one_backward(impl: Impl) -> None:
    critic = model_of(impl)
    real, fake = torch.randn(2, 4, 6).double()
    (critic(real).sum() - critic(fake).sum()).backward()
    assert all(parameter.grad is not None for parameter in critic.parameters())


@row(3, "seen on 2.13", torch="each call runs a power iteration")
def test_03_a_module_called_twice_in_one_forward_is_one_function(impl: Impl) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer: Any = impl.N.spectral_norm(nn.Linear(6, 6).double())

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.layer(x), self.layer(x)

    one, other = Twice()(torch.randn(2, 6).double())
    assert torch.equal(one, other)
