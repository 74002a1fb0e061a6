"""Row 24: an error names its cause and the way out, and a registration that fails changes nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from parametrize.oracle import anatomy
from parametrize.steps import Scale

from .table import Impl, fails_on, row


class MisspelledLater(nn.Module):
    """Asks itself for something that it does not have, once it is armed."""

    armed = False

    def forward(self, X: Tensor) -> Tensor:
        return self.scale * X if self.armed else X


# --- causes -------------------------------------------------------------------------------------------------------


@row(24, "pytorch 58488", torch="torch reports the tensor as missing")
def test_24_an_attribute_error_in_a_step_is_itself(impl: Impl) -> None:
    step = MisspelledLater()
    layer = impl.P.register_parametrization(nn.Linear(4, 3), "weight", step)
    step.armed = True
    with pytest.raises(AttributeError) as caught:
        layer(torch.ones(2, 4))
    assert str(caught.value) == "'MisspelledLater' object has no attribute 'scale'"


@row(24, "pytorch 58488", torch="torch reports the tensor as missing")
def test_24_the_traceback_leads_to_the_line(impl: Impl) -> None:
    step = MisspelledLater()
    layer = impl.P.register_parametrization(nn.Linear(4, 3), "weight", step)
    step.armed = True
    with pytest.raises(AttributeError) as caught:
        _ = layer.weight
    assert any(frame.frame.code.raw is MisspelledLater.forward.__code__ for frame in caught.traceback)


# --- remedies -----------------------------------------------------------------------------------------------------


def register(impl: Impl, module: nn.Module, name: str) -> None:
    impl.P.register_parametrization(module, name, Scale())


def weight_norm(impl: Impl, module: nn.Module, name: str) -> None:
    impl.N.weight_norm(module, name)


def spectral_norm(impl: Impl, module: nn.Module, name: str) -> None:
    impl.N.spectral_norm(module, name)


def orthogonal(impl: Impl, module: nn.Module, name: str) -> None:
    impl.N.orthogonal(module, name)


Verb = Callable[[Impl, nn.Module, str], None]
verbs = pytest.mark.parametrize("verb", [register, weight_norm, spectral_norm, orthogonal])


def told(impl: Impl, verb: Verb, module: nn.Module, name: str) -> str:
    """The message, of an error that torch's users would catch as well; the module is as it was."""
    before = dict(vars(module)), type(module), list(module.state_dict())
    with pytest.raises(ValueError) as caught:  # noqa: PT011  the caller matches the text
        verb(impl, module, name)
    assert (dict(vars(module)), type(module), list(module.state_dict())) == before
    return str(caught.value)


@pytest.mark.parametrize(
    "verb",
    [
        register,
        weight_norm,
        spectral_norm,
        orthogonal,
    ],
)
@row(
    24,
    "pytorch 125064",
    torch="an AttributeError of None, or the name is called missing",
    raises=(AssertionError, AttributeError),
)
def test_24_a_tensor_that_is_none(impl: Impl, verb: Verb) -> None:
    text = told(impl, verb, nn.Linear(4, 3, bias=False), "bias")
    assert "Linear.bias is None" in text
    assert "before registering" in text


@verbs
@row(
    24,
    "ao 2062",
    torch="an error about shapes",
    raises=(AssertionError, RuntimeError),
)
def test_24_a_lazy_tensor(impl: Impl, verb: Verb) -> None:
    text = told(impl, verb, nn.LazyLinear(3), "weight")
    assert "LazyLinear.weight" in text
    assert "forward" in text


@verbs
@row(24, "pytorch 125064", torch="the name is called missing")
def test_24_a_dotted_name(impl: Impl, verb: Verb) -> None:
    text = told(impl, verb, nn.Sequential(nn.Linear(4, 3)), "0.weight")
    assert "get_submodule" in text


@row(
    24,
    "pytorch 125064",
    torch="'function' object has no attribute 'train'",
    raises=AttributeError,
)
def test_24_a_step_that_is_no_module(impl: Impl) -> None:
    with pytest.raises((TypeError, ValueError), match=r"nn\.Module"):
        impl.P.register_parametrization(nn.Linear(4, 3), "weight", torch.triu)


# --- names that something else has --------------------------------------------------------------------------------


class Named(nn.Module):
    """A module with one tensor."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.register_parameter(name, nn.Parameter(torch.ones(3)))


@pytest.mark.parametrize("name", ["keys", "values", "items", "pop", "update"])
@row(24, "reproduced on torch 2.13", torch="nn.ModuleDict refuses the name, with no way out", raises=KeyError)
def test_24_a_name_that_a_dictionary_has(impl: Impl, name: str) -> None:
    module = Named(name)
    impl.P.register_parametrization(module, name, Scale())
    assert torch.equal(getattr(module, name), torch.ones(3))
    assert impl.P.is_parametrized(module, name)
    assert list(module.state_dict()) == [f"parametrizations.{name}.original"]
    impl.P.remove_parametrizations(module, name)
    assert torch.equal(getattr(module, name), torch.ones(3))
    assert type(module) is Named


class Taken(Named):
    """Has an attribute of the name under which the chains are kept."""

    def __init__(self, value: object) -> None:
        super().__init__("weight")
        self.parametrizations = value


OVERWRITTEN = "it is overwritten, or the error is of another kind"


@pytest.mark.parametrize(
    "value",
    [3, nn.ModuleDict({"mine": nn.ReLU()}), nn.Parameter(torch.ones(3))],
    ids=["attribute", "modules", "tensor"],
)
@row(
    24,
    "reproduced on torch 2.13",
    torch=OVERWRITTEN,
    raises=(IndexError, TypeError, pytest.fail.Exception),
)
def test_24_the_name_of_the_chains_is_taken(impl: Impl, value: object) -> None:
    module = Taken(value)
    with pytest.raises((KeyError, ValueError), match="parametrizations"):
        impl.P.register_parametrization(module, "weight", Scale())
    assert module.parametrizations is value
    assert type(module) is Taken


# --- nothing half done --------------------------------------------------------------------------------------------


class Refuses(nn.Module):
    """Fails in one of the calls that registration makes."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    def _maybe(self, where: str, X: Tensor) -> Tensor:
        if self.where == where:
            raise RuntimeError("refused")
        if self.where == f"{where}, shape":
            return X[:1]
        if self.where == f"{where}, dtype":
            return X.double()
        return None if self.where == f"{where}, nothing" else X * 1

    def forward(self, X: Tensor) -> Tensor:
        return self._maybe("forward", X)

    def right_inverse(self, X: Tensor) -> Tensor:
        return self._maybe("inverse", X / 2)


FAILURES = [
    f"{call}{what}" for call in ("forward", "inverse") for what in ("", ", shape", ", dtype", ", nothing")
]


@pytest.mark.parametrize("where", FAILURES)
@pytest.mark.parametrize("chained", [False, True], ids=["first", "second"])
@row(24, "pytorch 58488", torch="the data is changed, or the step is left in another mode")
def test_24_a_failed_registration_leaves_no_trace(impl: Impl, where: str, chained: bool) -> None:
    layer = nn.Linear(4, 3)
    if chained:
        impl.P.register_parametrization(layer, "weight", Scale())
    before, state = anatomy(layer), torch.get_rng_state()
    step = Refuses(where).eval()
    with pytest.raises((RuntimeError, ValueError)):
        impl.P.register_parametrization(layer, "weight", step)
    assert anatomy(layer) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert not step.training


@pytest.mark.parametrize(
    "where",
    [
        pytest.param("forward", marks=fails_on("torch", "the original has other data by then", RuntimeError)),
        "inverse",
    ],
)
@row(24, "pytorch 58488")
def test_24_a_graph_made_before_a_failed_registration_is_valid(impl: Impl, where: str) -> None:
    layer = nn.Linear(4, 3)
    loss = layer(torch.ones(2, 4, requires_grad=True)).sum()
    with pytest.raises(RuntimeError, match="refused"):
        impl.P.register_parametrization(layer, "weight", Refuses(where))
    loss.backward()
    assert torch.equal(layer.weight.grad, torch.full((3, 4), 2.0))
