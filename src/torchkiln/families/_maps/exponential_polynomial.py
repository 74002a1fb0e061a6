r"""The polynomial that is the exponential of a skew-Hermitian matrix of small norm: by products, and in reverse.

.. math:: e^A = f F H + z_2 M + z_1 B + (1 + z_0) I, \qquad B = A^2, \quad M = B^2 + a B

F and H are sums of powers of A, with the coefficients of :mod:`.exponential_series`. What ends in _ or takes ``out``
is computed in the place of what is no longer needed: fewer buffers stay in the processor's cache.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torchkiln.families._maps.exponential_series import Series
from torchkiln.families._maps.hermitian import packed, plus_adjoint, square
from torchkiln.families._maps.products import add_product, add_product_, plus_identity_

__all__ = [
    "Parts",
    "evaluated",
    "exponential",
    "minus_one",
    "through_products",
    "with_factors",
]


class Parts(NamedTuple):
    """What the exponential consists of: A, its powers, and F and H, of whose product it is a sum."""

    series: Series
    A: Tensor
    B: Tensor
    M: Tensor
    F: Tensor
    H: Tensor


def evaluated(series: Series, A: Tensor, B: Tensor, B2: Tensor) -> tuple[Parts, Tensor]:
    """Return the parts by A and its powers, and what is kept of them; ``B2`` is used up."""
    _, x1, x2 = series.first
    if series.squares == 2:
        return with_factors(series, A, B, B2, torch.add(B2, B, alpha=x1)), packed(B2, B)
    M = B2.add_(B, alpha=series.a)
    hermitian = square(M).add_(M, alpha=x2).add_(B, alpha=x1)
    halves = packed(hermitian, M)
    return with_factors(series, A, B, M, hermitian), halves


def with_factors(series: Series, A: Tensor, B: Tensor, M: Tensor, hermitian: Tensor) -> Parts:
    """Return the parts by the Hermitian part of F, which is used up."""
    y0, y, y1 = series.second
    H = plus_identity_(torch.add(M, A, alpha=y), y0)
    if y1:
        H.add_(B, alpha=y1)
    return Parts(series, A, B, M, hermitian.add_(A, alpha=series.first[0]), H)


def exponential(parts: Parts, *, out: Tensor | None = None) -> Tensor:
    """Return :math:`e^A`."""
    return plus_identity_(_product_and_rest(parts, out), 1 + parts.series.rest[0])


def minus_one(parts: Parts, *, out: Tensor | None = None) -> Tensor:
    """Return :math:`e^A - I`."""
    return plus_identity_(_product_and_rest(parts, out), parts.series.rest[0])


def _product_and_rest(parts: Parts, out: Tensor | None) -> Tensor:
    series, _, B, M, F, H = parts
    _, z1, z2 = series.rest
    return add_product_(torch.add(B, M, alpha=z2 / z1, out=out), F, H, beta=z1, alpha=series.factor)


def through_products(parts: Parts, G: Tensor) -> Tensor:
    """Return a matrix whose skew-Hermitian part is that of the adjoint derivative at A, of G; F and H are used up.

    By the products in reverse: a square of B or M counts only by the Hermitian part of its cotangent, one of A only by
    the skew-Hermitian part.
    """
    series, A, B, M, F, H = parts
    (x, x1, x2), (_, y, y1), (_, z1, z2) = series.first, series.second, series.rest
    of_F = add_product(H.mH, G, H.mH, beta=0, alpha=series.factor)
    of_H = add_product(G, F.mH, G, beta=0, alpha=series.factor, out=H)
    total = torch.add(of_H, of_F, alpha=x2, out=F).add_(G, alpha=z2)
    if series.squares == 3:
        add_product_(total, M, plus_adjoint(of_F))
    add_product_(total, B, plus_adjoint(total), beta=series.a)
    total.add_(of_F, alpha=x1).add_(G, alpha=z1)
    if y1:
        total.add_(of_H, alpha=y1)
    return add_product_(of_F, A, plus_adjoint(total), beta=x, alpha=-1).add_(of_H, alpha=y)
