"""Run the same calls on torch and on torchkiln and compare everything that can be observed.

Two decorators make a test of a function that takes an implementation:

- ``differential``: a generator whose yields (modules, tensors, errors, plain values) must be the same on both;
- ``beyond_torch``: an ordinary test that holds on torchkiln and is known to fail on torch, with the reason.

An ordinary test that takes the fixture ``impl`` holds on both.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch

# Bound once: while torchkiln is installed in torch's place, a later import of these names gives ours.
import torch.nn.utils.parametrizations as torch_parametrizations
import torch.nn.utils.parametrize as torch_parametrize
from torch import Tensor, nn

from torchkiln._core.errors import TorchkilnError
from torchkiln._core.writes import ComputedTensor


@dataclass(frozen=True)
class Impl:
    """One implementation: ``P`` is its parametrize module, ``N`` its parametrizations module."""

    name: str

    @property
    def P(self) -> ModuleType:
        return torch_parametrize if self.name == "torch" else importlib.import_module("torchkiln.parametrize")

    @property
    def N(self) -> ModuleType:
        if self.name == "torch":
            return torch_parametrizations
        return importlib.import_module("torchkiln.parametrizations")

    def __str__(self) -> str:
        return self.name


TORCH = Impl("torch")
OURS = Impl("torchkiln")


def beyond_torch(
    reason: str, *, raises: type[Exception] | tuple[type[Exception], ...] = AssertionError
) -> Any:
    """Run the test on both, where torch must fail with one of ``raises``."""
    known = pytest.mark.xfail(strict=True, reason=reason, raises=raises)
    return pytest.mark.parametrize("impl", [pytest.param(TORCH, marks=known), OURS], ids=str)


def differential(scenario: Callable[..., Iterator[Any]]) -> Callable[..., None]:
    """Turn a generator that takes an implementation first into a test that compares the two runs."""

    @functools.wraps(scenario)
    def test(**arguments: Any) -> None:
        expected = observe(scenario(TORCH, **arguments))
        assert expected, "the scenario observed nothing"
        assert_same(observe(scenario(OURS, **arguments)), expected)

    parameters = list(inspect.signature(scenario).parameters.values())[1:]
    test.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return test


def observe(run: Iterator[Any]) -> list[Any]:
    """Collect what a scenario yields, each frozen at the moment it was yielded, from a fixed seed."""
    torch.manual_seed(0)
    return [freeze(seen) for seen in run]


def raised(call: Callable[[], Any]) -> Exception:
    """Return the exception that ``call`` raises."""
    with pytest.raises(Exception) as caught:  # noqa: PT011  the type and text are compared by the caller
        call()
    return caught.value


def freeze(seen: Any) -> Any:
    """Turn an observation into plain values that later changes to modules and tensors do not touch."""
    if isinstance(seen, nn.Module):
        return snapshot(seen)
    if isinstance(seen, Tensor):
        return fingerprint(seen)
    if isinstance(seen, Mapping):
        return [(key, freeze(value)) for key, value in seen.items()]
    if isinstance(seen, Sequence) and not isinstance(seen, str | bytes):
        return [freeze(value) for value in seen]
    return seen


def fingerprint(tensor: Tensor) -> tuple[Any, ...]:
    """Kind, dtype, shape, gradient flag and bits of a tensor."""
    kind = "parameter" if isinstance(tensor, nn.Parameter) else "tensor"
    plain = tensor.detach()
    # What ours returns outside of a forward carries writes back; in all else it is a plain tensor.
    if type(tensor) not in (Tensor, nn.Parameter, ComputedTensor):
        kind = f"{kind} {type(tensor).__name__}"
    bits = plain.resolve_conj().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return kind, str(plain.dtype), tuple(plain.shape), tensor.requires_grad, bits


def snapshot(module: nn.Module) -> dict[str, Any]:
    """Everything of a module that its user can see without evaluating it."""
    return {
        "class": type(module).__name__,
        "bases": [base.__name__ for base in type(module).__bases__],
        "repr": repr(module),
        "state": [(key, fingerprint(value.data)) for key, value in module.state_dict().items()],
        "parameters": [(key, fingerprint(value)) for key, value in module.named_parameters()],
        "buffers": [(key, fingerprint(value)) for key, value in module.named_buffers()],
        "own": (list(module._parameters), list(module._buffers), list(module._modules)),
        "training": [(key, child.training) for key, child in module.named_modules()],
    }


def anatomy(module: nn.Module) -> dict[str, Any]:
    """A snapshot, with the identity of the class and of every tensor, to show that nothing was replaced."""
    tensors = itertools.chain(module.named_parameters(), module.named_buffers())
    identities = [(key, id(tensor), tensor.data_ptr()) for key, tensor in tensors]
    return {**snapshot(module), "type": type(module), "identities": identities}


def assert_same(ours: Any, expected: Any, *, at: str = "observation") -> None:
    """Compare two frozen observations; an error of ours may be a subclass and may say more after torch's text."""
    if isinstance(expected, Exception):
        assert_same_error(ours, expected, at=at)
    elif isinstance(expected, list):
        assert isinstance(ours, list), f"{at}: expected {expected!r}, got {ours!r}"
        assert len(ours) == len(expected), f"{at}: expected {expected!r}, got {ours!r}"
        for index, (mine, theirs) in enumerate(zip(ours, expected, strict=True)):
            assert_same(mine, theirs, at=f"{at}[{index}]")
    elif isinstance(expected, dict):
        for key, theirs in expected.items():
            assert_same(ours[key], theirs, at=f"{at}[{key!r}]")
    else:
        assert ours == expected, f"{at}: expected {expected!r}, got {ours!r}"


def assert_same_error(ours: Any, expected: Exception, *, at: str = "error") -> None:
    """Ours is of torch's type, and its text begins with torch's; a printed module may be shortened."""
    assert isinstance(ours, type(expected)), f"{at}: expected {expected!r}, got {ours!r}"
    text = str(expected)
    if isinstance(expected, KeyError) and isinstance(ours, TorchkilnError):
        text = expected.args[0]  # str() of a KeyError quotes it
    printed = re.search(r"(?s)^Module '?(?P<module>\w+\(.*\))'? (does not|has no)", text)
    if printed is None:
        assert str(ours).startswith(text), f"{at}: expected {text!r}, got {str(ours)!r}"
        return
    head, tail = (re.escape(part) for part in text.split(printed["module"]))
    assert re.match(rf"(?s){head}.*{tail}", str(ours)), f"{at}: expected {text!r}, got {str(ours)!r}"
