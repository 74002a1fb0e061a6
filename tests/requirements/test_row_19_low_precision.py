"""Row 19: every built-in registers, runs and backpropagates in float16 and bfloat16, and under autocast."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from .table import Impl, fails_on, row

NORMS = ["weight_norm", "spectral_norm", "orthogonal"]
HALVES = [torch.float16, torch.bfloat16]
NO_QR = fails_on(
    "torch", "its QR is not implemented for half precision", (RuntimeError, NotImplementedError, TypeError)
)
UNNORMED = fails_on("torch", "rounds at each step: the weight is not the norm's")
NARROWED = fails_on("torch", "autocast narrows the products that the weight is made of")

halves = pytest.mark.parametrize("dtype", HALVES, ids=["float16", "bfloat16"])


def trained(layer: nn.Module, dtype: torch.dtype) -> None:
    """One step of SGD: gradients for all, and nothing that is not finite."""
    layer(torch.ones(2, 4, dtype=dtype)).float().square().sum().backward()
    for parameter in layer.parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype is parameter.dtype
        assert parameter.grad.isfinite().all()
    torch.optim.SGD(layer.parameters(), lr=0.1).step()
    assert layer.weight.isfinite().all()


@pytest.mark.parametrize(
    "norm", ["weight_norm", "spectral_norm", pytest.param("orthogonal", marks=NO_QR)], ids=NORMS
)
@halves
@row(19, "80599")
def test_19_registers_on_a_low_precision_module_and_trains(impl: Impl, dtype: torch.dtype, norm: str) -> None:
    layer = getattr(impl.N, norm)(nn.Linear(4, 3, dtype=dtype))
    assert layer.weight.dtype is dtype
    trained(layer, dtype)


MAPS = ["matrix_exp", "cayley", "householder"]


@pytest.mark.parametrize("map_name", [pytest.param(name, marks=NO_QR) for name in MAPS], ids=MAPS)
@halves
@row(19, "80599")
def test_19_every_orthogonal_map(impl: Impl, dtype: torch.dtype, map_name: str) -> None:
    layer = impl.N.orthogonal(nn.Linear(4, 3, dtype=dtype), orthogonal_map=map_name)
    trained(layer, dtype)
    Q = layer.weight.detach().double()
    torch.testing.assert_close(Q @ Q.mT, torch.eye(3, dtype=Q.dtype), rtol=0, atol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize(
    "norm", ["weight_norm", "spectral_norm", pytest.param("orthogonal", marks=NO_QR)], ids=NORMS
)
@halves
@row(19, "114746")
def test_19_a_registered_module_is_cast(impl: Impl, dtype: torch.dtype, norm: str) -> None:
    layer = getattr(impl.N, norm)(nn.Linear(4, 3)).to(dtype)
    assert layer.weight.dtype is dtype
    trained(layer, dtype)


@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm", "orthogonal"], ids=NORMS)
@halves
@row(19, "191141")
def test_19_under_autocast(impl: Impl, dtype: torch.dtype, norm: str) -> None:
    layer = getattr(impl.N, norm)(nn.Linear(4, 3))
    with torch.autocast("cpu", dtype=dtype):
        output = layer(torch.ones(2, 4))
    assert output.dtype is dtype
    output.float().square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


def exact_spectral(layer: nn.Module) -> Tensor:
    step, original = layer.parametrizations.weight[0], layer.parametrizations.weight.original
    W, u, v = (tensor.detach().double() for tensor in (original, step._u, step._v))
    return W / (u @ W @ v)


def exact_weight(layer: nn.Module) -> Tensor:
    g, V = (original.detach().double() for original in layer.parametrizations.weight.parameters())
    return g * V / V.norm(dim=1, keepdim=True)


EXACT: dict[str, Callable[[nn.Module], Tensor]] = {
    "weight_norm": exact_weight,
    "spectral_norm": exact_spectral,
}


@pytest.mark.parametrize("norm", ["weight_norm", pytest.param("spectral_norm", marks=UNNORMED)])
@halves
@row(19, "PEFT 3601")
def test_19_the_value_is_rounded_once(impl: Impl, dtype: torch.dtype, norm: str) -> None:
    torch.manual_seed(0)
    layer = getattr(impl.N, norm)(nn.Linear(512, 256, dtype=dtype)).eval()
    exact = EXACT[norm](layer)
    half_a_unit = torch.finfo(dtype).eps / 2
    error = (layer.weight.detach().double() - exact).abs() / exact.abs().clamp_min(torch.finfo(dtype).tiny)
    assert error.max() <= half_a_unit * 1.01


@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm", pytest.param("orthogonal", marks=NARROWED)])
@halves
@row(19, "191141")
def test_19_autocast_does_not_touch_the_weight(impl: Impl, dtype: torch.dtype, norm: str) -> None:
    layer = getattr(impl.N, norm)(nn.Linear(4, 4)).eval()
    expected = layer.weight.detach()
    with torch.autocast("cpu", dtype=dtype):
        found = layer.weight.detach()
    assert found.dtype is torch.float32
    assert torch.equal(found, expected)
