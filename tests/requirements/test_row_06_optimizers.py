"""Row 6: optimizers follow a registration and a removal, or say that they were left behind; attributes carry over."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

from .table import OURS, Impl, row

X = torch.linspace(-1, 1, 8).reshape(2, 4)
DEAD = "the optimizer goes on with parameters that nothing uses"


class Halves(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b

    def right_inverse(self, X: Tensor) -> tuple[Tensor, Tensor]:
        return X / 2, X / 2


OPTIMIZERS = {
    "momentum": lambda parameters: optim.SGD(parameters, lr=0.1, momentum=0.9),
    "adam_foreach": lambda parameters: optim.Adam(parameters, lr=0.1, foreach=True),
    "adamw_fused": lambda parameters: optim.AdamW(parameters, lr=0.1, fused=True),
}
each_optimizer = pytest.mark.parametrize("kind", OPTIMIZERS)


def train(layer: nn.Module, optimizer: optim.Optimizer) -> None:
    optimizer.zero_grad()
    layer(X).square().sum().backward()
    optimizer.step()


def following(impl: Impl, optimizer: optim.Optimizer) -> dict[str, Any]:
    return {"optimizer": optimizer} if impl == OURS else {}


@each_optimizer
@row(6, "tutorials 2824", torch=DEAD)
def test_06_what_a_registration_makes_is_trained(impl: Impl, kind: str) -> None:
    layer = nn.Linear(4, 3)
    optimizer = OPTIMIZERS[kind](layer.parameters())
    train(layer, optimizer)
    impl.P.register_parametrization(layer, "weight", Halves(), **following(impl, optimizer))
    before = [p.detach().clone() for p in layer.parameters()]
    train(layer, optimizer)
    assert [torch.equal(p, old) for p, old in zip(layer.parameters(), before, strict=True)] == [False] * 3


@each_optimizer
@row(6, "tutorials 2824", torch=DEAD)
def test_06_what_a_removal_makes_is_trained(impl: Impl, kind: str) -> None:
    layer = impl.N.weight_norm(nn.Linear(4, 3))
    optimizer = OPTIMIZERS[kind](layer.parameters())
    train(layer, optimizer)
    impl.P.remove_parametrizations(layer, "weight", **following(impl, optimizer))
    before = layer.weight.detach().clone()
    train(layer, optimizer)
    assert not torch.equal(layer.weight, before)


@row(6, "tutorials 2824", torch=DEAD)
def test_06_what_a_built_in_makes_is_trained(impl: Impl) -> None:
    layer = nn.Linear(4, 3)
    optimizer = OPTIMIZERS["momentum"](layer.parameters())
    train(layer, optimizer)
    impl.N.weight_norm(layer, **following(impl, optimizer))
    held = {id(p) for p in optimizer.param_groups[0]["params"]}
    assert held == {id(p) for p in layer.parameters()}


@each_optimizer
@row(6, "tutorials 2824", torch=DEAD)
def test_06_moments_are_carried(impl: Impl, kind: str) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(4, 3)
    layer = nn.Linear(4, 3)
    layer.load_state_dict(plain.state_dict())
    control, optimizer = (OPTIMIZERS[kind](module.parameters()) for module in (plain, layer))
    train(plain, control)
    train(layer, optimizer)
    impl.P.register_parametrization(layer, "weight", Halves(), **following(impl, optimizer))
    impl.P.remove_parametrizations(layer, "weight", **following(impl, optimizer))
    for module, own in ((plain, control), (layer, optimizer)):
        train(module, own)
        train(module, own)
    assert torch.equal(layer.weight, plain.weight)


@pytest.mark.parametrize("removes", [True, False])
@row(6, "tutorials 2824", torch="the step says nothing", raises=pytest.fail.Exception)
def test_06_an_optimizer_that_was_left_behind_names_the_tensor(impl: Impl, removes: bool) -> None:
    layer = nn.Linear(4, 3)
    if removes:
        impl.N.weight_norm(layer)
    optimizer = optim.SGD(layer.parameters(), lr=0.1)
    if removes:
        impl.P.remove_parametrizations(layer, "weight")
    else:
        impl.N.weight_norm(layer)
    with pytest.warns(UserWarning, match=r"Linear\.weight"):
        train(layer, optimizer)


@row(6, "reproduced on torch 2.13", torch="the new parameters have no attributes")
def test_06_attributes_go_there_and_back(impl: Impl) -> None:
    layer = nn.Linear(4, 3)
    layer.weight._no_weight_decay = True
    impl.N.weight_norm(layer)
    assert all(vars(p) == {"_no_weight_decay": True} for p in layer.parametrizations.weight.parameters())
    impl.P.remove_parametrizations(layer, "weight")
    assert vars(layer.weight) == {"_no_weight_decay": True}
