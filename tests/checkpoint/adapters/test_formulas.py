"""The rule of each type by its formula, written out: without PEFT, and in other words than the rule's."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from torchkiln.checkpoint._adapters import lora, patterns, products, rotations, shared

torch.manual_seed(0)
W = torch.randn(6, 8, dtype=torch.float64)


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def assert_close(value: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)


def test_the_factors_of_a_convolution_are_a_convolution_after_another() -> None:
    A, B, x = rand(2, 4, 3, 3), rand(6, 2, 1, 1), rand(1, 4, 5, 5)
    L, R = lora.flat_factors(A, B)
    delta = (L @ R).view(6, 4, 3, 3)
    two = torch.nn.functional.conv2d(torch.nn.functional.conv2d(x, A), B)
    assert_close(torch.nn.functional.conv2d(x, delta), two)


def test_swapped_factors_are_the_transpose() -> None:
    A, B = rand(2, 8), rand(6, 2)
    L, R = lora.swapped_factors(A, B)
    assert_close(L @ R, (B @ A).T)


@pytest.mark.parametrize("inputs_first", [True, False])
def test_each_expert_has_its_own_factors(inputs_first: bool) -> None:
    experts, rank = 3, 2
    A, B = rand(experts * rank, 8), rand(6, rank * experts)
    delta = lora.expert_delta(A, B, experts=experts, inputs_first=inputs_first)
    for expert in range(experts):
        own = B[:, expert::experts] @ A[expert * rank : (expert + 1) * rank]
        assert_close(delta[expert], own.T if inputs_first else own)


@pytest.mark.parametrize("dim", [0, 1])
def test_dora_gives_the_sum_the_lengths_of_the_magnitudes(dim: int) -> None:
    A, B = rand(2, 8), rand(6, 2)
    swap = dim == 1
    W_in = W.T.contiguous() if swap else W
    lengths = torch.rand(6, dtype=torch.float64) + 1
    value = lora.dora(W_in, lengths, A, B, scale=0.5, dim=dim, swap=swap)
    rows = value.T if swap else value
    assert_close(rows.norm(dim=1), lengths)
    V = W + 0.5 * B @ A
    assert_close(rows / rows.norm(dim=1, keepdim=True), V / V.norm(dim=1, keepdim=True))


def test_hira_multiplies_element_by_element() -> None:
    A, B = rand(2, 8), rand(6, 2)
    assert_close(lora.hira_weight(W, A, B, swap=False), W * (B @ A + 1))


def test_vera_scales_cut_matrices() -> None:
    b, d, A, B = rand(6), rand(3), rand(3, 10), rand(9, 3)
    L, R = shared.vera_factors(b, d, A, B, rows=6, columns=8)
    assert_close(L @ R, torch.diag(b) @ B[:6] @ torch.diag(d) @ A[:, :8])


def test_delora_bounds_each_rank_one_term() -> None:
    A, B, bound, norms = rand(2, 8), rand(6, 2), rand(1).abs(), rand(8).abs()
    L, R = shared.delora_factors(A, B, bound, norms, rank=2)
    terms = [torch.outer(B[:, i] / B[:, i].norm(), A[i] / A[i].norm()) for i in range(2)]
    assert_close(L @ R, bound / 2 * sum(terms) * norms)


def test_mixed_vectors_are_a_convex_combination_of_the_best() -> None:
    bank = rand(5, 4)
    logits = torch.tensor([[0.0, 3.0, -math.inf, 3.0, 1.0]], dtype=torch.float64)
    assert_close(shared.mixed_vectors(logits, bank, most=2)[0], (bank[1] + bank[3]) / 2)


def test_hadamard_and_kronecker() -> None:
    a1, b1, a2, b2 = rand(6, 2), rand(2, 8), rand(6, 2), rand(2, 8)
    value = products.hadamard(a1, b1, a2, b2)
    assert_close(value[3, 5], (a1[3] @ b1[:, 5]) * (a2[3] @ b2[:, 5]))
    w1, w2 = rand(2, 3), rand(4, 5, 2, 2)
    assert_close(products.kronecker(w1, w2)[4:8, 10:15], w1[1, 2] * w2)


def test_scaled_and_rows() -> None:
    factors = rand(8)
    assert_close(products.scaled(W.clone(), factors, dim=1), W @ torch.diag(factors))
    rows = rand(2, 8)
    value = products.with_rows(W.clone(), rows, index=(4, 1))
    assert_close(value[[4, 1]], rows)
    assert_close(value[[0, 2, 3, 5]], W[[0, 2, 3, 5]])


def test_rotations_are_rotations() -> None:
    Q = rotations.skew(rand(2, 6))
    assert_close(Q, -Q.mT)
    assert Q.shape == (2, 4, 4)
    R = rotations.cayley(Q)
    assert_close(R @ R.mT, torch.eye(4, dtype=torch.float64).expand(2, 4, 4))
    assert_close(rotations.rotated_blocks(W, R), W @ torch.block_diag(*R).T)
    assert_close(rotations.rotated_blocks(W, R, inverse=True), W @ torch.block_diag(*R))


def test_the_series_goes_to_the_inverse_of_the_rotation() -> None:
    Q = rotations.skew(rand(1, 6) * 0.01)
    assert_close(rotations.cayley_series(Q, terms=12), rotations.cayley(-Q))


@pytest.mark.parametrize(("blocks", "half"), [(2, 2), (1, 2), (1, 1), (4, 1)])
def test_a_butterfly_pairs_halves_of_neighbouring_blocks(blocks: int, half: int) -> None:
    order = rotations.butterfly(8, blocks=blocks, half=half)
    assert sorted(order.tolist()) == list(range(8))
    part = order[: 8 // blocks].view(2, -1, half) if blocks * half * 2 <= 8 else order
    assert (part[0] // half % 2 == 0).all()


@pytest.mark.parametrize("factors", [1, 2])
def test_boft_keeps_lengths_up_to_its_scales(factors: int) -> None:
    count, side = 2, 4
    value = rotations._boft_weight(
        W, rand(factors, count, side, side), torch.full((6, 1), 2.0, dtype=torch.float64)
    )
    assert_close(value.norm(dim=1), 2 * W.norm(dim=1))
    assert_close(value @ value.T, 4 * W @ W.T)


def test_reflections_one_after_another() -> None:
    U = rand(8, 3)
    expected = W
    for u in (U / U.norm(dim=0)).unbind(1):
        expected = expected @ (torch.eye(8, dtype=torch.float64) - 2 * torch.outer(u, u))
    assert_close(rotations.reflected(W.clone(), U), expected)


@pytest.mark.parametrize(("variant", "count"), [("road_1", 3), ("road_2", 6), ("road_4", 12)])
def test_road_turns_pairs_of_outputs(variant: str, count: int) -> None:
    theta = torch.full((count,), math.pi / 2, dtype=torch.float64)
    value = rotations.rotated_pairs(W, theta, torch.ones_like(theta), group=2, variant=variant)
    # road_4 takes the cosine of one angle and the sine of another; both are right angles here.
    assert_close(value[0::2], -W[1::2])
    assert_close(value[1::2], W[0::2])


def test_a_spectrum_of_one_coefficient_is_a_wave() -> None:
    value = patterns.from_spectrum(torch.ones(1, dtype=torch.float64), shape=(6, 8), seed=3)
    assert_close(value.abs().max(), torch.tensor(1 / 48, dtype=torch.float64))
    place = int(torch.randperm(48, generator=torch.Generator().manual_seed(3))[0])
    row, column = divmod(place, 8)
    turns = torch.arange(6).double()[:, None] * row / 6 + torch.arange(8).double() * column / 8
    assert_close(value, (2 * math.pi * turns).cos() / 48)


def test_circulant_blocks_shift_their_rows() -> None:
    kernel = rand(2, 1, 3)
    value = patterns.circulant_blocks(kernel)
    for i in range(3):
        assert_close(value[i], kernel[0, 0].roll(i))


def test_tiles_are_cut_at_the_last_input() -> None:
    block = rand(3, 6)
    value = patterns.tiled(block, shape=(6, 8))
    assert_close(value, torch.cat([block.T, block.T, block.T[:, :2]], dim=1))


def test_scattered_entries_stand_alone() -> None:
    index = torch.tensor([[0, 5], [7, 2]], dtype=torch.int32)
    value = patterns.scattered(rand(2), index, shape=(6, 8))
    assert int((value != 0).sum()) == 2
    assert float(value[5, 2]) != 0
