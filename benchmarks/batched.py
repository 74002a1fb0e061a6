"""Evaluating many equal layers as one batch, against the same layers one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks._libraries import LIBRARIES, Library, seeded
from benchmarks._timing import FLOOR, OURS, Case, Loop, Meter, Sample, Settings
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
    def model_of(library: Library) -> nn.Module:
        layers = [_NORMS[norm](library, nn.Linear(n, n, bias=False)) for _ in range(count)]
        return moved(nn.Sequential(*layers))

    return {
        OURS: seeded(lambda: _Together(model_of(LIBRARIES[OURS]))),
        "torch": seeded(lambda: _step(model_of(LIBRARIES["torch"]))),
        FLOOR: seeded(lambda: _step(model_of(LIBRARIES[OURS]))),
    }


def _step(model: nn.Module) -> Loop:
    """Evaluate all weights and their gradients, of originals that have just been written to, as by an optimizer."""
    layers: Any = list(model)  # type: ignore[call-overload]  # a Sequential
    parameters = list(model.parameters())
    written = [parameter.detach() for parameter in parameters]
    G = torch.randn_like(layers[0].weight)

    def call() -> object:
        for parameter in written:
            parameter.mul_(1)
        return torch.autograd.grad([layer.weight for layer in layers], parameters, [G] * len(layers))

    return Loop(call)


class _Together:
    """Steps inside one long ``evaluate_together()``, which is entered outside the clock."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.loop = model, _step(model)

    def sample(self, settings: Settings) -> Sample:
        with evaluate_together(self.model):
            return self.loop.sample(settings)
