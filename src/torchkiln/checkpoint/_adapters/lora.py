"""LoRA and its kin: a product of two thin matrices, for every layer its own.

References: LoRA arXiv:2106.09685, rsLoRA arXiv:2312.03732, DoRA arXiv:2402.09353, AdaLoRA arXiv:2303.10512,
HiRA (Huang et al., ICLR 2025).
"""

from __future__ import annotations

from functools import partial
from math import sqrt

import torch
from torch import Tensor

from torchkiln.checkpoint._adapters.edits import Add, AddProduct, Edit, Rewrite
from torchkiln.checkpoint._adapters.target import Target

__all__ = [
    "adalora",
    "dora",
    "expert_delta",
    "experts",
    "flat_factors",
    "hira",
    "hira_weight",
    "lora",
    "swapped_factors",
]

# Added to the rank that AdaLoRA divides by; PEFT's constant.
_ADALORA_EPS = 1e-5


# Formulas -------------------------------------------------------------------------------------------------------------


def flat_factors(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Return B and A as matrices: for a convolution, A has the kernel and B is 1 x 1."""
    return B.flatten(1), A.flatten(1)


def swapped_factors(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors of ``(B A)^T``, for weights that are stored inputs first."""
    return A.mT, B.mT


def expert_delta(A: Tensor, B: Tensor, *, experts: int, inputs_first: bool) -> Tensor:
    """Return ``B_e A_e`` for each expert e of a stack.

    Shape:
        A: (experts rank, in), its experts one after the other; B: (out, rank experts), its experts interleaved.
        Result: (experts, in, out) where `inputs_first`, else (experts, out, in).
    """
    A = A.view(experts, -1, A.shape[1])
    B = B.view(B.shape[0], -1, experts).permute(2, 0, 1)
    delta = B @ A
    return delta.mT if inputs_first else delta


def dora(W: Tensor, magnitude: Tensor, A: Tensor, B: Tensor, *, scale: float, dim: int, swap: bool) -> Tensor:
    """Return the directions of ``V = W + scale B A`` with lengths m: ``m V / |V|``, norms over all dims but `dim`."""
    L, R = swapped_factors(A, B) if swap else flat_factors(A, B)
    V = W.clone()
    V.view(V.shape[0], -1).addmm_(L, R, alpha=scale)
    over = [d for d in range(V.ndim) if d != dim]
    norm = torch.linalg.vector_norm(V, dim=over, keepdim=True)
    return V.mul_(magnitude.reshape(norm.shape) / norm)


def hira_weight(W: Tensor, A: Tensor, B: Tensor, *, swap: bool) -> Tensor:
    """Return ``W * (1 + B A)``, element by element."""
    L, R = swapped_factors(A, B) if swap else flat_factors(A, B)
    return W + W * (L @ R).reshape(W.shape)


# From shapes to changes -----------------------------------------------------------------------------------------------


def lora(target: Target) -> list[Edit]:
    """Return the changes that LoRA makes to a module: to its weight, and to its bias where it has one."""
    if "lora_embedding_A" in target.parts:
        names = ("lora_embedding_A", "lora_embedding_B")
        swap = True
    else:
        names = ("lora_A.weight", "lora_B.weight")
        swap = _swapped(target, *names)
    _check_factors(target, *names, swap=swap)
    scale = _scale(target, names[0])
    if "lora_magnitude_vector" in target.parts:
        edits: list[Edit] = [_dora_edit(target, names, scale=scale, swap=swap)]
    else:
        edits = [AddProduct("weight", names, swapped_factors if swap else flat_factors, scale)]
    if "lora_B.bias" in target.parts:
        edits.append(_bias(target, scale))
    return edits


def _bias(target: Target, scale: float) -> Edit:
    if "bias" not in target.base:
        target.refuse("lora_bias: the base has no bias here to add to.")
    target.check("lora_B.bias", target.base["bias"].shape)
    return Add("bias", ("lora_B.bias",), lambda b: b, scale)


def _dora_edit(target: Target, names: tuple[str, str], *, scale: float, swap: bool) -> Edit:
    dim = 1 if swap else 0
    size = target.weight[dim]
    ndim = len(target.weight)
    target.check("lora_magnitude_vector", (size,), (1, size, *[1] * (ndim - 2)))
    return Rewrite(
        "weight", ("lora_magnitude_vector", *names), partial(dora, scale=scale, dim=dim, swap=swap)
    )


def _swapped(target: Target, a: str, b: str) -> bool:
    """Tell whether the weight is stored inputs first; shapes decide, and the setting where the weight is square."""
    rows, columns = target.matrix
    inner, outer = target.shape(a)[1:], target.shape(b)[0]
    size = 1
    for length in inner:
        size *= length
    if rows == columns and len(target.weight) == 2:
        return target.settings.flag("fan_in_fan_out")
    return (outer, size) == (columns, rows)


def _check_factors(target: Target, a: str, b: str, *, swap: bool) -> None:
    """Raise unless the factors fit each other, the weight, and the rank in the settings."""
    rank = target.shape(a)[0]
    outputs, *inputs = target.weight
    if swap and len(inputs) == 1:
        target.check(a, (rank, outputs))
        target.check(b, (inputs[0], rank))
    else:
        target.check(a, (rank, *inputs))
        target.check(b, (outputs, rank, *[1] * (len(inputs) - 1)))
    target.check_rank(a, rank=rank, pattern="rank_pattern")


def _scale(target: Target, a: str) -> float:
    alpha = target.settings.number("lora_alpha", module=target.name, pattern="alpha_pattern")
    rank = target.shape(a)[0]
    return alpha / (sqrt(rank) if target.settings.flag("use_rslora") else rank)


def experts(target: Target, tensor: str) -> list[Edit]:
    """Return the change that LoRA makes to a parameter that it targets by name.

    Raises:
        CheckpointError: The shapes do not say which of its dims are inputs.
    """
    a, b = "lora_A.weight", "lora_B.weight"
    shape = target.weight
    (total, inputs), (outputs, wide) = target.shape(a), target.shape(b)
    if len(shape) not in (2, 3):
        target.refuse(f"{tensor}: only matrices and stacks of them can be targeted, got {len(shape)} dims.")
    count = shape[0] if len(shape) == 3 else 1
    if total != wide or total % count or sorted(shape[-2:]) != sorted((inputs, outputs)):
        target.refuse(
            f"{tensor} has shape {'x'.join(map(str, shape))}, which factors of {total}x{inputs} and {outputs}x{wide} "
            "do not fit.\nWhich parameter they belong to is not in the file; merge it with PEFT."
        )
    if inputs == outputs and len(shape) == 3:
        target.refuse(
            f"{tensor} is a stack of square matrices: which of its dims are inputs is not in the file."
        )
    scale = target.settings.number("lora_alpha", module=target.name, pattern="alpha_pattern")
    rank = total // count
    target.check_rank(a, rank=rank, pattern="rank_pattern")
    scale /= sqrt(rank) if target.settings.flag("use_rslora") else rank
    if len(shape) == 2:
        if shape != (outputs, inputs):
            target.refuse(f"{tensor} is stored inputs first, which is not how PEFT targets a matrix.")
        return [AddProduct(tensor, (a, b), flat_factors, scale)]
    return [Add(tensor, (a, b), partial(expert_delta, experts=count, inputs_first=shape[1] == inputs), scale)]


def adalora(target: Target) -> list[Edit]:
    """Return the change of AdaLoRA: ``B diag(E) A``, over the rank that training began with."""
    names = ("lora_A", "lora_B", "lora_E")
    rank = target.shape("lora_A")[0]
    rows, columns = target.matrix
    swap = (rows, columns) != (target.shape("lora_B")[0], target.shape("lora_A")[1])
    swap = target.settings.flag("fan_in_fan_out") if rows == columns else swap
    wide, tall = (rows, columns) if swap else (columns, rows)
    for name, shape in zip(names, ((rank, wide), (tall, rank), (rank, 1)), strict=True):
        target.check(name, shape)
    first = target.settings.number("init_r")
    alpha = target.settings.number("lora_alpha")
    rule = swapped_factors if swap else flat_factors
    scale = (alpha if alpha > 0 else first) / (first + _ADALORA_EPS)
    return [AddProduct("weight", names, lambda A, B, E: rule(A * E, B), scale)]


def hira(target: Target) -> list[Edit]:
    """Return the change of HiRA."""
    embedding = "hira_embedding_A" in target.parts
    names = ("hira_embedding_A", "hira_embedding_B") if embedding else ("hira_A", "hira_B")
    swap = embedding or _swapped(target, *names)
    _check_factors(target, *names, swap=swap)
    return [Rewrite("weight", names, partial(hira_weight, swap=swap))]
