"""The gradient of an orthogonal weight in the other ways to have one: dtypes, batches, compiled, on two threads."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks._libraries import LIBRARIES, Library, seeded
from benchmarks._timing import FLOOR, OURS, Case, Loop, Meter, Settings
from benchmarks.orthogonal import forward_backward, moved

GROUP = "orthogonal-ways"

_MAPS = ("matrix_exp", "cayley", "householder")


class Way(NamedTuple):
    """A weight of a shape and dtype, and how it is evaluated."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    compiled: bool = False
    threads: int | None = None

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.shape))}, {self.name}"


_WAYS = (
    *(Way("float64", shape, torch.float64) for shape in ((256, 256), (512, 64))),
    *(Way("complex64", shape, torch.complex64) for shape in ((256, 256), (512, 64))),
    Way("batch", (8, 128, 128)),
    Way("compiled", (256, 256), compiled=True),
    *(Way("2 threads", shape, threads=2) for shape in ((256, 256), (512, 64))),
)
_QUICK = (Way("complex64", (16, 16), torch.complex64), Way("batch, 2 threads", (2, 16, 8), threads=2))


def cases(settings: Settings) -> Iterator[Case]:
    for map_name in _MAPS:
        for way in _QUICK if settings.quick else _WAYS:
            if map_name != "householder" or not way.dtype.is_complex:
                yield Case(
                    GROUP,
                    f"{map_name} {way}",
                    "one product of {0}x{0} and {0}x{1}".format(*way.shape[-2:]),
                    partial(_contenders, way, map_name),
                )


def _contenders(way: Way, map_name: str) -> dict[str, Meter]:
    n = way.shape[-2]
    A, B = torch.randn(*way.shape[:-1], n, dtype=way.dtype), torch.randn(way.shape, dtype=way.dtype)
    product = Loop("matmul(A, B)", {"matmul": torch.matmul, "A": A, "B": B})
    # torch's gradient of reflections is a graph with a few nodes for each, which takes minutes to compile.
    names = [OURS] if way.compiled and map_name == "householder" else [OURS, "torch"]
    meters = {name: seeded(partial(_gradient, way, map_name, LIBRARIES[name])) for name in names}
    return {**meters, FLOOR: _on_threads(product, way.threads)}


def _gradient(way: Way, map_name: str, library: Library) -> Meter:
    layer = _Weight(way)
    module = moved(library.parametrizations.orthogonal(layer, orthogonal_map=map_name))
    return _on_threads(_compiled(module) if way.compiled else forward_backward(module), way.threads)


class _Weight(nn.Module):
    def __init__(self, way: Way) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(way.shape, dtype=way.dtype))

    def forward(self) -> Tensor:
        return self.weight


def _compiled(module: nn.Module) -> Loop:
    torch._dynamo.reset()  # each is compiled anew, and none after so many others that it would not be
    compiled: Any = torch.compile(module, fullgraph=True)
    loop = forward_backward(module)
    return Loop("grad(compiled(), parameters, G)", {**loop.names, "compiled": compiled})


def _on_threads(loop: Loop, threads: int | None) -> Loop:
    if threads is None:
        return loop
    code = compile(str(loop.statement), "<benchmark>", "eval")

    def run() -> None:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        eval(code, loop.names)
        torch.set_num_threads(before)

    return Loop(run)
