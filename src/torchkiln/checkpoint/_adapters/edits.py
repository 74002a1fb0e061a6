"""The four ways in which an adapter changes a tensor, and how each is applied and checked.

A rule is a pure function of the adapter's tensors, in whichever dtype they arrive: float32 for the work, float64 for
the check. It does not know where they are stored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "Add",
    "AddProduct",
    "Edit",
    "Product",
    "Replace",
    "Rewrite",
    "add_products",
    "apply",
    "expected",
    "product",
]


@dataclass(frozen=True)
class AddProduct:
    """``W + scale L R``, the tensor as a matrix whose rows run along its first dim.

    Attributes:
        tensor: Which tensor of the module: ``"weight"``.
        parts: The adapter's tensors that the rule is a function of.
        factors: The rule.
        scale: The factor of the product.
    """

    tensor: str
    parts: tuple[str, ...]
    factors: Callable[..., tuple[Tensor, Tensor]]
    scale: float = 1.0


@dataclass(frozen=True)
class Add:
    """``W + scale D``, attributes as in :class:`AddProduct`."""

    tensor: str
    parts: tuple[str, ...]
    delta: Callable[..., Tensor]
    scale: float = 1.0


@dataclass(frozen=True)
class Rewrite:
    """``rule(W, ...)``: a new tensor that is no sum of the old one and something else."""

    tensor: str
    parts: tuple[str, ...]
    rule: Callable[..., Tensor]


@dataclass(frozen=True)
class Replace:
    """The adapter's own tensor: a module that was trained whole."""

    tensor: str
    parts: tuple[str]


Edit = Add | AddProduct | Replace | Rewrite


@torch.no_grad()
def apply(edit: Edit, W: Tensor, parts: Sequence[Tensor], *, weight: float) -> Tensor:
    """Return the changed tensor, in the memory of `W` where that is possible.

    Args:
        edit: The change.
        W: The tensor, contiguous and the caller's own.
        parts: What the rule is a function of, in the dtype of `W`.
        weight: How much of what is added to add.
    """
    if isinstance(edit, AddProduct):
        L, R = edit.factors(*parts)
        W.view(W.shape[0], -1).addmm_(L, R, alpha=edit.scale * weight)
        return W
    if isinstance(edit, Add):
        return W.add_(edit.delta(*parts).reshape(W.shape), alpha=edit.scale * weight)
    if isinstance(edit, Replace):
        return parts[0].reshape(W.shape)
    return edit.rule(W, *parts).reshape(W.shape).contiguous()


# A product to add: its factors, and how much of it.
Product = tuple[Tensor, Tensor, float]


def product(edit: Edit, parts: Sequence[Tensor], *, weight: float) -> Product:
    """Return what an :class:`AddProduct` adds."""
    assert isinstance(edit, AddProduct)
    L, R = edit.factors(*parts)
    return L, R, edit.scale * weight


@torch.no_grad()
def add_products(W: Tensor, products: Sequence[Product], rows: slice) -> Tensor:
    """Add products to some rows of a tensor, and return these.

    Args:
        W: The rows, contiguous and of the factors' dtype.
        products: What is added to the whole tensor.
        rows: Which rows they are.
    """
    matrix = W.view(W.shape[0], -1)
    for L, R, scale in products:
        matrix.addmm_(L[rows], R, alpha=scale)
    return W


@torch.no_grad()
def expected(
    edits: Sequence[tuple[Edit, float]], W: Tensor, parts: Sequence[Sequence[Tensor]]
) -> Callable[[slice], Tensor]:
    """Return what computes rows of the changed tensor in float64.

    Sums of products need no more memory than those rows; anything else is computed whole.

    Args:
        edits: The changes with their weights, in order.
        W: The tensor before them, in any dtype.
        parts: What each rule is a function of, in float64.
    """
    changes = list(zip(edits, parts, strict=True))
    if all(isinstance(edit, AddProduct) for edit, _ in edits):
        products = [product(edit, own, weight=weight) for (edit, weight), own in changes]
        return lambda rows: add_products(W[rows].to(torch.float64, copy=True).contiguous(), products, rows)
    whole = W.to(torch.float64, copy=True).contiguous()
    for (edit, weight), own in changes:
        whole = apply(edit, whole, own, weight=weight)
    return lambda rows: whole[rows].clone()
