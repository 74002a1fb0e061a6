"""``install()`` puts our modules in the place of torch's, and ``uninstall()`` puts exactly torch's back."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch import nn

import torchkiln

from .oracle import OURS, TORCH
from .steps import Scale, linear

NAMES = ["parametrize", "parametrizations"]


def in_place() -> dict[str, tuple[ModuleType, ModuleType]]:
    """What imports and attribute look-ups find now."""
    return {name: (sys.modules[f"torch.nn.utils.{name}"], getattr(torch.nn.utils, name)) for name in NAMES}


THEIRS = {"parametrize": (TORCH.P, TORCH.P), "parametrizations": (TORCH.N, TORCH.N)}
MINE = {"parametrize": (OURS.P, OURS.P), "parametrizations": (OURS.N, OURS.N)}


@pytest.fixture(autouse=True)
def _uninstalled() -> Iterator[None]:
    """Start and end with torch's modules in place, whatever the test does."""
    assert in_place() == THEIRS
    yield
    torchkiln.uninstall()
    assert in_place() == THEIRS


def test_install_and_uninstall() -> None:
    torchkiln.install()
    assert in_place() == MINE
    torchkiln.uninstall()
    assert in_place() == THEIRS


def test_both_can_be_repeated() -> None:
    torchkiln.uninstall()
    assert in_place() == THEIRS
    torchkiln.install()
    torchkiln.install()
    assert in_place() == MINE
    torchkiln.uninstall()
    assert in_place() == THEIRS


def test_every_spelling_of_the_import() -> None:
    with torchkiln.installed():
        import torch.nn.utils.parametrizations as N
        import torch.nn.utils.parametrize as P
        from torch.nn.utils import parametrizations, parametrize
        from torch.nn.utils.parametrizations import weight_norm
        from torch.nn.utils.parametrize import register_parametrization

        imported = importlib.import_module("torch.nn.utils.parametrize")
    assert P is torchkiln.parametrize
    assert N is torchkiln.parametrizations
    assert parametrize is torchkiln.parametrize
    assert imported is torchkiln.parametrize
    assert parametrizations is torchkiln.parametrizations
    assert weight_norm is torchkiln.parametrizations.weight_norm
    assert register_parametrization is torchkiln.parametrize.register_parametrization


@pytest.mark.parametrize("name", ["orthogonal", "weight_norm", "spectral_norm"])
def test_the_built_ins_are_ours(name: str) -> None:
    with torchkiln.installed():
        layer = getattr(torch.nn.utils.parametrizations, name)(linear())
        assert torch.nn.utils.parametrize.is_parametrized(layer, "weight")
    assert isinstance(layer.parametrizations.weight, torchkiln.parametrize.ParametrizationList)
    assert not isinstance(layer.parametrizations.weight, TORCH.P.ParametrizationList)
    layer = getattr(torch.nn.utils.parametrizations, name)(linear())
    assert isinstance(layer.parametrizations.weight, TORCH.P.ParametrizationList)


def test_the_context_restores() -> None:
    with torchkiln.installed():
        assert in_place() == MINE
    assert in_place() == THEIRS


def test_the_context_nests() -> None:
    with torchkiln.installed():
        with torchkiln.installed():
            assert in_place() == MINE
        assert in_place() == MINE
    assert in_place() == THEIRS


def test_the_context_restores_after_an_exception() -> None:
    with pytest.raises(KeyError, match="inside"), torchkiln.installed():
        raise KeyError("inside")
    assert in_place() == THEIRS


def test_the_context_leaves_an_installation_in_place() -> None:
    torchkiln.install()
    with torchkiln.installed():
        pass
    assert in_place() == MINE


def test_the_context_restores_after_an_inner_uninstall() -> None:
    with torchkiln.installed():
        torchkiln.uninstall()
        assert in_place() == THEIRS
    assert in_place() == THEIRS


def test_modules_made_before_go_on() -> None:
    before = linear()
    TORCH.P.register_parametrization(before, "weight", Scale())
    value = before.weight
    with torchkiln.installed():
        assert torch.equal(before.weight, value)
        during = linear()
        torch.nn.utils.parametrize.register_parametrization(during, "weight", Scale())
        torch.nn.utils.parametrize.remove_parametrizations(before, "weight")
    assert torch.equal(before.weight, value)
    assert type(before) is nn.Linear
    assert during(torch.ones(1, 4, dtype=torch.float64)).shape == (1, 3)
    torch.nn.utils.parametrize.remove_parametrizations(during, "weight")
    assert type(during) is nn.Linear


def test_the_cache_variables_that_libraries_write_are_ours() -> None:
    layer = linear()
    with torchkiln.installed():
        import torch.nn.utils.parametrize as P

        P.register_parametrization(layer, "weight", Scale())
        P._cache_enabled += 1
        try:
            assert layer.weight is layer.weight
        finally:
            P._cache_enabled -= 1
            P._cache = {}
    assert layer.weight is not layer.weight


def test_nothing_else_changes() -> None:
    before = dict(vars(torch.nn.utils))
    modules = {name for name in sys.modules if name.startswith("torch.nn")}
    with torchkiln.installed():
        during = dict(vars(torch.nn.utils))
    assert dict(vars(torch.nn.utils)) == before
    assert {name for name in sys.modules if name.startswith("torch.nn")} == modules
    assert {name for name in during if during[name] is not before.get(name)} == set(NAMES)


def test_torchs_own_functions_are_untouched() -> None:
    functions = dict(vars(TORCH.P))
    with torchkiln.installed():
        pass
    assert {name: value for name, value in vars(TORCH.P).items() if functions[name] is not value} == {}
