"""What the families document about extremes: far out, on the border, near singular, with repeated singular values."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from torchkiln import Parametrization, families
from torchkiln.parametrize import register_parametrization


def value_and_gradient(family: Parametrization, *originals: Tensor) -> tuple[Tensor, Tensor]:
    """The value, and the gradient of a sum that weighs every entry differently, for the first original."""
    leaves = [original.clone().requires_grad_() for original in originals]
    value = family(*leaves)
    weights = torch.linspace(1, 2, value.numel(), dtype=value.dtype).view(value.shape)
    (value * weights).sum().backward()
    gradient = leaves[0].grad
    assert gradient is not None
    return value.detach(), gradient


# --- far out ---------------------------------------------------------------------------------------------------------

FAR = torch.tensor([-1e4, 0.0, 1e4])
BOUNDED_OR_LINEAR = [
    families.Positive(),
    families.GreaterThan(1.0),
    families.LessThan(1.0),
    families.Interval(-2.0, 3.0),
    families.Interval(map="tanh"),
    families.Simplex(),
    families.Simplex("stick_breaking"),
    families.SparseSimplex(),
    families.L1Ball(),
    families.L2Ball(),
    families.MaxNorm(1.0),
    families.Sphere(),
    families.Triangular(diagonal="positive"),
    families.PositiveDefinite(),
    families.PositiveDefinite("softplus"),
    families.Correlation(),
    families.GraphLaplacian(),
]


@pytest.mark.parametrize("family", BOUNDED_OR_LINEAR, ids=repr)
def test_originals_of_ten_thousand_give_finite_values_and_gradients(family: Parametrization) -> None:
    X = FAR if (family.event_dim or 0) < 2 else FAR.expand(3, 3) + torch.eye(3)
    value, gradient = value_and_gradient(family, X)
    assert value.isfinite().all()
    assert gradient.isfinite().all()
    assert family.residual(value) <= 1e-3 * (1 + value.abs().max())


def test_softplus_is_exact_at_both_ends() -> None:
    value, gradient = value_and_gradient(families.Positive(), torch.tensor([-50.0, 1e4]))
    torch.testing.assert_close(
        value, torch.tensor([-50.0, 1e4]).double().exp().log1p().clamp(max=1e4).float()
    )
    torch.testing.assert_close(gradient, torch.sigmoid(torch.tensor([-50.0, 1e4])) * torch.tensor([1.0, 2.0]))


@pytest.mark.parametrize("size", [1e-30, 1e-8, 1.0, 20.0, 1e4, 1e30])
def test_the_inverse_of_softplus_keeps_numbers_of_every_size(size: float) -> None:
    y = torch.tensor([size])
    torch.testing.assert_close(families.Positive().project(y), y, rtol=1e-5, atol=0)


@pytest.mark.parametrize("spread", [1.0, 10.0, 1e3, 1e6])
def test_sinkhorn_in_logarithms_neither_overflows_nor_loses_the_columns(spread: float) -> None:
    X = spread * torch.linspace(-1, 1, 16).view(4, 4)[:, [2, 0, 3, 1]]
    value, gradient = value_and_gradient(families.DoublyStochastic(), X)
    torch.testing.assert_close(value.sum(0), torch.ones(4))
    assert gradient.isfinite().all()


def test_a_permutation_is_doubly_stochastic_and_kept() -> None:
    P = torch.eye(4)[[2, 0, 3, 1]]
    torch.testing.assert_close(families.DoublyStochastic().project(P), P)


# --- near singular, and with repeated singular values -----------------------------------------------------------------


@pytest.mark.parametrize("least", [1.0, 1e-3, 1e-6, 1e-7])
@pytest.mark.parametrize("map_name", ["cholesky", "exponential", "softplus"])
def test_a_definite_matrix_near_singular_is_kept(map_name: str, least: float) -> None:
    Q = torch.linalg.qr(torch.randn(4, 4)).Q
    A = (Q * torch.tensor([1.0, 1.0, 0.5, least])) @ Q.T
    A = (A + A.T) / 2
    torch.testing.assert_close(families.PositiveDefinite(map_name).project(A), A, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    "A", [torch.zeros(3, 3), torch.ones(3, 3), -torch.eye(3)], ids=["zero", "rank 1", "negative"]
)
def test_what_is_not_definite_becomes_so(A: Tensor) -> None:
    value = families.PositiveDefinite().project(A.double())
    assert torch.linalg.cholesky_ex(value).info == 0


class Repeated(NamedTuple):
    """A family that works with singular values or eigenvalues, and the original whose spectrum repeats."""

    family: Parametrization
    X: Tensor


REPEATED = [
    Repeated(families.SigmaReparam(), torch.eye(3)),
    Repeated(families.OperatorNormBound(2, 0.5), torch.eye(3)),
    Repeated(families.OrthogonalProjection("polar"), torch.eye(3)),
    Repeated(families.OrthogonalProjection("newton_schulz"), torch.eye(3)),
    Repeated(families.PositiveDefinite("exponential"), torch.eye(3)),
    Repeated(families.PositiveDefinite("softplus"), torch.zeros(3, 3)),
]


@pytest.mark.parametrize("case", REPEATED, ids=lambda case: repr(case.family))
def test_repeated_singular_values_give_a_finite_gradient(case: Repeated) -> None:
    inverse: Any = case.family.right_inverse(case.X)
    originals = inverse if isinstance(inverse, tuple) else (case.X,)
    value, gradient = value_and_gradient(case.family, *originals)
    assert value.isfinite().all()
    assert gradient.isfinite().all()


FACTORED = [
    families.LowRank(2),
    families.FixedRank(2),
    families.AlmostOrthogonal(0.5),
    families.Invertible(),
    families.SpecialLinear(),
    families.PositiveSemidefinite(2),
    families.FixedRankSemidefinite(2),
    families.DiagonalPlusLowRank(1),
    families.Kronecker(2, 2),
    families.Monarch(2),
    families.Butterfly(),
    families.Orthogonal(),
    families.Stiefel(),
    families.Correlation(),
    families.HurwitzStable(),
    families.SchurStable(),
    families.PLU(),
]


@pytest.mark.parametrize("family", FACTORED, ids=lambda family: type(family).__name__)
@pytest.mark.parametrize(
    "X", [torch.zeros(4, 4), torch.ones(4, 4), torch.eye(4)], ids=["zero", "ones", "identity"]
)
def test_degenerate_values_can_be_trained_away_from(family: Parametrization, X: Tensor) -> None:
    """An SVD or eigendecomposition of these has repeated values; in the original nothing may be NaN, or stuck at 0."""
    layer = nn.Linear(4, 4, bias=False)
    layer.weight = nn.Parameter(X.clone())
    register_parametrization(layer, "weight", family)
    target = torch.linspace(-1, 1, 16).view(4, 4)
    before = layer.weight.detach().clone()
    (layer.weight * target).sum().backward()
    gradients = torch.cat([parameter.grad.flatten() for parameter in layer.parameters()])
    assert before.isfinite().all()
    assert gradients.isfinite().all()
    assert gradients.abs().max() > 0


# --- on the border ----------------------------------------------------------------------------------------------------


class Border(NamedTuple):
    """A value on the border of an open set, or beyond, and where it goes."""

    family: Parametrization
    value: list[float]
    goes_to: list[float]


EPS = torch.finfo(torch.float32).eps
BORDERS = [
    Border(families.Positive(), [0.0, -1.0, 2.0], [EPS, EPS, 2.0]),
    Border(families.Positive("exp"), [0.0, -1.0, 2.0], [EPS, EPS, 2.0]),
    Border(families.Positive("square"), [0.0, -1.0, 2.0], [0.0, EPS, 2.0]),
    Border(families.GreaterThan(1.0), [1.0, 0.0, 3.0], [1.0 + EPS, 1.0 + EPS, 3.0]),
    Border(families.LessThan(1.0), [1.0, 2.0, 0.0], [1.0 - EPS, 1.0 - EPS, 0.0]),
    Border(families.Interval(), [0.0, 1.0, 0.5], [EPS, 1.0 - EPS, 0.5]),
    Border(families.Clamped(0.0, 1.0), [0.0, 2.0, 0.5], [0.0, 1.0, 0.5]),
    Border(families.LInfBall(), [1.0, -2.0, 0.5], [1.0, -1.0, 0.5]),
    Border(families.Ordered(), [1.0, 0.0, 2.0], [0.0, 1.0, 2.0]),
    Border(families.Ordered(), [0.0, 0.0, 1.0], [0.0, EPS, 1.0]),
    Border(families.PositiveOrdered(), [-1.0, 1.0, 2.0], [EPS, 1.0, 2.0]),
    Border(families.Simplex(), [1.0, 0.0, 0.0], [1.0, EPS, EPS]),
    Border(families.SparseSimplex(), [1.0, 0.0, 0.0], [1.0, 0.0, 0.0]),
    Border(families.Sphere(), [0.0, 0.0, 0.0], [3**-0.5] * 3),
    Border(families.UnitNorm(), [1e-42, 0.0, 0.0], [3**-0.5] * 3),
    Border(families.UnitNorm(), [1e-15, 0.0, 0.0], [1.0, 0.0, 0.0]),
]


@pytest.mark.parametrize("border", BORDERS, ids=lambda border: f"{border.family!r} {border.value}")
def test_a_value_on_the_border_goes_where_it_is_documented(border: Border) -> None:
    got = border.family.project(torch.tensor(border.value))
    torch.testing.assert_close(got, torch.tensor(border.goes_to), rtol=1e-5, atol=1.5e-7)


SCALED = [
    families.FrobeniusNorm(),
    families.UnitNorm(),
    families.Sphere(),
    families.WeightStandardization(),
    families.MaxNorm(1.0),
    families.L2Ball(),
    families.SparseSimplex(),
    families.OperatorNormBound(2),
]


@pytest.mark.parametrize("family", SCALED, ids=repr)
def test_an_original_of_zeros_has_a_finite_gradient(family: Parametrization) -> None:
    value, gradient = value_and_gradient(family, torch.zeros(3, 4))
    assert value.isfinite().all()
    assert gradient.isfinite().all()
    assert gradient.abs().max() > 0


# --- second derivatives -----------------------------------------------------------------------------------------------

TWICE = [
    families.Positive(),
    families.Interval(),
    families.Simplex(),
    families.PositiveDefinite(),
    families.Stiefel(),
    families.SpecialOrthogonal("cayley"),
    families.UnitNorm(),
    families.Correlation(),
]


@pytest.mark.parametrize("family", TWICE, ids=repr)
def test_second_derivatives(family: Parametrization) -> None:
    X = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(family, X, fast_mode=True)


@pytest.mark.parametrize(
    "family", [families.PositiveDefinite("exponential"), families.OrthogonalProjection()], ids=repr
)
def test_a_second_derivative_that_is_not_there_is_refused(family: Parametrization) -> None:
    X = torch.randn(3, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(family(X).square()[0].sum(), X, create_graph=True)
    with pytest.raises(Exception, match="differentiable once here"):
        gradient.sum().backward()


# --- the cost of tall matrices --------------------------------------------------------------------------------------


def largest_allocation(family: Parametrization, n: int, k: int) -> int:
    """The largest number of bytes that one operation allocates, forward and backward."""
    layer = nn.Linear(k, n, bias=False)
    register_parametrization(layer, "weight", family)
    with torch.profiler.profile(profile_memory=True) as profile:
        layer.weight.sum().backward()
    return max(event.cpu_memory_usage for event in profile.events())


@pytest.mark.parametrize("family", [families.Stiefel(), families.Grassmann()], ids=repr)
def test_thirty_thousand_rows_need_the_memory_of_a_tall_matrix(family: Parametrization) -> None:
    assert 0 < largest_allocation(family, 30_000, 8) <= 4 * 30_000 * 8 * 4  # n x n would be 3.6 GB


def test_the_memory_of_a_square_matrix_is_seen() -> None:
    assert largest_allocation(families.Symmetric(), 300, 300) >= 300 * 300 * 4
