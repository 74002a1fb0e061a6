"""Rotations of a weight's inputs or outputs: OFT, BOFT, HRA, RoAd.

References: OFT arXiv:2306.07280, BOFT arXiv:2311.06243, HRA arXiv:2405.17484, RoAd arXiv:2409.00119.
"""

from __future__ import annotations

from functools import partial
from math import isqrt, sqrt

import torch
from torch import Tensor

from torchkiln.checkpoint._adapters.edits import Edit, Rewrite
from torchkiln.checkpoint._adapters.target import Target

__all__ = [
    "boft",
    "butterfly",
    "cayley",
    "cayley_series",
    "hra",
    "oft",
    "reflected",
    "road",
    "rotated_blocks",
    "rotated_pairs",
    "skew",
]


# Formulas -------------------------------------------------------------------------------------------------------------


def skew(entries: Tensor) -> Tensor:
    """Return skew-symmetric matrices of the entries above the diagonal, row by row.

    Shape:
        (blocks, n (n - 1) / 2) gives (blocks, n, n).
    """
    side = (1 + isqrt(1 + 8 * entries.shape[-1])) // 2
    Q = entries.new_zeros(entries.shape[0], side, side)
    rows, columns = torch.triu_indices(side, side, 1)
    Q[:, rows, columns] = entries
    return Q - Q.mT


def cayley(Q: Tensor) -> Tensor:
    """Return ``(I - Q) (I + Q)^-1``, orthogonal for skew-symmetric Q."""
    identity = torch.eye(Q.shape[-1], dtype=Q.dtype)
    rotation: Tensor = torch.linalg.solve(identity + Q, identity - Q, left=False)
    return rotation


def cayley_series(Q: Tensor, *, terms: int) -> Tensor:
    """Return the first terms of ``(I + Q)(I - Q)^-1 = I + 2 Q + 2 Q^2 + ...``, from the fourth on the last one halved.

    Three terms are four in PEFT, with which adapters were trained.
    """
    terms = 4 if terms == 3 else terms
    total = torch.eye(Q.shape[-1], dtype=Q.dtype).expand_as(Q).clone()
    power = Q
    for term in range(1, terms):
        total += power if term == terms - 1 > 1 else 2 * power
        power = power @ Q
    return total


def _shrunk(Q: Tensor, *, eps: float) -> Tensor:
    """Return the matrices, those of a norm above ``eps / sqrt(blocks)`` scaled down to it."""
    most = eps / sqrt(Q.shape[0])
    norm = Q.flatten(1).norm(dim=1)[:, None, None]
    return torch.where(norm <= most, Q, Q * (most / norm))


def rotated_blocks(W: Tensor, R: Tensor, *, inverse: bool = False) -> Tensor:
    """Return the matrix with each block of columns multiplied by the transpose of its rotation.

    Args:
        W: The weight; dims after the first count as columns.
        R: One rotation for each block, or one for all.
        inverse: Multiply by the rotation instead.
    """
    blocks = W.reshape(W.shape[0], -1, R.shape[-1]).transpose(0, 1)
    turned = blocks @ (R if inverse else R.mT)
    return turned.transpose(0, 1).reshape(W.shape)


def butterfly(n: int, *, blocks: int, half: int) -> Tensor:
    """Return the order of columns that one factor of a butterfly works in: halves of blocks, even ones before odd.

    Args:
        n: The number of columns.
        blocks: Into how many equal parts they fall.
        half: Half the side of the rotations.
    """
    order = torch.arange(n).view(blocks, -1, half)
    return torch.cat([order[:, 0::2], order[:, 1::2]], dim=1).flatten()


def _boft_weight(W: Tensor, generators: Tensor, scales: Tensor) -> Tensor:
    """Return ``diag(s) W M^T`` where M is the product of the butterfly factors, the first one innermost."""
    factors, count, side, _ = generators.shape
    matrix = W.reshape(W.shape[0], -1)
    for level in range(factors):
        R = cayley((generators[level] - generators[level].mT) / 2)
        order = (
            torch.arange(matrix.shape[1])
            if factors == 1
            else butterfly(matrix.shape[1], blocks=count >> level, half=side // 2)
        )
        turned = torch.empty_like(matrix)
        turned[:, order] = rotated_blocks(matrix[:, order], R)
        matrix = turned
    return (matrix * scales.reshape(-1, 1)).reshape(W.shape)


def reflected(W: Tensor, U: Tensor) -> Tensor:
    """Return ``W H_1 ... H_r`` with the Householder reflections of the columns of U."""
    matrix = W.view(W.shape[0], -1)
    for u in (U / U.norm(dim=0)).unbind(1):
        matrix.addr_(matrix @ u, u, alpha=-2)
    return W


def _reflected_at_once(W: Tensor, U: Tensor) -> Tensor:
    """Return ``W (I - 2 Q Q^T)``, Q an orthonormal basis of the columns of U."""
    Q, _ = torch.linalg.qr(U)
    matrix = W.view(W.shape[0], -1)
    matrix.addmm_(matrix @ Q, Q.mT, alpha=-2)
    return W


def rotated_pairs(y: Tensor, theta: Tensor, alpha: Tensor, *, group: int, variant: str) -> Tensor:
    """Return outputs y of which pairs are turned by theta and stretched by alpha; a pair is half a group apart."""
    size = group // 2
    if variant == "road_4":
        theta, alpha = theta.view(-1, 2, group), alpha.view(-1, 2, group)
        same, other = (alpha[:, 0] * theta[:, 0].cos()).flatten(), (alpha[:, 1] * theta[:, 1].sin()).flatten()
    else:
        if variant == "road_1":
            theta, alpha = (each.view(-1, 1, size).expand(-1, 2, size).reshape(-1) for each in (theta, alpha))
        same, other = alpha * theta.cos(), alpha * theta.sin()
    halves = y.reshape(-1, 2, size, *y.shape[1:])
    swapped = torch.stack((-halves[:, 1], halves[:, 0]), dim=1).reshape(y.shape)
    column = (-1, *[1] * (y.ndim - 1))
    return y * same.view(column) + swapped * other.view(column)


# From shapes to changes -----------------------------------------------------------------------------------------------


def oft(target: Target) -> list[Edit]:
    """Return the change of OFT: blocks of inputs are rotated (of an embedding, blocks of its vectors)."""
    settings = target.settings
    embedding = "oft_embedding_R.weight" in target.parts
    part = "oft_embedding_R.weight" if embedding else "oft_R.weight"
    if settings.says("oft_block_size") is None or settings.says("use_cayley_neumann") is None:
        target.refuse(
            "this is the OFT of older versions of PEFT, with other formulas. Merge it with one of them."
        )
    entries = target.shape(part)[-1]
    side = (1 + isqrt(1 + 8 * entries)) // 2
    whole = target.matrix[1]
    target.check(part, (1 if settings.flag("block_share") else whole // side, side * (side - 1) // 2))
    if whole % side:
        target.refuse(f"{part}: {whole} inputs are not made of blocks of {side}.")
    if settings.flag("fan_in_fan_out"):
        target.refuse("fan_in_fan_out: PEFT does not merge OFT into weights that are stored inputs first.")
    terms = int(settings.number("num_cayley_neumann_terms")) if settings.flag("use_cayley_neumann") else 0
    eps = settings.number("eps") if settings.flag("coft") else None

    def rule(W: Tensor, entries: Tensor) -> Tensor:
        Q = skew(entries)
        Q = Q if eps is None else _shrunk(Q, eps=eps)
        return rotated_blocks(W, cayley_series(Q, terms=terms) if terms else cayley(Q), inverse=embedding)

    return [Rewrite("weight", (part,), rule)]


def boft(target: Target) -> list[Edit]:
    """Return the change of BOFT."""
    rows, columns = target.matrix
    factors, count, side, _ = target.shape("boft_R")
    target.check("boft_R", (factors, columns // side, side, side))
    target.check("boft_s", (rows, 1), (1, rows))
    if count * side != columns:
        target.refuse(f"boft_R: {columns} inputs are not made of blocks of {side}.")
    if factors > 1 and (side % 2 or count % (1 << (factors - 1))):
        target.refuse(f"boft_R: {count} blocks of {side} have no butterfly of {factors} factors.")
    return [Rewrite("weight", ("boft_R", "boft_s"), _boft_weight)]


def hra(target: Target) -> list[Edit]:
    """Return the change of HRA: inputs are reflected."""
    rank = target.shape("hra_u")[-1]
    target.check("hra_u", (target.matrix[1], rank))
    target.check_rank("hra_u", rank=rank, pattern="rank_pattern")
    rule = _reflected_at_once if target.settings.flag("apply_GS") else reflected
    return [Rewrite("weight", ("hra_u",), rule)]


def road(target: Target) -> list[Edit]:
    """Return the changes of RoAd: outputs are turned in pairs, with the bias."""
    variant = target.settings.says("variant")
    group = int(target.settings.number("group_size"))
    shares = {"road_1": (1, 2), "road_2": (1, 1), "road_4": (2, 1)}
    if variant not in shares or group < 2 or group % 2 or target.weight[0] % group:
        target.refuse(f"variant {variant!r} with group_size {group} does not fit {target.weight[0]} outputs.")
    times, divided = shares[variant]
    names = ("road_theta", "road_alpha")
    for name in names:
        target.check(name, (target.weight[0] * times // divided,))
    rule = partial(rotated_pairs, group=group, variant=variant)
    return [Rewrite(tensor, names, rule) for tensor in ("weight", "bias") if tensor in target.base]
