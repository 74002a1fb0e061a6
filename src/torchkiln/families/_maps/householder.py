r"""Products of Householder reflections in the compact WY form: value and gradient by a few matrix products each.

.. math:: H_1 \cdots H_k = I - V T V^T, \qquad M = T^{-1} = \mathrm{triu}(V^T V, 1) + \mathrm{diag}(V^T V)/2

with the vectors as the columns of V (Schreiber and Van Loan, doi:10.1137/0910005; T by Puglisi, doi:10.1137/0913096).
With D = diag(signs), E the first k unit vectors and U = -D V_1 M^{-T}, where V_1 is the first k rows of V, the value is
Q = V U^T + E D. A cotangent G of a tall Q is taken back to

.. math:: Y = M^{-T} V^T G, \quad Z = Y U, \quad
    \mathrm{tril}(G U - V (\mathrm{triu}(Z) + \mathrm{triu}(Z, 1)^T) - E D Y^T, -1)

Of a square Q only :math:`S = Q^T G - G^T Q` counts, what G is along the orthogonal matrices. Put in the place of G, and
as U = (I - H) D, it makes Z skew, and most of this cancels:

.. math:: P = S U, \qquad \mathrm{tril}(D P + V\, \mathrm{tril}(U^T P, -1), -1)

V and U are lower triangular, M is upper; of each product only one triangle counts. Each is made in blocks, from what is
not zero and counts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchkiln.families._maps.explicit import ExplicitMap
from torchkiln.families._maps.skew import minus_adjoint

__all__ = ["HOUSEHOLDER"]

# LAPACK applies the vectors one by one: quicker up to this many rows, and more exact where one is as long as this.
_SMALL = 64
_LONG = 1.8


def _value(X: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return Q, and U with M (or, for a square Q, with Q); of a small one Q alone."""
    n, k = X.shape[-2:]
    V, signs = _reflectors(X), _signs(X)
    if _is_small(X):
        return _one_by_one(V, signs), (X.new_empty(0),)
    U, M = _factors(V, signs)
    long = X.device.type == "cpu" and bool(M.diagonal(dim1=-2, dim2=-1).max() > _LONG**2 / 2)
    Q = _one_by_one(V, signs) if long else _product(V, signs, U)
    return Q, (U, M if n > k else X.new_empty(0))


def _is_small(X: Tensor) -> bool:
    return X.shape[-2] <= _SMALL and X.device.type == "cpu"


def _kept_like(X: Tensor) -> tuple[Tensor, ...]:
    if _is_small(X):
        return (torch.empty_like(X),)
    k = X.shape[-1]
    U = X.new_empty(*X.shape[:-2], k, k)
    return U, torch.empty_like(U)


def _one_by_one(V: Tensor, signs: Tensor) -> Tensor:
    squares = V * V
    # The 1 of each column comes last: small squares added to it one by one would be rounded off.
    squares.diagonal(dim1=-2, dim2=-1).zero_()
    Q: Tensor = torch.linalg.householder_product(V, 2 / squares.sum(-2).add_(1))
    return Q.mul_(signs.unsqueeze(-2))


def _product(V: Tensor, signs: Tensor, U: Tensor) -> Tensor:
    Q, W = torch.empty_like(V), U.mT
    for i, j in _blocks(V.shape[-1]):
        torch.matmul(V[..., i:j, :j], W[..., :j, i:], out=Q[..., i:j, i:])
        if j < V.shape[-2]:
            torch.matmul(V[..., j:, :j], W[..., :j, i:j], out=Q[..., j:, i:j])
    Q.diagonal(dim1=-2, dim2=-1).add_(signs)
    return Q


def _pullback(X: Tensor, kept: Sequence[Tensor], G: Tensor) -> Tensor:
    V, signs = _reflectors(X), _signs(X)
    U, M = _factors(V, signs) if _is_small(X) else kept
    if X.shape[-2] == X.shape[-1]:
        return _pullback_square(V, signs, U, kept[-1], G)
    return _pullback_tall(V, signs, U, M, G)


def _pullback_square(V: Tensor, signs: Tensor, U: Tensor, Q: Tensor, G: Tensor) -> Tensor:
    S = minus_adjoint(Q.mT @ G)
    P, L, blocks = torch.empty_like(V), torch.empty_like(V), _blocks(V.shape[-1])
    for i, j in blocks:
        torch.matmul(S[..., i:, i:], U[..., i:, i:j], out=P[..., i:, i:j])
    for i, j in blocks:
        torch.matmul(U[..., i:, i:j].mT, P[..., i:, :j], out=L[..., i:j, :j])
    L.tril_(-1)
    P.mul_(signs.unsqueeze(-1))
    for i, j in blocks:
        _add_(P[..., i:j, :j], V[..., i:j, :j], L[..., :j, :j])
    return P.tril_(-1)


def _pullback_tall(V: Tensor, signs: Tensor, U: Tensor, M: Tensor, G: Tensor) -> Tensor:
    n, k = V.shape[-2:]
    blocks = _blocks(k)
    Y, Z = torch.zeros_like(M), torch.zeros_like(M)
    for i, j in blocks:
        F = V[..., i:, i:j].mT @ G[..., i:, i:]
        _add_(F, M[..., :i, i:j].mT, Y[..., :i, i:], -1)
        Y[..., i:j, i:] = torch.linalg.solve_triangular(M[..., i:j, i:j].mT, F, upper=False)
    for i, j in blocks:
        Z[..., :j, i:j] = Y[..., :j, i:] @ U[..., i:, i:j]
    Z = Z.triu_() + Z.triu(1).mT
    gradient = torch.empty_like(V)
    for i, j in blocks:
        torch.matmul(G[..., i:, i:], U[..., i:, i:j], out=gradient[..., i:, i:j])
    for i, j in blocks:
        rows = slice(i, j if j < k else n)
        _add_(gradient[..., rows, :j], V[..., rows, :j], Z[..., :j, :j], -1)
    gradient[..., :k, :] -= (Y * signs.unsqueeze(-2)).mT
    return gradient.tril_(-1)


def _plain(X: Tensor) -> Tensor:
    n, k = X.shape[-2:]
    E = torch.eye(n, k, dtype=X.dtype, device=X.device)
    V = X.tril(-1) + E
    S = V.mT @ V
    M = S.triu(1) + torch.diag_embed(S.diagonal(dim1=-2, dim2=-1) / 2)
    W = torch.linalg.solve_triangular(M, V[..., :k, :].mT, upper=True)
    Q: Tensor = (E - V @ W) * _signs(X).unsqueeze(-2)
    return Q


HOUSEHOLDER = ExplicitMap("householder", value=_value, pullback=_pullback, plain=_plain, kept_like=_kept_like)


# --- triangular matrices ------------------------------------------------------------------------------------------


def _signs(X: Tensor) -> Tensor:
    """Return the signs of the diagonal of X with zero as negative: weight decay does not change them."""
    return X.detach().diagonal(dim1=-2, dim2=-1).sign().sub_(0.5).sign_()


def _reflectors(X: Tensor) -> Tensor:
    """Return V."""
    V = X.clone(memory_format=torch.contiguous_format).tril_(-1)
    V.diagonal(dim1=-2, dim2=-1).fill_(1)
    return V


def _factors(V: Tensor, signs: Tensor) -> tuple[Tensor, Tensor]:
    """Return U and M; of M what is below the blocks on its diagonal is never read."""
    k = V.shape[-1]
    blocks = _blocks(k)
    M = V.new_zeros(*V.shape[:-2], k, k)
    # Most of what Q lacks to being orthogonal would come of rounding these sums.
    wide = V.double() if V.device.type == "cpu" else V
    for i, j in blocks:
        M[..., :j, i:j] = wide[..., i:, :j].mT @ wide[..., i:, i:j]
    M.diagonal(dim1=-2, dim2=-1).mul_(0.5)
    U = V[..., :k, :] * -signs.unsqueeze(-1)
    for i, j in reversed(blocks):
        columns = U[..., i:, i:j]
        if j < k:
            _add_(U[..., j:, i:j], U[..., j:, j:], M[..., i:j, j:].mT, -1)
        columns.copy_(torch.linalg.solve_triangular(M[..., i:j, i:j].mT, columns, upper=False, left=False))
    return U, M


def _blocks(k: int) -> list[tuple[int, int]]:
    """Return from where to where the blocks of k rows or columns go: smaller ones leave out more, at more calls."""
    size = max(64, k // 4)
    return [(i, min(i + size, k)) for i in range(0, k, size)]


def _add_(C: Tensor, A: Tensor, B: Tensor, factor: float = 1) -> None:
    """Add ``factor`` times A B to C."""
    if C.ndim == 2:
        C.addmm_(A, B, alpha=factor)
    else:
        C.add_(A @ B, alpha=factor)
