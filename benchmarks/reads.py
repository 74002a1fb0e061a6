"""Reading a parametrized tensor: what one ``module.weight`` costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks._libraries import LIBRARIES, Library, each
from benchmarks._timing import FLOOR, Case, Loop, Meter, Sample, Settings

GROUP = "reads"
_PLAIN = "the same read of a plain layer"


class Identity(nn.Module):
    """The step that changes nothing: what is left is the cost of the system."""

    def forward(self, X: Tensor) -> Tensor:
        return X


def cases(settings: Settings) -> Iterator[Case]:
    size = 16
    yield Case(GROUP, "bias, beside a parametrized weight", _PLAIN, partial(_plain_tensor, size))
    yield Case(GROUP, "identity", _PLAIN, partial(_identity, size))
    yield Case(GROUP, "identity in cached()", _PLAIN, partial(_in_cached, size, with_identity))
    yield Case(GROUP, "weight_norm in cached()", _PLAIN, partial(_in_cached, size, with_weight_norm))
    for n in (size,) if settings.quick else (size, 256):
        yield Case(GROUP, f"weight_norm {n}x{n}", "torch._weight_norm", partial(_weight_norm, n))
        yield Case(GROUP, f"spectral_norm {n}x{n}, train", "two mv, one div", partial(_spectral_train, n))
        yield Case(GROUP, f"spectral_norm {n}x{n}, eval", "one mv, one div", partial(_spectral_eval, n))


def with_identity(library: Library, size: int) -> nn.Module:
    layer: nn.Module = library.parametrize.register_parametrization(
        nn.Linear(size, size), "weight", Identity()
    )
    return layer


def with_weight_norm(library: Library, size: int) -> nn.Module:
    layer: nn.Module = library.parametrizations.weight_norm(nn.Linear(size, size))
    return layer


def _read(module: nn.Module, name: str = "weight") -> Loop:
    return Loop(f"module.{name}", {"module": module})


def _plain_tensor(size: int) -> dict[str, Meter]:
    meters = each(lambda library: _read(with_identity(library, size), "bias"))
    return {**meters, FLOOR: _read(nn.Linear(size, size), "bias")}


def _identity(size: int) -> dict[str, Meter]:
    return {**each(lambda library: _read(with_identity(library, size))), FLOOR: _read(nn.Linear(size, size))}


class _Cached:
    """Reads inside one long ``cached()`` scope, which is opened outside the clock."""

    def __init__(self, library: Library, loop: Loop) -> None:
        self.library, self.loop = library, loop

    def sample(self, settings: Settings) -> Sample:
        with self.library.parametrize.cached():
            return self.loop.sample(settings)


def _in_cached(size: int, make: Callable[[Library, int], nn.Module]) -> dict[str, Meter]:
    meters = each(lambda library: _Cached(library, _read(make(library, size))))
    return {**meters, FLOOR: _read(nn.Linear(size, size))}


def _weight_norm(size: int) -> dict[str, Meter]:
    layer = with_weight_norm(LIBRARIES["torch"], size)
    chains: Any = layer.parametrizations
    g, v = chains["weight"].original0, chains["weight"].original1
    floor = Loop("f(v, g, 0)", {"f": torch._weight_norm, "v": v, "g": g})
    return {**each(lambda library: _read(with_weight_norm(library, size))), FLOOR: floor}


def _spectral(library: Library, size: int) -> nn.Module:
    layer: nn.Module = library.parametrizations.spectral_norm(nn.Linear(size, size))
    return layer


def _spectral_train(size: int) -> dict[str, Meter]:
    floor = Loop("mv(W, v); mv(W.T, u); W / sigma", _spectral_names(size))
    return {**each(lambda library: _read(_spectral(library, size).train())), FLOOR: floor}


def _spectral_eval(size: int) -> dict[str, Meter]:
    floor = Loop("mv(W, v); W / sigma", _spectral_names(size))
    return {**each(lambda library: _read(_spectral(library, size).eval())), FLOOR: floor}


def _spectral_names(size: int) -> dict[str, Any]:
    W = nn.Parameter(torch.randn(size, size))
    return {
        "mv": torch.mv,
        "W": W,
        "u": torch.randn(size),
        "v": torch.randn(size),
        "sigma": torch.tensor(2.0),
    }
