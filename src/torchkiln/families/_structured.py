"""Families of matrices made of small factors: block-diagonal, Kronecker, Monarch, butterfly."""

from __future__ import annotations

from torch import Tensor

from torchkiln._core.base import Parametrization
from torchkiln._core.errors import ParametrizationError
from torchkiln.families._contract import check_positive, computed, inverted, largest
from torchkiln.families._maps import structured as maps

__all__ = ["BlockDiagonal", "Butterfly", "Kronecker", "Monarch"]


def _check_divides(family: Parametrization, X: Tensor, *, rows: int, columns: int) -> None:
    if X.shape[-2] % rows or X.shape[-1] % columns:
        raise ParametrizationError(
            f"{family}: {rows} and {columns} must divide the sides of the matrix, got {tuple(X.shape)}."
        )


class BlockDiagonal(Parametrization):
    r"""Keep a matrix block-diagonal, with blocks of equal shape: a grouped layer.

    .. math:: W = \mathrm{diag}(B_1, \dots, B_b)

    The original has the blocks: (b, n / b, m / b).

    Numerics:
        Linear and exact; off the constraint the nearest point, without what is outside of the blocks.

    Args:
        blocks: Their number b.

    Example:
        >>> BlockDiagonal(2).project(Tensor([[1, 1, 1, 1], [1, 1, 1, 1]]))
        tensor([[1., 1., 0., 0.],
                [0., 0., 1., 1.]])
    """

    event_dim = 2
    accepts = "any"

    def __init__(self, blocks: int) -> None:
        super().__init__()
        check_positive(self, blocks=blocks)
        self.blocks = blocks

    @computed
    def forward(self, B: Tensor) -> Tensor:
        return maps.block_diagonal(B)

    @inverted
    def right_inverse(self, W: Tensor) -> Tensor:
        _check_divides(self, W, rows=self.blocks, columns=self.blocks)
        return maps.diagonal_blocks(W, self.blocks)

    def residual(self, W: Tensor) -> Tensor:
        return largest(W - maps.block_diagonal(maps.diagonal_blocks(W, self.blocks)))

    def _from_normal(self, Z: Tensor) -> Tensor:
        return maps.block_diagonal(maps.diagonal_blocks(Z, self.blocks))


class Kronecker(Parametrization):
    r"""Keep a matrix a sum of Kronecker products.

    .. math:: W = \sum_{k=1}^{r} A_k \otimes B_k

    Two originals: the first factors (r, p, q) and the second ones (r, n / p, m / q).

    Numerics:
        Off the constraint the nearest point, by the singular values of the rearranged matrix. The factors are not
        unique; they are given equal lengths. Smooth; a value of 0 gets one factor that is not, and so can move.

    Args:
        rows: Rows p of the first factor.
        columns: Columns q of the first factor.
        terms: How many products r are summed.

    Example:
        >>> Kronecker(2, 1)(Tensor([[[1.0], [2.0]]]), Tensor([[[3.0, 4.0]]]))
        tensor([[3., 4.],
                [6., 8.]])

    References:
        Van Loan and Pitsianis, doi:10.1007/978-94-015-8196-7_17.
    """

    event_dim = 2
    accepts = "any"

    def __init__(self, rows: int, columns: int, *, terms: int = 1) -> None:
        super().__init__()
        check_positive(self, rows=rows, columns=columns, terms=terms)
        self.rows, self.columns, self.terms = rows, columns, terms

    @computed
    def forward(self, A: Tensor, B: Tensor) -> Tensor:
        return maps.kronecker(A, B)

    @inverted
    def right_inverse(self, W: Tensor) -> tuple[Tensor, Tensor]:
        _check_divides(self, W, rows=self.rows, columns=self.columns)
        return maps.kronecker_factors(W, self.rows, self.columns, terms=self.terms)

    def residual(self, W: Tensor) -> Tensor:
        return largest(W - self.project(W))

    def _from_normal(self, Z: Tensor) -> Tensor:
        return self.project(Z)


class Monarch(Parametrization):
    r"""Keep a matrix a product of two block-diagonal ones with the blocks' order transposed between.

    .. math:: M = P L P^T R

    Any input reaches any output, in n / b + m / b times b^2 numbers. Two originals: L (b, n / b, b), R (b, b, m / b).

    Numerics:
        Off the constraint the nearest point, in closed form: b^2 rank-1 approximations. The factors are not unique;
        they are given equal lengths. Smooth; a value of 0 can move, as in :class:`Kronecker`.

    Args:
        blocks: Their number b; divides both sides.

    Example:
        >>> import torch
        >>> M = Monarch(2).project(torch.arange(16.0).view(4, 4))
        >>> torch.linalg.matrix_rank(M[::2, :2])  # all rows of one block of L, all columns of one block of R
        tensor(1)

    References:
        Dao et al., arXiv:2204.00595.
    """

    event_dim = 2
    accepts = "any"

    def __init__(self, blocks: int) -> None:
        super().__init__()
        check_positive(self, blocks=blocks)
        self.blocks = blocks

    @computed
    def forward(self, L: Tensor, R: Tensor) -> Tensor:
        return maps.monarch(L, R)

    @inverted
    def right_inverse(self, M: Tensor) -> tuple[Tensor, Tensor]:
        _check_divides(self, M, rows=self.blocks, columns=self.blocks)
        return maps.monarch_factors(M, self.blocks)

    def residual(self, M: Tensor) -> Tensor:
        return largest(M - self.project(M))

    def _from_normal(self, Z: Tensor) -> Tensor:
        return self.project(Z)


class Butterfly(Parametrization):
    r"""Keep a square matrix a butterfly: the pattern of the fast Fourier transform, with free weights.

    .. math:: W = F_1 F_2 \cdots F_L, \qquad N = 2^L

    A full mixing in 2 N log N numbers. The original has the 2 x 2 parts: (L, N / 2, 2, 2).

    Numerics:
        Exact for butterflies; off the constraint the best first factor, then the next, which is near but not nearest.
        The factors are not unique; the scale is spread over them. Smooth; a value of 0 can move.

    Example:
        >>> import torch
        >>> W = torch.fft.fft(torch.eye(4, dtype=torch.complex64))[:, [0, 2, 1, 3]]  # bit-reversed
        >>> torch.allclose(Butterfly().project(W), W, atol=1e-6)
        True

    References:
        Dao et al., arXiv:1903.05895; the way back: Zheng, Riccietti, Gribonval, arXiv:2110.01230.
    """

    event_dim = 2
    square = True
    accepts = "any"

    @computed
    def forward(self, F: Tensor) -> Tensor:
        return maps.butterfly(F)

    @inverted
    def right_inverse(self, W: Tensor) -> Tensor:
        n = W.shape[-1]
        if n < 2 or n & (n - 1):
            raise ParametrizationError(
                f"Butterfly needs sides that are a power of 2, got shape {tuple(W.shape)}."
            )
        return maps.butterfly_factors(W)

    def residual(self, W: Tensor) -> Tensor:
        return largest(W - self.project(W))

    def _from_normal(self, Z: Tensor) -> Tensor:
        return self.project(Z)
