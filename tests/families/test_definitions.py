"""The values satisfy each family's definition, written here a second time: a residual may not be its own judge."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cases import FIRST
from torchkiln.testing._catalogue import Row, names
from torchkiln.testing._laws import Subject

Definition = Callable[[Tensor], Tensor]
EPS = 1e-7


def zero(X: Tensor) -> Tensor:
    return X.abs().max() <= EPS


def same(X: Tensor, Y: Tensor) -> Tensor:
    return zero(X - Y)


def eye(X: Tensor) -> Tensor:
    return torch.eye(X.shape[-1], dtype=X.dtype)


def orthonormal(Q: Tensor) -> Tensor:
    return same(Q.mH @ Q, eye(Q))


def definite(A: Tensor) -> Tensor:
    return same(A, A.mH) & (torch.linalg.eigvalsh(A) > 0).all()


def simplex(y: Tensor) -> Tensor:
    return (y >= 0).all() & same(y.sum(-1), torch.ones(y.shape[:-1]))


def singular_values_beyond(A: Tensor, rank: int) -> Tensor:
    return torch.linalg.svdvals(A)[rank:]


def rank_one_pieces(M: Tensor, blocks: int) -> Tensor:
    """The second singular value of each part of a Monarch matrix that must have rank 1."""
    parts = M.reshape(M.shape[0] // blocks, blocks, blocks, M.shape[1] // blocks).movedim(0, 2)
    return torch.linalg.svdvals(parts)[..., 1:]


def rearranged(W: Tensor) -> Tensor:
    """Van Loan's rearrangement for a first factor of 2 x 2: its rank is the number of Kronecker products."""
    n, m = W.shape
    return W.reshape(2, n // 2, 2, m // 2).transpose(1, 2).reshape(4, -1)


def convolution_norm(W: Tensor) -> Tensor:
    """The largest singular value of a convolution with padding 1, on images of 6 x 6, as a dense matrix."""
    images = torch.eye(72, dtype=W.dtype).view(72, 2, 6, 6)
    return torch.linalg.svdvals(torch.nn.functional.conv2d(images, W, padding=1).flatten(1))[0]


def off_diagonal(X: Tensor) -> Tensor:
    return X.tril(-1) + X.triu(1)


# For the arguments that the catalogue's first row of the family has.
DEFINITIONS: dict[str, Definition | None] = {
    "PLU": None,
    "AlmostOrthogonal": lambda W: ((torch.linalg.svdvals(W) - 1).abs() <= 0.3 + EPS).all(),
    "Banded": lambda B: zero(B.tril(-2)) & zero(B.triu(1)),
    "BlockCirculant": lambda W: same(W[::2, ::2], W[1::2, 1::2]) & same(W[::2, 1::2], W[1::2, ::2]),
    "BlockDiagonal": lambda W: zero(W[:2, 3:]) & zero(W[2:, :3]),
    "Butterfly": lambda W: zero(
        torch.linalg.svdvals(torch.stack([W[i::2, 2 * j : 2 * j + 2] for i in (0, 1) for j in (0, 1)]))[
            ..., 1:
        ]
    ),
    "Centered": lambda W: zero(W.mean(1)),
    "Chain": lambda W: same(W, W.T),
    "Circulant": lambda C: torch.stack([same(C[(i + 1) % 4], C[i].roll(1)) for i in range(4)]).all(),
    "Clamped": lambda y: (y.abs() <= 1).all(),
    "ConvSpectralNorm": lambda W: convolution_norm(W) <= 1,
    "Correlation": lambda C: definite(C) & same(C.diagonal(), torch.ones(4)),
    "Custom": None,
    "Diagonal": lambda D: zero(off_diagonal(D)),
    "DiagonalPlusLowRank": lambda A: definite(A) & zero(A[0, 2] * A[1, 3] - A[0, 3] * A[1, 2]),
    "DoublyStochastic": lambda Y: simplex(Y) & simplex(Y.T),
    "EqualizedRate": None,
    "FixedRank": lambda A: zero(singular_values_beyond(A, 2)) & (torch.linalg.svdvals(A)[1] > 0),
    "FixedRankSemidefinite": lambda A: (
        same(A, A.T) & zero(torch.linalg.eigvalsh(A)[:2]) & (torch.linalg.eigvalsh(A)[2:] > 0).all()
    ),
    "FrobeniusNorm": lambda W: same(W.square().sum(), torch.ones(())),
    "GraphLaplacian": lambda L: same(L, L.T) & zero(L.sum(0)) & (off_diagonal(L) <= 0).all(),
    "Grassmann": orthonormal,
    "GreaterThan": lambda y: (y > 1).all(),
    "Hankel": lambda H: same(H[1:, :-1], H[:-1, 1:]),
    "Hermitian": lambda A: same(A, A.mH),
    "HurwitzStable": lambda A: (torch.linalg.eigvals(A).real < 0).all(),
    "Interval": lambda y: ((y > 0) & (y < 1)).all(),
    "Invertible": lambda A: torch.linalg.det(A) > 0,
    "Kronecker": lambda W: zero(singular_values_beyond(rearranged(W), 1)),
    "L1Ball": lambda y: (y.abs().sum(-1) <= 1 + EPS).all(),
    "L2Ball": lambda y: (y.square().sum(-1) <= 1 + EPS).all(),
    "LInfBall": lambda y: (y.abs() <= 1).all(),
    "LessThan": lambda y: (y < -1).all(),
    "LowRank": lambda A: zero(singular_values_beyond(A, 2)),
    "Masked": lambda Y: zero(Y[:, 1]),
    "MaxNorm": lambda w: (w.square().sum(-1) <= 1 + EPS).all(),
    "Monarch": lambda M: zero(rank_one_pieces(M, 2)),
    "OperatorNormBound": lambda W: (W.abs().sum(0) <= 1 + EPS).all(),
    "Ordered": lambda y: (y.diff() > 0).all(),
    "Orthogonal": orthonormal,
    "OrthogonalProjection": orthonormal,
    "Positive": lambda y: (y > 0).all(),
    "PositiveDefinite": definite,
    "PositiveOrdered": lambda y: (y > 0).all() & (y.diff() > 0).all(),
    "PositiveSemidefinite": lambda A: same(A, A.T) & (torch.linalg.eigvalsh(A) > -EPS).all(),
    "Product": lambda W: simplex(W[:2]) & (W[3] > 0).all(),
    "Scaled": None,
    "SchurStable": lambda A: (torch.linalg.eigvals(A).abs() < 1).all(),
    "SigmaReparam": None,
    "Simplex": simplex,
    "SkewHermitian": lambda A: same(A, -A.mH),
    "SkewSymmetric": lambda A: same(A, -A.T),
    "SparseSimplex": simplex,
    "SpecialLinear": lambda A: same(torch.linalg.det(A), torch.ones(())),
    "SpecialOrthogonal": lambda Q: orthonormal(Q) & (torch.linalg.det(Q) > 0),
    "SpectralNorm": lambda W: same(torch.linalg.svdvals(W)[0], torch.ones(())),
    "Sphere": lambda w: same(w.square().sum(-1), torch.ones(())),
    "Stiefel": orthonormal,
    "Symmetric": lambda A: same(A, A.T),
    "Toeplitz": lambda T: same(T[1:, 1:], T[:-1, :-1]),
    "TraceFree": lambda A: zero(A.trace()),
    "Triangular": lambda T: zero(T.triu(1)),
    "UnitCircle": lambda z: same(z.abs(), torch.ones(())),
    "UnitNorm": lambda w: same(w.square().sum(-1), torch.ones(())),
    "Unitary": orthonormal,
    "WeightNorm": None,
    "WeightStandardization": lambda W: zero(W.mean(1)) & same(W.var(1, correction=0), torch.ones(())),
    "ZeroSum": lambda y: zero(y.sum(-1)),
}


def test_every_family_has_a_definition() -> None:
    assert set(DEFINITIONS) == set(names())


@pytest.mark.parametrize(("name", "definition"), DEFINITIONS.items())
def test_values_satisfy_the_definition(name: str, definition: Definition | None) -> None:
    row: Row = FIRST[name]
    value = Subject(row.family, row.example).point()
    if definition is None:
        with pytest.raises(NotImplementedError, match=r"constrains nothing|reaches every tensor"):
            row.family.residual(value)
        return
    assert definition(value)
    # The definition can fail, and the residual sees what it sees.
    other = row.example.roll(1, 0) + 0.5
    assert not definition(other)
    assert row.family.residual(other) > 1e-3
