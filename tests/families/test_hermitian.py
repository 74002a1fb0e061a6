"""Halves of Hermitian matrices: computed, transposed, packed and unpacked, below and above the sizes of other ways."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from torchkiln.families._maps.hermitian import (
    adjoint,
    lower,
    minus_adjoint,
    packed,
    plus_adjoint,
    square,
    unpacked,
)

EVERY_DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64], ids=str)
EVERY_SHAPE = pytest.mark.parametrize(
    "shape", [(1, 1), (5, 5), (127, 127), (128, 128), (2, 130, 130), (261, 261), (600, 600)], ids=str
)


def hermitian(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    X = torch.randn(shape, dtype=dtype)
    return X + X.mH


@EVERY_DTYPE
@pytest.mark.parametrize("shape", [(1, 2), (3, 4), (130, 140), (2, 3, 7), (2, 3, 130, 129)], ids=str)
def test_an_adjoint_is_a_copy_row_by_row(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    X = torch.randn(shape, dtype=dtype)
    assert torch.equal(adjoint(X), X.mH.resolve_conj())
    assert adjoint(X).is_contiguous()
    assert torch.equal(adjoint(X[..., 1:]), X[..., 1:].mH)
    assert torch.equal(adjoint(X.mT), X.mT.mH)


@EVERY_DTYPE
@EVERY_SHAPE
def test_sums_with_adjoints_and_triangles(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    X = torch.randn(shape, dtype=dtype)
    assert torch.equal(plus_adjoint(X), X + X.mH)
    assert torch.equal(minus_adjoint(X), X - X.mH)
    assert torch.equal(lower(X), X.tril())
    assert torch.equal(lower(X, -1), X.tril(-1))


@EVERY_DTYPE
@EVERY_SHAPE
@pytest.mark.parametrize("sign", [1, -1], ids=["Hermitian", "skew-Hermitian"])
def test_a_square_is_the_product(shape: tuple[int, ...], dtype: torch.dtype, sign: int) -> None:
    X = torch.randn(shape, dtype=dtype)
    X = X + sign * X.mH
    result = square(X)
    torch.testing.assert_close(result, X @ X, rtol=0, atol=torch.finfo(dtype).eps * 40 * shape[-1])
    if shape[-1] > 260:
        assert torch.equal(result.tril(-1), result.mH.tril(-1))


@EVERY_DTYPE
@EVERY_SHAPE
def test_two_matrices_packed_into_one_come_back(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    first, second = hermitian(shape, dtype), hermitian(shape, dtype)
    halves = packed(first, second)
    assert halves.shape == first.shape
    back = unpacked(halves, second.diagonal(dim1=-2, dim2=-1))
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(back[0], first, rtol=0, atol=10 * eps)
    torch.testing.assert_close(back[1], second, rtol=0, atol=0)
