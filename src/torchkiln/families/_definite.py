"""Families of definite matrices, correlations, stable systems and graph Laplacians."""

from __future__ import annotations

import torch
from torch import Tensor

from torchkiln._core.base import Parametrization
from torchkiln._core.errors import ParametrizationError
from torchkiln.families._contract import (
    check_argument,
    check_positive,
    computed,
    inverted,
    largest,
)
from torchkiln.families._maps import definite as maps
from torchkiln.families._maps.elementwise import POSITIVE
from torchkiln.families._maps.frames import first_columns, nearest_frame, retract
from torchkiln.families._maps.linear import symmetrize
from torchkiln.families._maps.spectral import SPECTRAL, apply_spectral, nearest_definite, spectral_inverse

__all__ = [
    "Correlation",
    "DiagonalPlusLowRank",
    "FixedRankSemidefinite",
    "GraphLaplacian",
    "HurwitzStable",
    "PositiveDefinite",
    "PositiveSemidefinite",
    "SchurStable",
]

# How far inside the stable region a matrix is put that was not stable.
_MARGIN = 1e-3


class PositiveDefinite(Parametrization):
    r"""Keep a square matrix symmetric (Hermitian) and positive definite.

    .. math:: A = L L^H, \quad \exp(S) \quad \text{or} \quad \mathrm{softplus}(S), \qquad S = (X + X^H) / 2

    with L the lower triangle of X and a softplus on its diagonal. ``"cholesky"`` is the cheapest; ``"exponential"``
    follows the geometry (relative changes); ``"softplus"``, on the eigenvalues, grows no faster than X does.

    Numerics:
        Exact on definite matrices; the logarithm of small eigenvalues loses what the matrix had lost. Off the
        constraint the nearest definite matrix, whose eigenvalues are at least the rounding unit times the largest one.
        Differentiable everywhere, also at repeated eigenvalues; twice only for ``"cholesky"``.

    Args:
        map: ``"cholesky"``, ``"exponential"`` or ``"softplus"``.

    Example:
        >>> PositiveDefinite("exponential")(torch.zeros(2, 2))
        tensor([[1., 0.],
                [0., 1.]])

    References:
        Pinheiro and Bates, doi:10.1007/BF00140873; Arsigny et al., doi:10.1137/050637996.
    """

    event_dim = 2
    square = True
    accepts = "any"

    def __init__(self, map: str = "cholesky") -> None:  # noqa: A002  # the field's word
        super().__init__()
        check_argument(self, argument="map", value=map, choices=("cholesky", *SPECTRAL))
        self.map = map

    @computed
    def forward(self, X: Tensor) -> Tensor:
        if self.map != "cholesky":
            return apply_spectral(X, self.map)
        L = maps.cholesky_factor(X)
        return L @ L.mH

    @inverted
    def right_inverse(self, A: Tensor) -> Tensor:
        A = nearest_definite(A)
        if self.map == "cholesky":
            return maps.cholesky_free(torch.linalg.cholesky(A))
        return spectral_inverse(A, self.map)

    def residual(self, A: Tensor) -> Tensor:
        return largest(A - A.mH, torch.linalg.eigvalsh((A + A.mH) / 2).clamp(max=0))

    def _from_normal(self, Z: Tensor) -> Tensor:
        # Wishart's distribution with n + 1 degrees of freedom would need another column.
        return Z @ Z.mH / max(Z.shape[-1], 1)


class PositiveSemidefinite(Parametrization):
    r"""Keep a square matrix symmetric (Hermitian), positive semidefinite and of rank at most ``rank``.

    .. math:: A = L L^H, \qquad L \in \mathbb{R}^{n \times r}

    The original is L: n r numbers.

    Numerics:
        Exact on the constraint to the rounding unit of the largest eigenvalue, which the smallest ones are raised to;
        off it the nearest point. L is determined up to a rotation. Differentiable everywhere; the derivative is
        singular where the rank falls below r.

    Args:
        rank: The largest rank; None for the size of the matrix.

    Example:
        >>> PositiveSemidefinite(1)(torch.tensor([[1.0], [2.0]]))
        tensor([[1., 2.],
                [2., 4.]])

    References:
        Burer and Monteiro, doi:10.1007/s10107-002-0352-8.
    """

    event_dim = 2
    square = True
    accepts = "any"

    def __init__(self, rank: int | None = None) -> None:
        super().__init__()
        self.rank = rank

    @computed
    def forward(self, L: Tensor) -> Tensor:
        return L @ L.mH

    @inverted
    def right_inverse(self, A: Tensor) -> Tensor:
        return maps.low_rank_root(A, _rank(self, self.rank, A))

    def residual(self, A: Tensor) -> Tensor:
        values = torch.linalg.eigvalsh((A + A.mH) / 2)
        return largest(A - A.mH, values.clamp(max=0), values[..., : A.shape[-1] - _rank(self, self.rank, A)])

    def _from_normal(self, Z: Tensor) -> Tensor:
        L = Z[..., : _rank(self, self.rank, Z)]
        return L @ L.mH


class FixedRankSemidefinite(Parametrization):
    r"""Keep a square matrix symmetric (Hermitian), positive semidefinite and of rank exactly ``rank``.

    .. math:: A = U\, \mathrm{diag}(s)\, U^H, \qquad U^H U = I,\ s > 0

    Two originals: the movement of U from its base (as :class:`Stiefel`), and s before its softplus.

    Numerics:
        Exact on the constraint; off it the nearest point, with eigenvalues of at least the rounding unit. Eigenvectors
        are as well conditioned as the gaps between eigenvalues, the matrix is not affected. Differentiable everywhere:
        no eigendecomposition is taken in forward.

    Args:
        rank: The rank.

    Example:
        >>> torch.linalg.matrix_rank(FixedRankSemidefinite(2).project(torch.eye(4)))
        tensor(2)

    References:
        Bonnabel and Sepulchre, doi:10.1137/080731347.
    """

    event_dim = 2
    square = True
    accepts = "any"
    base: Tensor | None

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.register_buffer("base", None)

    @computed
    def forward(self, X: Tensor, s: Tensor) -> Tensor:
        U = retract(first_columns(X) if self.base is None else self.base.to(X.dtype), X)
        return (U * POSITIVE["softplus"][0](s)[..., None, :].to(U.dtype)) @ U.mH

    @inverted
    def right_inverse(self, A: Tensor) -> tuple[Tensor, Tensor]:
        values, V = torch.linalg.eigh((A + A.mH) / 2)
        start = A.shape[-1] - _rank(self, self.rank, A)
        self.base = nearest_frame(V[..., start:])
        return torch.zeros_like(self.base), POSITIVE["softplus"][1](values[..., start:])

    def residual(self, A: Tensor) -> Tensor:
        values = torch.linalg.eigvalsh((A + A.mH) / 2)
        start = A.shape[-1] - _rank(self, self.rank, A)
        return largest(A - A.mH, values[..., :start], values[..., start:].clamp(max=0))

    def _from_normal(self, Z: Tensor) -> Tensor:
        L = Z[..., : _rank(self, self.rank, Z)]
        return L @ L.mH


def _rank(family: Parametrization, rank: int | None, A: Tensor) -> int:
    n = A.shape[-1]
    if rank is not None and not 0 < rank <= n:
        raise ParametrizationError(f"{family}: the rank must be from 1 to {n} for shape {tuple(A.shape)}.")
    return n if rank is None else rank


class Correlation(Parametrization):
    r"""Keep a square matrix a correlation matrix: positive definite with ones on the diagonal.

    .. math:: C = L L^T, \qquad L_{ij} = X_{ij} / \sqrt{1 + \textstyle\sum_{k<i} X_{ik}^2}, \quad X_{ii} := 1

    Numerics:
        A bijection from the strictly lower triangle; ill-conditioned near singular matrices, as the Cholesky factor.
        Off the constraint the nearest definite matrix, scaled to ones on its diagonal. Differentiable everywhere.

    Example:
        >>> Correlation()(torch.tensor([[9.0, 9.0], [1.0, 9.0]]))
        tensor([[1.0000, 0.7071],
                [0.7071, 1.0000]])

    References:
        Rapisarda, Brigo, Mercurio, doi:10.1093/imaman/dpl010 (the same rows, in angles).
    """

    event_dim = 2
    square = True
    accepts = "any"

    @computed
    def forward(self, X: Tensor) -> Tensor:
        L = maps.correlation_factor(X)
        return L @ L.mH

    @inverted
    def right_inverse(self, C: Tensor) -> Tensor:
        L = torch.linalg.cholesky(nearest_definite(C))
        result: Tensor = (L / L.diagonal(dim1=-2, dim2=-1)[..., None]).tril(-1)
        return result

    def residual(self, C: Tensor) -> Tensor:
        values = torch.linalg.eigvalsh((C + C.mH) / 2)
        return largest(C - C.mH, C.diagonal(dim1=-2, dim2=-1) - 1, values.clamp(max=0))

    def _from_normal(self, Z: Tensor) -> Tensor:
        V = Z / torch.linalg.vector_norm(Z, dim=-1, keepdim=True)
        result: Tensor = V @ V.mH
        return result


class DiagonalPlusLowRank(Parametrization):
    r"""Keep a square matrix a positive diagonal plus a semidefinite matrix of low rank: factor analysis.

    .. math:: A = \mathrm{diag}(d) + U U^H, \qquad d > 0,\ U \in \mathbb{R}^{n \times r}

    Two originals: d before its softplus, and U. Solves and determinants cost O(n r^2).

    Numerics:
        The way back is factor analysis by least squares, 50 Newton steps in float64; it finds a matrix of this form
        where the form is unique (r well below n / 2). Off the constraint a matrix of the same diagonal, as far as d
        can stay positive. Differentiable everywhere.

    Args:
        rank: The rank r.

    Example:
        >>> DiagonalPlusLowRank(1).project(torch.eye(3) + 1)
        tensor([[2., 1., 1.],
                [1., 2., 1.],
                [1., 1., 2.]])

    References:
        Harman and Jones, "Minres", doi:10.1007/BF02289468.
    """

    event_dim = 2
    square = True
    accepts = "any"

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank

    @computed
    def forward(self, d: Tensor, U: Tensor) -> Tensor:
        return torch.diag_embed(POSITIVE["softplus"][0](d)).to(U.dtype) + U @ U.mH

    @inverted
    def right_inverse(self, A: Tensor) -> tuple[Tensor, Tensor]:
        wide = A.to(torch.promote_types(A.dtype, torch.float64))
        d, U = maps.principal_factors(wide, _rank(self, self.rank, A))
        return POSITIVE["softplus"][1](d).to(A.real.dtype), U.to(A.dtype)

    def residual(self, A: Tensor) -> Tensor:
        return largest(A - self.project(A))

    def _from_normal(self, Z: Tensor) -> Tensor:
        U = Z[..., : _rank(self, self.rank, Z)]
        return torch.diag_embed(0.5 + Z[..., -1].abs()).to(Z.dtype) + U @ U.mH


class HurwitzStable(Parametrization):
    r"""Keep every eigenvalue of a square matrix left of :math:`-\alpha`: :math:`\dot x = A x` decays.

    .. math:: A = Q^{-1} (S - I/2) - \alpha I, \qquad Q \succ 0,\ S^T = -S

    A bijection: Q, by its Cholesky factor, is the lower triangle of the original, and S the upper one.

    Numerics:
        The way back solves Lyapunov's equation in float64 by doubling; it is ill-conditioned for a matrix near the
        border or far from normal. One that is not stable is shifted left, to 1/1000 of its norm inside: not the
        nearest point. Differentiable everywhere.

    Args:
        decay: The rate alpha.

    Example:
        >>> A = HurwitzStable(decay=1.0)(torch.zeros(2, 2))
        >>> bool((torch.linalg.eigvals(A).real < -1).all())
        True

    References:
        Lezcano-Casado, arXiv:1909.09501 and geotorch; Gillis and Sharma, doi:10.1016/j.automatica.2017.07.047.
    """

    event_dim = 2
    square = True

    def __init__(self, decay: float = 0.0) -> None:
        super().__init__()
        self.decay = decay

    @computed
    def forward(self, X: Tensor) -> Tensor:
        A = maps.hurwitz(X)
        return A - self.decay * torch.eye(X.shape[-1], dtype=X.dtype, device=X.device)

    @inverted
    def right_inverse(self, A: Tensor) -> Tensor:
        I = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)  # noqa: E741  # the identity's name
        A = A + self.decay * I
        abscissa = _extreme(torch.linalg.eigvals(A).real)
        shift = abscissa + _MARGIN * torch.linalg.matrix_norm(A)[..., None, None].clamp(min=1)
        return maps.hurwitz_inverse(torch.where(abscissa < 0, A, A - shift * I))

    def residual(self, A: Tensor) -> Tensor:
        return largest((torch.linalg.eigvals(A.double()).real + self.decay).clamp(min=0))


class SchurStable(Parametrization):
    r"""Keep every eigenvalue of a square matrix inside a circle of radius :math:`\rho`: :math:`x_{t+1} = A x_t` decays.

    .. math:: A = \rho\, (I + H)(I - H)^{-1}, \qquad H \text{ as in } \texttt{HurwitzStable}

    Numerics:
        As :class:`HurwitzStable`, differentiable everywhere as well. A matrix that is not stable is scaled down, to
        1/1000 inside: not the nearest point.

    Args:
        radius: The radius.

    Example:
        >>> A = SchurStable()(torch.ones(2, 2))
        >>> bool((torch.linalg.eigvals(A).abs() < 1).all())
        True
    """

    event_dim = 2
    square = True

    def __init__(self, radius: float = 1.0) -> None:
        super().__init__()
        check_positive(self, radius=radius)
        self.radius = radius

    @computed
    def forward(self, X: Tensor) -> Tensor:
        return self.radius * maps.moebius(maps.hurwitz(X))

    @inverted
    def right_inverse(self, A: Tensor) -> Tensor:
        B = A / self.radius
        size = _extreme(torch.linalg.eigvals(B).abs())
        B = torch.where(size < 1, B, B * ((1 - _MARGIN) / size.clamp(min=1))).double()
        return maps.hurwitz_inverse(-maps.moebius(-B)).to(A.dtype)

    def residual(self, A: Tensor) -> Tensor:
        return largest((torch.linalg.eigvals(A.double()).abs() - self.radius).clamp(min=0))


def _extreme(values: Tensor) -> Tensor:
    """Return the largest of each row, kept as 1 x 1."""
    return (values.amax(-1) if values.shape[-1] else values.sum(-1))[..., None, None]


class GraphLaplacian(Parametrization):
    r"""Keep a square matrix the Laplacian of an undirected graph with positive weights.

    .. math:: L = \mathrm{diag}(W \mathbf{1}) - W, \qquad
        W_{ij} = \log(1 + e^{(X_{ij} + X_{ji}) / 2}) \text{ for } i \ne j

    Numerics:
        Exact for a graph whose edges all have weight; a missing edge gets the rounding unit, and hardly moves. Off the
        constraint the entries beside the diagonal decide, made symmetric. Differentiable everywhere.

    Example:
        >>> GraphLaplacian().project(torch.tensor([[0.0, -2.0], [-4.0, 0.0]]))
        tensor([[ 3., -3.],
                [-3.,  3.]])
    """

    event_dim = 2
    square = True

    @computed
    def forward(self, X: Tensor) -> Tensor:
        return maps.laplacian(POSITIVE["softplus"][0](symmetrize(X)))

    @inverted
    def right_inverse(self, L: Tensor) -> Tensor:
        weights = POSITIVE["softplus"][1](-symmetrize(L))
        return weights.tril(-1) + weights.triu(1)

    def residual(self, L: Tensor) -> Tensor:
        edges = -L.double().tril(-1) - L.double().triu(1)
        return largest(L - L.mT, L.double().sum(-1), edges.clamp(max=0))

    def _from_normal(self, Z: Tensor) -> Tensor:
        return maps.laplacian(symmetrize(Z).exp())
