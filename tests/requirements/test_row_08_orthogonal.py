"""Row 8: an orthogonal weight stays orthogonal, whatever the optimizer does to its original."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from parametrize.oracle import OURS

from .table import Impl, fails_on, row

MAPS = ["matrix_exp", "cayley", "householder"]
COLLAPSES = fails_on("torch", "it reads the signs of the columns off a diagonal that decays, as integers")
with_householder = pytest.mark.parametrize(
    "orthogonal_map", [*MAPS[:2], pytest.param("householder", marks=COLLAPSES)]
)
EPS = torch.finfo(torch.float32).eps


def layer_of(impl: Impl, orthogonal_map: str, *, rows: int = 12) -> nn.Linear:
    torch.manual_seed(0)
    return impl.N.orthogonal(nn.Linear(8, rows, bias=False), orthogonal_map=orthogonal_map)


def gram_error(layer: nn.Linear) -> float:
    Q: Tensor = layer.weight.detach().double()
    return float((Q.T @ Q - torch.eye(Q.shape[1], dtype=Q.dtype)).abs().max())


@with_householder
@row(8, "spd_learn 33")
def test_08_a_zero_original(impl: Impl, orthogonal_map: str) -> None:
    layer = layer_of(impl, orthogonal_map)
    nn.init.zeros_(layer.parametrizations.weight.original)
    assert gram_error(layer) < 20 * EPS


@with_householder
@pytest.mark.parametrize("rows", [8, 12, 30])
@row(8, "spd_learn 33")
def test_08_steps_of_pure_decay(impl: Impl, rows: int, orthogonal_map: str) -> None:
    layer = layer_of(impl, orthogonal_map, rows=rows)
    with torch.no_grad():
        layer.parametrizations.weight.original.add_(torch.randn(rows, 8).tril(-1))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(200):
        (0 * layer.weight).sum().backward()
        optimizer.step()
    assert gram_error(layer) < 20 * EPS


@pytest.mark.slow
@pytest.mark.parametrize("orthogonal_map", MAPS)
def test_08_ten_thousand_steps_of_adam_at_a_large_rate(orthogonal_map: str) -> None:
    layer = layer_of(OURS, orthogonal_map)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1.0)
    target = torch.randn(12, 8)
    for _ in range(10_000):
        optimizer.zero_grad()
        (layer.weight - target).square().sum().backward()
        optimizer.step()
    assert gram_error(layer) < 40 * EPS


DRIFTS = fails_on("torch", "each squaring adds to the error, and none takes it away")


@pytest.mark.parametrize(
    "orthogonal_map", [pytest.param("matrix_exp", marks=DRIFTS), "cayley", "householder"]
)
@row(8, "spd_learn 33")
def test_08_large_originals(impl: Impl, orthogonal_map: str) -> None:
    layer = layer_of(impl, orthogonal_map)
    with torch.no_grad():
        layer.parametrizations.weight.original.add_(300 * torch.randn(12, 8).tril(-1))
    assert gram_error(layer) < 40 * EPS
