"""Calling layers under weight norm and spectral norm, and under the norm of a convolution, against the plain layer.

``forward`` is in eval mode. ``forward+backward`` is in training mode, and writes to the weight first, as an optimizer
does: spectral norm then has one power iteration to make, here as in torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from benchmarks._libraries import LIBRARIES, Library, each, seeded
from benchmarks._timing import FLOOR, OURS, Case, Loop, Meter, Sample, Settings
from torchkiln.families import ConvSpectralNorm
from torchkiln.parametrize import register_parametrization

GROUP = "norms"
_PLAIN = "the plain layer"
_BATCH = 16
_LENGTH = 32


# How the norm of a convolution is found; each on images of _IMAGE x _IMAGE.
_IMAGE = 16
_METHODS: dict[str, dict[str, Any]] = {
    "power, 1 step": {"method": "power", "steps": 1, "input_size": (_IMAGE, _IMAGE)},
    "power, to 0.001": {"method": "power", "input_size": (_IMAGE, _IMAGE)},
    "exact": {"method": "exact", "input_size": (_IMAGE, _IMAGE)},
    "bound": {"method": "bound"},
}


class _Way(NamedTuple):
    """Another way to run a layer than in float32, in eager mode and on the threads that the run is for."""

    name: str
    dtype: torch.dtype = torch.float32
    threads: int | None = None
    compiled: bool = False


_WAYS = (
    _Way("2 threads", threads=2),
    _Way("float64", dtype=torch.float64),
    _Way("bfloat16", dtype=torch.bfloat16),
    _Way("compiled", compiled=True),
)


def _linear(size: int) -> tuple[nn.Module, Tensor]:
    return nn.Linear(size, size), torch.randn(_BATCH, size)


def _conv(size: int) -> tuple[nn.Module, Tensor]:
    return nn.Conv1d(size, size, 3, padding=1), torch.randn(_BATCH, size, _LENGTH)


def _conv2d(size: int) -> tuple[nn.Module, Tensor]:
    layer = nn.Conv2d(size, size, 3, padding=1, padding_mode="circular")
    return layer, torch.randn(_BATCH, size, _IMAGE, _IMAGE)


Make = Callable[[int], tuple[nn.Module, Tensor]]
Run = Callable[[nn.Module, Tensor], Loop]


def cases(settings: Settings) -> Iterator[Case]:
    sizes = (16,) if settings.quick else (16, 64, 256, 512)
    layers: dict[str, Make] = {"linear": _linear, "conv1d": _conv}
    runs: dict[str, Run] = {"forward": _forward, "forward+backward": _forward_backward}
    for norm in ("weight_norm", "spectral_norm"):
        for layer, make in layers.items():
            # A convolution of 512 channels is 40 times its norm: the row would show noise.
            for size in (size for size in sizes if layer == "linear" or size <= 256):
                for what, run in runs.items():
                    build = partial(_contenders, norm, make, size, run)
                    yield Case(GROUP, f"{norm} {layer} {size}, {what}", _PLAIN, build)
    yield from _other_ways(settings)
    for method, options in _METHODS.items():
        for size in (4,) if settings.quick else (16, 64):
            for what, run in runs.items():
                build = partial(_operator, options, size, run)
                yield Case(GROUP, f"operator norm ({method}) conv2d {size}, {what}", _PLAIN, build)


def _other_ways(settings: Settings) -> Iterator[Case]:
    size, ways = (
        (16, _WAYS[:-1]) if settings.quick else (256, _WAYS)
    )  # a compiler is nothing for a quick look
    for norm in ("weight_norm", "spectral_norm"):
        for way in ways:
            build = partial(_contenders, norm, _linear, size, _forward_backward, way)
            yield Case(GROUP, f"{norm} linear {size}, {way.name}, forward+backward", _PLAIN, build)


def _contenders(norm: str, make: Make, size: int, run: Run, way: _Way | None = None) -> dict[str, Meter]:
    def normed(library: Library) -> Meter:
        layer, x = make(size)
        return _ready(getattr(library.parametrizations, norm)(layer), x, run=run, way=way)

    return {**each(normed), FLOOR: seeded(lambda: _ready(*make(size), run=run, way=way))}


def _ready(layer: nn.Module, x: Tensor, *, run: Run, way: _Way | None) -> Meter:
    if way is None:
        return run(layer, x)
    layer, x = layer.to(way.dtype), x.to(way.dtype)
    if way.compiled:
        # Not layer.compile(): torch runs its own layers in eager mode then, and compiles what they call alone.
        layer = cast(nn.Module, torch.compile(layer))
    return _InThreads(run(layer, x), way.threads)


class _InThreads:
    """A loop with a number of threads of its own."""

    def __init__(self, loop: Loop, threads: int | None) -> None:
        self.loop, self.threads = loop, threads

    def sample(self, settings: Settings) -> Sample:
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads or before)
        try:
            return self.loop.sample(settings)
        finally:
            torch.set_num_threads(before)


def _operator(options: dict[str, Any], size: int, run: Run) -> dict[str, Meter]:
    """Measure ours beside torch's spectral norm, which is that of the weight as a matrix: it has no other."""

    def ours() -> Loop:
        layer, x = _conv2d(size)
        return run(register_parametrization(layer, "weight", ConvSpectralNorm.of(layer, **options)), x)

    def theirs() -> Loop:
        layer, x = _conv2d(size)
        return run(LIBRARIES["torch"].parametrizations.spectral_norm(layer), x)

    return {OURS: seeded(ours), "torch": seeded(theirs), FLOOR: seeded(lambda: run(*_conv2d(size)))}


def _forward(module: nn.Module, x: Tensor) -> Loop:
    return Loop("module(x)", {"module": module.eval(), "x": x})


def _forward_backward(module: nn.Module, x: Tensor) -> Loop:
    # With the gradient of the input, as for a layer inside a network.
    inputs = [x.requires_grad_(), *module.parameters()]
    names = {"grad": torch.autograd.grad, "module": module, "x": x, "inputs": inputs}
    written = max(module.parameters(), key=torch.numel).detach()
    return Loop(
        "written.mul_(1); grad(module(x), inputs, G)",
        {**names, "written": written, "G": torch.randn_like(module(x))},
    )
