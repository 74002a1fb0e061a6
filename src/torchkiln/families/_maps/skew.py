r"""Functions of the skew-Hermitian matrix that a tall matrix stands for, at the cost of the tall matrix.

The lower triangle L of X, n x k, stands for :math:`A = L E^H - E L^H`, n x n, with E the first k unit vectors; wanted
are the first k columns of f(A), :math:`f = \exp` or the Cayley transform. With :math:`X_2 = Q_2 R` the QR factors of
the rows below the first k,

.. math:: A = W \hat A W^H, \qquad W = \begin{pmatrix} I & 0 \\ 0 & Q_2 \end{pmatrix}, \quad
    \hat A = \begin{pmatrix} A_{11} & -R^H \\ R & 0 \end{pmatrix}

so f is evaluated for a skew-Hermitian 2k x 2k matrix, as accurately as for an n x n one, however large X is. The
gradient never differentiates the factors, which have no derivative where X loses rank; f(A) E has one everywhere:

.. math:: \nabla_X = \mathrm{tril}(G_\perp \hat F_{11}^H + W (\hat P - \hat P^H) E)

with :math:`\hat P` the adjoint derivative at :math:`\hat A` of :math:`W^H G E^H`, :math:`\hat F = (f(\hat A) - I)
\hat A^{-1}` and :math:`G_\perp = G - W W^H G`. Both follow from :math:`f(A) = f(0) I + W (f(\hat A) - f(0) I) W^H` and
the same identity for the derivative's resolvents (Higham, Functions of Matrices, doi:10.1137/1.9780898717778, 1.35).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from torchkiln.families._maps.explicit import ExplicitMap, around, around_adjoint, with_value
from torchkiln.families._maps.hermitian import lower, minus_adjoint

__all__ = ["SkewFunction", "explicit_map", "skew"]

Kept = Sequence[Tensor]
Base = Tensor | None


class SkewFunction(NamedTuple):
    """A function f of skew-Hermitian matrices A, of 2 or 3 dimensions, with f(0) = I, around a base B or none.

    Attributes:
        value: Returns B f(A), and what the next two need; an empty tensor in it stands for the value.
        pullback: Returns twice the skew-Hermitian part of the adjoint derivative at A, of a cotangent.
        quotient: Returns the first k rows and columns of (f(A) - I) A^-1.
        plain: Returns f(A) by differentiable operations.
        plain_quotient: Returns (f(M) - I) M^-1 B for any square M, by differentiable operations.
        kept_like: Returns tensors like those that ``value`` keeps.
        small: Up to how many rows of a single A ``plain`` is quicker than ``value`` and ``pullback``.
        precise: Whether ``value`` is more exact, for small A, than what LAPACK computes.
    """

    value: Callable[[Tensor, Base], tuple[Tensor, tuple[Tensor, ...]]]
    pullback: Callable[[Tensor, Base, Kept, Tensor], Tensor]
    quotient: Callable[[Tensor, Kept, int], Tensor]
    plain: Callable[[Tensor], Tensor]
    plain_quotient: Callable[[Tensor, Tensor], Tensor]
    kept_like: Callable[[Tensor, Base], tuple[Tensor, ...]]
    small: int = 0
    precise: bool = False


def skew(X: Tensor) -> Tensor:
    r"""Return the skew-Hermitian :math:`L - L^H`, ``L`` the lower triangle of ``X`` padded with zero columns to n x n.

    Example:
        >>> skew(torch.tensor([[1.0, 9.0], [2.0, 1.0]]))
        tensor([[ 0., -2.],
                [ 2.,  0.]])
    """
    n, k = X.shape[-2:]
    L = X.tril() if n == k else pad(X.tril(), (0, n - k))
    return L - L.mH


def _skew(X: Tensor) -> Tensor:
    """Return :func:`skew`, with no way to differentiate it."""
    n, k = X.shape[-2:]
    L = lower(X)
    return minus_adjoint(L if n == k else pad(L, (0, n - k)))


class _Form(NamedTuple):
    """How the first k columns of f(A) are evaluated, for X of 2 or 3 dimensions."""

    value: Callable[[SkewFunction, Tensor, Base], tuple[Tensor, tuple[Tensor, ...]]]
    pullback: Callable[[SkewFunction, Tensor, Base, Kept, Tensor], Tensor]
    plain: Callable[[SkewFunction, Tensor], Tensor]
    kept_like: Callable[[SkewFunction, Tensor, Base], tuple[Tensor, ...]]


def _form(X: Tensor) -> _Form:
    n, k = X.shape[-2:]
    return _SQUARE if n == k else _THIN if _is_thin(X) else _TALL


def _is_thin(X: Tensor) -> bool:
    return X.shape[-2] > 2 * X.shape[-1]


def explicit_map(name: str, f: SkewFunction) -> ExplicitMap:
    """Return the map from X to the first k columns of f(A)."""

    def value(X: Tensor, base: Base) -> tuple[Tensor, tuple[Tensor, ...]]:
        of = _form(X).value
        if X.ndim <= 3:
            return of(f, X, base)
        batch = X.shape[:-2]
        Y, kept = of(f, X.flatten(0, -3), None if base is None else base.flatten(0, -3))
        split = (tensor.reshape(*batch, *tensor.shape[1:]) if tensor.numel() else tensor for tensor in kept)
        return Y.reshape(X.shape), tuple(split)

    def pullback(X: Tensor, base: Base, kept: Kept, G: Tensor) -> Tensor:
        of = _form(X).pullback
        if X.ndim <= 3:
            return of(f, X, base, kept, G)
        flat = [tensor.flatten(0, X.ndim - 3) for tensor in kept]
        base = None if base is None else base.flatten(0, -3)
        return of(f, X.flatten(0, -3), base, flat, G.flatten(0, -3)).reshape(X.shape)

    return ExplicitMap(
        name,
        value=value,
        pullback=pullback,
        plain=lambda X: _form(X).plain(f, X),
        kept_like=lambda X, base: _form(X).kept_like(f, X, base),
        is_small=lambda X: X.ndim == 2 and X.shape[-2] <= f.small and not _is_thin(X),
    )


# --- n <= 2k: the matrix itself -----------------------------------------------------------------------------------


def _value_square(f: SkewFunction, X: Tensor, base: Base) -> tuple[Tensor, tuple[Tensor, ...]]:
    return f.value(_skew(X), base)


def _pullback_square(f: SkewFunction, X: Tensor, base: Base, kept: Kept, G: Tensor) -> Tensor:
    return f.pullback(_skew(X), base, kept, G).tril_()


def _plain_square(f: SkewFunction, X: Tensor) -> Tensor:
    return f.plain(skew(X))


def _kept_like_square(f: SkewFunction, X: Tensor, base: Base) -> tuple[Tensor, ...]:
    return f.kept_like(X, base)


_SQUARE = _Form(_value_square, _pullback_square, _plain_square, _kept_like_square)


def _value_tall(f: SkewFunction, X: Tensor, base: Base) -> tuple[Tensor, tuple[Tensor, ...]]:
    F, kept = f.value(_skew(X), None)
    return around(base, F[..., : X.shape[-1]]), tuple(with_value(kept, F))


def _pullback_tall(f: SkewFunction, X: Tensor, base: Base, kept: Kept, G: Tensor) -> Tensor:
    n, k = X.shape[-2:]
    P = f.pullback(_skew(X), None, kept, pad(around_adjoint(base, G), (0, n - k)))
    return P[..., :k].tril()


def _plain_tall(f: SkewFunction, X: Tensor) -> Tensor:
    return f.plain(skew(X))[..., : X.shape[-1]]


def _kept_like_tall(f: SkewFunction, X: Tensor, _base: Base) -> tuple[Tensor, ...]:
    A = X.new_empty(*X.shape[:-1], X.shape[-2])
    return tuple(with_value(f.kept_like(A, None), A))


_TALL = _Form(_value_tall, _pullback_tall, _plain_tall, _kept_like_tall)


# --- n > 2k: a matrix of 2k rows ----------------------------------------------------------------------------------


def _value_thin(f: SkewFunction, X: Tensor, base: Base) -> tuple[Tensor, tuple[Tensor, ...]]:
    k = X.shape[-1]
    Q, R = _qr(X[..., k:, :], precise=f.precise)
    A = _block(_skew(X[..., :k, :]), -R.mH, R, torch.zeros_like(R))
    F, kept = f.value(A, None)
    Y = torch.cat([F[..., :k, :k], Q @ F[..., k:, :k]], -2)
    return around(base, Y), (Q, A, *with_value(kept, F))


def _qr(X: Tensor, *, precise: bool) -> tuple[Tensor, Tensor]:
    """Return the QR factors, on the CPU rounded only once where that counts."""
    wide = torch.promote_types(X.dtype, torch.float64) if precise and X.device.type == "cpu" else X.dtype
    Q, R = torch.linalg.qr(X.to(wide))
    return Q.to(X.dtype), R.to(X.dtype)


def _pullback_thin(f: SkewFunction, X: Tensor, base: Base, kept: Kept, G: Tensor) -> Tensor:
    k = X.shape[-1]
    Q, A, *kept = kept
    G = around_adjoint(base, G)
    below = Q.mH @ G[..., k:, :]
    P = f.pullback(A, None, kept, pad(torch.cat([G[..., :k, :], below], -2), (0, k)))
    F = f.quotient(A, kept, k).mH
    rest = G[..., k:, :] @ F + Q @ (P[..., k:, :k] - below @ F)
    return torch.cat([P[..., :k, :k].tril(), rest], -2)


def _plain_thin(f: SkewFunction, X: Tensor) -> Tensor:
    r"""With :math:`A = P R^H`, P = [L, -E], R = [E, L]: :math:`f(A) E = E + P\, q(R^H P) R^H E`, q the quotient."""
    n, k = X.shape[-2:]
    L = X.tril()
    top = L[..., :k, :]
    I = torch.eye(k, dtype=X.dtype, device=X.device).expand_as(top)  # noqa: E741  # the identity's name
    M = _block(top, -I, L.mH @ L, -top.mH)
    first, second = f.plain_quotient(M, torch.cat([I, top.mH], -2)).chunk(2, -2)
    return L @ first + pad(I - second, (0, 0, 0, n - k))


def _kept_like_thin(f: SkewFunction, X: Tensor, _base: Base) -> tuple[Tensor, ...]:
    n, k = X.shape[-2:]
    A = X.new_empty(*X.shape[:-2], 2 * k, 2 * k)
    return X.new_empty(*X.shape[:-2], n - k, k), A, *with_value(f.kept_like(A, None), torch.empty_like(A))


_THIN = _Form(_value_thin, _pullback_thin, _plain_thin, _kept_like_thin)


def _block(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    return torch.cat([torch.cat([a, b], -1), torch.cat([c, d], -1)], -2)
