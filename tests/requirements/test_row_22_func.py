"""Row 22: the transforms of torch.func see a parametrized module as the function it is."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap

import torchkiln
from parametrize.oracle import snapshot

from .table import Impl, fails_on, row

# torch's own: forward mode compiles with jit.script, and vmap lacks a batching rule or two.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`torch.jit.script` is deprecated:DeprecationWarning",
    "ignore:There is a performance drop:UserWarning",
)

X = torch.linspace(-1, 1, 8, dtype=torch.float64).reshape(2, 4)
NORMS = ["weight_norm", "spectral_norm", "orthogonal"]
norms = pytest.mark.parametrize("norm", NORMS)
NO_FORWARD_AD = fails_on("torch", "no forward-mode derivative of the fused kernel", NotImplementedError)
TRUNCATED = fails_on("torch", "orthogonal truncates the diagonal to integers, and jumps beside -1")
forward_mode = pytest.mark.parametrize(
    "norm", [pytest.param("weight_norm", marks=NO_FORWARD_AD), "spectral_norm", "orthogonal"]
)
by_differences = pytest.mark.parametrize(
    "norm",
    [
        pytest.param("weight_norm", marks=NO_FORWARD_AD),
        "spectral_norm",
        pytest.param("orthogonal", marks=TRUNCATED),
    ],
)

Tensors = Mapping[str, Tensor]


def layer_of(impl: Impl, norm: str) -> nn.Module:
    return getattr(impl.N, norm)(nn.Linear(4, 3, dtype=torch.float64)).eval()


def parameters(layer: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in layer.named_parameters()}


def loss_of(layer: nn.Module) -> Callable[[Tensors], Tensor]:
    return lambda tensors: functional_call(layer, dict(tensors), (X,)).square().sum()


def gradients(layer: nn.Module) -> dict[str, Tensor]:
    """The gradients of the loss by ordinary autograd."""
    named = dict(layer.named_parameters())
    return dict(zip(named, torch.autograd.grad(layer(X).square().sum(), list(named.values())), strict=True))


def slope(function: Callable[[Tensors], Tensor], at: Tensors, along: Tensors, *, h: float = 1e-6) -> Tensor:
    """The derivative by central differences."""
    ahead, behind = ({name: at[name] + s * along[name] for name in at} for s in (h, -h))
    return (function(ahead) - function(behind)) / (2 * h)


def directions(at: Tensors) -> dict[str, Tensor]:
    return {name: torch.randn_like(tensor) for name, tensor in at.items()}


# --- derivatives by the originals ---------------------------------------------------------------------------------


@norms
@row(22, "pytorch 186565")
def test_22_grad_and_vjp(impl: Impl, norm: str) -> None:
    layer = layer_of(impl, norm)
    torch.testing.assert_close(grad(loss_of(layer))(parameters(layer)), gradients(layer))
    _, pull_back = vjp(loss_of(layer), parameters(layer))
    torch.testing.assert_close(pull_back(torch.ones((), dtype=X.dtype))[0], gradients(layer))


@by_differences
@row(22, "pytorch 186565")
def test_22_jvp(impl: Impl, norm: str) -> None:
    layer = layer_of(impl, norm)
    at = parameters(layer)
    along = directions(at)
    _, tangent = jvp(loss_of(layer), (at,), (along,))
    torch.testing.assert_close(tangent, slope(loss_of(layer), at, along), rtol=1e-6, atol=1e-7)


@by_differences
@row(22, "pytorch 186565")
def test_22_dual_numbers_without_transforms(impl: Impl, norm: str) -> None:
    layer = layer_of(impl, norm)
    at = parameters(layer)
    along = directions(at)
    with forward_ad.dual_level():
        dual = {name: forward_ad.make_dual(at[name], along[name]) for name in at}
        tangent = forward_ad.unpack_dual(loss_of(layer)(dual)).tangent
    torch.testing.assert_close(tangent, slope(loss_of(layer), at, along), rtol=1e-6, atol=1e-7)


@forward_mode
@row(22, "pytorch 186565")
def test_22_jacobians_agree(impl: Impl, norm: str) -> None:
    layer = layer_of(impl, norm)
    outputs = functools.partial(functional_call, layer, args=(X,))
    backward = jacrev(outputs)(parameters(layer))
    torch.testing.assert_close(jacfwd(outputs)(parameters(layer)), backward)
    pull = 2 * functional_call(layer, parameters(layer), (X,)).flatten()
    by_chain_rule = {name: pull @ J.flatten(2).flatten(0, 1) for name, J in backward.items()}
    torch.testing.assert_close(by_chain_rule, {name: g.flatten() for name, g in gradients(layer).items()})


@by_differences
@row(22, "pytorch 186565")
def test_22_hessian(impl: Impl, norm: str) -> None:
    layer = layer_of(impl, norm)
    at = parameters(layer)
    along = directions(at)
    second = hessian(loss_of(layer))(at)
    product = {a: sum(torch.tensordot(second[a][b], along[b], along[b].ndim) for b in at) for a in at}
    expected = slope_of_gradient(layer, at, along)
    torch.testing.assert_close(product, expected, rtol=1e-5, atol=1e-6)


def slope_of_gradient(layer: nn.Module, at: Tensors, along: Tensors) -> dict[str, Tensor]:
    h = 1e-5
    ahead, behind = (grad(loss_of(layer))({n: at[n] + s * along[n] for n in at}) for s in (h, -h))
    return {name: (ahead[name] - behind[name]) / (2 * h) for name in at}


@norms
@row(22, "pytorch 186565")
def test_22_gradients_per_sample(impl: Impl, norm: str) -> None:
    layer = layer_of(impl, norm)

    def one(tensors: Tensors, x: Tensor) -> Tensor:
        return functional_call(layer, dict(tensors), (x[None],)).square().sum()

    batch = vmap(grad(one), (None, 0))(parameters(layer), X)
    each = [grad(one)(parameters(layer), x) for x in X]
    torch.testing.assert_close(batch, {name: torch.stack([g[name] for g in each]) for name in batch})


@norms
@row(22, "torchtitan 2754", torch="each member has a class of its own", raises=RuntimeError)
def test_22_ensembles(impl: Impl, norm: str) -> None:
    members = [layer_of(impl, norm) for _ in range(3)]
    stacked, buffers = stack_module_state(members)
    skeleton = copy.deepcopy(members[0])

    def loss(tensors: Tensors, state: Tensors) -> Tensor:
        return functional_call(skeleton, (dict(tensors), dict(state)), (X,)).square().sum()

    found = vmap(grad(loss))(stacked, buffers)
    each = [gradients(member) for member in members]
    torch.testing.assert_close(found, {name: torch.stack([g[name] for g in each]) for name in found})


# --- names --------------------------------------------------------------------------------------------------------


def everything(layer: nn.Module) -> dict[str, Tensor]:
    return {**parameters(layer), **dict(layer.named_buffers())}


@norms
@row(22, "pytorch 186565")
def test_22_a_strict_call_with_the_originals(impl: Impl, norm: str) -> None:
    layer, other = layer_of(impl, norm), layer_of(impl, norm)
    before = snapshot(layer)
    assert torch.equal(functional_call(layer, everything(other), (X,), strict=True), other(X))
    assert snapshot(layer) == before


def plain_tensors() -> dict[str, Tensor]:
    weight = torch.linspace(-1, 2, 12, dtype=X.dtype).reshape(3, 4)  # no value of any of the norms
    return {"weight": weight, "bias": torch.arange(3.0, dtype=X.dtype)}


def plain_output() -> Tensor:
    return nn.functional.linear(X, **plain_tensors())


ASSIGNED = "assigns the tensor, and then the value before: both write to the originals"
by_assignment = pytest.mark.parametrize(
    "norm", ["weight_norm", *(pytest.param(n, marks=fails_on("torch", ASSIGNED)) for n in NORMS[1:])]
)


@by_assignment
@row(22, "pytorch 186565")
def test_22_the_plain_name_disables_the_parametrization(impl: Impl, norm: str) -> None:
    """As the documentation of torch.func.functional_call says."""
    torch.testing.assert_close(functional_call(layer_of(impl, norm), plain_tensors(), (X,)), plain_output())


@by_assignment
@row(22, "pytorch 186565")
def test_22_the_plain_name_leaves_the_module_as_it_was(impl: Impl, norm: str) -> None:
    layer = layer_of(impl, norm)
    before = snapshot(layer)
    functional_call(layer, plain_tensors(), (X,))
    with pytest.raises(TypeError, match="linear"):
        functional_call(layer, plain_tensors(), ("no tensor",))
    assert snapshot(layer) == before


@norms
@row(22, "pytorch 186565", torch=ASSIGNED, raises=RuntimeError)
def test_22_a_gradient_by_the_plain_name(impl: Impl, norm: str) -> None:
    layer = layer_of(impl, norm)
    found = grad(lambda W: functional_call(layer, {"weight": W}, (X,)).sum())(plain_tensors()["weight"])
    torch.testing.assert_close(found, X.sum(0).expand(3, 4))


@norms
@row(22, "pytorch 186565", torch=ASSIGNED)
def test_22_calls_within_calls(impl: Impl, norm: str) -> None:
    """Each has its own tensor, within ``cached()`` as well, and is undone when it ends."""
    layer = layer_of(impl, norm)
    own = layer(X)

    def nested(x: Tensor) -> tuple[Tensor, Tensor]:
        doubled = functional_call(layer, {"weight": 2 * plain_tensors()["weight"]}, (x,))
        return layer(x), doubled

    outer = nn.Module()
    outer.layer, outer.forward = layer, nested
    with impl.P.cached():
        assert torch.equal(layer(X), own)
        once, twice = functional_call(outer, {f"layer.{n}": t for n, t in plain_tensors().items()}, (X,))
        assert torch.equal(layer(X), own)
    assert torch.equal(once, plain_output())
    torch.testing.assert_close(twice, 2 * once - plain_tensors()["bias"])


def own_functional_call(impl: Impl) -> Callable[..., Tensor]:
    return torchkiln.functional_call if impl.name == "torchkiln" else functional_call


REFUSED = "compares the names with named_parameters()"


@norms
@row(22, "pytorch 186565", torch=REFUSED, raises=RuntimeError)
def test_22_a_strict_call_with_the_plain_name(impl: Impl, norm: str) -> None:
    layer = layer_of(impl, norm)
    before = snapshot(layer)
    assert torch.equal(own_functional_call(impl)(layer, plain_tensors(), (X,), strict=True), plain_output())
    assert snapshot(layer) == before


def baked(impl: Impl) -> Any:
    return torchkiln.baked if impl.name == "torchkiln" else impl.P.baked


@norms
@row(22, "pytorch 186565", torch="torch cannot fold for the time of a call", raises=AttributeError)
def test_22_plain_names_on_a_folded_model(impl: Impl, norm: str) -> None:
    """Strictly, with derivatives by the plain tensor, and the module is as before."""
    layer = layer_of(impl, norm)
    before = snapshot(layer)
    with baked(impl)(layer):
        assert torch.equal(functional_call(layer, plain_tensors(), (X,), strict=True), plain_output())
        found = grad(lambda W: functional_call(layer, {"weight": W}, (X,)).sum())(plain_tensors()["weight"])
    torch.testing.assert_close(found, X.sum(0).expand(3, 4))
    assert snapshot(layer) == before
