"""``weight_norm`` gives torch's numbers, names and errors, and loads the keys of the older one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.autograd.gradcheck import GradcheckError

from parametrize.oracle import OURS, TORCH, Impl, beyond_torch

from .agreement import assert_agree, assert_close, assert_same_error, assert_same_names, both

MODULES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(4, 3, dtype=torch.float64),
    "convolution 1d": lambda: nn.Conv1d(4, 3, 2, dtype=torch.float64),
    "convolution 2d": lambda: nn.Conv2d(2, 3, (2, 3), dtype=torch.float64),
    "convolution 3d": lambda: nn.Conv3d(2, 2, 2, dtype=torch.float64),
    "transposed convolution": lambda: nn.ConvTranspose1d(4, 3, 2, dtype=torch.float64),
    "grouped convolution": lambda: nn.Conv1d(4, 4, 3, groups=2, dtype=torch.float64),
    "embedding": lambda: nn.Embedding(5, 3, dtype=torch.float64),
    "bilinear": lambda: nn.Bilinear(2, 3, 4, dtype=torch.float64),
}
EVERY_MODULE = pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)


@EVERY_MODULE
@pytest.mark.parametrize("dim", [0, 1, None, -1])
def test_dimensions(module: Callable[[], nn.Module], dim: int | None) -> None:
    theirs, ours = both(lambda impl: impl.N.weight_norm(module(), dim=dim))
    assert_agree(ours, theirs)


@pytest.mark.parametrize("dim", [2, 3, -2])
def test_further_dimensions(dim: int) -> None:
    def make(impl: Impl) -> nn.Module:
        return impl.N.weight_norm(nn.Conv2d(2, 3, (2, 3), dtype=torch.float64), "weight", dim)

    try:
        make(TORCH)
    except (RuntimeError, IndexError):
        assert_same_error(make)
    else:
        theirs, ours = both(make)
        assert_agree(ours, theirs)


@pytest.mark.parametrize("dim", [0, None, -1])
def test_vector(dim: int | None) -> None:
    theirs, ours = both(lambda impl: impl.N.weight_norm(nn.Linear(4, 3, dtype=torch.float64), "bias", dim))
    assert_agree(ours, theirs, "bias")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@EVERY_MODULE
def test_forward_and_backward(module: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    def make(impl: Impl) -> nn.Module:
        layer = impl.N.weight_norm(module().to(dtype))
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.add_(torch.randn_like(parameter) / 4)
        return layer

    theirs, ours = both(make)
    assert_agree(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision(impl: Impl, dtype: torch.dtype) -> None:
    layer = impl.N.weight_norm(nn.Linear(64, 32, dtype=dtype))
    g, v = (original.detach().double() for original in layer.parametrizations.weight.parameters())
    exact = g * v / v.norm(dim=1, keepdim=True)
    assert layer.weight.dtype is dtype
    torch.testing.assert_close(layer.weight.double(), exact, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("dim", [0, 3])
def test_channels_last(dim: int) -> None:
    """torch's kernel does not look at strides: the tensors have to be contiguous before they reach it."""
    theirs, ours = both(
        lambda impl: impl.N.weight_norm(
            nn.Conv2d(4, 3, (2, 3), dtype=torch.float64).to(memory_format=torch.channels_last), dim=dim
        )
    )
    assert not ours.parametrizations.weight.original1.is_contiguous()
    assert_agree(ours, theirs)


@EVERY_MODULE
def test_registration_keeps_the_value(impl: Impl, module: Callable[[], nn.Module]) -> None:
    layer = module()
    value = layer.weight.detach().clone()
    impl.N.weight_norm(layer)
    assert_close(layer.weight.detach(), value)


@pytest.mark.parametrize("dim", [0, None])
def test_assignment(dim: int | None) -> None:
    def make(impl: Impl) -> nn.Module:
        layer = impl.N.weight_norm(nn.Linear(4, 3, dtype=torch.float64), dim=dim)
        layer.weight = torch.randn(3, 4, dtype=torch.float64)
        return layer

    theirs, ours = both(make)
    assert_agree(ours, theirs)


@beyond_torch("torch divides by zero")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [0, 1, 2, None])
def test_a_zero_slice_is_zero_and_stays_so(impl: Impl, dim: int | None, dtype: torch.dtype) -> None:
    """No direction, so no value; the gradients of all the others are what they are without it."""
    layer = impl.N.weight_norm(nn.Conv1d(4, 3, 2, dtype=dtype), dim=dim)
    chain = layer.parametrizations.weight
    index = slice(None) if dim is None else 1
    with torch.no_grad():
        chain.original1.movedim(dim or 0, 0)[index] = 0
    weight = layer.weight
    (weight - 1).square().sum().backward()
    assert weight.isfinite().all()
    assert weight.movedim(dim or 0, 0)[index].eq(0).all()
    for gradient in (chain.original0.grad, chain.original1.grad):
        assert gradient.isfinite().all()
    assert chain.original1.grad.movedim(dim or 0, 0)[index].eq(0).all()
    assert dim is None or not chain.original1.grad.movedim(dim, 0)[0].eq(0).any()


@EVERY_MODULE
def test_training(module: Callable[[], nn.Module]) -> None:
    theirs, ours = both(lambda impl: impl.N.weight_norm(module()))
    for layer in (theirs, ours):
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            (layer.weight - 0.5).square().sum().backward()
            optimizer.step()
    assert_agree(ours, theirs)


@pytest.mark.parametrize(("source", "target"), [(TORCH, OURS), (OURS, TORCH)], ids=["to ours", "to torch"])
@pytest.mark.parametrize("dim", [0, 1, None])
def test_state_dicts_move(source: Impl, target: Impl, dim: int | None) -> None:
    giver, taker = (
        impl.N.weight_norm(nn.Linear(4, 3, dtype=torch.float64), dim=dim) for impl in (source, target)
    )
    assert repr(taker.load_state_dict(giver.state_dict())) == "<All keys matched successfully>"
    assert_close(taker.weight.detach(), giver.weight.detach())


def legacy(module: nn.Module, name: str = "weight", dim: int | None = 0) -> nn.Module:
    """The older norm, which recomputes the weight in a hook."""
    return torch.nn.utils.weight_norm(module, name, dim)


@EVERY_MODULE
@pytest.mark.parametrize("dim", [0, 1, None])
def test_legacy_keys(impl: Impl, module: Callable[[], nn.Module], dim: int | None) -> None:
    old, new = legacy(module(), dim=dim), impl.N.weight_norm(module(), dim=dim)
    assert repr(new.load_state_dict(old.state_dict())) == "<All keys matched successfully>"
    assert_close(new.weight.detach(), old.weight.detach())


def test_legacy_keys_below_a_prefix(impl: Impl) -> None:
    def model(norm: Callable[..., nn.Module]) -> nn.Module:
        return nn.Sequential(norm(nn.Linear(4, 3), "bias"), nn.Sequential(nn.ReLU(), norm(nn.Linear(3, 2))))

    old, new = model(legacy), model(impl.N.weight_norm)
    assert repr(new.load_state_dict(old.state_dict())) == "<All keys matched successfully>"
    x = torch.ones(1, 4)
    assert_close(new(x).detach(), old(x).detach())


def test_the_state_dict_of_the_caller_is_not_changed(impl: Impl) -> None:
    old, new = legacy(nn.Linear(4, 3)), impl.N.weight_norm(nn.Linear(4, 3))
    state = old.state_dict()
    new.load_state_dict(state)
    assert list(state) == ["bias", "weight_g", "weight_v"]


def test_two_norms_on_one_module(impl: Impl) -> None:
    old = legacy(legacy(nn.RNNCell(4, 3), "weight_ih"), "weight_hh")
    new = impl.N.weight_norm(impl.N.weight_norm(nn.RNNCell(4, 3), "weight_ih"), "weight_hh")
    assert repr(new.load_state_dict(old.state_dict())) == "<All keys matched successfully>"
    x = torch.ones(1, 4)
    assert_close(new(x).detach(), old(x).detach())


def test_half_of_the_legacy_keys_is_not_enough(impl: Impl) -> None:
    new = impl.N.weight_norm(nn.Linear(4, 3))
    state = new.state_dict()
    state["weight_g"] = state.pop("parametrizations.weight.original0")
    with pytest.raises(RuntimeError, match=r"Missing key.*original0(?s:.*)Unexpected key.*weight_g"):
        new.load_state_dict(state)


def test_removal() -> None:
    def make(impl: Impl) -> nn.Module:
        layer = impl.N.weight_norm(nn.Linear(4, 3, dtype=torch.float64))
        return impl.P.remove_parametrizations(layer, "weight")

    theirs, ours = both(make)
    assert type(ours) is nn.Linear
    assert_close(ours.weight.detach(), theirs.weight.detach())
    assert isinstance(ours.weight, nn.Parameter)


def test_legacy_keys_after_removal(impl: Impl) -> None:
    layer = impl.N.weight_norm(nn.Linear(4, 3))
    impl.P.remove_parametrizations(layer, "weight")
    with pytest.raises(RuntimeError, match="Missing key"):
        layer.load_state_dict(legacy(nn.Linear(4, 3)).state_dict())


def test_below_another_step() -> None:
    def make(impl: Impl) -> nn.Module:
        layer = impl.N.weight_norm(nn.Linear(4, 3, dtype=torch.float64))
        return impl.N.spectral_norm(layer).eval()

    theirs, ours = both(make)
    assert_same_names(ours, theirs)
    assert_close(ours.weight.detach(), theirs.weight.detach())


@pytest.mark.parametrize(
    "call",
    [
        lambda impl: impl.N.weight_norm(nn.Linear(4, 3), "missing"),
        lambda impl: impl.N.weight_norm(nn.Linear(4, 3), dim=2),
        lambda impl: impl.N.weight_norm(nn.Linear(4, 3), dim=-3),
        lambda impl: impl.N.weight_norm(nn.Linear(4, 3), "in_features"),
        lambda impl: impl.P.remove_parametrizations(
            impl.N.weight_norm(nn.Linear(4, 3)), "weight", leave_parametrized=False
        ),
    ],
    ids=["missing", "dimension", "negative dimension", "no tensor", "several originals"],
)
def test_errors(call: Callable[[Impl], nn.Module]) -> None:
    assert_same_error(call)


@pytest.mark.parametrize("dim", [0, 1, None])
def test_gradcheck(dim: int | None) -> None:
    layer = OURS.N.weight_norm(nn.Linear(4, 3, dtype=torch.float64), dim=dim)
    chain = layer.parametrizations.weight
    originals = [original.detach().clone().requires_grad_() for original in chain.parameters()]
    assert torch.autograd.gradcheck(chain[0], originals)


@beyond_torch("the second derivative of torch's kernel is wrong", raises=GradcheckError)
@pytest.mark.parametrize("dim", [0, 1])
def test_second_derivative(impl: Impl, dim: int) -> None:
    layer = impl.N.weight_norm(nn.Linear(4, 3, dtype=torch.float64), dim=dim)
    chain = layer.parametrizations.weight
    originals = [original.detach().clone().requires_grad_() for original in chain.parameters()]
    assert torch.autograd.gradgradcheck(chain[0], originals)


def test_second_derivative_of_one_length(impl: Impl) -> None:
    layer = impl.N.weight_norm(nn.Linear(4, 3, dtype=torch.float64), dim=None)
    chain = layer.parametrizations.weight
    originals = [original.detach().clone().requires_grad_() for original in chain.parameters()]
    assert torch.autograd.gradgradcheck(chain[0], originals)
