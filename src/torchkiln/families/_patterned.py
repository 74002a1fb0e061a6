"""Families of matrices with entries that are zero or equal by a pattern: triangular, banded, Toeplitz, circulant."""

from __future__ import annotations

import torch
from torch import Tensor

from torchkiln._core.base import Parametrization
from torchkiln._core.errors import ParametrizationError
from torchkiln.families._contract import (
    Projection,
    check_argument,
    check_not_empty,
    check_positive,
    computed,
    inverted,
    largest,
)
from torchkiln.families._maps import linear as maps
from torchkiln.families._maps.elementwise import POSITIVE, Map

__all__ = [
    "Banded",
    "BlockCirculant",
    "Circulant",
    "Diagonal",
    "Hankel",
    "Masked",
    "Toeplitz",
    "Triangular",
]


# --- zeros in fixed places ------------------------------------------------------------------------------------------


class Triangular(Parametrization):
    r"""Keep a matrix triangular, with a diagonal that is free, zero (strict), one (unit) or positive.

    .. math:: T_{ij} = X_{ij} \text{ for } i > j, \qquad T_{ii} = x_{ii},\ 0,\ 1 \text{ or } \log(1 + e^{x_{ii}})

    For factors (Cholesky, LU), autoregressive layers, flows.

    Numerics:
        Exact; off the constraint the entries that must be 0 or 1 become so, the nearest point, and a diagonal that
        is not positive goes to the rounding unit. Smooth, and linear but for a positive diagonal.

    Args:
        side: ``"lower"`` or ``"upper"``.
        diagonal: ``"free"``, ``"zero"``, ``"unit"`` or ``"positive"``.

    Example:
        >>> Triangular(diagonal="unit")(torch.tensor([[5.0, 2.0], [3.0, 4.0]]))
        tensor([[1., 0.],
                [3., 1.]])
    """

    event_dim = 2
    accepts = "any"

    def __init__(self, side: str = "lower", diagonal: str = "free") -> None:
        super().__init__()
        check_argument(self, argument="side", value=side, choices=("lower", "upper"))
        check_argument(
            self, argument="diagonal", value=diagonal, choices=("free", "zero", "unit", "positive")
        )
        self.side, self.diagonal = side, diagonal

    @computed
    def forward(self, X: Tensor) -> Tensor:
        return self._with_diagonal(X, POSITIVE["softplus"][0])

    @inverted
    def right_inverse(self, T: Tensor) -> Tensor:
        if self.diagonal == "positive" and T.is_complex():
            raise ParametrizationError("Triangular with a positive diagonal needs real numbers.")
        return self._with_diagonal(T, POSITIVE["softplus"][1])

    def _with_diagonal(self, X: Tensor, positive: Map) -> Tensor:
        if self.diagonal == "free":
            return self._triangle(X, 0)
        T = self._triangle(X, 1)
        if self.diagonal == "zero":
            return T
        d = X.diagonal(dim1=-2, dim2=-1)
        d = torch.ones_like(d) if self.diagonal == "unit" else positive(d)
        return T + _embed(d, X)

    def _triangle(self, X: Tensor, strict: int) -> Tensor:
        return X.tril(-strict) if self.side == "lower" else X.triu(strict)

    def residual(self, T: Tensor) -> Tensor:
        d = T.diagonal(dim1=-2, dim2=-1)
        wrong = {"free": d[..., :0], "zero": d, "unit": d - 1}
        return largest(
            T - self._triangle(T, 0),
            d.real.clamp(max=0) if self.diagonal == "positive" else wrong[self.diagonal],
        )

    def _from_normal(self, Z: Tensor) -> Tensor:
        return self._with_diagonal(Z, torch.exp)


class Diagonal(Projection):
    r"""Keep a matrix diagonal; it need not be square.

    .. math:: D_{ij} = \delta_{ij} X_{ij}

    Numerics:
        Linear and exact; off the constraint the nearest diagonal matrix.

    Example:
        >>> Diagonal()(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        tensor([[1., 0.],
                [0., 4.]])
    """

    event_dim = 2
    accepts = "any"

    def _nearest(self, X: Tensor) -> Tensor:
        return X.tril().triu()


class Banded(Projection):
    r"""Keep a matrix banded: zero below ``lower`` subdiagonals and above ``upper`` superdiagonals.

    .. math:: B_{ij} = X_{ij} \text{ for } -u \le i - j \le l, \text{ else } 0

    Numerics:
        Linear and exact; off the constraint the nearest banded matrix.

    Args:
        lower: Number of subdiagonals kept.
        upper: Number of superdiagonals kept.

    Example:
        >>> Banded(1, 0)(torch.ones(3, 3))
        tensor([[1., 0., 0.],
                [1., 1., 0.],
                [0., 1., 1.]])
    """

    event_dim = 2
    accepts = "any"

    def __init__(self, lower: int, upper: int) -> None:
        super().__init__()
        self.lower, self.upper = lower, upper

    def _nearest(self, X: Tensor) -> Tensor:
        return X.tril(self.upper).triu(-self.lower)


class Masked(Projection):
    r"""Keep the entries at zero where a mask is zero.

    .. math:: Y = M \odot X

    For autoregressive masks (MADE) and fixed sparsity.

    Numerics:
        Linear and exact; off the constraint the nearest masked tensor. Entries under the mask get no gradient.

    Args:
        mask: Of a shape that broadcasts to the tensor's; nonzero keeps. A buffer, and so in the state dict; None where
            it comes from there.

    Example:
        >>> Masked(torch.tensor([True, False]))(torch.tensor([2.0, 3.0]))
        tensor([2., 0.])

    References:
        Germain et al., "MADE", arXiv:1502.03509.
    """

    accepts = "any"
    mask: Tensor

    def __init__(self, mask: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("mask", None if mask is None else mask.detach().bool())

    def _nearest(self, X: Tensor) -> Tensor:
        return torch.where(self.mask, X, 0)

    @inverted
    def right_inverse(self, X: Tensor) -> Tensor:
        fits = self.mask.ndim <= X.ndim and all(
            m in (1, x) for m, x in zip(self.mask.shape[::-1], X.shape[::-1], strict=False)
        )
        if not fits:
            raise ParametrizationError(
                f"Masked: a mask of shape {tuple(self.mask.shape)} does not fit shape {tuple(X.shape)}."
            )
        self.mask = self.mask.to(X.device)
        return self._nearest(X)


# --- equal entries --------------------------------------------------------------------------------------------------


class Toeplitz(Parametrization):
    r"""Keep the diagonals of a matrix constant.

    .. math:: T_{ij} = t_{i-j}

    A convolution of finite signals as a matrix. Two originals: the first column, and the first row without its first
    entry.

    Numerics:
        Linear and exact; off the constraint each diagonal goes to its mean, the nearest point.

    Example:
        >>> Toeplitz()(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([8.0]))
        tensor([[1., 8.],
                [2., 1.],
                [3., 2.]])
    """

    event_dim = 2
    accepts = "any"

    @computed
    def forward(self, column: Tensor, row: Tensor) -> Tensor:
        n, m = column.shape[-1], row.shape[-1] + 1
        return maps.spread(torch.cat([row.flip(-1), column], -1), maps.toeplitz_pattern(n, m, column.device))

    @inverted
    def right_inverse(self, T: Tensor) -> tuple[Tensor, Tensor]:
        n, m = check_not_empty(self, T)
        means = maps.mean_over(T, maps.toeplitz_pattern(n, m, T.device), groups=n + m - 1)
        return means[..., m - 1 :], means[..., : m - 1].flip(-1)

    def residual(self, T: Tensor) -> Tensor:
        return largest(T[..., 1:, 1:] - T[..., :-1, :-1])

    def _from_normal(self, Z: Tensor) -> Tensor:
        return self.forward(Z[..., :, 0], Z[..., 0, 1:])


class Hankel(Parametrization):
    r"""Keep the anti-diagonals of a matrix constant.

    .. math:: H_{ij} = h_{i+j}

    Two originals: the first column, and the last row without its first entry.

    Numerics:
        Linear and exact; off the constraint each anti-diagonal goes to its mean, the nearest point.

    Example:
        >>> Hankel()(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([8.0]))
        tensor([[1., 2.],
                [2., 3.],
                [3., 8.]])
    """

    event_dim = 2
    accepts = "any"

    @computed
    def forward(self, column: Tensor, row: Tensor) -> Tensor:
        n, m = column.shape[-1], row.shape[-1] + 1
        return maps.spread(torch.cat([column, row], -1), maps.hankel_pattern(n, m, column.device))

    @inverted
    def right_inverse(self, H: Tensor) -> tuple[Tensor, Tensor]:
        n, m = check_not_empty(self, H)
        means = maps.mean_over(H, maps.hankel_pattern(n, m, H.device), groups=n + m - 1)
        return means[..., :n], means[..., n:]

    def residual(self, H: Tensor) -> Tensor:
        return largest(H[..., 1:, :-1] - H[..., :-1, 1:])

    def _from_normal(self, Z: Tensor) -> Tensor:
        return self.forward(Z[..., :, 0], Z[..., -1, 1:])


class Circulant(Parametrization):
    r"""Keep a square matrix circulant: each column is the one before it, moved down by one.

    .. math:: C_{ij} = c_{(i-j) \bmod n}

    A circular convolution as a matrix. The original is the first column.

    Numerics:
        Linear and exact; off the constraint each wrapped diagonal goes to its mean, the nearest point.

    Example:
        >>> Circulant()(torch.tensor([1.0, 2.0, 3.0]))
        tensor([[1., 3., 2.],
                [2., 1., 3.],
                [3., 2., 1.]])
    """

    event_dim = 2
    square = True
    accepts = "any"

    @computed
    def forward(self, c: Tensor) -> Tensor:
        return maps.spread(c, maps.circulant_pattern(c.shape[-1], c.device))

    @inverted
    def right_inverse(self, C: Tensor) -> Tensor:
        n = C.shape[-1]
        return maps.mean_over(C, maps.circulant_pattern(n, C.device), groups=n)

    def residual(self, C: Tensor) -> Tensor:
        return largest(C - C.roll((1, 1), (-2, -1)))

    def _from_normal(self, Z: Tensor) -> Tensor:
        # A mean of n numbers, brought back to their deviation.
        result: Tensor = self.project(Z) * Z.shape[-1] ** 0.5
        return result


class BlockCirculant(Parametrization):
    r"""Keep every b x b block of a matrix circulant.

    .. math:: W_{(I,p),(J,q)} = c_{IJ,(p-q) \bmod b}

    A dense layer in 1/b of its numbers. The original has the first column of each block: (n / b, m / b, b).

    Numerics:
        Linear and exact; off the constraint the nearest point, block by block.

    Args:
        block: The size b of the blocks; divides both sides.

    Example:
        >>> BlockCirculant(2)(torch.tensor([[[1.0, 2.0], [5.0, 6.0]]]))
        tensor([[1., 2., 5., 6.],
                [2., 1., 6., 5.]])

    References:
        Ding et al., "CirCNN", arXiv:1708.08917.
    """

    event_dim = 2
    accepts = "any"

    def __init__(self, block: int) -> None:
        super().__init__()
        check_positive(self, block=block)
        self.block = block

    @computed
    def forward(self, c: Tensor) -> Tensor:
        blocks = maps.spread(c, maps.circulant_pattern(self.block, c.device))
        n, m = c.shape[-3] * self.block, c.shape[-2] * self.block
        return blocks.transpose(-3, -2).reshape(*c.shape[:-3], n, m)

    @inverted
    def right_inverse(self, W: Tensor) -> Tensor:
        pattern = maps.circulant_pattern(self.block, W.device)
        return maps.mean_over(self._blocks(W), pattern, groups=self.block)

    def _blocks(self, W: Tensor) -> Tensor:
        n, m = W.shape[-2:]
        if n % self.block or m % self.block:
            raise ParametrizationError(
                f"BlockCirculant({self.block}) needs sides that {self.block} divides, got {tuple(W.shape)}."
            )
        blocks = W.reshape(*W.shape[:-2], n // self.block, self.block, m // self.block, self.block)
        return blocks.transpose(-3, -2)

    def residual(self, W: Tensor) -> Tensor:
        blocks = self._blocks(W)
        return largest(blocks - blocks.roll((1, 1), (-2, -1)))

    def _from_normal(self, Z: Tensor) -> Tensor:
        result: Tensor = self.project(Z) * self.block**0.5
        return result


def _embed(d: Tensor, X: Tensor) -> Tensor:
    """Return a matrix of the shape of ``X`` with the diagonal ``d``."""
    n, m = X.shape[-2:]
    square = torch.diag_embed(d)
    return torch.nn.functional.pad(square, (0, m - square.shape[-1], 0, n - square.shape[-2]))
