"""Matrices made of small factors: blocks, Kronecker products, Monarch and butterfly; and the way back.

The way back from a dense matrix splits it into blocks that have rank 1 where the matrix has the structure, and takes
the best rank-1 approximation of each.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "block_diagonal",
    "butterfly",
    "butterfly_factors",
    "diagonal_blocks",
    "kronecker",
    "kronecker_factors",
    "monarch",
    "monarch_factors",
    "rank_one",
]


def block_diagonal(blocks: Tensor) -> Tensor:
    """Return the matrix with the last three dimensions of ``blocks`` (count, rows, columns) along its diagonal.

    Example:
        >>> block_diagonal(torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]]))
        tensor([[1., 2., 0., 0.],
                [0., 0., 3., 4.]])
    """
    b, n, m = blocks.shape[-3:]
    same = torch.eye(b, dtype=blocks.dtype, device=blocks.device)
    return torch.einsum("...bnm,bc->...bncm", blocks, same).reshape(*blocks.shape[:-3], b * n, b * m)


def diagonal_blocks(X: Tensor, b: int) -> Tensor:
    """Return the ``b`` blocks along the diagonal of ``X``: the inverse of :func:`block_diagonal`."""
    n, m = X.shape[-2] // b, X.shape[-1] // b
    blocks = X.reshape(*X.shape[:-2], b, n, b, m).diagonal(dim1=-4, dim2=-2)
    return blocks.movedim(-1, -3)


def rank_one(X: Tensor) -> tuple[Tensor, Tensor]:
    """Return u and v with ``u v^H`` nearest to ``X`` and of equal lengths, ``v`` conjugated already."""
    U, S, Vh = torch.linalg.svd(X, full_matrices=False)
    left, right = _shared(S[..., :1], X)
    return U[..., 0] * left, Vh[..., 0, :] * right


def _shared(S: Tensor, X: Tensor) -> tuple[Tensor, Tensor]:
    """Share singular values among two factors; of 0, whose product has no gradient at 0 and 0, give one of them 1."""
    root = S.sqrt()
    return torch.where(S > 0, root, 1).to(X.dtype), root.to(X.dtype)


def kronecker(A: Tensor, B: Tensor) -> Tensor:
    r"""Return :math:`\sum_k A_k \otimes B_k`, over the third dimension from the end.

    Example:
        >>> kronecker(torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[3.0], [4.0]]]))
        tensor([[3., 6.],
                [4., 8.]])
    """
    (n, m), (p, q) = A.shape[-2:], B.shape[-2:]
    return torch.einsum("...knm,...kpq->...npmq", A, B).reshape(*A.shape[:-3], n * p, m * q)


def kronecker_factors(X: Tensor, rows: int, columns: int, *, terms: int) -> tuple[Tensor, Tensor]:
    """Return the factors of the nearest sum of ``terms`` products whose first factor is ``rows`` x ``columns``.

    Van Loan and Pitsianis: as a matrix of (entries of A) x (entries of B) the product has rank 1.
    """
    p, q = X.shape[-2] // rows, X.shape[-1] // columns
    batch = X.shape[:-2]
    rearranged = X.reshape(*batch, rows, p, columns, q).transpose(-3, -2)
    U, S, Vh = torch.linalg.svd(rearranged.reshape(*batch, rows * columns, p * q), full_matrices=False)
    left, right = _shared(S[..., :terms], X)
    A = (U[..., :terms] * left[..., None, :]).mT
    B = Vh[..., :terms, :] * right[..., :, None]
    return A.reshape(*batch, terms, rows, columns), B.reshape(*batch, terms, p, q)


def monarch(L: Tensor, R: Tensor) -> Tensor:
    r"""Return :math:`P L P^T R` with block-diagonal L and R and the permutation P that transposes the blocks.

    As a tensor, :math:`M_{ljki} = L_{jlk} R_{kji}` (arXiv:2204.00595): block k of R takes part k of the input to one
    number for each block j of L.

    Shape:
        L: (b, n / b, b); R: (b, b, m / b); the result: (n, m); with equal batch dimensions in front.
    """
    b, rows, columns = L.shape[-3], L.shape[-2], R.shape[-1]
    M = torch.einsum("...jlk,...kji->...ljki", L, R)
    return M.reshape(*L.shape[:-3], rows * b, b * columns)


def monarch_factors(X: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """Return the factors of the Monarch matrix nearest to ``X``: a rank-1 problem for each pair of blocks."""
    rows, columns = X.shape[-2] // b, X.shape[-1] // b
    M = X.reshape(*X.shape[:-2], rows, b, b, columns)
    u, v = rank_one(M.movedim(-4, -2))  # (j, k, l) and (j, k, i)
    return u.transpose(-2, -1), v.transpose(-3, -2)


def butterfly(factors: Tensor) -> Tensor:
    r"""Return :math:`F_1 F_2 \cdots F_L`, each factor mixing entries whose index differs in one binary digit.

    Shape:
        (L, N / 2, 2, 2) to (N, N), with N = 2^L: a 2 x 2 matrix for each factor and each value of the other digits.
    """
    levels, half = factors.shape[-4], factors.shape[-3]
    batch = factors.shape[:-4]
    N = 2 * half
    W = torch.eye(N, dtype=factors.dtype, device=factors.device).expand(*batch, N, N)
    for level in reversed(range(levels)):
        high, low = 2**level, half // 2**level
        F = factors[..., level, :, :, :].reshape(*batch, high, low, 2, 2)
        split = W.reshape(*batch, high, 2, low, N)
        W = torch.einsum("...hlac,...hcln->...haln", F, split).reshape(*batch, N, N)
    return W


def butterfly_factors(X: Tensor) -> Tensor:
    """Return factors of ``X``, exact where it is a butterfly; otherwise the best first factor, then the next.

    For each value of the other digits of the row, and each first digit of the column, a 2 x N/2 piece of ``X`` has
    rank 1: the first factor times a row of one of two butterflies of half the size.
    """
    N, batch = X.shape[-1], X.shape[:-2]
    if N == 1:
        return X.new_empty(*batch, 0, 0, 2, 2)
    half = N // 2
    # (row digit 1, rest of the row, column digit 1, rest of the column) -> one matrix for each (rest of row, column 1)
    pieces = X.reshape(*batch, 2, half, 2, half).movedim(-4, -2)
    # (rest of the row, column digit, row digit) and (rest of the row, column digit, rest)
    u, v = rank_one(pieces)
    first = u.mT.unsqueeze(-4)
    if half == 1:
        # One digit: the piece is a column, and all of it belongs to the only factor.
        return (u * v).mT.unsqueeze(-4)
    rest = butterfly_factors(v.movedim(-2, -3))
    # Both halves' factors, one after the other, as the digits of the row count.
    return torch.cat([first, rest.movedim(-5, -4).flatten(-4, -3)], dim=-4)
