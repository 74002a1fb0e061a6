"""Row 26: baking is checked: finite, the value of before, the keys, order and kinds of the plain module, and loud."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import torchkiln

from .table import OURS, Impl, row

X = torch.linspace(-1, 1, 8).reshape(2, 4)


class Halves(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b

    def right_inverse(self, X: Tensor) -> tuple[Tensor, Tensor]:
        return X / 2, X / 2


class Adapter(nn.Module):
    """A low-rank update that is zero until it is trained or loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.A, self.B = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.zeros(4, 2))

    def forward(self, W: Tensor) -> Tensor:
        return W + self.B @ self.A


def fold(impl: Impl, model: nn.Module) -> None:
    """Fold every tensor, the way each of the two offers it."""
    if impl == OURS:
        torchkiln.bake(model)
        return
    for module in list(model.modules()):
        if impl.P.is_parametrized(module) and type(module) is not nn.ModuleDict:
            for name in list(module.parametrizations):
                impl.P.remove_parametrizations(module, name)


def model_of(impl: Impl) -> nn.Module:
    model = nn.Sequential(impl.N.weight_norm(nn.Linear(4, 3)), impl.N.spectral_norm(nn.Linear(3, 2)))
    impl.P.register_parametrization(model[1], "bias", Halves())
    return model


@row(26, "reproduced on torch 2.13", torch="NaN is baked without a word")
def test_26_a_value_that_is_not_finite_is_refused_by_name(impl: Impl) -> None:
    model = nn.Sequential(nn.Linear(4, 4), impl.N.weight_norm(nn.Linear(4, 4)))
    with torch.no_grad():
        model[1].parametrizations.weight.original1[0, 0] = torch.nan
    message = ""
    try:
        fold(impl, model)
    except ValueError as error:
        message = str(error)
    assert "1.weight" in message
    assert impl.P.is_parametrized(model[1])


@row(26, "reproduced on torch 2.13", torch="NaN is removed without a word", raises=pytest.fail.Exception)
def test_26_removal_names_a_value_that_is_not_finite(impl: Impl) -> None:
    layer = impl.N.weight_norm(nn.Linear(4, 4))
    with torch.no_grad():
        layer.parametrizations.weight.original1[0, 0] = torch.nan
    with pytest.warns(UserWarning, match=r"Linear\.weight: not all values are finite"):
        impl.P.remove_parametrizations(layer, "weight")


@pytest.mark.parametrize("frozen", [True, False])
@row(26, "reproduced on torch 2.13", torch="the order changes, and frozen tensors become buffers")
def test_26_keys_order_and_kinds_are_those_of_the_plain_module(impl: Impl, frozen: bool) -> None:
    model = model_of(impl).requires_grad_(not frozen)
    plain = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    fold(impl, model)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert not list(model.buffers())


@row(26, "reproduced on torch 2.13", torch="removal in training mode runs one more power iteration")
def test_26_the_value_is_that_of_before(impl: Impl) -> None:
    model = model_of(impl)
    model(X)
    expected = [layer.weight.detach().clone() for layer in model.eval()]
    fold(impl, model.train())
    assert all(torch.equal(layer.weight, value) for layer, value in zip(model, expected, strict=True))


@row(26, "verl 7285", torch="nothing is said", raises=pytest.fail.Exception)
def test_26_a_bake_that_finds_nothing_is_loud(impl: Impl) -> None:
    with pytest.warns(UserWarning, match="nothing to bake"):
        fold(impl, nn.Linear(4, 3))


@row(26, "verl 7285", torch="nothing is said", raises=pytest.fail.Exception)
def test_26_a_bake_that_gives_back_the_base_is_loud(impl: Impl) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    impl.P.register_parametrization(model[0], "weight", Adapter())
    with pytest.warns(
        UserWarning, match=r"every baked value is that of its original, bit for bit \(0\.weight\)"
    ):
        fold(impl, model)


@row(26, "reproduced on torch 2.13", torch="there is no report", raises=TypeError)
def test_26_rounding_is_reported(impl: Impl) -> None:
    model = model_of(impl)
    report = torchkiln.bake(model, dtype=torch.bfloat16) if impl == OURS else fold(impl, model)
    assert all(0 < row.rounding < 2**-8 for row in report)  # type: ignore[union-attr]
    assert {p.dtype for p in model[1].parameters()} == {torch.bfloat16}
