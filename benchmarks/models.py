"""Folding every norm of a model into plain weights, serving it without folding, and parametrizing a whole model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize as torch_parametrize
from torch.nn.utils import remove_weight_norm
from torch.nn.utils import weight_norm as hook_weight_norm

from benchmarks._libraries import LIBRARIES, Library
from benchmarks._timing import FLOOR, OURS, Case, Fresh, Loop, Meter, Sample, Settings
from torchkiln.models import bake, baked
from torchkiln.parametrize import cached

GROUP = "models"
_CHANNELS = 64


def cases(settings: Settings) -> Iterator[Case]:
    n = 5 if settings.quick else 100
    floor = "compute the weights, make them parameters"
    yield Case(GROUP, f"bake {n} weight-normed conv1d", floor, lambda: _bake(n, _conv, "weight_norm"))
    yield Case(GROUP, f"bake {n} weight-normed conv1d made by torch", floor, lambda: _bake_torchs(n))
    yield Case(GROUP, f"bake {n} weight-normed conv1d made by hooks", floor, lambda: _bake_hooks(n))
    yield Case(GROUP, f"bake {n} spectral-normed linear", floor, lambda: _bake(n, _linear, "spectral_norm"))
    yield Case(
        GROUP, f"parametrize {n} conv1d by weight_norm", "norms of the plain weights", lambda: _parametrize(n)
    )
    for name, make in {"conv1d": _conv, "linear": _wide_linear}.items():
        for norm in ("weight_norm", "spectral_norm"):
            yield Case(
                GROUP,
                f"12 {name} under {norm}, in cached(model)",
                "the baked model",
                partial(_serve, make, norm, cached),
            )
        yield Case(
            GROUP,
            f"12 {name} under {norm}, in baked(model)",
            "the baked model",
            partial(_serve, make, norm, baked),
        )


def _conv() -> nn.Module:
    return nn.Conv1d(_CHANNELS, _CHANNELS, 3)


def _linear() -> nn.Module:
    return nn.Linear(_CHANNELS, _CHANNELS)


def _wide_linear() -> nn.Module:
    return nn.Linear(4 * _CHANNELS, 4 * _CHANNELS)


def _model(n: int, layer: Callable[[], nn.Module], norm: Callable[[nn.Module], object]) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(*(layer() for _ in range(n)))
    for module in model:
        norm(module)
    return model.eval()


def _remove_by_torch(model: nn.Module) -> None:
    """Run the loop that people write."""
    for module in list(model.modules()):
        if torch_parametrize.is_parametrized(module):
            for name in list(module.parametrizations):  # type: ignore[arg-type]  # mypy: Tensor | Module
                torch_parametrize.remove_parametrizations(module, name)


def _compute(model: Any) -> list[nn.Parameter]:
    with torch.no_grad():
        return [nn.Parameter(module.weight) for module in model]


def _bake(n: int, layer: Callable[[], nn.Module], norm: str) -> dict[str, Meter]:
    def made(library: Library) -> nn.Module:
        return _model(n, layer, getattr(library.parametrizations, norm))

    return {
        OURS: Fresh(lambda: made(LIBRARIES[OURS]), bake),
        "torch": Fresh(lambda: made(LIBRARIES["torch"]), _remove_by_torch),
        FLOOR: Fresh(lambda: made(LIBRARIES[OURS]), _compute),
    }


def _bake_torchs(n: int) -> dict[str, Meter]:
    def made() -> nn.Module:
        return _model(n, _conv, LIBRARIES["torch"].parametrizations.weight_norm)

    return {
        OURS: Fresh(made, bake),
        "torch": Fresh(made, _remove_by_torch),
        FLOOR: Fresh(made, _compute),
    }


def _bake_hooks(n: int) -> dict[str, Meter]:
    def made() -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # deprecated by torch, and still in most files
            return _model(n, _conv, hook_weight_norm)

    def remove(model: nn.Module) -> None:
        for module in model.children():
            remove_weight_norm(module)

    def compute(model: Any) -> list[nn.Parameter]:
        with torch.no_grad():
            return [
                nn.Parameter(torch._weight_norm(module.weight_v, module.weight_g, 0))
                for module in model.children()
            ]

    return {OURS: Fresh(made, bake), "torch": Fresh(made, remove), FLOOR: Fresh(made, compute)}


class _Serving:
    """A model that is called again and again, in eval mode without grad, inside of one long context."""

    def __init__(
        self, model: nn.Module, context: Callable[[nn.Module], AbstractContextManager[object]]
    ) -> None:
        kernel = isinstance(model[0], nn.Conv1d)  # type: ignore[index]  # a Sequential
        self.x = torch.randn(1, _CHANNELS, 128) if kernel else torch.randn(16, 4 * _CHANNELS)
        self.model, self.context = model, context
        self.loop = Loop("model(x)", {"model": model, "x": self.x})

    def sample(self, settings: Settings) -> Sample:
        with torch.no_grad(), self.context(self.model):
            self.model(self.x)  # outside the clock, as long as the scope is to live
            return self.loop.sample(settings)


def _serve(
    layer: Callable[[], nn.Module],
    norm: str,
    context: Callable[[nn.Module], AbstractContextManager[object]],
) -> dict[str, Meter]:
    def made(library: Library) -> nn.Module:
        return _model(12, layer, getattr(library.parametrizations, norm))

    plain = made(LIBRARIES[OURS])
    bake(plain)
    return {
        OURS: _Serving(made(LIBRARIES[OURS]), context),
        "torch": _Serving(made(LIBRARIES["torch"]), lambda _: LIBRARIES["torch"].parametrize.cached()),
        FLOOR: _Serving(plain, nullcontext),
    }


def _parametrize(n: int) -> dict[str, Meter]:
    def plain() -> nn.Module:
        return _model(n, _conv, lambda layer: layer)

    def norm(library: Library) -> Callable[[nn.Module], object]:
        return lambda model: [library.parametrizations.weight_norm(layer) for layer in model.children()]

    def floor(model: Any) -> object:
        return [torch.norm_except_dim(layer.weight, 2, 0) for layer in model.children()]

    meters: dict[str, Meter] = {name: Fresh(plain, norm(library)) for name, library in LIBRARIES.items()}
    return {**meters, FLOOR: Fresh(plain, floor)}
