"""Row 5: what is written into a computed tensor takes effect, or says why it cannot."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torchkiln import TorchkilnWarning

from .table import Impl, row

ISSUE = "180968, hifi-gan 145"
LOST = "the write goes into a tensor that is dropped"


def normed(impl: Impl) -> Any:
    torch.manual_seed(0)
    return impl.N.weight_norm(nn.Linear(4, 4, dtype=torch.float64))


def no_grad(write: Callable[[Any], object]) -> Callable[[Any], object]:
    return torch.no_grad()(write)


WRITES: dict[str, Callable[[Any], object]] = {
    "init.ones_": lambda m: nn.init.ones_(m.weight),
    "init.uniform_": lambda m: nn.init.uniform_(m.weight),
    "init.trunc_normal_": lambda m: nn.init.trunc_normal_(m.weight),
    "init.orthogonal_": lambda m: nn.init.orthogonal_(m.weight),
    "init.dirac_ by a view": lambda m: nn.init.dirac_(m.weight.unsqueeze(-1)),
    "init.eye_ by out=": lambda m: nn.init.eye_(m.weight),
    "init.sparse_ by index": lambda m: nn.init.sparse_(m.weight, 0.5),
    "init.kaiming_normal_ under no_grad": no_grad(lambda m: nn.init.kaiming_normal_(m.weight)),
    "data.normal_": lambda m: m.weight.data.normal_(),
    "data = ": lambda m: setattr(m.weight, "data", torch.full((4, 4), 2.0, dtype=torch.float64)),
    "copy_": no_grad(lambda m: m.weight.copy_(torch.full((4, 4), 3.0))),
    "item": no_grad(lambda m: m.weight.__setitem__(0, 5.0)),
    "item of a view": no_grad(lambda m: m.weight[1:].fill_(5.0)),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@row(5, ISSUE, torch=LOST)
def test_05_a_write_takes_effect(impl: Impl, write: Callable[[Any], object]) -> None:
    """The same write on a plain layer is what to expect: weight norm can be any tensor without zero rows."""
    layer, plain = normed(impl), nn.Linear(4, 4, dtype=torch.float64)
    plain.weight = nn.Parameter(layer.weight.detach().clone())
    for module in (plain, layer):
        torch.manual_seed(1)
        write(module)
    nonzero = plain.weight.abs().sum(1) > 0
    torch.testing.assert_close(layer.weight[nonzero], plain.weight[nonzero], rtol=1e-9, atol=1e-9)


@row(5, ISSUE, torch=LOST)
def test_05_reset_parameters(impl: Impl) -> None:
    layer = normed(impl)
    before = layer.weight.detach().clone()
    layer.reset_parameters()
    assert not torch.equal(layer.weight, before)
    assert layer.weight.abs().max() <= 0.5 + 1e-9  # 1 / sqrt(fan in)


@row(5, ISSUE, torch=LOST)
def test_05_what_transformers_does_to_initialize(impl: Impl) -> None:
    layer = normed(impl)

    def init_weights(module: Any) -> None:
        if isinstance(module, nn.Linear):
            module.weight.data.normal_(mean=0.0, std=1e-3)
            module.bias.data.zero_()

    nn.Sequential(layer).apply(init_weights)
    assert layer.weight.abs().max() < 1e-2


@row(5, ISSUE, torch=LOST)
def test_05_a_write_into_a_kept_tensor(impl: Impl) -> None:
    layer = normed(impl)
    weight = layer.weight
    nn.init.constant_(weight, 0.25)
    torch.testing.assert_close(
        layer(torch.ones(1, 4, dtype=torch.float64)) - layer.bias, torch.ones(1, 4).double()
    )


@row(5, ISSUE)
def test_05_assignment(impl: Impl) -> None:
    layer = normed(impl)
    value = torch.randn(4, 4, dtype=torch.float64)
    layer.weight = value
    torch.testing.assert_close(layer.weight, value)


@row(5, ISSUE, torch="nothing is said", raises=pytest.fail.Exception)
def test_05_without_an_inverse_the_loss_is_told(impl: Impl) -> None:
    layer: Any = impl.P.register_parametrization(nn.Linear(3, 3), "weight", nn.Tanh())
    with pytest.warns(TorchkilnWarning, match="lost: Tanh has no right_inverse"):
        nn.init.ones_(layer.weight)


@row(5, ISSUE)
def test_05_the_projection_is_what_is_kept(impl: Impl) -> None:
    layer: Any = impl.N.orthogonal(nn.Linear(3, 3, dtype=torch.float64))
    nn.init.uniform_(layer.weight)
    torch.testing.assert_close(layer.weight.T @ layer.weight, torch.eye(3, dtype=torch.float64))


@row(5, ISSUE)
def test_05_a_differentiable_operation_in_place_is_the_callers_own(impl: Impl) -> None:
    layer = normed(impl)
    before = layer.weight.detach().clone()
    weight = layer.weight
    weight.mul_(2.0)
    weight.sum().backward()
    del weight
    assert torch.equal(layer.weight, before)
    assert layer.parametrizations.weight.original1.grad is not None


@row(5, ISSUE)
def test_05_what_is_read_is_an_ordinary_tensor(impl: Impl) -> None:
    layer = normed(impl)
    with torch.no_grad():
        weight = layer.weight
        assert type(weight + 0) is Tensor
        assert type(copy.deepcopy(weight)) is Tensor
        assert type(pickle.loads(pickle.dumps(weight))) is Tensor
        assert type(torch.compile(lambda w: w * 2, backend="eager", fullgraph=True)(weight)) is Tensor
    assert repr(layer.weight).startswith("tensor(")


@row(5, ISSUE)
def test_05_a_buffer_that_a_step_returns_stays_one(impl: Impl) -> None:
    class Held(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("held", torch.eye(3))

        def forward(self, X: Tensor) -> Any:
            return self.held

    layer: Any = impl.P.register_parametrization(nn.Linear(3, 3), "weight", Held())
    _ = layer.weight
    assert type(layer.parametrizations.weight[0].held) is Tensor


@row(5, ISSUE, torch=LOST)
def test_05_a_write_while_another_module_has_a_scope(impl: Impl) -> None:
    layer = normed(impl)

    def initialize() -> None:
        nn.init.ones_(layer.weight)

    class Other(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            initialize()
            return x

    other = impl.P.register_parametrization(Other(2, 2), "weight", nn.Identity())
    other(torch.ones(1, 2))
    torch.testing.assert_close(layer.weight, torch.ones(4, 4, dtype=torch.float64))


@row(5, ISSUE, torch="the value knows nothing of its originals", raises=AttributeError)
def test_05_what_is_marked_as_loaded_is_known_to_be(impl: Impl) -> None:
    """transformers initializes after loading, but for tensors that carry its mark."""
    layer = normed(impl)
    assert not hasattr(layer.weight, "_is_hf_initialized")
    for original in layer.parametrizations.weight.parameters():
        original._is_hf_initialized = True
    assert layer.weight._is_hf_initialized
