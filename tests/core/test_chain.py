"""Whether a module has chains: asked at a fraction of the cost of an attribute, with the same answer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize as torch_parametrize

from torchkiln import parametrizations, parametrize
from torchkiln._core.chain import parametrizations_of


class Wrapper(nn.Module):
    """Shows the attributes of what it wraps, as a compiled module does."""

    def __init__(self, wrapped: nn.Module) -> None:
        super().__init__()
        self.wrapped = wrapped

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name) if name == "wrapped" else getattr(self.wrapped, name)


class InClass(nn.Module):
    parametrizations = nn.ModuleDict({"weight": nn.ReLU()})


def with_buffer() -> nn.Module:
    module = nn.Module()
    module.register_buffer("parametrizations", torch.ones(2))
    return module


def in_dict() -> nn.Module:
    module = nn.Module()
    vars(module)["parametrizations"] = nn.ModuleDict({"weight": nn.ReLU()})
    return module


def normed() -> nn.Module:
    return parametrizations.weight_norm(nn.Linear(2, 2))


MODULES = {
    "plain": lambda: nn.Linear(2, 2),
    "parametrized": normed,
    "parametrized by torch": lambda: torch.nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)),
    "wrapped": lambda: Wrapper(normed()),
    "a wrapper of a plain one": lambda: Wrapper(nn.Linear(2, 2)),
    "compiled": lambda: torch.compile(normed(), backend="eager"),
    "in the class": InClass,
    "in the instance": in_dict,
    "a buffer": with_buffer,
    "an empty dict": lambda: nn.ModuleDict({"parametrizations": nn.ModuleDict()}),
}


@pytest.mark.parametrize("kind", MODULES)
def test_the_answer_is_that_of_the_attribute_and_of_torch(kind: str) -> None:
    module = MODULES[kind]()
    assert parametrizations_of(module) is getattr(module, "parametrizations", None)
    for name in (None, "weight", "bias"):
        assert parametrize.is_parametrized(module, name) == torch_parametrize.is_parametrized(module, name)


def test_a_module_that_is_not_made_yet_has_none() -> None:
    assert not parametrize.is_parametrized(nn.Linear.__new__(nn.Linear))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_a_scripted_module_has_none() -> None:
    assert not parametrize.is_parametrized(torch.jit.script(nn.Linear(2, 2)))
