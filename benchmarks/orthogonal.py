"""Evaluating an orthogonal weight and its gradient, against one matrix product of that size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks._libraries import Library, each, geotorch, seeded
from benchmarks._timing import FLOOR, Case, Loop, Meter, Settings

GROUP = "orthogonal"

_SQUARE = [(16, 16), (64, 64), (256, 256), (512, 512)]
_TALL = [(256, 16), (512, 64)]
# geotorch's names for the maps that it has.
_GEOTORCH = {"matrix_exp": "expm", "cayley": "cayley"}


def cases(settings: Settings) -> Iterator[Case]:
    for map_name in ("matrix_exp", "cayley", "householder"):
        thin = [(1024, 64)] if map_name == "householder" else []  # the others make 1024 x 1024 of it in torch
        for n, k in [(16, 16), (32, 8)] if settings.quick else [*_SQUARE, *_TALL, *thin]:
            floor = f"one product of {n}x{n} and {n}x{k}"
            for what, meter in (("forward", forward), ("forward+backward", forward_backward)):
                yield Case(
                    GROUP,
                    f"{map_name} {n}x{k}, {what}",
                    floor,
                    partial(_contenders, (n, k), map_name, meter),
                )


def _contenders(
    shape: tuple[int, int], map_name: str, meter: Callable[[nn.Module], Loop]
) -> dict[str, Meter]:
    n, k = shape

    def ours_or_torchs(library: Library) -> Loop:
        layer = nn.Linear(k, n, bias=False)
        return meter(moved(library.parametrizations.orthogonal(layer, orthogonal_map=map_name)))

    meters = each(ours_or_torchs)
    peer: Any = geotorch()
    if peer is not None and map_name in _GEOTORCH:
        triv = _GEOTORCH[map_name]
        meters["geotorch"] = seeded(
            lambda: meter(moved(peer.orthogonal(nn.Linear(k, n, bias=False), triv=triv)))
        )
    A, B = torch.randn(n, n), torch.randn(n, k)
    return {**meters, FLOOR: Loop("mm(A, B)", {"mm": torch.mm, "A": A, "B": B})}


def moved(module: nn.Module) -> nn.Module:
    """Move the free matrix off the point it starts from, where the maps would have little to do."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) / parameter.shape[0] ** 0.5)
    return module


def forward(module: nn.Module) -> Loop:
    return Loop("module.weight", {"module": module})


def forward_backward(module: nn.Module) -> Loop:
    parameters = list(module.parameters())
    weight: Any = module.weight
    G: Tensor = torch.randn_like(weight)
    names = {"grad": torch.autograd.grad, "module": module, "parameters": parameters, "G": G}
    return Loop("grad(module.weight, parameters, G)", names)
