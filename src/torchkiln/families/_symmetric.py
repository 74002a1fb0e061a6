"""Families that are linear subspaces of matrices: symmetric, skew, without trace, with sums of zero.

Each is trained through the orthogonal projection onto it, so the original keeps the tensor's shape, the gradient is
the Riemannian one, and a value off the subspace goes to the nearest one on it.
"""

from __future__ import annotations

from torch import Tensor

from torchkiln.families._contract import Projection
from torchkiln.families._maps import linear as maps

__all__ = ["Hermitian", "SkewHermitian", "SkewSymmetric", "Symmetric", "TraceFree", "ZeroSum"]


class Symmetric(Projection):
    r"""Keep a square matrix symmetric.

    .. math:: A = (X + X^T) / 2

    Numerics:
        Linear and exact; a symmetric value is kept to the bit, another goes to the nearest symmetric one.

    Example:
        >>> Symmetric()(Tensor([[1.0, 2.0], [4.0, 3.0]]))
        tensor([[1., 3.],
                [3., 3.]])
    """

    event_dim = 2
    square = True
    accepts = "any"

    def _nearest(self, X: Tensor) -> Tensor:
        return maps.symmetrize(X)


class SkewSymmetric(Projection):
    r"""Keep a square matrix skew-symmetric.

    .. math:: A = (X - X^T) / 2

    For rotations' generators and energy-preserving dynamics.

    Numerics:
        Linear and exact, as :class:`Symmetric`.

    Example:
        >>> SkewSymmetric()(Tensor([[1.0, 2.0], [4.0, 3.0]]))
        tensor([[ 0., -1.],
                [ 1.,  0.]])
    """

    event_dim = 2
    square = True
    accepts = "any"

    def _nearest(self, X: Tensor) -> Tensor:
        return maps.antisymmetrize(X)


class Hermitian(Projection):
    r"""Keep a square matrix Hermitian; symmetric where it is real.

    .. math:: A = (X + X^H) / 2

    Numerics:
        Linear and exact, as :class:`Symmetric`.

    Example:
        >>> import torch
        >>> Hermitian()(torch.tensor([[1j, 2j], [0j, 1]]))
        tensor([[0.+0.j, 0.+1.j],
                [0.-1.j, 1.+0.j]])
    """

    event_dim = 2
    square = True
    accepts = "any"

    def _nearest(self, X: Tensor) -> Tensor:
        return maps.hermitize(X)


class SkewHermitian(Projection):
    r"""Keep a square matrix skew-Hermitian; skew-symmetric where it is real.

    .. math:: A = (X - X^H) / 2

    Numerics:
        Linear and exact, as :class:`Symmetric`.

    Example:
        >>> import torch
        >>> SkewHermitian()(torch.tensor([[1j, 2j], [0j, 1]]))
        tensor([[0.+1.j, 0.+1.j],
                [0.+1.j, 0.+0.j]])
    """

    event_dim = 2
    square = True
    accepts = "any"

    def _nearest(self, X: Tensor) -> Tensor:
        return maps.antihermitize(X)


class TraceFree(Projection):
    r"""Keep the trace of a square matrix at 0.

    .. math:: A = X - \frac{\mathrm{tr} X}{n} I

    For generators of volume-preserving maps.

    Numerics:
        Linear; exact to the rounding of the trace.

    Example:
        >>> TraceFree()(Tensor([[1.0, 2.0], [4.0, 3.0]]))
        tensor([[-1.,  2.],
                [ 4.,  1.]])
    """

    event_dim = 2
    square = True
    accepts = "any"

    def _nearest(self, X: Tensor) -> Tensor:
        return maps.remove_trace(X)


class ZeroSum(Projection):
    r"""Keep the sum over a dimension at 0.

    .. math:: y = x - \frac{1}{n} \sum_i x_i

    For contrasts and effects that must cancel.

    Numerics:
        Linear; exact to the rounding of the mean.

    Args:
        dim: The dimension that is summed over, from the end.

    Example:
        >>> ZeroSum()(Tensor([1.0, 2.0, 6.0]))
        tensor([-2., -1.,  3.])
    """

    accepts = "any"

    def __init__(self, dim: int = -1) -> None:
        super().__init__()
        self.dim = dim

    def _nearest(self, X: Tensor) -> Tensor:
        return maps.remove_mean(X, self.dim)
