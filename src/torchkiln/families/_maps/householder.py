r"""Products of Householder reflections in the compact WY form: value and gradient by a few matrix products each.

.. math:: H_1 \cdots H_k = I - V T V^T, \qquad M = T^{-1} = \mathrm{triu}(V^T V, 1) + \mathrm{diag}(V^T V)/2

with the vectors as the columns of V (Schreiber and Van Loan, doi:10.1137/0910005; T by Puglisi, doi:10.1137/0913096).
With D = diag(signs), E the first k unit vectors and U = -D V_1 M^{-T}, where V_1 is the first k rows of V, the value is
Q = V U^T + E D. A cotangent G of a tall Q is taken back to

.. math:: Y = M^{-T} V^T G, \quad Z = Y U, \quad
    \mathrm{tril}(G U - V (\mathrm{triu}(Z) + \mathrm{triu}(Z, 1)^T) - E D Y^T, -1)

Of a square Q only :math:`S = Q^T G - G^T Q` counts, what G is along the orthogonal matrices. Put in the place of G, and
as U = (I - H) D, it makes Z skew, and most of this cancels (with a base B, and G of B Q, it is B Q in the place of Q):

.. math:: P = S U, \qquad \mathrm{tril}(D P + V\, \mathrm{tril}(U^T P, -1), -1)

V and U are lower triangular, M is upper; of each product only one triangle counts. Each is made in blocks, from what is
not zero and counts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchkiln.families._maps.explicit import ExplicitMap, around, around_adjoint
from torchkiln.families._maps.hermitian import adjoint, minus_adjoint
from torchkiln.families._maps.products import add_product_

__all__ = ["HOUSEHOLDER"]

# LAPACK applies the vectors one by one, which is quicker up to this many rows.
_SMALL = 128


def _value(X: Tensor, base: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return Q around the base, and what the gradient needs: U, and M of a tall X or that value of a square one."""
    n, k = X.shape[-2:]
    signs = _signs(X)
    if _is_small(X):
        return around(base, _one_by_one(X, signs)), (X.new_empty(0),)
    V = _reflectors(X)
    U, M = _factors(V, signs)
    Q = _one_by_one(X, signs) if _is_coarse(X, M) else _product(V, signs, U)
    return _around(base, Q), (U, M if n > k else X.new_empty(0))


def _around(base: Tensor | None, Q: Tensor) -> Tensor:
    """Return the base times Q, summed block by block: half of what W lacks to being orthogonal is rounded here."""
    if base is None:
        return Q
    (_, first), *others = _blocks(Q.shape[-2])
    W = base[..., :first] @ Q[..., :first, :]
    for i, j in others:
        add_product_(W, base[..., i:j], Q[..., i:j, :])
    return W


def _is_small(X: Tensor) -> bool:
    return X.shape[-2] <= _SMALL and X.device.type == "cpu"


def _is_coarse(X: Tensor, M: Tensor) -> bool:
    """Return whether LAPACK's columns would be more orthogonal: of many vectors, where one is longer than 1.6."""
    n, k = X.shape[-2:]
    many = n < 2 * k and X.device.type == "cpu"
    return many and bool(M.diagonal(dim1=-2, dim2=-1).max() > 1.6**2 / 2)


def _kept_like(X: Tensor, _base: Tensor | None) -> tuple[Tensor, ...]:
    if _is_small(X):
        return (X.new_empty(0),)
    n, k = X.shape[-2:]
    U = X.new_empty(*X.shape[:-2], k, k)
    return U, torch.empty_like(U) if n > k else X.new_empty(0)


def _one_by_one(X: Tensor, signs: Tensor) -> Tensor:
    L = X.tril(-1)
    # The 1 of each column comes last: small squares added to it one by one would be rounded off.
    tau = (L * L).sum(-2).add_(1).reciprocal_().mul_(2)
    Q: Tensor = torch.linalg.householder_product(L, tau)
    return Q.mul_(signs.unsqueeze(-2))


def _product(V: Tensor, signs: Tensor, U: Tensor) -> Tensor:
    Q, W = torch.zeros_like(V), U.mT
    for i, j in _blocks(V.shape[-1]):
        add_product_(Q[..., i:, i:], V[..., i:, i:j], W[..., i:j, i:])
    Q.diagonal(dim1=-2, dim2=-1).add_(signs)
    return Q


def _pullback(X: Tensor, base: Tensor | None, kept: Sequence[Tensor], G: Tensor) -> Tensor:
    V, signs = _reflectors(X), _signs(X)
    U, M = _factors(V, signs) if _is_small(X) else kept
    if X.shape[-2] == X.shape[-1]:
        return _pullback_square(V, signs, U, kept[-1].mT @ G)
    return _pullback_tall(V, signs, U, M, around_adjoint(base, G))


def _pullback_square(V: Tensor, signs: Tensor, U: Tensor, QG: Tensor) -> Tensor:
    S = minus_adjoint(QG)
    P, L, blocks = torch.empty_like(V), S, _blocks(V.shape[-1])
    for i, j in blocks:
        torch.matmul(S[..., i:, i:], U[..., i:, i:j], out=P[..., i:, i:j])
    for i, j in blocks:
        torch.matmul(U[..., i:, i:j].mT, P[..., i:, :j], out=L[..., i:j, :j])
    L.tril_(-1)
    P.mul_(signs.unsqueeze(-1))
    for i, j in blocks:
        add_product_(P[..., i:, :j], V[..., i:, i:j], L[..., i:j, :j])
    return P.tril_(-1)


def _pullback_tall(V: Tensor, signs: Tensor, U: Tensor, M: Tensor, G: Tensor) -> Tensor:
    n, k = V.shape[-2:]
    blocks = _blocks(k)
    YT, Z = torch.zeros_like(M), torch.zeros_like(M)
    for i, j in blocks:
        F = G[..., i:, i:].mT @ V[..., i:, i:j]
        add_product_(F, YT[..., i:, :i], M[..., :i, i:j], alpha=-1)
        # From the right LAPACK takes half as long.
        YT[..., i:, i:j] = torch.linalg.solve_triangular(M[..., i:j, i:j], F, upper=True, left=False)
    for i, j in blocks:
        torch.matmul(YT[..., i:, :j].mT, U[..., i:, i:j], out=Z[..., :j, i:j])
    Z = Z.triu_() + Z.triu(1).mT
    gradient = torch.empty_like(V)
    for i, j in blocks:
        torch.matmul(G[..., i:, i:], U[..., i:, i:j], out=gradient[..., i:, i:j])
    for i, j in blocks:
        rows = slice(i, j if j < k else n)
        add_product_(gradient[..., rows, :j], V[..., rows, :j], Z[..., :j, :j], alpha=-1)
    gradient[..., :k, :] -= YT.mul_(signs.unsqueeze(-1))
    return gradient.tril_(-1)


def _plain(X: Tensor) -> Tensor:
    n, k = X.shape[-2:]
    E = torch.eye(n, k, dtype=X.dtype, device=X.device)
    V = X.tril(-1) + E
    S = V.mT @ V
    M = S.triu(1) + torch.diag_embed(S.diagonal(dim1=-2, dim2=-1) / 2)
    W = torch.linalg.solve_triangular(M, V[..., :k, :].mT, upper=True)
    Q: Tensor = (E - V @ W) * _signs(X.detach()).unsqueeze(-2)
    return Q


HOUSEHOLDER = ExplicitMap("householder", value=_value, pullback=_pullback, plain=_plain, kept_like=_kept_like)


# --- triangular matrices ------------------------------------------------------------------------------------------


def _signs(X: Tensor) -> Tensor:
    """Return the signs of the diagonal of X with zero as negative: weight decay does not change them."""
    return X.diagonal(dim1=-2, dim2=-1).sign().sub_(0.5).sign_()


def _reflectors(X: Tensor) -> Tensor:
    """Return V."""
    V = X.clone(memory_format=torch.contiguous_format).tril_(-1)
    V.diagonal(dim1=-2, dim2=-1).fill_(1)
    return V


def _factors(V: Tensor, signs: Tensor) -> tuple[Tensor, Tensor]:
    """Return U and M."""
    k = V.shape[-1]
    M, U = _inner_products(V), V[..., :k, :] * -signs.unsqueeze(-1)
    for i, j in reversed(_blocks(k)):
        columns = U[..., i:, i:j]
        if j < k:
            add_product_(U[..., j:, i:j], U[..., j:, j:], M[..., i:j, j:].mT, alpha=-1)
        columns.copy_(torch.linalg.solve_triangular(M[..., i:j, i:j].mT, columns, upper=False, left=False))
    return U, M


def _inner_products(V: Tensor) -> Tensor:
    """Return M; what is below its diagonal is never read.

    Most of what Q lacks to being orthogonal comes of rounding these sums. They are small but for what the ones in V add
    and for the diagonal. So the ones are left out, the diagonal is summed apart, and the rows are summed by blocks.
    """
    n, k = V.shape[-2:]
    ones = V.diagonal(dim1=-2, dim2=-1).zero_()
    M = adjoint(V[..., :k, :])
    for i, j in _blocks(n, least=32, most=8):
        rows = V[..., i:j, :j]
        add_product_(M[..., :j, :j], rows.mT, rows)
    M.diagonal(dim1=-2, dim2=-1).copy_((V * V).sum(-2).add_(1).mul_(0.5))
    ones.fill_(1)
    return M


def _blocks(k: int, least: int = 64, most: int = 4) -> list[tuple[int, int]]:
    """Return from where to where the blocks of k rows or columns go: smaller ones leave out more, at more calls."""
    size = max(least, k // most)
    return [(i, min(i + size, k)) for i in range(0, k, size)]
