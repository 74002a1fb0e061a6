"""Elementwise, Kronecker and row products: LoHa, LoKr, IA3, and tensors that are replaced whole or by rows.

References: LoHa arXiv:2108.06098, LoKr arXiv:2309.14859 (section 3), IA3 arXiv:2205.05638.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from torchkiln.checkpoint._adapters.edits import Add, Edit, Replace, Rewrite
from torchkiln.checkpoint._adapters.target import Shape, Target

__all__ = ["hadamard", "ia3", "kronecker", "layer_norm", "loha", "lokr", "scaled", "tokens", "with_rows"]


# Formulas -------------------------------------------------------------------------------------------------------------


def hadamard(a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor) -> Tensor:
    """Return ``(a1 b1) * (a2 b2)``, element by element."""
    return (a1 @ b1) * (a2 @ b2)


def _core_product(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return a Tucker product: `core` (r, r, k, l) with its first dims expanded by a (r, out) and b (r, in)."""
    return torch.einsum("ijkl,ip,jq->pqkl", core, a, b)


def _hadamard_of_cores(t1: Tensor, a1: Tensor, b1: Tensor, t2: Tensor, a2: Tensor, b2: Tensor) -> Tensor:
    return _core_product(t1, a1, b1) * _core_product(t2, a2, b2)


def kronecker(w1: Tensor, w2: Tensor) -> Tensor:
    """Return the Kronecker product, over the first two dims where `w2` has the two dims of a kernel behind them.

    With one dim of a kernel PEFT multiplies over the last dims instead. Adapters were trained with that, so it is what
    they mean.
    """
    return torch.kron(w1[..., None, None] if w2.ndim == 4 else w1, w2.contiguous())


def scaled(W: Tensor, factors: Tensor, *, dim: int) -> Tensor:
    """Return the tensor times a factor for each index of a dim."""
    shape = [1] * W.ndim
    shape[dim] = -1
    return W.mul_(factors.reshape(shape))


def with_rows(W: Tensor, rows: Tensor, *, index: tuple[int, ...]) -> Tensor:
    """Return the tensor with some of its rows replaced."""
    W[list(index)] = rows
    return W


# From shapes to changes -----------------------------------------------------------------------------------------------


def _scale(target: Target) -> float:
    alpha = target.settings.number("alpha", module=target.name, pattern="alpha_pattern")
    return alpha / target.settings.number("r", module=target.name, pattern="rank_pattern")


def loha(target: Target) -> list[Edit]:
    """Return the change of LoHa; a convolution has a core beside each pair, or pairs over its flat kernel."""
    one, two = ("hada_w1_a", "hada_w1_b"), ("hada_w2_a", "hada_w2_b")
    rank = target.shape(one[1])[0]
    target.check_rank(one[1], rank=rank, pattern="rank_pattern")
    if "hada_t1" in target.parts:
        for core, pair in (("hada_t1", one), ("hada_t2", two)):
            _check_core(target, core, *pair)
        return [Add("weight", ("hada_t1", *one, "hada_t2", *two), _hadamard_of_cores, _scale(target))]
    rows, columns = target.matrix
    for a, b in (one, two):
        target.check(a, (rows, rank))
        target.check(b, (rank, columns))
    return [Add("weight", (*one, *two), hadamard, _scale(target))]


def _check_core(target: Target, core: str, a: str, b: str) -> None:
    rank = target.shape(core)[0]
    outputs, inputs, *kernel = target.weight
    target.check(core, (rank, rank, *kernel, *[1] * (2 - len(kernel))))
    target.check(a, (rank, outputs))
    target.check(b, (rank, inputs))


def lokr(target: Target) -> list[Edit]:
    """Return the change of LoKr: a Kronecker product whose factors may be products themselves."""
    one = ("lokr_w1",) if "lokr_w1" in target.parts else ("lokr_w1_a", "lokr_w1_b")
    two: tuple[str, ...] = ("lokr_w2",)
    if "lokr_w2" not in target.parts:
        core = ("lokr_t2",) if "lokr_t2" in target.parts else ()
        two = (*core, "lokr_w2_a", "lokr_w2_b")
    shape1, shape2 = _product_shape(target, one), _product_shape(target, two)
    size = [a * b for a, b in zip(shape1, shape2, strict=False)]
    kernel = 1
    for length in shape2[2:]:
        kernel *= length
    if size[0] != target.weight[0] or size[1] * kernel != target.matrix[1]:
        target.refuse(
            f"{one[0]} and {two[0]} make a matrix of {size[0]}x{size[1] * kernel}, and the weight is one of "
            f"{'x'.join(map(str, target.matrix))}. Is this the base that the adapter was trained on?"
        )

    def delta(*parts: Tensor) -> Tensor:
        return kronecker(_factor(*parts[: len(one)]), _factor(*parts[len(one) :]))

    return [Add("weight", (*one, *two), delta, _scale(target))]


def _factor(*parts: Tensor) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    return parts[0] @ parts[1] if len(parts) == 2 else _core_product(*parts)


def _product_shape(target: Target, names: tuple[str, ...]) -> Shape:
    shapes = [target.shape(name) for name in names]
    if len(shapes) == 1:
        return shapes[0]
    if len(shapes) == 3:
        core, a, b = shapes
        fits = len(core) == 4 and (a[0], b[0]) == core[:2]
        shape = (a[1], b[1], *core[2:])
    else:
        (a, b) = shapes
        fits = a[1] == b[0]
        shape = (a[0], b[1])
    if not fits:
        target.refuse(f"{', '.join(names)} do not fit each other.")
    return shape


def ia3(target: Target) -> list[Edit]:
    """Return the changes of IA3: outputs scaled, with the bias; or inputs, in modules named as feedforward."""
    settings, part = target.settings, "ia3_l"
    named = settings.says("feedforward_modules")
    names = [named] if isinstance(named, str) else settings.names("feedforward_modules")
    inputs = any(target.name.endswith(name) or settings.matches(name, target.name) for name in names)
    swap = settings.flag("fan_in_fan_out") and len(target.weight) == 2
    dim = int(inputs) ^ int(swap)
    size = target.weight[dim]
    target.check(part, (size, 1), (1, size, *[1] * (len(target.weight) - 2)))
    edits: list[Edit] = [Rewrite("weight", (part,), partial(scaled, dim=dim))]
    if not inputs and "bias" in target.base:
        edits.append(Rewrite("bias", (part,), partial(scaled, dim=0)))
    return edits


def layer_norm(target: Target) -> list[Edit]:
    """Return the changes of LN tuning: weight and bias of a normalization, trained whole."""
    names = {part.rpartition(".")[2]: part for part in target.parts}
    for tensor, part in names.items():
        if tensor not in target.base:
            target.refuse(f"{part}: the base has no {tensor} here.")
        target.check(part, target.base[tensor].shape)
    return [Replace(tensor, (part,)) for tensor, part in names.items()]


def tokens(target: Target, part: str) -> list[Edit]:
    """Return the change of an embedding of which some rows were trained."""
    index = tuple(_token_indices(target))
    rows, width = target.weight
    target.check(part, (len(index), width))
    if not all(0 <= row < rows for row in index):
        target.refuse(f"the token {max(index)} is not among the {rows} of the base.")
    return [Rewrite("weight", (part,), partial(with_rows, index=index))]


def _token_indices(target: Target) -> list[int]:
    settings = target.settings
    name = "token_indices" if settings.kind == "TRAINABLE_TOKENS" else "trainable_token_indices"
    found = settings.says(name)
    if isinstance(found, dict):
        fitting = [own for pattern, own in found.items() if settings.matches(pattern, target.name)]
        found = fitting[0] if fitting else None
    if not isinstance(found, list) or not all(type(row) is int for row in found):
        target.refuse(f"{name} in {settings.path.name} does not say which tokens were trained.")
    return found
