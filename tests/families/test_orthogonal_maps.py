"""The orthogonal maps: what they promise about their values, and their derivatives against finite differences."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from torchkiln.families._maps import orthogonal as maps

ORTHOGONAL = [maps.exponential, maps.cayley, maps.householder]
TALL = [(4, 4), (5, 3), (4, 1), (1, 1), (2, 4, 3)]

tall_shapes = st.tuples(st.integers(1, 7), st.integers(1, 7)).map(lambda nk: (max(nk), min(nk)))


def gram_error(Q: Tensor) -> float:
    eye = torch.eye(Q.shape[-1], dtype=Q.dtype)
    return float((Q.mH @ Q - eye).abs().max())


def free(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype)


@pytest.mark.parametrize("f", ORTHOGONAL)
@given(shape=tall_shapes, scale=st.sampled_from([0.0, 1e-8, 1.0, 30.0]))
def test_orthogonal_maps_give_orthonormal_columns(f, shape, scale):
    assert gram_error(f(free(shape) * scale)) < 1e-12


@pytest.mark.parametrize("f", [maps.exponential, maps.cayley])
@pytest.mark.parametrize("shape", TALL)
def test_complex_maps_give_unitary_columns(f, shape):
    assert gram_error(f(free(shape, torch.complex128))) < 1e-13


@pytest.mark.parametrize("f", ORTHOGONAL)
@pytest.mark.parametrize("shape", TALL)
def test_orthogonal_maps_differentiate(f, shape):
    assert gradcheck(f, free(shape).requires_grad_())


@pytest.mark.parametrize("f", ORTHOGONAL)
def test_orthogonal_maps_of_a_batch_equal_the_maps_of_its_matrices(f):
    batch = free((3, 5, 2))
    torch.testing.assert_close(f(batch), torch.stack([f(X) for X in batch]))


@pytest.mark.parametrize("f", ORTHOGONAL)
def test_zero_maps_to_the_first_unit_vectors(f):
    torch.testing.assert_close(
        f(torch.zeros(4, 2, dtype=torch.float64)), torch.eye(4, dtype=torch.float64)[:, :2]
    )


def test_exponential_of_a_plane_rotation():
    angle = torch.tensor(0.3, dtype=torch.float64)
    expected = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()]).view(2, 2)
    torch.testing.assert_close(
        maps.exponential(torch.tensor([[0, 0], [0.3, 0]], dtype=torch.float64)), expected
    )


def test_cayley_of_a_plane_rotation_is_twice_the_arc_tangent_of_half():
    angle = 2 * torch.atan(torch.tensor(0.15, dtype=torch.float64))
    expected = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()]).view(2, 2)
    torch.testing.assert_close(maps.cayley(torch.tensor([[0, 0], [0.3, 0]], dtype=torch.float64)), expected)


@pytest.mark.parametrize("shrink", [0.99, 1e-3, 0.0])
def test_householder_survives_weight_decay(shrink):
    X = maps.householder_inverse(torch.linalg.qr(free((5, 3))).Q)
    assert gram_error(maps.householder(X * shrink)) < 1e-14


@given(shape=tall_shapes)
def test_householder_inverse_is_one(shape):
    Q = maps.orthonormalize(free(shape))
    torch.testing.assert_close(maps.householder(maps.householder_inverse(Q)), Q)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("shape", TALL)
def test_orthonormalize_is_the_q_factor_with_a_nonnegative_diagonal(shape, dtype):
    A = free(shape, dtype)
    Q = maps.orthonormalize(A)
    R = Q.mH @ A
    diagonal = R.diagonal(dim1=-2, dim2=-1)
    assert gram_error(Q) < 1e-13
    torch.testing.assert_close(Q @ R.triu(), A)
    torch.testing.assert_close(diagonal, diagonal.abs().to(dtype))


def test_orthonormalize_of_a_singular_matrix_is_orthonormal():
    assert gram_error(maps.orthonormalize(torch.zeros(4, 4, dtype=torch.float64))) < 1e-14


@pytest.mark.parametrize("shape", TALL)
def test_complete_basis_begins_with_its_argument(shape):
    Q = torch.linalg.qr(free(shape)).Q
    basis = maps.complete_basis(Q)
    assert basis.shape[-2] == basis.shape[-1]
    assert gram_error(basis) < 1e-13
    torch.testing.assert_close(basis[..., : shape[-1]], Q)


def test_complete_basis_of_an_orthogonal_matrix_is_a_copy():
    Q = torch.linalg.qr(free((4, 4))).Q
    basis = maps.complete_basis(Q)
    assert torch.equal(basis, Q)
    assert basis.data_ptr() != Q.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("n", [3, 200])
def test_is_orthonormal_allows_the_rounding_of_the_dtype_and_little_more(dtype, n):
    Q = torch.linalg.qr(free((n, n))).Q.to(dtype)
    assert maps.is_orthonormal(Q)
    Q[0, 0] += 0.5
    assert not maps.is_orthonormal(Q)
