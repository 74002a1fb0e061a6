"""Row 20: models are built on the meta device, given memory, loaded, and converted in each of torch's three ways."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from parametrize.oracle import fingerprint
from parametrize.steps import Scale

from .table import Impl, fails_on, row

X = torch.linspace(-1, 1, 8).reshape(2, 4)
NORMS = ["weight_norm", "spectral_norm", "orthogonal"]


def build(impl: Impl, norm: str) -> nn.Sequential:
    make = getattr(impl.N, norm)
    return nn.Sequential(make(nn.Linear(4, 6)), nn.Tanh(), make(nn.Linear(6, 6)), make(nn.Linear(6, 3)))


# --- the meta device ----------------------------------------------------------------------------------------------

ASKS_FOR_VALUES = fails_on(
    "torch", "orthogonal asks for values when it is registered", (RuntimeError, TypeError)
)
on_meta = pytest.mark.parametrize(
    "norm", ["weight_norm", "spectral_norm", pytest.param("orthogonal", marks=ASKS_FOR_VALUES)]
)


@pytest.mark.parametrize("assign", [False, True], ids=["to_empty", "assign"])
@on_meta
@row(20, "pytorch 96409")
def test_20_build_on_meta_and_load(impl: Impl, norm: str, assign: bool) -> None:
    direct = build(impl, norm).eval()
    with torch.device("meta"):
        model = build(impl, norm).eval()
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    if not assign:
        model.to_empty(device="cpu")
    model.load_state_dict(direct.state_dict(), assign=assign)
    assert {key: fingerprint(value) for key, value in model.state_dict().items()} == {
        key: fingerprint(value) for key, value in direct.state_dict().items()
    }
    assert torch.equal(model(X), direct(X))


@on_meta
@row(20, "pytorch 96409")
def test_20_shapes_are_read_on_meta(impl: Impl, norm: str) -> None:
    with torch.device("meta"):
        layer = getattr(impl.N, norm)(nn.Linear(4, 3))
    assert layer.weight.is_meta
    assert layer.weight.shape == (3, 4)
    assert layer(X.to("meta")).shape == (2, 3)


@on_meta
@row(20, "pytorch 96409")
def test_20_removal_on_meta(impl: Impl, norm: str) -> None:
    with torch.device("meta"):
        layer = getattr(impl.N, norm)(nn.Linear(4, 3))
    impl.P.remove_parametrizations(layer, "weight")
    assert type(layer) is nn.Linear
    assert layer.weight.is_meta
    assert set(layer.state_dict()) == {"weight", "bias"}


# --- conversions --------------------------------------------------------------------------------------------------


@pytest.fixture(params=["default", "overwrite", "swap"])
def mode(request: pytest.FixtureRequest) -> Iterator[str]:
    """How ``Module.to`` changes a parameter: its data, the object, or by exchanging what two objects are."""
    future = torch.__future__
    future.set_overwrite_module_params_on_conversion(request.param == "overwrite")
    future.set_swap_module_params_on_conversion(request.param == "swap")
    yield request.param
    future.set_overwrite_module_params_on_conversion(False)
    future.set_swap_module_params_on_conversion(False)


CONVERSIONS = {
    "double": lambda layer: layer.double(),
    "bfloat16 and back": lambda layer: layer.bfloat16().float(),
    "to meta and back": lambda layer: layer.to("meta").to_empty(device="cpu"),
}


@pytest.mark.parametrize("convert", CONVERSIONS.values(), ids=CONVERSIONS)
@pytest.mark.parametrize("norm", NORMS)
@row(20, "pytorch 145529")
def test_20_conversion(impl: Impl, norm: str, convert: Callable[[nn.Module], nn.Module], mode: str) -> None:
    layer = getattr(impl.N, norm)(nn.Linear(4, 4)).eval()
    state = {key: value.clone() for key, value in layer.state_dict().items()}
    convert(layer)
    dtype = layer.bias.dtype
    assert {value.dtype for value in layer.state_dict().values()} == {dtype}
    layer.load_state_dict(state)
    expected = getattr(impl.N, norm)(nn.Linear(4, 4)).eval()
    expected.load_state_dict(state)
    expected.to(dtype)
    torch.testing.assert_close(layer(X.to(dtype)), expected(X.to(dtype)))
    layer(X.to(dtype)).sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


@row(20, "pytorch 145529")
def test_20_the_optimizer_survives_conversion(impl: Impl, mode: str) -> None:
    """In place or swapped the parameter objects stay; overwritten they are new, as on any module."""
    layer = impl.P.register_parametrization(nn.Linear(4, 3), "weight", Scale())
    before = list(layer.parameters())
    layer.double()
    kept = all(mine is its for mine, its in zip(layer.parameters(), before, strict=True))
    assert kept == (mode != "overwrite")


@pytest.mark.parametrize("leave", [True, False], ids=["baked", "restored"])
@row(20, "pytorch 145529")
def test_20_register_assign_and_remove(impl: Impl, mode: str, leave: bool) -> None:
    layer = nn.Linear(4, 3)
    weight = layer.weight
    impl.P.register_parametrization(layer, "weight", Scale())
    layer.weight = torch.ones(3, 4)
    assert torch.equal(layer.weight, torch.ones(3, 4))
    impl.P.remove_parametrizations(layer, "weight", leave_parametrized=leave)
    assert layer.weight is weight
    assert torch.equal(weight, torch.full((3, 4), 1.0 if leave else 0.5))


@row(20, "pytorch 145529")
def test_20_originals_are_swapped(impl: Impl) -> None:
    layer = impl.N.weight_norm(nn.Linear(4, 3))
    layer(X).sum().backward()
    layer.zero_grad()
    chain = layer.parametrizations.weight
    new = nn.Parameter(torch.full_like(chain.original0, 2.0))
    torch.utils.swap_tensors(chain.original0, new)
    torch.testing.assert_close(layer.weight.norm(dim=1), torch.full((3,), 2.0))
