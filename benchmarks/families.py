"""Evaluating families of the catalogue that geotorch has as well, and their gradients, side by side with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.utils import parametrize as torch_parametrize

from benchmarks._libraries import geotorch, seeded
from benchmarks._timing import FLOOR, OURS, Case, Loop, Meter, Settings
from benchmarks.orthogonal import forward, forward_backward, moved
from torchkiln import families, parametrize

GROUP = "families"


class Family(NamedTuple):
    """The same constraint in both libraries, and the matrices it is tried on."""

    name: str
    ours: Callable[[], nn.Module]
    theirs: Callable[[Any, tuple[int, int]], nn.Module]
    shapes: tuple[tuple[int, int], ...]


_FAMILIES = (
    Family(
        "Stiefel",
        families.Stiefel,
        lambda peer, size: peer.Stiefel(size, triv="cayley"),
        ((64, 16), (256, 32), (1024, 64)),
    ),
    Family(
        "LowRank(8)",
        lambda: families.LowRank(8),
        lambda peer, size: peer.LowRank(size, 8, triv="cayley"),
        ((64, 16), (256, 256)),
    ),
    Family(
        "PositiveDefinite",
        families.PositiveDefinite,
        lambda peer, size: peer.PSD(size, triv="cayley"),
        ((16, 16), (128, 128)),
    ),
    Family(
        "Sphere",
        families.Sphere,
        lambda peer, size: peer.SphereEmbedded(size),
        ((16, 16), (256, 256)),
    ),
)


def cases(settings: Settings) -> Iterator[Case]:
    for family in _FAMILIES:
        for n, k in family.shapes[:1] if settings.quick else family.shapes:
            for what, meter in (("forward", forward), ("forward+backward", forward_backward)):
                yield Case(
                    GROUP,
                    f"{family.name} {n}x{k}, {what}",
                    f"one product of {n}x{k} and {k}x{k}",
                    partial(_contenders, family, (n, k), meter),
                )


def _contenders(
    family: Family, size: tuple[int, int], meter: Callable[[nn.Module], Loop]
) -> dict[str, Meter]:
    n, k = size

    def registered(register: Callable[..., nn.Module], one: Any, X: torch.Tensor) -> Loop:
        layer = nn.Linear(k, n, bias=False)
        layer.weight.data = X
        return meter(moved(register(layer, "weight", one)))

    def ours() -> Loop:
        return registered(parametrize.register_parametrization, family.ours(), torch.randn(n, k))

    def theirs(peer: Any) -> Loop:
        one: Any = family.theirs(peer, size)
        return registered(torch_parametrize.register_parametrization, one, one.sample())  # it takes no other

    meters = {OURS: seeded(ours)}
    peer = geotorch()
    if peer is not None:
        meters["geotorch"] = seeded(partial(theirs, peer))
    A, B = torch.randn(n, k), torch.randn(k, k)
    return {**meters, FLOOR: Loop("mm(A, B)", {"mm": torch.mm, "A": A, "B": B})}
