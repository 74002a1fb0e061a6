"""Families of matrices with orthonormal columns, or rows where they are wide.

Most move around a base, the value at registration ("dynamic trivialization", arXiv:1909.09501): the original starts at
0 and an orthonormal value is kept to the bit. The base is a buffer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchkiln._core.base import Parametrization
from torchkiln._core.errors import ParametrizationError
from torchkiln.families._contract import (
    Projection,
    check_argument,
    computed,
    inverted,
    largest,
    square_or_tall,
)
from torchkiln.families._maps import frames
from torchkiln.families._maps import orthogonal as maps
from torchkiln.families._maps.elementwise import INTERVAL, Map
from torchkiln.families._maps.spectral import polar

__all__ = [
    "AlmostOrthogonal",
    "Grassmann",
    "Orthogonal",
    "OrthogonalProjection",
    "SpecialOrthogonal",
    "Stiefel",
    "Unitary",
]

_MAPS = {"exponential": maps.exponential, "cayley": maps.cayley}


def _mapped(name: str, X: Tensor, base: Tensor | None) -> Tensor:
    return _MAPS[name](X, maps.in_dtype_of(X, base))


class Orthogonal(Parametrization):
    r"""Keep the columns of a matrix orthonormal; the rows where it is wide.

    .. math:: Q = B\, \varphi(X), \qquad \varphi = \exp(A),\ (I - A/2)^{-1}(I + A/2) \text{ or } H_1 \cdots H_k

    with A the skew matrix of the lower triangle of X and H Householder reflectors, which need no base. B is n x n; for
    tall matrices :class:`Stiefel` is cheaper.

    Numerics:
        A value that is orthonormal to its rounding is kept; off the constraint the nearest point (polar factor).
        Differentiable everywhere. ``"cayley"`` does not reach rotations by exactly 180 degrees from its base.

    Args:
        map: ``"exponential"``, ``"cayley"`` or ``"householder"``.

    Example:
        >>> Orthogonal().project(torch.tensor([[0.0, -3.0], [2.0, 0.0]]))
        tensor([[ 0., -1.],
                [ 1.,  0.]])

    References:
        Lezcano-Casado and Martinez-Rubio, arXiv:1901.08428; Lezcano-Casado, arXiv:1909.09501.
    """

    event_dim = 2
    base: Tensor | None

    def __init__(self, map: str = "exponential") -> None:  # noqa: A002  # the field's word
        super().__init__()
        check_argument(self, argument="map", value=map, choices=(*_MAPS, "householder"))
        self.map = map
        self.register_buffer("base", None)

    @computed
    def forward(self, X: Tensor) -> Tensor:
        X, wide = square_or_tall(X)
        Q = maps.householder(X) if self.map == "householder" else _mapped(self.map, X, self.base)
        return Q.mT if wide else Q

    @inverted
    def right_inverse(self, Q: Tensor) -> Tensor:
        tall, wide = square_or_tall(Q)
        tall = frames.nearest_frame(tall)
        if self.map == "householder":
            X = maps.householder_inverse(tall)
            return X.mT if wide else X
        self.base = frames.complete(tall).contiguous()
        return torch.zeros_like(Q)

    def residual(self, Q: Tensor) -> Tensor:
        return largest(frames.gram_residual(Q))

    def _from_normal(self, Z: Tensor) -> Tensor:
        return _haar(Z)


def _haar(Z: Tensor) -> Tensor:
    """Return the uniform distribution's frame: Q of a normal matrix, with R's diagonal positive (math-ph/0609050)."""
    tall, wide = square_or_tall(Z)
    Q = maps.orthonormalize(tall)
    return Q.mT if wide else Q


class SpecialOrthogonal(Parametrization):
    r"""Keep a square matrix a rotation: orthogonal with determinant 1.

    .. math:: Q = B\, \varphi(X), \qquad \varphi = \exp(A) \text{ or } (I - A/2)^{-1}(I + A/2)

    Numerics:
        As :class:`Orthogonal`; a reflection goes to a nearest rotation.

    Args:
        map: ``"exponential"`` or ``"cayley"``.

    Example:
        >>> torch.linalg.det(SpecialOrthogonal().project(torch.diag(torch.tensor([1.0, -2.0]))))
        tensor(1.)

    References:
        Lezcano-Casado and Martinez-Rubio, arXiv:1901.08428.
    """

    event_dim = 2
    square = True
    base: Tensor | None

    def __init__(self, map: str = "exponential") -> None:  # noqa: A002  # the field's word
        super().__init__()
        check_argument(self, argument="map", value=map, choices=_MAPS)
        self.map = map
        self.register_buffer("base", None)

    @computed
    def forward(self, X: Tensor) -> Tensor:
        return _mapped(self.map, X, self.base)

    @inverted
    def right_inverse(self, Q: Tensor) -> Tensor:
        self.base = frames.nearest_rotation(Q).contiguous()
        return torch.zeros_like(Q)

    def residual(self, Q: Tensor) -> Tensor:
        return largest(frames.gram_residual(Q), torch.linalg.det(Q) - 1)

    def _from_normal(self, Z: Tensor) -> Tensor:
        return frames.nearest_rotation(_haar(Z))


class Unitary(Parametrization):
    r"""Keep the columns of a complex matrix orthonormal; the rows where it is wide.

    .. math:: U = B\, \varphi(X), \qquad A = L - L^H

    as :class:`Orthogonal`, with a skew-Hermitian A.

    Numerics:
        As :class:`Orthogonal`.

    Args:
        map: ``"exponential"`` or ``"cayley"``.

    Example:
        >>> Unitary().project(torch.tensor([[3j, 0], [0, 2]]))
        tensor([[0.+1.j, 0.+0.j],
                [0.+0.j, 1.+0.j]])

    References:
        Lezcano-Casado and Martinez-Rubio, arXiv:1901.08428.
    """

    event_dim = 2
    accepts = "complex"
    base: Tensor | None

    def __init__(self, map: str = "exponential") -> None:  # noqa: A002  # the field's word
        super().__init__()
        check_argument(self, argument="map", value=map, choices=_MAPS)
        self.map = map
        self.register_buffer("base", None)

    @computed
    def forward(self, X: Tensor) -> Tensor:
        X, wide = square_or_tall(X)
        U = _mapped(self.map, X, self.base)
        return U.mT if wide else U

    @inverted
    def right_inverse(self, U: Tensor) -> Tensor:
        tall, _ = square_or_tall(U)
        self.base = frames.complete(frames.nearest_frame(tall)).contiguous()
        return torch.zeros_like(U)

    def residual(self, U: Tensor) -> Tensor:
        return largest(frames.gram_residual(U))

    def _from_normal(self, Z: Tensor) -> Tensor:
        return _haar(Z)


class _Frame(Parametrization):
    """Moves from a base with orthonormal columns, the value that was last set, along a tangent there."""

    event_dim = 2
    accepts = "any"
    base: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("base", None)

    @computed
    def forward(self, X: Tensor) -> Tensor:
        X, wide = square_or_tall(X)
        base = frames.first_columns(X) if self.base is None else self.base.to(X.dtype)
        Q = self._moved(base, X)
        return Q.mT if wide else Q

    def _moved(self, base: Tensor, X: Tensor) -> Tensor:
        """Return where ``X`` leads from ``base``."""
        raise NotImplementedError(type(self).__name__)

    @inverted
    def right_inverse(self, Q: Tensor) -> Tensor:
        tall, _ = square_or_tall(Q)
        self.base = frames.nearest_frame(tall).contiguous()
        return torch.zeros_like(Q)

    def residual(self, Q: Tensor) -> Tensor:
        return largest(frames.gram_residual(Q))

    def _from_normal(self, Z: Tensor) -> Tensor:
        return _haar(Z)


class Stiefel(_Frame):
    r"""Keep the columns of a tall matrix orthonormal at the cost of tall matrices: O(n k^2) time, O(n k) memory.

    .. math:: Q = (I - W/2)^{-1} (I + W/2)\, B, \qquad W = P X B^H - B X^H P,\ P = I - B B^H / 2

    The Cayley retraction along the canonical tangent X at the base B, n x k: a system of 2k x 2k. Wide matrices are
    transposed.

    Numerics:
        As :class:`Orthogonal`; the movement is a smooth bijection near the base.

    Example:
        >>> Q = Stiefel().project(torch.arange(6.0).view(3, 2))
        >>> torch.allclose(Q.T @ Q, torch.eye(2), atol=1e-6)
        True

    References:
        Wen and Yin, doi:10.1007/s10107-012-0584-1; Li, Fuxin, Todorovic, arXiv:2002.01113.
    """

    def _moved(self, base: Tensor, X: Tensor) -> Tensor:
        return frames.retract(base, X)


class Grassmann(_Frame):
    r"""Keep a tall matrix an orthonormal basis of a subspace, and train the subspace alone.

    .. math:: Q = (I - W/2)^{-1} (I + W/2)\, B, \qquad W = H B^H - B H^H,\ H = (I - B B^H) X

    As :class:`Stiefel`, without the movements that turn the basis within its span.

    Numerics:
        As :class:`Stiefel`. The part of the original along the base has no effect and no gradient.

    Example:
        >>> P = Grassmann()
        >>> X = P.right_inverse(torch.eye(4, 2))
        >>> P(X + torch.eye(4, 2))[:2]  # turning within the span does nothing
        tensor([[1., 0.],
                [0., 1.]])

    References:
        Edelman, Arias, Smith, arXiv:physics/9806030.
    """

    def _moved(self, base: Tensor, X: Tensor) -> Tensor:
        return frames.retract(base, frames.horizontal(base, X))


class AlmostOrthogonal(Parametrization):
    r"""Keep the singular values of a matrix between :math:`1 - \lambda` and :math:`1 + \lambda`.

    .. math:: W = U\, \mathrm{diag}(1 + \lambda \tanh s)\, V^H

    Three originals: the movement of U, s, and the movement of V (as :class:`Stiefel`).

    Numerics:
        Off the constraint the nearest point. A singular value on the bounds goes one rounding unit inside, where it
        hardly moves again. Differentiable everywhere: no SVD is taken in forward.

    Args:
        radius: The number lambda, from 0 to 1.

    Example:
        >>> AlmostOrthogonal(0.5).project(torch.tensor([[4.0, 0.0], [0.0, 1.0]]))
        tensor([[1.5000, 0.0000],
                [0.0000, 1.0000]])

    References:
        Lezcano-Casado, arXiv:1909.09501.
    """

    event_dim = 2
    accepts = "any"

    def __init__(self, radius: float) -> None:
        super().__init__()
        if not 0 < radius <= 1:
            raise ParametrizationError(f"AlmostOrthogonal needs 0 < radius <= 1, got {radius}.")
        self.radius = radius
        self.left, self.right = Stiefel(), Stiefel()

    @computed
    def forward(self, X: Tensor, s: Tensor, Y: Tensor) -> Tensor:
        values = 1 + self.radius * (2 * INTERVAL["tanh"][0](s) - 1)
        U, V = self.left.forward(X), self.right.forward(Y)
        return (U * values[..., None, :]) @ V.mH

    @inverted
    def right_inverse(self, W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        s: Tensor = INTERVAL["tanh"][1](((S - 1) / self.radius + 1) / 2)
        return self.left.right_inverse(U), s, self.right.right_inverse(Vh.mH)

    def residual(self, W: Tensor) -> Tensor:
        return largest(((torch.linalg.svdvals(W) - 1).abs() - self.radius).clamp(min=0))

    def _from_normal(self, Z: Tensor) -> Tensor:
        return _haar(Z)


def _qr(A: Tensor) -> Tensor:
    # Not maps.orthonormalize(): LAPACK's factors have no derivative in torch, Q and R have.
    Q, R = torch.linalg.qr(A)
    diagonal = R.diagonal(dim1=-2, dim2=-1).real
    result: Tensor = Q * torch.where(diagonal < 0, -1.0, 1.0)[..., None, :].to(Q.dtype)
    return result


_PROJECTIONS: dict[str, Map] = {
    "polar": polar,
    "qr": _qr,
    "bjorck": lambda A: frames.newton_schulz(A, 30, order=1),
    "newton_schulz": lambda A: frames.newton_schulz(A, 18, order=2),
    "cholesky": lambda A: (
        torch.linalg.solve_triangular(torch.linalg.cholesky(A.mH @ A), A.mH, upper=False).mH
    ),
}


class OrthogonalProjection(Projection):
    r"""Keep the columns of a matrix orthonormal by projecting a free one; the rows where it is wide.

    .. math:: Q = A (A^H A)^{-1/2} \quad \text{(polar)}, \qquad Q = A R^{-1} \quad \text{(QR, Cholesky)}

    No base, and no trigonometry: the original has every scale. ``"polar"`` is the nearest point, by an SVD;
    ``"bjorck"`` and ``"newton_schulz"`` reach it by matrix products alone; ``"qr"`` and ``"cholesky"`` make the columns
    orthonormal one after the other.

    Numerics:
        Defined where A has full rank; the gradient grows as its inverse. ``"cholesky"`` and the iterations lose half
        of the digits for condition numbers near 1e4 (float32); the iterations then end early, short of the constraint.
        No NaN at repeated singular values. ``"polar"`` has no second derivative.

    Args:
        method: ``"polar"``, ``"qr"``, ``"bjorck"``, ``"newton_schulz"`` or ``"cholesky"``.

    Example:
        >>> OrthogonalProjection()(torch.tensor([[0.0, -3.0], [2.0, 0.0]]))
        tensor([[ 0., -1.],
                [ 1.,  0.]])

    References:
        Anil, Lucas, Grosse, arXiv:1811.05381 (Bjorck).
    """

    event_dim = 2
    accepts = "any"

    def __init__(self, method: str = "polar") -> None:
        super().__init__()
        check_argument(self, argument="method", value=method, choices=_PROJECTIONS)
        self.method = method

    def _nearest(self, X: Tensor) -> Tensor:
        tall, wide = square_or_tall(X)
        Q = _PROJECTIONS[self.method](tall)
        return Q.mT if wide else Q

    def residual(self, Q: Tensor) -> Tensor:
        return largest(frames.gram_residual(Q))

    def _from_normal(self, Z: Tensor) -> Tensor:
        return _haar(Z)
