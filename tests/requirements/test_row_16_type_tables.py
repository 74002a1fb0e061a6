"""Row 16: code that decides by a module's type treats a parametrized module as what it was."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.ao.quantization as quantization
import torch.distributed
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

import torchkiln
from parametrize.oracle import snapshot
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


NO_FOLD = "torch cannot fold for the time of a call, nor copy an LSTM after a forward"


def baked(impl: Impl) -> Any:
    return torchkiln.baked if impl.name == "torchkiln" else impl.P.baked


@quantizes
@pytest.mark.parametrize("kind", [nn.Linear, nn.LSTM])
@row(16, "pytorch 74848", torch=NO_FOLD, raises=(AttributeError, RuntimeError))
def test_16_dynamic_quantization(impl: Impl, kind: type[nn.Module]) -> None:
    """Of the plain form: torch.ao compares ``type(module)`` by identity, and no subclass is identical.

    That a class cannot claim to be equal either is shown below.
    """
    layer = impl.N.weight_norm(kind(4, 3), "weight" if kind is nn.Linear else "weight_hh_l0")
    model, x = nn.Sequential(layer).eval(), X[None]
    (expected, *_), before = model(x), snapshot(model)
    with pytest.raises(AssertionError, match="from_float only works for"):
        quantization.quantize_dynamic(model, {kind})
    assert snapshot(model) == before
    with baked(impl)(model):
        quantized = quantization.quantize_dynamic(model, {kind})
    assert snapshot(model) == before
    assert "quantized" in type(quantized[0]).__module__
    torch.testing.assert_close(quantized(x)[0], expected, atol=0.02, rtol=0)


class Quantized(nn.Parameter):
    """The parameter that torchao's ``quantize_`` assigns to ``module.weight``."""


@row(16, "pytorch 74848", torch="says neither why nor what to do", raises=AssertionError)
def test_16_a_parameter_in_the_place_of_a_computed_tensor_is_refused(impl: Impl) -> None:
    layer = normed(impl)
    before = snapshot(layer)
    with pytest.raises(KeyError, match="attribute 'weight' already exists") as refusal:
        layer.weight = Quantized(layer.weight.detach().round())
    assert snapshot(layer) == before
    assert "torchkiln.bake(model)" in str(refusal.value)


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


# --- why a class cannot claim to be equal -------------------------------------------------------------------------


class EqualToItsBase(type):
    """A metaclass whose classes equal their base, and with ``HashOfItsBase`` are found in tables of it."""

    def __eq__(cls, other: object) -> bool:
        return cls is other or (cls.__name__ == "Claims" and cls.__bases__[0] is other)

    __hash__ = type.__hash__


class HashOfItsBase(EqualToItsBase):
    """The same, with the hash of the base too."""

    def __hash__(cls) -> int:
        return hash(cls.__bases__[0])


def test_equality_to_the_base_breaks_the_dispatch_by_class() -> None:
    """Python merges lines of ancestors by ``==``: the class would look like an ancestor of its base."""
    claims = EqualToItsBase("Claims", (nn.Linear,), {})
    kind = functools.singledispatch(lambda module: "unknown")
    kind.register(nn.Linear, lambda module: "linear")
    assert claims in [nn.Linear]
    assert kind(nn.Linear(4, 3)) == "linear"
    assert kind(claims(4, 3)) == "unknown"


def test_the_hash_of_the_base_gives_it_the_class_that_fsdp_made_for_the_base(mesh: DeviceMesh) -> None:
    """And so takes its computed tensors away; FSDP, like others, keeps what it makes by class."""
    claims = HashOfItsBase("Claims", (nn.Linear,), {})
    plain, claiming = nn.Linear(4, 3), claims(4, 3)
    for layer in (plain, claiming):
        fully_shard(layer, mesh=mesh)
    assert type(claiming) is type(plain)


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
