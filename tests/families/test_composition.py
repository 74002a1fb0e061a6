"""Families made of families, or of a user's functions: chains, products, nesting; what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

import torchkiln
from torchkiln import Parametrization, ParametrizationError, families
from torchkiln.parametrizations import spectral_norm
from torchkiln.parametrize import register_parametrization
from torchkiln.testing import check


def registered(family: nn.Module, *shape: int) -> nn.Linear:
    layer = nn.Linear(shape[1], shape[0], bias=False)
    register_parametrization(layer, "weight", family)
    return layer


# --- chains -----------------------------------------------------------------------------------------------------------

CHAINS = [
    families.Chain([families.Symmetric(), families.OperatorNormBound(2)]),
    families.Chain([families.Triangular(diagonal="positive"), families.OperatorNormBound(1, 0.5)]),
    families.Chain([families.Positive(), families.Masked(torch.tensor([True, False, True, True]))]),
    families.Chain([families.LowRank(2), families.FrobeniusNorm(3.0)]),
    families.Chain([families.Chain([families.SkewSymmetric(), families.Scaled(2.0)]), families.Scaled(0.5)]),
]


@pytest.mark.parametrize("chain", CHAINS, ids=repr)
def test_a_chain_obeys_every_law(chain: families.Chain) -> None:
    report = check(chain, torch.randn(4, 4, dtype=torch.float64))
    assert report.ok, str(report)


def test_a_chain_keeps_what_its_links_keep() -> None:
    W = registered(families.Chain([families.Symmetric(), families.OperatorNormBound(2)]), 4, 4).weight
    assert torch.equal(W, W.T)
    assert torch.linalg.matrix_norm(W, 2) <= 1 + 1e-6


def test_a_chain_is_what_registering_one_by_one_gives() -> None:
    torch.manual_seed(0)
    chained = registered(families.Chain([families.Symmetric(), families.OperatorNormBound(2)]), 4, 4)
    torch.manual_seed(0)
    stacked = registered(families.Symmetric(), 4, 4)
    register_parametrization(stacked, "weight", families.OperatorNormBound(2))
    torch.testing.assert_close(chained.weight, stacked.weight)


def test_spectral_norm_after_symmetric_leaves_it_symmetric() -> None:
    layer = registered(families.Symmetric(), 4, 4)
    spectral_norm(layer, n_power_iterations=20)
    torch.testing.assert_close(layer.weight, layer.weight.T)
    torch.testing.assert_close(
        torch.linalg.matrix_norm(layer.weight, 2), torch.tensor(1.0), rtol=1e-3, atol=0
    )


@pytest.mark.parametrize(
    ("chain", "violation"),
    [
        (CHAINS[0], torch.tensor([[0.0, 0.5], [0.0, 0.0]])),
        (CHAINS[0], torch.tensor([[2.0, 0.0], [0.0, 0.0]])),
    ],
    ids=["the first link's", "the last link's"],
)
def test_the_residual_of_a_chain_sees_every_link(chain: Parametrization, violation: Tensor) -> None:
    assert chain.residual(torch.eye(2)) < 1e-6
    assert chain.residual(violation) > 0.2


# --- products ---------------------------------------------------------------------------------------------------------

PRODUCTS = [
    families.Product([families.Orthogonal("cayley"), None], [2, 2], dim=0),
    families.Product([families.Sphere(), families.Simplex()], [1, 3], dim=-1),
    families.Product([families.Kronecker(1, 2), families.LowRank(1)], [2, 2], dim=0),
    families.Product([families.Chain([families.Symmetric(), families.Scaled(2.0)])], [4], dim=1),
    families.Product([families.Product([families.Positive(), None], [1, 1]), families.UnitNorm()], [2, 2]),
]


@pytest.mark.parametrize("product", PRODUCTS, ids=repr)
def test_a_product_obeys_every_law(product: families.Product) -> None:
    report = check(product, torch.randn(4, 4, dtype=torch.float64))
    assert report.ok, str(report)


def test_the_parts_of_a_fused_projection_have_their_own_constraints() -> None:
    fused = families.Product([families.Orthogonal("cayley"), families.Orthogonal("cayley"), None], [4, 4, 4])
    query, key, value = registered(fused, 12, 4).weight.split(4)
    torch.testing.assert_close(query @ query.T, torch.eye(4))
    torch.testing.assert_close(key @ key.T, torch.eye(4))
    assert not torch.allclose(value @ value.T, torch.eye(4))


# --- a user's own -----------------------------------------------------------------------------------------------------


def test_a_function_and_its_inverse_make_a_family() -> None:
    layer = registered(families.Custom(torch.sinh, torch.asinh), 2, 3)
    before = layer.weight.detach().clone()
    torch.testing.assert_close(layer.parametrizations.weight.original.sinh(), before)
    torchkiln.bake(layer)
    assert torch.equal(layer.weight, before)


def test_a_distance_makes_it_a_constraint() -> None:
    even = families.Custom(lambda X: X + X.flip(-1), lambda X: X / 2, distance=lambda X: X - X.flip(-1))
    assert even.residual(torch.tensor([1.0, 2.0])) == 1
    assert even.residual(even(torch.tensor([1.0, 2.0]))) == 0


def test_without_an_inverse_a_function_computes_and_cannot_be_assigned() -> None:
    layer = registered(families.Custom(torch.sin), 2, 3)
    with pytest.raises(NotImplementedError, match="no inverse was passed"):
        layer.weight = torch.zeros(2, 3)


# --- what registering will change -------------------------------------------------------------------------------------


def test_a_family_says_how_far_registering_moves_a_value() -> None:
    family = families.Symmetric()
    X = torch.tensor([[1.0, 2.0], [4.0, 3.0]])
    assert family.displacement(X) == pytest.approx(2**0.5)
    assert family.displacement(family.project(X)) == 0
    assert torch.equal(registered_on(family, X), family.project(X))


def registered_on(family: nn.Module, X: Tensor) -> Tensor:
    layer = nn.Linear(*X.shape, bias=False)
    layer.weight = nn.Parameter(X)
    return register_parametrization(layer, "weight", family).weight.detach()


def test_asking_changes_no_family() -> None:
    family = families.Stiefel()
    family.displacement(torch.randn(4, 2))
    assert family.base is None


# --- refusals ---------------------------------------------------------------------------------------------------------

REFUSED_ARGUMENTS: list[tuple[Callable[[], object], str]] = [
    (lambda: families.Positive("log"), "Positive: map must be one of 'softplus', 'exp', 'square', got 'log'"),
    (lambda: families.Interval(1.0, 1.0), "Interval needs lower < upper, got lower=1.0, upper=1.0"),
    (families.Clamped, "Clamped needs a bound"),
    (lambda: families.L1Ball(0.0), "L1Ball needs radius > 0, got 0.0"),
    (lambda: families.L2Ball(-1.0), "L2Ball needs radius > 0, got -1.0"),
    (lambda: families.LInfBall(0.0), "LInfBall needs radius > 0"),
    (lambda: families.Sphere(float("nan")), "Sphere needs radius > 0, got nan"),
    (lambda: families.MaxNorm(0.0), "MaxNorm needs bound > 0"),
    (lambda: families.OperatorNormBound(3), "OperatorNormBound: order must be one of 1, 2, 'inf', got 3"),
    (lambda: families.FrobeniusNorm(per="column"), "FrobeniusNorm: per must be one of 'tensor', 'row'"),
    (lambda: families.SchurStable(0.0), "SchurStable needs radius > 0"),
    (lambda: families.Kronecker(0, 2), "Kronecker needs rows > 0, got 0"),
    (lambda: families.Monarch(0), "Monarch needs blocks > 0, got 0"),
    (lambda: families.BlockCirculant(0), "BlockCirculant needs block > 0, got 0"),
    (lambda: families.Scaled(0.0), "Scaled needs a factor that is not 0"),
    (lambda: families.AlmostOrthogonal(2.0), "AlmostOrthogonal needs 0 < radius <= 1, got 2.0"),
    (lambda: families.Chain([]), "Chain needs at least one family"),
    (lambda: families.Product([None], [1, 2]), "Product needs one size for each family, got 1 and 2"),
]


@pytest.mark.parametrize(
    ("make", "text"), REFUSED_ARGUMENTS, ids=[text[:30] for _, text in REFUSED_ARGUMENTS]
)
def test_arguments_that_make_no_sense_are_refused(make: Callable[[], object], text: str) -> None:
    with pytest.raises(ParametrizationError) as caught:
        make()
    assert text in str(caught.value)


REFUSED_TENSORS: list[tuple[Parametrization, Tensor, str]] = [
    (
        families.Symmetric(),
        torch.zeros(3),
        'needs at least 2 dimensions, got shape (3,).\nRegister it on "weight"',
    ),
    (families.Symmetric(), torch.zeros(2, 3), "Symmetric needs square matrices, got shape (2, 3)"),
    (
        families.Positive(),
        torch.zeros(2, dtype=torch.complex64),
        "Positive needs real numbers, got torch.complex64",
    ),
    (families.UnitCircle(), torch.zeros(2), "UnitCircle needs complex numbers, got torch.float32"),
    (families.Diagonal(), torch.zeros(2, 2, dtype=torch.int64), "Diagonal needs real or complex numbers"),
    (
        families.LowRank(4),
        torch.zeros(3, 5),
        "LowRank(rank=4): the rank must be from 1 to 3 for shape (3, 5)",
    ),
    (families.PositiveSemidefinite(4), torch.zeros(3, 3), "the rank must be from 1 to 3 for shape (3, 3)"),
    (families.Monarch(2), torch.zeros(3, 4), "2 and 2 must divide the sides of the matrix, got (3, 4)"),
    (families.BlockCirculant(2), torch.zeros(3, 4), "needs sides that 2 divides, got (3, 4)"),
    (families.Butterfly(), torch.zeros(6, 6), "needs sides that are a power of 2, got shape (6, 6)"),
    (families.Toeplitz(), torch.zeros(3, 0), "Toeplitz needs at least one row and column, got (3, 0)"),
    (families.LowRank(1), torch.zeros(0, 3), "LowRank needs at least one row and column, got (0, 3)"),
    (families.Simplex(), torch.zeros(3, 0), "Simplex needs at least one entry, got shape (3, 0)"),
    (families.Masked(torch.ones(2)), torch.zeros(3), "a mask of shape (2,) does not fit shape (3,)"),
    (
        families.WeightStandardization(),
        torch.zeros(3),
        "needs at least 2 weights per channel, got shape (3,)",
    ),
    (families.Product([None], [2]), torch.zeros(3), "parts of (2,) do not add up to dim 0 of shape (3,)"),
    (
        families.Chain([families.Scaled(2.0), families.LowRank(1)]),
        torch.zeros(3, 3),
        "Scaled comes before a family with several originals.\nOnly the first family may have more than one",
    ),
    (
        families.Triangular(diagonal="positive"),
        torch.zeros(2, 2, dtype=torch.complex64),
        "Triangular with a positive diagonal needs real numbers",
    ),
]


@pytest.mark.parametrize(
    ("family", "X", "text"), REFUSED_TENSORS, ids=[text[:30] for *_, text in REFUSED_TENSORS]
)
def test_tensors_that_a_family_is_not_for_are_refused(family: Parametrization, X: Tensor, text: str) -> None:
    holder = nn.Module()
    holder.weight = nn.Parameter(X, requires_grad=X.dtype != torch.int64)
    with pytest.raises(ParametrizationError) as caught:
        register_parametrization(holder, "weight", deepcopy(family))
    assert text in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 3
    assert type(holder) is nn.Module
