"""The orthogonal maps are at least as accurate as torch's operations for them, in float32, at every norm."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from torchkiln.families._maps import orthogonal as maps

Map = Callable[[Tensor], Tensor]


def torch_exponential(X: Tensor) -> Tensor:
    return torch.matrix_exp(maps.skew(X))[..., : X.shape[-1]]


def torch_cayley(X: Tensor) -> Tensor:
    half = maps.skew(X) / 2
    eye = torch.eye(half.shape[-1], dtype=X.dtype)
    return torch.linalg.solve(eye - half, eye + half)[..., : X.shape[-1]]


def torch_householder(X: Tensor) -> Tensor:
    V = X.tril(-1)
    tau = 2 / (1 + (V * V).sum(-2))
    return torch.linalg.householder_product(V, tau) * X.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)


PAIRS = [
    pytest.param(maps.exponential, torch_exponential, id="exponential"),
    pytest.param(maps.cayley, torch_cayley, id="cayley"),
    pytest.param(maps.householder, torch_householder, id="householder"),
]
against_torch = pytest.mark.parametrize(("ours", "theirs"), PAIRS)
EVERY_SHAPE = pytest.mark.parametrize(
    "shape", [(24, 24), (100, 100), (90, 60), (150, 20), (3, 40, 8)], ids=str
)


def gram_error(Q: Tensor) -> float:
    Q = Q.double() if not Q.is_complex() else Q.to(torch.complex128)
    return float((Q.mH @ Q - torch.eye(Q.shape[-1], dtype=Q.dtype)).abs().max())


def of_norm(shape: tuple[int, ...], norm: float, dtype: torch.dtype = torch.float32) -> Tensor:
    X = torch.randn(shape, dtype=dtype)
    return X * norm / float(torch.linalg.matrix_norm(maps.skew(X), 2).max())


@against_torch
@EVERY_SHAPE
@pytest.mark.parametrize("norm", [0.0, 1e-6, 0.3, 1, 3, 10, 100, 1000])
def test_columns_are_as_orthonormal_as_torchs(
    ours: Map, theirs: Map, shape: tuple[int, ...], norm: float
) -> None:
    X = of_norm(shape, norm)
    # Below eight units in the last place either may be the better one by chance.
    assert gram_error(ours(X)) <= max(gram_error(theirs(X)), 8 * torch.finfo(torch.float32).eps)


@against_torch
@EVERY_SHAPE
def test_columns_of_all_scales_are_as_orthonormal_as_torchs(
    ours: Map, theirs: Map, shape: tuple[int, ...]
) -> None:
    X = torch.randn(shape) * torch.logspace(-6, 3, shape[-1])
    assert gram_error(ours(X)) <= max(gram_error(theirs(X)), 8 * torch.finfo(torch.float32).eps)


@against_torch
@pytest.mark.parametrize(
    "shape", [(20, 64, 64), (5, 128, 128), (3, 256, 256), (3, 300, 200), (3, 512, 64)], ids=str
)
@pytest.mark.parametrize("scale", [0.1, 1, 1.4, 2])
def test_columns_are_as_orthonormal_as_torchs_on_average(
    ours: Map, theirs: Map, shape: tuple[int, ...], scale: float
) -> None:
    X = torch.randn(shape) * scale / shape[-2] ** 0.5

    def error(Q: Tensor) -> float:
        Q = Q.double()
        return float(torch.linalg.norm(Q.mT @ Q - torch.eye(shape[-1], dtype=Q.dtype)))

    assert error(ours(X)) <= 1.1 * error(theirs(X))


@pytest.mark.parametrize("norm", [1, 30, 1000])
@pytest.mark.parametrize("ours", [maps.exponential, maps.cayley], ids=["exponential", "cayley"])
@EVERY_SHAPE
def test_complex_columns_stay_orthonormal(ours: Map, shape: tuple[int, ...], norm: float) -> None:
    assert gram_error(ours(of_norm(shape, norm, torch.complex64))) < 5e-5


@against_torch
@EVERY_SHAPE
@pytest.mark.parametrize("norm", [1e-6, 0.3, 1, 3, 20])
def test_values_and_gradients_equal_torchs(
    ours: Map, theirs: Map, shape: tuple[int, ...], norm: float
) -> None:
    X = of_norm(shape, norm, torch.float64).requires_grad_()
    mine, expected = ours(X), theirs(X)
    G = torch.randn_like(expected)
    torch.testing.assert_close(mine, expected, rtol=0, atol=1e-12)
    gradients = [torch.autograd.grad(Q, X, G)[0] for Q in (mine, expected)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12 * float(gradients[1].abs().max() + 1))


@against_torch
@pytest.mark.parametrize("shape", [(261, 261), (300, 261), (400, 140)], ids=str)
def test_large_matrices_are_computed_by_blocks(ours: Map, theirs: Map, shape: tuple[int, ...]) -> None:
    test_values_and_gradients_equal_torchs(ours, theirs, shape, 2)


def test_a_batch_of_all_sizes_is_as_accurate_as_its_matrices() -> None:
    X = torch.stack([of_norm((12, 12), norm) for norm in (0.0, 1e-4, 1.0, 300.0)]).requires_grad_()
    Q = maps.exponential(X)
    G = torch.randn_like(Q)
    torch.testing.assert_close(Q, torch.stack([maps.exponential(each) for each in X]), rtol=0, atol=1e-6)
    (together,) = torch.autograd.grad(Q, X, G)
    each = X.detach().requires_grad_()
    (apart,) = torch.autograd.grad(torch.stack([maps.exponential(one) for one in each]), each, G)
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-5)


@pytest.mark.parametrize("norm", [1e12, 1e15])
def test_no_power_overflows(norm: float) -> None:
    assert gram_error(maps.exponential(of_norm((6, 6), norm))) < 1e-6


@pytest.mark.parametrize(
    "ours", [maps.exponential, maps.cayley, maps.householder], ids=lambda one: one.__name__
)
def test_what_is_not_finite_gives_what_is_not_finite(ours: Map) -> None:
    X = torch.randn(5, 5)
    X[3, 1] = torch.nan
    assert ours(X).isnan().any()
