"""Full matrices from few numbers by a pattern: FourierFT, C3A, MiSS, SHiRA.

References: FourierFT arXiv:2405.03003, C3A arXiv:2407.19342, MiSS arXiv:2409.15371, SHiRA arXiv:2406.13175.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from torchkiln.checkpoint._adapters.edits import Add, Edit, Rewrite
from torchkiln.checkpoint._adapters.target import Shape, Target

__all__ = ["c3a", "circulant_blocks", "fourierft", "from_spectrum", "miss", "scattered", "shira", "tiled"]


# Formulas -------------------------------------------------------------------------------------------------------------


def from_spectrum(spectrum: Tensor, *, shape: Shape, seed: int) -> Tensor:
    """Return the real part of the inverse Fourier transform of a sparse spectrum.

    The places of the coefficients are not stored: they begin a random permutation of all entries, from the seed.
    """
    rows, columns = shape
    generator = torch.Generator().manual_seed(seed)
    places = torch.randperm(rows * columns, generator=generator)[: spectrum.shape[0]]
    dense = spectrum.new_zeros(rows * columns)
    dense[places] = spectrum
    delta: Tensor = torch.fft.ifft2(dense.view(rows, columns)).real
    return delta


def circulant_blocks(kernel: Tensor) -> Tensor:
    """Return the matrix of circulant blocks with ``block[i, j] = kernel[(j - i) mod b]``.

    Shape:
        (m, n, b) gives (m b, n b).
    """
    m, n, b = kernel.shape
    steps = torch.arange(b)
    blocks = kernel[:, :, (steps[None, :] - steps[:, None]) % b]
    return blocks.transpose(1, 2).reshape(m * b, n * b)


def tiled(block: Tensor, *, shape: Shape) -> Tensor:
    """Return the transpose of a block of (r, out) repeated along the inputs, the last one cut."""
    rows, columns = shape
    block = block.repeat(1, rows // block.shape[1])
    return block.mT.repeat(1, -(-columns // block.shape[0]))[:, :columns]


def _block_affine(W: Tensor, block: Tensor) -> Tensor:
    """Return ``W + W_ij B_i + B_i`` for the square blocks of W, one B for each row of blocks."""
    rows, columns = W.shape
    r = block.shape[-1]
    blocks = W.view(rows // r, r, columns // r, r).permute(2, 0, 1, 3)
    return W + (blocks @ block + block).permute(1, 2, 0, 3).reshape(rows, columns)


def scattered(values: Tensor, index: Tensor, *, shape: Shape) -> Tensor:
    """Return a matrix of zeros but for some entries."""
    dense = values.new_zeros(shape)
    dense.index_put_((index[0].long(), index[1].long()), values, accumulate=True)
    return dense


# From shapes to changes -----------------------------------------------------------------------------------------------


def fourierft(target: Target) -> list[Edit]:
    """Return the change of FourierFT."""
    if target.settings.flag("fan_in_fan_out"):
        target.refuse(
            "fan_in_fan_out: PEFT does not merge FourierFT into weights that are stored inputs first."
        )
    (count,) = target.shape("fourierft_spectrum")
    rows, columns = target.weight
    if count > rows * columns:
        target.refuse(f"fourierft_spectrum has {count} coefficients, more than the weight has entries.")
    seed = int(target.settings.number("random_loc_seed"))
    rule = partial(from_spectrum, shape=(rows, columns), seed=seed)
    return [Add("weight", ("fourierft_spectrum",), rule, target.settings.number("scaling"))]


def c3a(target: Target) -> list[Edit]:
    """Return the change of C3A."""
    rows, columns = target.weight
    size = target.shape("c3a_kernel")[-1]
    target.check("c3a_kernel", (rows // size, columns // size, size))
    return [Add("weight", ("c3a_kernel",), circulant_blocks, 1 / columns)]


def miss(target: Target) -> list[Edit]:
    """Return the change of MiSS, of which ``init_weights`` names the variant."""
    part, variant = "miss_block", target.settings.says("init_weights")
    rows, columns = target.weight
    rank = target.shape(part)[0]
    if variant == "bat":
        rank = target.shape(part)[-1]
        target.check(part, (rows // rank, rank, rank))
        if rows % rank or columns % rank:
            target.refuse(f"{part}: the weight is not made of blocks of {rank}x{rank}.")
        return [Rewrite("weight", (part,), _block_affine)]
    width = int(target.settings.number("mini_r")) if variant == "mini" else rows
    target.check(part, (rank, width))
    if rows % width:
        target.refuse(f"{part}: {rows} outputs are not made of groups of {width}.")
    target.check_rank(part, rank=rank)
    return [Add("weight", (part,), partial(tiled, shape=(rows, columns)))]


def shira(target: Target) -> list[Edit]:
    """Return the change of SHiRA."""
    (count,) = target.shape("shira_weight")
    target.check("shira_indices", (2, count))
    names = ("shira_weight", "shira_indices")
    rows, columns = target.weight
    return [Add("weight", names, partial(scattered, shape=(rows, columns)))]
