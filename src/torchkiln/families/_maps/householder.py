r"""Products of Householder reflections: LAPACK's value, and a gradient of a few matrix products by the compact WY form.

.. math:: H_1 \cdots H_k = I - V T V^T, \qquad M = T^{-1} = \mathrm{triu}(V^T V, 1) + \mathrm{diag}(V^T V)/2

with the vectors as the columns of V (Schreiber and Van Loan, doi:10.1137/0910005; T by Puglisi, doi:10.1137/0913096).
With D = diag(signs) and W = -M^{-1} V_1^T D, where V_1 is the first k rows of V, the value is Q = V W + E D. From a
cotangent G come

.. math:: Y = M^{-T} V^T G, \quad Z = Y W^T, \quad
    \mathrm{tril}(G W^T - V (\mathrm{triu}(Z) + \mathrm{triu}(Z, 1)^T) - E D Y^T, -1)

M and W are upper triangular and V is lower; of V^T V, V^T G, Y and Z only the upper triangle counts, and of the
gradient the lower one. Each is made in blocks, from what is not zero and counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from torchkiln.families._maps.explicit import ExplicitMap

__all__ = ["HOUSEHOLDER"]

# Rows or columns of a triangular product that are computed at a time: fewer leave out more, and cost more calls.
_BLOCK = 64


def _signs(X: Tensor) -> Tensor:
    """Return the signs of the diagonal of X with zero as negative: weight decay does not change them."""
    return X.detach().diagonal(dim1=-2, dim2=-1).sign().sub_(0.5).sign_()


def _value(X: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    if X.device.type != "cpu":
        return _plain(X), ()
    V = X.tril(-1)
    tau = (V * V).sum(-2).add_(1).reciprocal_().mul_(2)
    Q: Tensor = torch.linalg.householder_product(V, tau)
    return Q.mul_(_signs(X).unsqueeze(-2)), ()


def _plain(X: Tensor) -> Tensor:
    n, k = X.shape[-2:]
    E = torch.eye(n, k, dtype=X.dtype, device=X.device)
    V = X.tril(-1) + E
    S = V.mT @ V
    M = S.triu(1) + torch.diag_embed(S.diagonal(dim1=-2, dim2=-1) / 2)
    W = torch.linalg.solve_triangular(M, V[..., :k, :].mT, upper=True)
    Q: Tensor = (E - V @ W) * _signs(X).unsqueeze(-2)
    return Q


def _pullback(X: Tensor, _kept: Sequence[Tensor], G: Tensor) -> Tensor:
    n, k = X.shape[-2:]
    V, signs = X.tril(-1), _signs(X)
    V.diagonal(dim1=-2, dim2=-1).fill_(1)
    U = (V[..., :k, :] * -signs.unsqueeze(-1)).mT
    M = _upper(V, lambda i, j, _: V[..., i:, i:j].mT @ V[..., i:, i:])
    M.diagonal(dim1=-2, dim2=-1).mul_(0.5)
    T = _inverses_on_diagonal(M)
    F = _upper(V, lambda i, j, _: V[..., i:, i:j].mT @ G[..., i:, i:])
    Y = _upper(V, lambda i, j, Y: T[i].mT @ (F[..., i:j, i:] - M[..., :i, i:j].mT @ Y[..., :i, i:]))
    W = _upper(V, lambda i, j, W: T[i] @ (U[..., i:j, i:] - M[..., i:j, j:] @ W[..., j:, i:]), upwards=True)
    Z = _upper(V, lambda i, j, _: Y[..., i:j, i:] @ W[..., i:, i:].mT)
    Z = Z.triu() + Z.triu(1).mT
    gradient = torch.empty_like(V)
    for i, j in _blocks(k):
        gradient[..., i:, i:j] = G[..., i:, i:] @ W[..., i:j, i:].mT
    for i, j in _blocks(k):
        rows = slice(i, j if j < k else n)
        gradient[..., rows, :j] -= V[..., rows, :j] @ Z[..., :j, :j]
    gradient[..., :k, :] -= (Y * signs.unsqueeze(-2)).mT
    return gradient.tril_(-1)


HOUSEHOLDER = ExplicitMap("householder", value=_value, pullback=_pullback, plain=_plain)


# --- triangular matrices ------------------------------------------------------------------------------------------


def _blocks(k: int) -> list[tuple[int, int]]:
    return [(i, min(i + _BLOCK, k)) for i in range(0, k, _BLOCK)]


def _upper(V: Tensor, rows: Callable[[int, int, Tensor], Tensor], *, upwards: bool = False) -> Tensor:
    """Return an upper triangular k x k matrix, its rows from i to j by ``rows(i, j, what is there so far)``.

    These start in column i.
    """
    k = V.shape[-1]
    result = V.new_zeros(*V.shape[:-2], k, k)
    for i, j in reversed(_blocks(k)) if upwards else _blocks(k):
        result[..., i:j, i:] = rows(i, j, result)
    return result


def _inverses_on_diagonal(M: Tensor) -> dict[int, Tensor]:
    def inverse(B: Tensor) -> Tensor:
        identity = torch.eye(B.shape[-1], dtype=B.dtype, device=B.device)
        result: Tensor = torch.linalg.solve_triangular(B, identity, upper=True)
        return result

    return {i: inverse(M[..., i:j, i:j]) for i, j in _blocks(M.shape[-1])}
