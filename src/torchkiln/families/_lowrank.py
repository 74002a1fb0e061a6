"""Families of matrices known by their rank or determinant: low rank, fixed rank, invertible."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from torchkiln._core.base import Parametrization
from torchkiln._core.errors import ParametrizationError
from torchkiln.families._contract import check_not_empty, computed, inverted, largest
from torchkiln.families._definite import PositiveDefinite
from torchkiln.families._maps.elementwise import POSITIVE, Map
from torchkiln.families._orthogonal import SpecialOrthogonal, Stiefel

__all__ = ["PLU", "FixedRank", "Invertible", "LowRank", "SpecialLinear"]


def _check_rank(family: Parametrization, rank: int, A: Tensor) -> None:
    most = min(check_not_empty(family, A))
    if not 0 < rank <= most:
        raise ParametrizationError(f"{family}: the rank must be from 1 to {most} for shape {tuple(A.shape)}.")


def _factors(A: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the first ``rank`` left singular vectors, singular values and right singular vectors, as columns."""
    U, S, Vh = torch.linalg.svd(A, full_matrices=False)
    return U[..., :rank], S[..., :rank], Vh[..., :rank, :].mH


def _identity(s: Tensor) -> Tensor:
    return s


class _Factored(Parametrization):
    """A matrix by the factors of its singular value decomposition, each free in its place."""

    event_dim = 2
    accepts = "any"
    _values: ClassVar[tuple[Map, Map]]  # the singular values from the original, and back

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.left, self.right = Stiefel(), Stiefel()

    @computed
    def forward(self, X: Tensor, s: Tensor, Y: Tensor) -> Tensor:
        U, V = self.left.forward(X), self.right.forward(Y)
        return (U * self._values[0](s)[..., None, :]) @ V.mH

    @inverted
    def right_inverse(self, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        _check_rank(self, self.rank, A)
        U, S, V = _factors(A, self.rank)
        return self.left.right_inverse(U), self._values[1](S), self.right.right_inverse(V)

    def residual(self, A: Tensor) -> Tensor:
        return largest(torch.linalg.svdvals(A)[..., self.rank :])

    def _from_normal(self, Z: Tensor) -> Tensor:
        return Z[..., : self.rank] @ Z[..., : self.rank, :]


class LowRank(_Factored):
    r"""Keep the rank of a matrix at most ``rank``.

    .. math:: A = U\, \mathrm{diag}(s)\, V^H, \qquad U^H U = V^H V = I

    Three originals: the movement of U (n x r), s, and the movement of V (m x r), as :class:`Stiefel`.

    Numerics:
        Off the constraint the nearest point (truncated SVD). Differentiable everywhere, also at repeated singular
        values: no SVD is taken in forward.

    Args:
        rank: The largest rank.

    Example:
        >>> LowRank(1).project(torch.diag(torch.tensor([3.0, 2.0])))
        tensor([[3., 0.],
                [0., 0.]])

    References:
        Lezcano-Casado, arXiv:1909.09501.
    """

    _values = (_identity, _identity)


class FixedRank(_Factored):
    r"""Keep the rank of a matrix at exactly ``rank``.

    .. math:: A = U\, \mathrm{diag}(\log(1 + e^s))\, V^H, \qquad U^H U = V^H V = I

    As :class:`LowRank`, with singular values that stay positive.

    Numerics:
        As :class:`LowRank`; singular values of 0 become the rounding unit.

    Args:
        rank: The rank.

    Example:
        >>> torch.linalg.matrix_rank(FixedRank(2).project(torch.eye(3, 4)))
        tensor(2)

    References:
        Lezcano-Casado, arXiv:1909.09501.
    """

    # The residual, a distance, cannot tell rank r from less: the matrices of lower rank are limits.
    _values = POSITIVE["softplus"]


class Invertible(Parametrization):
    r"""Keep a square matrix invertible, with positive determinant.

    .. math:: A = Q P, \qquad Q \in SO(n),\ P \succ 0

    The polar decomposition, a bijection. Two originals: as :class:`SpecialOrthogonal` (exponential) and as
    :class:`PositiveDefinite` (Cholesky) have them.

    Numerics:
        Exact on the constraint, with the conditioning of the matrix. A matrix of negative determinant is reflected
        along its least singular vector, which is twice as far as the border but well inside; a singular value of 0, to
        the rounding, becomes the root of the rounding unit. Differentiable everywhere.

    Example:
        >>> A = Invertible().project(torch.tensor([[2.0, 0.0], [0.0, -1.0]]))
        >>> bool(torch.linalg.det(A) > 0)
        True

    References:
        Lezcano-Casado, arXiv:1909.09501.
    """

    event_dim = 2
    square = True

    def __init__(self) -> None:
        super().__init__()
        self.rotation, self.stretch = SpecialOrthogonal(), PositiveDefinite()

    @computed
    def forward(self, X: Tensor, Y: Tensor) -> Tensor:
        return self.rotation.forward(X) @ self.stretch.forward(Y)

    @inverted
    def right_inverse(self, A: Tensor) -> tuple[Tensor, Tensor]:
        Q, P = _polar_factors(A)
        return self.rotation.right_inverse(Q), self.stretch.right_inverse(P)

    def residual(self, A: Tensor) -> Tensor:
        return _beyond_singular(A)

    def _from_normal(self, Z: Tensor) -> Tensor:
        return _positive_determinant(Z)


class SpecialLinear(Parametrization):
    r"""Keep a square matrix at determinant 1.

    .. math:: A = Q P / \det(P)^{1/n}, \qquad Q \in SO(n),\ P \succ 0

    For maps that preserve volume. Originals as of :class:`Invertible`.

    Numerics:
        As :class:`Invertible`; off the constraint a matrix is scaled to determinant 1. The determinant
        is 1 to the rounding times the condition number.

    Example:
        >>> torch.linalg.det(SpecialLinear().project(torch.diag(torch.tensor([2.0, 8.0]))))
        tensor(1.0000)

    References:
        Lezcano-Casado, arXiv:1909.09501.
    """

    event_dim = 2
    square = True

    def __init__(self) -> None:
        super().__init__()
        self.rotation, self.stretch = SpecialOrthogonal(), PositiveDefinite()

    @computed
    def forward(self, X: Tensor, Y: Tensor) -> Tensor:
        return self.rotation.forward(X) @ _unimodular(self.stretch.forward(Y))

    @inverted
    def right_inverse(self, A: Tensor) -> tuple[Tensor, Tensor]:
        Q, P = _polar_factors(A)
        return self.rotation.right_inverse(Q), self.stretch.right_inverse(_unimodular(P))

    def residual(self, A: Tensor) -> Tensor:
        return largest(torch.linalg.det(A.double()) - 1)

    def _from_normal(self, Z: Tensor) -> Tensor:
        return _unimodular(_positive_determinant(Z))


def _unimodular(A: Tensor) -> Tensor:
    """Return ``A``, of positive determinant, scaled to determinant 1."""
    logarithm = torch.linalg.slogdet(A).logabsdet / max(A.shape[-1], 1)
    return A * torch.exp(-logarithm)[..., None, None]


def _polar_factors(A: Tensor) -> tuple[Tensor, Tensor]:
    """Return a rotation and a definite matrix with product ``A``, reflected first where its determinant is negative."""
    U, S, Vh = torch.linalg.svd(A)
    turns = torch.linalg.det(U @ Vh)
    if A.shape[-1]:
        U = torch.cat([U[..., :-1], U[..., -1:] * turns[..., None, None]], -1)
        scale, eps = torch.where(S[..., :1] > 0, S[..., :1], 1), torch.finfo(S.dtype).eps
        S = torch.where(scale * eps * A.shape[-1] < S, S, scale * eps**0.5)
    P = (Vh.mH * S[..., None, :]) @ Vh
    return U @ Vh, (P + P.mH) / 2


def _beyond_singular(A: Tensor) -> Tensor:
    """Return how far matrices of negative determinant are from the singular ones between: the least singular value."""
    if not A.shape[-1]:
        return largest(A)
    return largest(torch.where(torch.linalg.det(A) < 0, torch.linalg.svdvals(A)[..., -1], 0))


def _positive_determinant(Z: Tensor) -> Tensor:
    """Exchange the sign of the first row where the determinant is negative."""
    sign = torch.where(torch.linalg.det(Z) < 0, -1.0, 1.0).to(Z.dtype)[..., None, None]
    return torch.cat([Z[..., :1, :] * sign, Z[..., 1:, :]], -2)


class PLU(Parametrization):
    r"""Train a square matrix by its LU factors: an invertible layer whose determinant costs n multiplications.

    .. math:: A = P L (U + \mathrm{diag}(\varsigma \odot e^s))

    The permutation P (as the row of LU that each row is) and the signs are buffers, from the value at registration;
    the original has L below its diagonal, U above it and s on it.

    Numerics:
        Exact for invertible matrices, with partial pivoting; a singular one gets the rounding unit on the diagonal.
        Differentiable everywhere. ``log|det A|`` is the sum of the original's diagonal.

    Example:
        >>> plu = PLU()
        >>> X = plu.right_inverse(torch.tensor([[0.0, 2.0], [3.0, 0.0]]))
        >>> plu(X)
        tensor([[0., 2.],
                [3., 0.]])

    References:
        Kingma and Dhariwal, "Glow", arXiv:1807.03039, section 3.2.
    """

    event_dim = 2
    square = True
    rows: Tensor | None
    signs: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("rows", None)
        self.register_buffer("signs", None)

    @computed
    def forward(self, X: Tensor) -> Tensor:
        I = torch.eye(X.shape[-1], dtype=X.dtype, device=X.device)  # noqa: E741  # the identity's name
        d = X.diagonal(dim1=-2, dim2=-1).exp()
        signed = d if self.signs is None else d * self.signs.to(X.dtype)
        product = (X.tril(-1) + I) @ (X.triu(1) + torch.diag_embed(signed))
        return product if self.rows is None else product.take_along_dim(self.rows[..., None], -2)

    @inverted
    def right_inverse(self, A: Tensor) -> Tensor:
        P, L, U = torch.linalg.lu(A)
        d = U.diagonal(dim1=-2, dim2=-1)
        scale = d.abs().amax(-1, keepdim=True) if d.shape[-1] else d
        floor = torch.where(scale > 0, scale, 1) * torch.finfo(d.dtype).eps
        self.rows = P.argmax(-1) if d.shape[-1] else P.new_empty(P.shape[:-1], dtype=torch.int64)
        self.signs = torch.where(d < 0, -1.0, 1.0).to(A.dtype)
        result: Tensor = L.tril(-1) + U.triu(1) + torch.diag_embed(torch.where(d == 0, floor, d.abs()).log())
        return result
