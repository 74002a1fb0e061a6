"""Evaluating many equal layers as one batch, against the same layers one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks._libraries import LIBRARIES, Library, seeded
from benchmarks._timing import FLOOR, OURS, Case, Loop, Meter, Settings
from benchmarks.orthogonal import moved
from torchkiln import evaluate_together

GROUP = "batched"

_COUNTS = ((48, 64), (12, 512))
_NORMS: dict[str, Callable[[Library, nn.Module], Any]] = {
    **{
        map_name: lambda library, layer, map_name=map_name: library.parametrizations.orthogonal(
            layer, orthogonal_map=map_name
        )
        for map_name in ("matrix_exp", "cayley", "householder")
    },
    "spectral_norm": lambda library, layer: library.parametrizations.spectral_norm(layer),
}


def cases(settings: Settings) -> Iterator[Case]:
    for norm in _NORMS:
        for count, n in ((6, 16),) if settings.quick else _COUNTS:
            yield Case(
                GROUP,
                f"{norm}, {count} of {n}x{n}, forward+backward",
                "torchkiln, one by one",
                partial(_contenders, norm, count, n),
                least_blocks=1 if n >= 512 else 5,
            )


def _contenders(norm: str, count: int, n: int) -> dict[str, Meter]:
    def of(library: Library, evaluate: Callable[[nn.Module], Loop]) -> Loop:
        layers = [_NORMS[norm](library, nn.Linear(n, n, bias=False)) for _ in range(count)]
        return evaluate(moved(nn.Sequential(*layers)))

    return {
        OURS: seeded(partial(of, LIBRARIES[OURS], _together)),
        "torch": seeded(partial(of, LIBRARIES["torch"], _one_by_one)),
        FLOOR: seeded(partial(of, LIBRARIES[OURS], _one_by_one)),
    }


def _one_by_one(model: nn.Module) -> Loop:
    layers: Any = list(model)  # type: ignore[call-overload]  # a Sequential
    parameters = list(model.parameters())
    G = torch.randn_like(layers[0].weight)

    def call() -> object:
        return torch.autograd.grad([layer.weight for layer in layers], parameters, [G] * len(layers))

    return Loop(call)


def _together(model: nn.Module) -> Loop:
    apart: Any = _one_by_one(model).statement

    def call() -> object:
        with evaluate_together(model):
            return apart()

    return Loop(call)
