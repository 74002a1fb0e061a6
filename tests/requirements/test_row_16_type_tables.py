"""Row 16: code that decides by a module's type treats a parametrized module as what it was."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.ao.quantization as quantization
import torch.distributed
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from parametrize.steps import Scale

from .table import Impl, row

X = torch.linspace(-1, 1, 8).reshape(2, 4)

quantizes = pytest.mark.filterwarnings(
    "ignore:torch.ao.quantization is deprecated:DeprecationWarning",
    "ignore:torch.quantize_per_tensor:UserWarning",
    "ignore:Please use quant_min and quant_max:UserWarning",
)


class Own(nn.Module):
    """A user's module."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


# --- isinstance and the type before -------------------------------------------------------------------------------


@row(16, "pytorch 74846")
def test_16_it_is_an_instance_and_knows_its_true_type(impl: Impl) -> None:
    layer = impl.N.spectral_norm(impl.N.weight_norm(nn.Linear(4, 3)), "bias")
    assert isinstance(layer, nn.Linear)
    assert impl.P.type_before_parametrizations(layer) is nn.Linear
    assert torch.nn.utils.parametrize.type_before_parametrizations(layer) is nn.Linear


@row(16, "opacus 646")
def test_16_a_table_by_true_type_finds_it(impl: Impl) -> None:
    """Per-sample gradients by layer type, as opacus computes them; the table is asked with the type before."""
    table = {nn.Linear: lambda x, g: torch.einsum("no,ni->noi", g, x)}
    layer = impl.P.register_parametrization(nn.Linear(4, 3), "weight", Scale())
    g = torch.randn(2, 3)
    sampler = table[impl.P.type_before_parametrizations(layer)]
    (whole,) = torch.autograd.grad(layer(X), layer.parametrizations.weight.original, g)
    torch.testing.assert_close(2 * sampler(X, g).sum(0), whole)


@row(16, "opacus 646")
def test_16_single_dispatch_finds_it(impl: Impl) -> None:
    @functools.singledispatch
    def kind(module: nn.Module) -> str:
        return "unknown"

    kind.register(nn.Linear, lambda module: "linear")
    assert kind(impl.N.weight_norm(nn.Linear(4, 3))) == "linear"


# --- fully_shard --------------------------------------------------------------------------------------------------


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[DeviceMesh]:
    """One process by itself."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield DeviceMesh("cpu", [0])
    finally:
        torch.distributed.destroy_process_group()


@row(16, "reproduced on torch 2.13", torch="torch takes FSDPModule for the class before")
def test_16_the_true_type_under_fully_shard(impl: Impl, mesh: DeviceMesh) -> None:
    layer = impl.N.weight_norm(nn.Linear(4, 3))
    fully_shard(layer, mesh=mesh)
    assert type(layer).__name__.startswith("FSDP")
    assert impl.P.type_before_parametrizations(layer) is nn.Linear


@pytest.mark.parametrize("leave", [True, False], ids=["baked", "restored"])
@row(
    16,
    "reproduced on torch 2.13",
    torch="torch looks for the property on FSDP's class",
    raises=AttributeError,
)
def test_16_removal_under_fully_shard(impl: Impl, mesh: DeviceMesh, leave: bool) -> None:
    layer = impl.P.register_parametrization(nn.Linear(4, 3), "weight", Scale())
    chosen = (layer.weight if leave else layer.parametrizations.weight.original).detach().clone()
    fully_shard(layer, mesh=mesh)
    impl.P.remove_parametrizations(layer, "weight", leave_parametrized=leave)
    assert not impl.P.is_parametrized(layer)
    assert type(layer).__mro__[2:] == nn.Linear.__mro__
    assert torch.equal(layer.weight.full_tensor(), chosen)


@row(16, "reproduced on torch 2.13")
def test_16_a_class_on_top_survives_a_second_tensor(impl: Impl, mesh: DeviceMesh) -> None:
    layer = impl.P.register_parametrization(nn.Linear(4, 3), "weight", Scale())
    fully_shard(layer, mesh=mesh)
    impl.P.register_parametrization(layer, "bias", Scale())
    assert isinstance(layer, torch.distributed.fsdp.FSDPModule)
    assert impl.P.is_parametrized(layer, "weight")
    assert impl.P.is_parametrized(layer, "bias")
    assert torch.equal(layer.bias.full_tensor(), 2 * layer.parametrizations.bias.original.full_tensor())


# --- quantization -------------------------------------------------------------------------------------------------


def normed(impl: Impl) -> nn.Module:
    return impl.N.weight_norm(nn.Linear(4, 3))


@quantizes
@row(
    16,
    "pytorch 74848",
    torch="torch.ao asserts on type(module)",
    torchkiln="torch.ao asserts on type(module); bake first",
)
def test_16_dynamic_quantization(impl: Impl) -> None:
    model = nn.Sequential(normed(impl), nn.ReLU()).eval()
    expected = model(X)
    quantized = quantization.quantize_dynamic(model, {nn.Linear})
    assert type(quantized[0]).__name__ == "Linear"
    assert "quantized" in type(quantized[0]).__module__
    torch.testing.assert_close(quantized(X), expected, atol=0.02, rtol=0)


@quantizes
@row(16, "pytorch 74848")
def test_16_static_quantization(impl: Impl) -> None:
    model = nn.Sequential(quantization.QuantStub(), normed(impl), quantization.DeQuantStub()).eval()
    model.qconfig = quantization.default_qconfig
    expected = model(X)
    prepared = quantization.prepare(model)
    prepared(X)
    converted = quantization.convert(prepared)
    assert "quantized" in type(converted[1]).__module__
    torch.testing.assert_close(converted(X), expected, atol=0.02, rtol=0)


@quantizes
@row(16, "pytorch 74846")
def test_16_quantization_aware_training(impl: Impl) -> None:
    model = nn.Sequential(quantization.QuantStub(), normed(impl), quantization.DeQuantStub()).train()
    model.qconfig = quantization.default_qat_qconfig
    prepared = quantization.prepare_qat(model)
    assert impl.P.is_parametrized(prepared[1], "weight")
    prepared(X).sum().backward()
    assert prepared[1].parametrizations.weight.original0.grad.any()
    converted = quantization.convert(prepared.eval())
    torch.testing.assert_close(converted(X), prepared(X), atol=0.02, rtol=0)


# --- fx -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [nn.Linear, Own])
@row(16, "pytorch 74846")
def test_16_fx_takes_a_parametrized_layer_for_a_leaf(impl: Impl, kind: type[nn.Module]) -> None:
    layer = impl.N.weight_norm(kind(4, 3) if kind is nn.Linear else kind())
    graph = torch.fx.symbolic_trace(nn.Sequential(layer, nn.ReLU()))
    assert [node.op for node in graph.graph.nodes] == ["placeholder", "call_module", "call_module", "output"]
    assert torch.equal(graph(X), layer(X).relu())


@row(16, "pytorch 74846")
def test_16_fx_traces_into_a_parametrized_module(impl: Impl) -> None:
    """The graph computes the weight from its originals, and so trains them."""
    layer = impl.N.weight_norm(Own())
    graph = torch.fx.symbolic_trace(layer)
    with torch.no_grad():
        layer.parametrizations.weight.original0.mul_(3)
    assert torch.equal(graph(X), layer(X))
