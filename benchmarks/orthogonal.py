"""Evaluating an orthogonal weight and its gradient, against one matrix product of that size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks._libraries import LIBRARIES, Library, geotorch, seeded
from benchmarks._timing import FLOOR, OURS, Case, Fresh, Loop, Meter, Settings

GROUP = "orthogonal"

_MAPS = ("matrix_exp", "cayley", "householder")
# geotorch's names for the maps that it has.
_GEOTORCH = {"matrix_exp": "expm", "cayley": "cayley"}


class Shape(NamedTuple):
    """A weight, and who is measured on it: torch may need seconds, or more memory than there is."""

    n: int
    k: int
    base: bool = True
    torch: tuple[str, ...] = _MAPS
    geotorch: bool = True

    def __str__(self) -> str:
        return f"{self.n}x{self.k}" + ("" if self.base else ", no base")


_SHAPES = (
    *(Shape(n, n) for n in (16, 64, 128, 256, 512)),
    Shape(1024, 1024, geotorch=False),
    Shape(256, 16),
    Shape(512, 64),
    Shape(1024, 64, geotorch=False),
    Shape(1024, 64, base=False, geotorch=False),
    Shape(2048, 64, base=False, geotorch=False),
    Shape(4096, 32, base=False, torch=("householder",), geotorch=False),
    Shape(30000, 50, base=False, torch=(), geotorch=False),
)
_QUICK = (Shape(16, 16), Shape(32, 8), Shape(32, 8, base=False, torch=()))


def cases(settings: Settings) -> Iterator[Case]:
    for map_name in _MAPS:
        for shape in _QUICK if settings.quick else _SHAPES:
            slow = max(shape[:2]) >= 1024
            for what, meter in (("forward", forward), ("forward+backward", forward_backward)):
                yield Case(
                    GROUP,
                    f"{map_name} {shape}, {what}",
                    _FLOORS[shape.base].format(shape),
                    partial(_contenders, shape, map_name, meter),
                    least_blocks=1 if slow else 5,
                )


_FLOORS = {
    True: "one product of {0.n}x{0.n} and {0.n}x{0.k}",
    False: "one product of {0.n}x{0.k} and {0.k}x{0.k}",
}


def _contenders(shape: Shape, map_name: str, meter: Callable[[nn.Module], Loop]) -> dict[str, Meter]:
    n, k = shape[:2]

    def of(library: Library) -> Loop:
        layer = nn.Linear(k, n, bias=False)
        options = {"orthogonal_map": map_name, "use_trivialization": shape.base}
        return meter(moved(library.parametrizations.orthogonal(layer, **options)))

    meters: dict[str, Meter] = {OURS: seeded(partial(of, LIBRARIES[OURS]))}
    if map_name in shape.torch:
        loop = seeded(partial(of, LIBRARIES["torch"]))
        # Seconds for one call: not to be calibrated.
        meters["torch"] = _once(loop) if max(n, k) >= 1024 else loop
    peer: Any = geotorch()
    if peer is not None and shape.geotorch and map_name in _GEOTORCH:
        triv = _GEOTORCH[map_name]
        meters["geotorch"] = seeded(
            lambda: meter(moved(peer.orthogonal(nn.Linear(k, n, bias=False), triv=triv)))
        )
    A, B = (torch.randn(n, n), torch.randn(n, k)) if shape.base else (torch.randn(n, k), torch.randn(k, k))
    return {**meters, FLOOR: Loop("mm(A, B)", {"mm": torch.mm, "A": A, "B": B})}


def _once(loop: Loop) -> Fresh:
    code = compile(str(loop.statement), "<benchmark>", "eval")
    return Fresh(lambda: None, lambda _: eval(code, loop.names))


def moved(module: nn.Module) -> nn.Module:
    """Move the free tensors off the point they start from, where the maps would have little to do."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) / parameter.shape[-2:][0] ** 0.5)
    return module


def forward(module: nn.Module) -> Loop:
    return Loop("module.weight", {"module": module})


def forward_backward(module: nn.Module) -> Loop:
    parameters = list(module.parameters())
    weight: Any = module.weight
    G: Tensor = torch.randn_like(weight)
    names = {"grad": torch.autograd.grad, "module": module, "parameters": parameters, "G": G}
    return Loop("grad(module.weight, parameters, G)", names)
