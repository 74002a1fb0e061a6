"""The families compute what geotorch, torch.distributions, gpytorch, scipy, torchlip and orthogonium compute."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import scipy.sparse.csgraph
import scipy.special
import torch
from torch import Tensor
from torch.distributions import constraints, transforms

from torchkiln import Parametrization, families


def library(name: str) -> Any:
    """Import a library that warns when it is imported: gpytorch uses torch.jit.script, which torch has deprecated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return importlib.import_module(name)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


VECTOR, MATRIX, TALL = normal(5), normal(4, 4), normal(6, 3)
BASE = torch.from_numpy(scipy.linalg.expm((normal(4, 4, seed=1) - normal(4, 4, seed=1).T).numpy()))
DEFINITE = MATRIX @ MATRIX.T + torch.eye(4, dtype=torch.float64)
STABLE = MATRIX - 5 * torch.eye(4, dtype=torch.float64)


class Same(NamedTuple):
    """One value computed here and by another library."""

    id: str
    ours: Callable[[], Tensor]
    theirs: Callable[[], Any]


def from_base(family: Parametrization, base: Tensor, X: Tensor) -> Tensor:
    """Register on ``base``, and move to ``X``."""
    family.right_inverse(base)
    return family(X)


def geotorch_from_base(family: Any, base: Tensor, X: Tensor) -> Tensor:
    family = family.double()
    family.right_inverse(base)
    return family(X)


def gpytorch_constraint(name: str, *arguments: float) -> Any:
    return getattr(library("gpytorch.constraints"), name)(*arguments)


def torchlip_frobenius(W: Tensor, *, per_row: bool) -> Tensor:
    layer = torch.nn.Linear(W.shape[1], W.shape[0], bias=False, dtype=W.dtype)
    layer.weight.data = W.clone()
    return library("deel.torchlip.utils").frobenius_norm(layer, disjoint_neurons=per_row).weight


def nearest_by_optimization(x: Tensor, constraint: dict[str, Any], bounds: Any = None) -> Tensor:
    """The point of a convex set nearest to ``x``, from a general optimizer."""
    found = scipy.optimize.minimize(
        lambda y: ((y - x.numpy()) ** 2).sum(),
        x.numpy() * 0 + 1 / len(x),
        constraints=[constraint],
        bounds=bounds,
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    assert found.success, found.message
    return torch.from_numpy(found.x)


GEOTORCH = [
    Same(
        "SO expm",
        lambda: from_base(families.SpecialOrthogonal(), BASE, MATRIX),
        lambda: geotorch_from_base(library("geotorch").SO((4, 4)), BASE, MATRIX),
    ),
    Same(
        "SO cayley",
        lambda: from_base(families.Orthogonal("cayley"), BASE, MATRIX),
        lambda: geotorch_from_base(library("geotorch").SO((4, 4), triv="cayley"), BASE, MATRIX),
    ),
    Same(
        "Sphere",
        lambda: families.Sphere(2.0)(TALL),
        lambda: library("geotorch").SphereEmbedded((6, 3), 2.0)(TALL),
    ),
    Same(
        "Symmetric",
        lambda: families.Symmetric().project(DEFINITE),
        lambda: library("geotorch").Symmetric()(DEFINITE),
    ),
]
DISTRIBUTIONS = [
    Same("exp", lambda: families.Positive("exp")(VECTOR), lambda: transforms.ExpTransform()(VECTOR)),
    Same("softplus", lambda: families.Positive()(VECTOR), lambda: transforms.SoftplusTransform()(VECTOR)),
    Same(
        "square",
        lambda: families.Positive("square")(VECTOR.abs()),
        lambda: transforms.PowerTransform(torch.tensor(2.0))(VECTOR.abs()),
    ),
    Same("sigmoid", lambda: families.Interval()(VECTOR), lambda: transforms.SigmoidTransform()(VECTOR)),
    Same(
        "tanh",
        lambda: families.Interval(-1.0, 1.0, map="tanh")(VECTOR),
        lambda: transforms.TanhTransform()(VECTOR),
    ),
    Same("affine", lambda: families.Scaled(3.0)(VECTOR), lambda: transforms.AffineTransform(0, 3.0)(VECTOR)),
    Same("softmax", lambda: families.Simplex()(VECTOR), lambda: transforms.SoftmaxTransform()(VECTOR)),
    Same(
        "stick-breaking",
        lambda: families.Simplex("stick_breaking")(VECTOR),
        lambda: transforms.StickBreakingTransform()(VECTOR),
    ),
    Same(
        "stick-breaking, back",
        lambda: families.Simplex("stick_breaking").right_inverse(VECTOR.softmax(-1)),
        lambda: transforms.StickBreakingTransform().inv(VECTOR.softmax(-1)),
    ),
    Same(
        "cat",
        lambda: families.Product([families.Positive("exp"), families.Interval()], [2, 3])(
            VECTOR[:2], VECTOR[2:]
        ),
        lambda: transforms.CatTransform(
            [transforms.ExpTransform(), transforms.SigmoidTransform()], 0, [2, 3]
        )(VECTOR),
    ),
    Same(
        "compose",
        lambda: families.Chain([families.Positive("exp"), families.Scaled(2.0)])(VECTOR),
        lambda: transforms.ComposeTransform([transforms.ExpTransform(), transforms.AffineTransform(0, 2.0)])(
            VECTOR
        ),
    ),
]
GPYTORCH = [
    Same(
        "Positive",
        lambda: families.Positive()(VECTOR),
        lambda: gpytorch_constraint("Positive").transform(VECTOR),
    ),
    Same(
        "Positive, back",
        lambda: families.Positive().right_inverse(VECTOR.exp()),
        lambda: gpytorch_constraint("Positive").inverse_transform(VECTOR.exp()),
    ),
    Same(
        "GreaterThan",
        lambda: families.GreaterThan(2.0)(VECTOR),
        lambda: gpytorch_constraint("GreaterThan", 2.0).transform(VECTOR),
    ),
    # It counts down from the bound as the original falls; ours, as it rises.
    Same(
        "LessThan",
        lambda: families.LessThan(2.0)(-VECTOR),
        lambda: gpytorch_constraint("LessThan", 2.0).transform(VECTOR),
    ),
    Same(
        "Interval",
        lambda: families.Interval(-1.0, 3.0)(VECTOR),
        lambda: gpytorch_constraint("Interval", -1.0, 3.0).transform(VECTOR),
    ),
]
SCIPY = [
    Same(
        "expm",
        lambda: families.Orthogonal()(MATRIX),
        lambda: scipy.linalg.expm(MATRIX.tril(-1) - MATRIX.tril(-1).T),
    ),
    Same("polar", lambda: families.OrthogonalProjection()(TALL), lambda: scipy.linalg.polar(TALL)[0]),
    Same(
        "polar as projection", lambda: families.Stiefel().project(TALL), lambda: scipy.linalg.polar(TALL)[0]
    ),
    Same(
        "toeplitz",
        lambda: families.Toeplitz()(VECTOR, VECTOR[1:3] * 2),
        lambda: scipy.linalg.toeplitz(VECTOR, torch.cat([VECTOR[:1], VECTOR[1:3] * 2])),
    ),
    Same(
        "hankel",
        lambda: families.Hankel()(VECTOR, VECTOR[1:3] * 2),
        lambda: scipy.linalg.hankel(VECTOR, torch.cat([VECTOR[-1:], VECTOR[1:3] * 2])),
    ),
    Same("circulant", lambda: families.Circulant()(VECTOR), lambda: scipy.linalg.circulant(VECTOR)),
    Same(
        "block_diag",
        lambda: families.BlockDiagonal(2)(TALL.view(2, 3, 3)),
        lambda: scipy.linalg.block_diag(*TALL.view(2, 3, 3)),
    ),
    Same(
        "kron",
        lambda: families.Kronecker(4, 4)(MATRIX[None], TALL[None]),
        lambda: np.kron(MATRIX, TALL),
    ),
    Same(
        "lu",
        lambda: families.PLU().right_inverse(MATRIX).tril(-1),
        lambda: torch.from_numpy(scipy.linalg.lu(MATRIX)[1]).tril(-1),
    ),
    Same("logsumexp", lambda: families.Simplex()(VECTOR), lambda: scipy.special.softmax(VECTOR)),
    Same(
        "spectral norm",
        lambda: families.OperatorNormBound(2)(9 * MATRIX),
        lambda: MATRIX / scipy.linalg.norm(MATRIX, 2),
    ),
    Same(
        "1-norm",
        lambda: families.OperatorNormBound(1)(9 * MATRIX),
        lambda: MATRIX / scipy.linalg.norm(MATRIX, 1),
    ),
    Same(
        "inf-norm",
        lambda: families.OperatorNormBound("inf")(9 * MATRIX),
        lambda: MATRIX / scipy.linalg.norm(MATRIX, float("inf")),
    ),
    Same(
        "matrix exponential",
        lambda: families.PositiveDefinite("exponential")(MATRIX),
        lambda: scipy.linalg.expm((MATRIX + MATRIX.T) / 2),
    ),
    Same(
        "Lyapunov",
        lambda: families.HurwitzStable().right_inverse(STABLE).tril(-1),
        lambda: torch.from_numpy(
            scipy.linalg.cholesky(scipy.linalg.solve_continuous_lyapunov(STABLE.T, -torch.eye(4)), lower=True)
        ).tril(-1),
    ),
    Same(
        "laplacian",
        lambda: families.GraphLaplacian()(MATRIX),
        lambda: scipy.sparse.csgraph.laplacian(
            torch.nn.functional.softplus((MATRIX + MATRIX.T) / 2).fill_diagonal_(0).numpy()
        ),
    ),
    Same(
        "nearest on the simplex",
        lambda: families.SparseSimplex()(VECTOR),
        lambda: nearest_by_optimization(
            VECTOR, {"type": "eq", "fun": lambda y: y.sum() - 1}, [(0, None)] * 5
        ),
    ),
    Same(
        "nearest in the l1 ball",
        lambda: families.L1Ball(1.0)(VECTOR.abs()),
        lambda: nearest_by_optimization(
            VECTOR.abs(), {"type": "ineq", "fun": lambda y: 1 - y.sum()}, [(0, None)] * 5
        ),
    ),
]
LIPSCHITZ = [
    Same(
        "frobenius", lambda: families.FrobeniusNorm()(TALL), lambda: torchlip_frobenius(TALL, per_row=False)
    ),
    Same("rows", lambda: families.UnitNorm()(TALL), lambda: torchlip_frobenius(TALL, per_row=True)),
    Same(
        "bjorck",
        lambda: families.OrthogonalProjection("bjorck")(TALL),
        lambda: library("deel.torchlip.normalizers").bjorck_normalization(
            TALL / scipy.linalg.norm(TALL, 2), 1e-12, maxiter=40
        ),
    ),
    Same(
        "qr",
        lambda: families.OrthogonalProjection("qr")(TALL),
        lambda: library("orthogonium.reparametrizers").BatchedQROrthogonalization((6, 3))(TALL),
    ),
    Same(
        "cholesky",
        lambda: families.OrthogonalProjection("cholesky")(TALL.T),
        lambda: library("orthogonium.reparametrizers").BatchedCholeskyOrthogonalization((1, 3, 6))(
            TALL.T[None]
        )[0],
    ),
]


@pytest.mark.parametrize(
    "same", [*GEOTORCH, *DISTRIBUTIONS, *GPYTORCH, *SCIPY, *LIPSCHITZ], ids=lambda same: same.id
)
def test_the_value_is_the_other_librarys(same: Same) -> None:
    theirs = torch.as_tensor(same.theirs()).detach()
    torch.testing.assert_close(same.ours().detach(), theirs, rtol=1e-6, atol=1e-6)


# --- what one library makes is a point of the other ------------------------------------------------------------------

MANIFOLDS = {
    "Symmetric": (lambda g: g.Symmetric(), families.Symmetric(), (4, 4)),
    "Skew": (lambda g: g.Skew((4, 4)), families.SkewSymmetric(), (4, 4)),
    "Sphere": (lambda g: g.Sphere((3, 5), 2.0), families.Sphere(2.0), (3, 5)),
    "SphereEmbedded": (lambda g: g.SphereEmbedded((3, 5), 2.0), families.Sphere(2.0), (3, 5)),
    "SO": (lambda g: g.SO((4, 4)), families.SpecialOrthogonal(), (4, 4)),
    "Stiefel": (lambda g: g.Stiefel((5, 3)), families.Stiefel(), (5, 3)),
    "Grassmannian": (lambda g: g.Grassmannian((5, 3)), families.Grassmann(), (5, 3)),
    "AlmostOrthogonal": (lambda g: g.AlmostOrthogonal((5, 3), 0.5), families.AlmostOrthogonal(0.5), (5, 3)),
    "LowRank": (lambda g: g.LowRank((5, 4), 2), families.LowRank(2), (5, 4)),
    "FixedRank": (lambda g: g.FixedRank((5, 4), 2), families.FixedRank(2), (5, 4)),
    "GLp": (lambda g: g.GLp((4, 4)), families.Invertible(), (4, 4)),
    "SL": (lambda g: g.SL((4, 4)), families.SpecialLinear(), (4, 4)),
    "PSD": (lambda g: g.PSD((4, 4)), families.PositiveDefinite(), (4, 4)),
    "PSSD": (lambda g: g.PSSD((4, 4)), families.PositiveSemidefinite(), (4, 4)),
    "PSSDLowRank": (lambda g: g.PSSDLowRank((4, 4), 2), families.PositiveSemidefinite(2), (4, 4)),
    "PSSDFixedRank": (lambda g: g.PSSDFixedRank((4, 4), 2), families.FixedRankSemidefinite(2), (4, 4)),
    "Hurwitz": (lambda g: g.Hurwitz((4, 4), 0.5), families.HurwitzStable(0.5), (4, 4)),
}


@pytest.mark.parametrize("name", MANIFOLDS)
def test_geotorch_accepts_what_ours_makes(name: str) -> None:
    make, family, shape = MANIFOLDS[name]
    theirs = make(library("geotorch")).double()
    # Not far from the constraint: on the borders of closed sets geotorch decides by the last bit.
    value = family.project(torch.eye(*shape, dtype=torch.float64) + 0.1 * normal(*shape))
    accepts = theirs.in_manifold_eigen if name == "Hurwitz" else theirs.in_manifold
    assert accepts(value)


@pytest.mark.parametrize("name", MANIFOLDS)
def test_ours_keeps_what_geotorch_makes(name: str) -> None:
    make, family, shape = MANIFOLDS[name]
    theirs = make(library("geotorch")).double()
    originals = [normal(*shape, seed=seed) for seed in range(3 if name == "Hurwitz" else 1)]
    value = theirs(*originals).detach()
    assert family.residual(value) < 1e-6
    assert family.displacement(value) < 1e-6 * (1 + value.norm())


CHECKS = {
    "positive": (constraints.positive, families.Positive(), (4,)),
    "greater_than": (constraints.greater_than(2.0), families.GreaterThan(2.0), (4,)),
    "less_than": (constraints.less_than(2.0), families.LessThan(2.0), (4,)),
    "interval": (constraints.interval(-1.0, 2.0), families.Interval(-1.0, 2.0), (4,)),
    "simplex": (constraints.simplex, families.Simplex(), (3, 4)),
    "sparse simplex": (constraints.simplex, families.SparseSimplex(), (3, 4)),
    "lower_triangular": (constraints.lower_triangular, families.Triangular(), (4, 4)),
    "lower_cholesky": (constraints.lower_cholesky, families.Triangular(diagonal="positive"), (4, 4)),
    "symmetric": (constraints.symmetric, families.Symmetric(), (4, 4)),
    "positive_definite": (constraints.positive_definite, families.PositiveDefinite(), (4, 4)),
    "positive_semidefinite": (
        constraints.positive_semidefinite,
        families.PositiveDefinite("softplus"),
        (4, 4),
    ),
    "correlation": (constraints.positive_definite, families.Correlation(), (4, 4)),
}


@pytest.mark.parametrize("name", CHECKS)
def test_torch_distributions_accepts_what_ours_makes(name: str) -> None:
    constraint, family, shape = CHECKS[name]
    assert constraint.check(family.project(normal(*shape))).all()


def test_the_subspace_is_the_one_that_scipy_finds() -> None:
    base = torch.linalg.qr(TALL).Q
    moved = from_base(families.Grassmann(), base, 0.1 * normal(6, 3, seed=2))
    turned = from_base(families.Grassmann(), base, base @ normal(3, 3, seed=3))
    assert scipy.linalg.subspace_angles(base.numpy(), turned.numpy()).max() < 1e-8
    assert scipy.linalg.subspace_angles(base.numpy(), moved.numpy()).max() > 1e-3


def test_a_wrong_value_is_seen() -> None:
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        test_the_value_is_the_other_librarys(Same("", VECTOR.exp, lambda: VECTOR.exp() + 1e-3))
