"""Calling layers under weight norm and spectral norm, against the same plain layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks._libraries import Library, each, seeded
from benchmarks._timing import FLOOR, Case, Loop, Meter, Settings

GROUP = "norms"
_PLAIN = "the plain layer"
_BATCH = 16
_LENGTH = 32


def _linear(size: int) -> tuple[nn.Module, Tensor]:
    return nn.Linear(size, size), torch.randn(_BATCH, size)


def _conv(size: int) -> tuple[nn.Module, Tensor]:
    return nn.Conv1d(size, size, 3, padding=1), torch.randn(_BATCH, size, _LENGTH)


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
                    yield Case(
                        GROUP,
                        f"{norm} {layer} {size}, {what}",
                        _PLAIN,
                        partial(_contenders, norm, make, size, run),
                    )


def _contenders(norm: str, make: Make, size: int, run: Run) -> dict[str, Meter]:
    def normed(library: Library) -> Loop:
        layer, x = make(size)
        return run(getattr(library.parametrizations, norm)(layer), x)

    return {**each(normed), FLOOR: seeded(lambda: run(*make(size)))}


def _forward(module: nn.Module, x: Tensor) -> Loop:
    return Loop("module(x)", {"module": module, "x": x})


def _forward_backward(module: nn.Module, x: Tensor) -> Loop:
    # With the gradient of the input, as for a layer inside a network.
    inputs = [x.requires_grad_(), *module.parameters()]
    names = {"grad": torch.autograd.grad, "module": module, "x": x, "inputs": inputs}
    return Loop("grad(module(x), inputs, G)", {**names, "G": torch.randn_like(module(x))})
