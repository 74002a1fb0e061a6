"""Products of thin matrices that layers share, or that are scaled between the two factors.

References: VeRA arXiv:2310.11454, DeLoRA arXiv:2503.18225, VB-LoRA arXiv:2405.15179, RandLoRA arXiv:2502.00987.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import sqrt

import torch
from torch import Tensor

from torchkiln._core.errors import CheckpointError
from torchkiln._core.spellings.entries import Entry
from torchkiln.checkpoint._adapters.edits import AddProduct, Edit
from torchkiln.checkpoint._adapters.lora import swapped_factors
from torchkiln.checkpoint._adapters.settings import Settings
from torchkiln.checkpoint._adapters.target import Shape, Target

__all__ = [
    "delora",
    "delora_factors",
    "mixed_vectors",
    "projections",
    "randlora",
    "vblora",
    "vera",
    "vera_factors",
]

# The least length that DeLoRA divides by; PEFT's constant.
_SHORTEST = 1e-4


# Formulas -------------------------------------------------------------------------------------------------------------


def vera_factors(
    lambda_b: Tensor, lambda_d: Tensor, A: Tensor, B: Tensor, *, rows: int, columns: int
) -> tuple[Tensor, Tensor]:
    """Return the factors of ``diag(b) B diag(d) A``, A and B cut to the layer's size."""
    return lambda_b[:, None] * B[:rows], lambda_d[:, None] * A[:, :columns]


def delora_factors(A: Tensor, B: Tensor, bound: Tensor, norms: Tensor, *, rank: int) -> tuple[Tensor, Tensor]:
    """Return the factors of ``B diag(bound / (r |A_i| |B_i|)) A diag(norms)``."""
    lengths = A.norm(dim=1).clamp(min=_SHORTEST) * B.norm(dim=0).clamp(min=_SHORTEST)
    return B * (bound / rank / lengths), A * norms


def mixed_vectors(logits: Tensor, bank: Tensor, *, most: int) -> Tensor:
    """Return the vectors of the bank with the largest logits, weighted by their softmax."""
    chosen, index = logits.topk(most, dim=-1)
    return (chosen.softmax(-1).unsqueeze(-1) * bank[index]).sum(-2)


def _vblora_factors(
    logits_A: Tensor, logits_B: Tensor, bank: Tensor, *, most: int, swap: bool
) -> tuple[Tensor, Tensor]:
    A = mixed_vectors(logits_A, bank, most=most).flatten(1)
    B = mixed_vectors(logits_B, bank, most=most).mT.flatten(0, 1)
    return swapped_factors(A, B) if swap else (B, A)


def _randlora_factors(
    lambda_: Tensor, gamma: Tensor, A: Tensor, B: Tensor, *, rows: int, columns: int
) -> tuple[Tensor, Tensor]:
    """Return the factors of ``sum_j B_j diag(lambda_j) A_j diag(gamma_j)``, trained on the smaller side."""
    bases, small = gamma.shape
    scaled = (A[:, :bases, :small] * lambda_[..., None] * gamma).flatten(0, 1)
    fixed = B[: max(rows, columns), :bases].flatten(1)
    return (fixed, scaled) if columns == small else (scaled.mT, fixed.mT)


# From shapes to changes ---------------------------------------------------------------------------------------------


def vera(target: Target) -> list[Edit]:
    """Return the change of VeRA."""
    rank = int(target.settings.number("r"))
    swap = target.settings.flag("fan_in_fan_out")
    rows, columns = target.weight[::-1] if swap else target.weight
    target.check("vera_lambda_b", (rows,))
    target.check("vera_lambda_d", (rank,))
    for name, dim, least in (("vera_A", 1, columns), ("vera_B", 0, rows)):
        if target.shape(name)[dim] < least or target.shape(name)[1 - dim] < rank:
            target.refuse(f"{name} is too small: expected at least {least} along dim {dim}.")

    def factors(*parts: Tensor) -> tuple[Tensor, Tensor]:
        L, R = vera_factors(*parts, rows=rows, columns=columns)
        return (R.mT, L.mT) if swap else (L, R)

    return [AddProduct("weight", ("vera_lambda_b", "vera_lambda_d", "vera_A", "vera_B"), factors)]


def delora(target: Target) -> list[Edit]:
    """Return the change of DeLoRA."""
    names = ("delora_A", "delora_B", "delora_lambda", "delora_w_norm")
    rows, columns = target.matrix
    rank = target.shape("delora_A")[0]
    for name, shape in zip(names, ((rank, columns), (rows, rank), (1,), (columns,)), strict=True):
        target.check(name, shape)
    target.check_rank("delora_A", rank=rank, pattern="rank_pattern")
    return [AddProduct("weight", names, partial(delora_factors, rank=rank))]


def vblora(target: Target) -> list[Edit]:
    """Return the change of VB-LoRA."""
    names = ("vblora_logits_A", "vblora_logits_B", "vblora_vector_bank")
    rank, _, count = target.shape(names[0])
    length = target.shape(names[2])[-1]
    swap = target.settings.flag("fan_in_fan_out")
    outputs, inputs = target.weight[::-1] if swap else target.weight
    target.check(names[0], (rank, inputs // length, count))
    target.check(names[1], (outputs // length, rank, count))
    target.check(names[2], (count, length))
    target.check_rank(names[0], rank=rank)
    most = int(target.settings.number("topk"))
    return [AddProduct("weight", names, partial(_vblora_factors, most=most, swap=swap))]


def randlora(target: Target) -> list[Edit]:
    """Return the change of RandLoRA."""
    names = ("randlora_lambda", "randlora_gamma", "randlora_A", "randlora_B")
    swap = target.settings.flag("fan_in_fan_out")
    rows, columns = target.weight[::-1] if swap else target.weight
    rank = int(target.settings.number("r"))
    bases = -(-min(rows, columns) // rank)
    target.check("randlora_lambda", (rank, bases))
    target.check("randlora_gamma", (bases, min(rows, columns)))
    scale = target.settings.number("randlora_alpha") / rank

    def factors(*parts: Tensor) -> tuple[Tensor, Tensor]:
        L, R = _randlora_factors(*parts, rows=rows, columns=columns)
        return (R.mT, L.mT) if swap else (L, R)

    return [AddProduct("weight", names, factors, scale)]


def projections(
    settings: Settings, together: Mapping[str, Entry], weights: Sequence[Shape]
) -> dict[str, tuple[Entry, Callable[[], Tensor]]]:
    """Return the shared matrices of VeRA where the folder does not hold them: they follow from its random seed.

    Args:
        settings: The adapter's.
        together: The shared tensors that the folder holds.
        weights: The shapes of all weights that the adapter changes; the largest sizes among them count.
    """
    if settings.kind == "RANDLORA" and "randlora_A" not in together:
        raise CheckpointError(
            f"{settings.path.parent}: its random bases were not saved (save_projection is false). Merge it with PEFT."
        )
    if settings.kind != "VERA" or "vera_A" in together or not weights:
        return {}
    shapes = [shape[::-1] for shape in weights] if settings.flag("fan_in_fan_out") else list(weights)
    rank = int(settings.number("r"))
    seed = int(settings.number("projection_prng_key"))
    a = Entry((rank, max(shape[1] for shape in shapes)), torch.float32)
    b = Entry((max(shape[0] for shape in shapes), rank), torch.float32)
    draw = partial(_drawn, a.shape, b.shape, seed)
    return {"vera_A": (a, lambda: draw()[0]), "vera_B": (b, lambda: draw()[1])}


def _drawn(a: Shape, b: Shape, seed: int) -> tuple[Tensor, Tensor]:
    """Return two matrices, uniform with the variance of Kaiming's initialization, one drawn after the other."""
    generator = torch.Generator().manual_seed(seed)
    first, second = (
        torch.empty(shape).uniform_(-sqrt(6 / shape[1]), sqrt(6 / shape[1]), generator=generator)
        for shape in (a, b)
    )
    return first, second
