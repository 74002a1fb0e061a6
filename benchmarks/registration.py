"""Putting a parametrization in, taking it out, and copying a layer that has one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks._libraries import LIBRARIES, Library, each, geotorch
from benchmarks._timing import FLOOR, Case, Fresh, Loop, Meter, Settings
from benchmarks.reads import Identity, with_identity, with_weight_norm

GROUP = "registration"
_SIZE = 16
_CALLS = 10
_MOVE = "take the parameter out of the layer and put it back"

Put = Callable[[Library, nn.Module], object]


def cases(_settings: Settings) -> Iterator[Case]:
    put: dict[str, Put] = {
        "identity": lambda library, layer: library.parametrize.register_parametrization(
            layer, "weight", Identity()
        ),
        "weight_norm": lambda library, layer: library.parametrizations.weight_norm(layer),
        "spectral_norm": lambda library, layer: library.parametrizations.spectral_norm(layer),
        "orthogonal": lambda library, layer: library.parametrizations.orthogonal(layer),
    }
    for name, function in put.items():
        yield Case(GROUP, f"{name}: register", _MOVE, partial(_register, function, name))
        yield Case(GROUP, f"{name}: remove", _MOVE, partial(_remove, function, name))
    plain = "deepcopy of the plain layer"
    yield Case(GROUP, "identity: deepcopy", plain, partial(_deepcopy, with_identity))
    yield Case(GROUP, "weight_norm: deepcopy", plain, partial(_deepcopy, with_weight_norm))


def _layer() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(_SIZE, _SIZE)


def _move() -> Loop:
    def move() -> None:
        weight = layer.weight
        del layer.weight
        layer.register_parameter("weight", weight)

    layer: Any = _layer()
    return Loop(move)


def _peer(name: str) -> Callable[[nn.Module], object] | None:
    """Return geotorch's function of that name; it has its own families and registers them by torch's functions."""
    library = geotorch() if name == "orthogonal" else None
    return library.orthogonal if library else None


def _register(put: Put, name: str) -> dict[str, Meter]:
    meters = each(lambda library: Fresh(_layer, lambda layer: put(library, layer), _CALLS))
    if peer := _peer(name):
        meters["geotorch"] = Fresh(_layer, peer, _CALLS)
    return {**meters, FLOOR: _move()}


def _remove(put: Put, name: str) -> dict[str, Meter]:
    def filled(fill: Callable[[nn.Module], object]) -> nn.Module:
        layer = _layer()
        fill(layer)
        return layer

    def meter(library: Library, fill: Callable[[nn.Module], object]) -> Fresh:
        remove = library.parametrize.remove_parametrizations
        return Fresh(lambda: filled(fill), lambda layer: remove(layer, "weight"), _CALLS)

    meters = each(lambda library: meter(library, lambda layer: put(library, layer)))
    if peer := _peer(name):
        meters["geotorch"] = meter(LIBRARIES["torch"], peer)
    return {**meters, FLOOR: _move()}


def _deepcopy(make: Callable[[Library, int], nn.Module]) -> dict[str, Meter]:
    def meter(module: nn.Module) -> Loop:
        return Loop(lambda: copy.deepcopy(module))

    return {**each(lambda library: meter(make(library, _SIZE))), FLOOR: meter(_layer())}
