"""A convolution as the linear operator it is: applied, its adjoint, and its transfer function; pure maps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Convolution", "peak_of"]

_CORRELATE = (F.conv1d, F.conv2d, F.conv3d)
_SPREAD = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


@dataclass(frozen=True)
class Convolution:
    """What a convolution is beside its weight, with a number for each spatial dimension.

    A transposed convolution is the adjoint of the convolution with the same numbers, and has its norm.

    Attributes:
        kernel: The sizes of the kernel.
        stride: As ``torch.nn.functional.conv2d`` has it, and so are the next three.
        dilation: The distances of the taps.
        groups: The number of blocks.
        output_padding: Of a transposed convolution.
        padding: What is added in front and behind.
        mode: What it is filled with: ``"zeros"``, ``"circular"``, ``"reflect"`` or ``"replicate"``.
        transposed: Whether it is the transposed convolution.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    output_padding: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    mode: str
    transposed: bool

    @property
    def reach(self) -> tuple[int, ...]:
        """The distance of the first and the last tap."""
        return tuple(d * (k - 1) for d, k in zip(self.dilation, self.kernel, strict=True))

    def output_size(self, size: Sequence[int]) -> tuple[int, ...]:
        """Return the spatial size of what comes out for a spatial size that goes in."""
        padding = [before + behind for before, behind in self.padding]
        if self.transposed:
            each = zip(size, self.stride, padding, self.reach, self.output_padding, strict=True)
            return tuple((n - 1) * s - p + r + more + 1 for n, s, p, r, more in each)
        each_ = zip(size, self.stride, padding, self.reach, strict=True)
        return tuple((n + p - r - 1) // s + 1 for n, s, p, r in each_)

    def is_circulant(self, size: Sequence[int]) -> bool:
        """Say whether it is one circular convolution of images of this size, and so diagonal by blocks after a FFT."""
        whole = all(n % s == 0 for n, s in zip(size, self.stride, strict=True))
        kept = tuple(n // s for n, s in zip(size, self.stride, strict=True))
        return self.mode == "circular" and not self.transposed and whole and self.output_size(size) == kept

    def input_channels(self, W: Tensor) -> int:
        """Return the number of channels that go in."""
        return W.shape[0] if self.transposed else W.shape[1] * self.groups

    def apply(self, W: Tensor, x: Tensor) -> Tensor:
        """Return the (transposed) convolution of the batch ``x``."""
        return self._spread(W, x, self.output_size(x.shape[2:])) if self.transposed else self._correlate(W, x)

    def adjoint(self, W: Tensor, y: Tensor, size: Sequence[int]) -> Tensor:
        """Return the adjoint of :meth:`apply`, for images of the spatial ``size`` that went in."""
        if not self.transposed:
            return self._spread(W, y, size)
        x = self._correlate(W, y)
        for dim, n in enumerate(size, 2):  # an output padding of a stride or more leaves room for one more
            x = x.narrow(dim, 0, n)
        return x

    def _correlate(self, W: Tensor, x: Tensor) -> Tensor:
        if self.mode == "zeros":
            x = F.pad(x, [side for pair in reversed(self.padding) for side in pair])
        else:
            for dim, index in self._sources(x.shape[2:], x.device):
                x = x.index_select(dim, index)
        call = _CORRELATE[len(self.kernel) - 1]
        return call(x, W, None, self.stride, 0, self.dilation, self.groups)

    def _spread(self, W: Tensor, y: Tensor, size: Sequence[int]) -> Tensor:
        padded = [n + sum(pair) for n, pair in zip(size, self.padding, strict=True)]
        each = zip(padded, y.shape[2:], self.stride, self.reach, strict=True)
        more = [p - ((m - 1) * s + r + 1) for p, m, s, r in each]
        call = _SPREAD[len(self.kernel) - 1]
        x = call(y, W, None, self.stride, 0, more, self.groups, self.dilation)
        if self.mode == "zeros":
            for dim, ((before, _), n) in enumerate(zip(self.padding, size, strict=True), 2):
                x = x.narrow(dim, before, n)
            return x
        for dim, index in self._sources(size, x.device):
            shape = [*x.shape[:dim], size[dim - 2], *x.shape[dim + 1 :]]
            x = x.new_zeros(shape).index_add(dim, index, x)
        return x

    def _sources(self, size: Sequence[int], device: torch.device) -> list[tuple[int, Tensor]]:
        """Return, for each dimension, from where the padded image takes its entries."""
        found = []
        for dim, ((before, behind), n) in enumerate(zip(self.padding, size, strict=True), 2):
            index = torch.arange(-before, n + behind, device=device)
            if self.mode == "circular":
                index = index % n
            elif self.mode == "reflect":
                index = (n - 1) - ((n - 1) - index.abs()).abs()
            else:
                index = index.clamp(0, n - 1)
            found.append((dim, index))
        return found

    def at_any_size(self) -> Convolution:
        """Return one with the same largest norm over all frequencies: without a stride the dilation only permutes."""
        pairs = zip(self.dilation, self.stride, strict=True)
        return replace(self, dilation=tuple(1 if stride == 1 else step for step, stride in pairs))

    def spread_of_padding(self) -> float:
        """Return by how much filling the border may stretch an image of any size: an entry may be copied."""
        if self.mode == "zeros" or (
            self.mode == "circular"
            and all(s == 1 for s in self.stride)
            and all(sum(pair) == r for pair, r in zip(self.padding, self.reach, strict=True))
        ):
            return 1.0  # the norm of a circulant is that of its transfer function on a grid
        copies = [1 + (sum(pair) if self.mode == "replicate" else 2 * any(pair)) for pair in self.padding]
        return math.sqrt(math.prod(copies))

    def bounding_grid(self, tolerance: float) -> tuple[tuple[int, ...], float]:
        r"""Return a grid of frequencies, and by what the norm there may fall short of the norm between its points.

        For unit vectors x and y, :math:`|x^H S(\theta) y|^2` is a real trigonometric polynomial of degree q in each
        frequency. Such a polynomial falls from its maximum no faster than :math:`\cos(q \theta)` (M. Riesz), and the
        next of N points is at most :math:`\pi / N` away: the maximum on the grid is at least :math:`\cos(\pi q / N)`
        of it.

        Args:
            tolerance: How far the product of these factors, for the norm, may exceed 1.
        """
        steps = zip(self.reach, self.kernel, self.stride, strict=True)
        degrees = [k - 1 if s == 1 else r // s for r, k, s in steps]
        share = (1 + tolerance) ** (-2 / max(1, sum(q > 0 for q in degrees)))
        grid = tuple(math.ceil(math.pi * q / math.acos(share)) if q else 1 for q in degrees)
        factor = math.prod([math.cos(math.pi * q / n) ** -0.5 for q, n in zip(degrees, grid, strict=True)])
        return grid, factor


# --- transfer function --------------------------------------------------------------------------------------------


@torch.no_grad()
def peak_of(W: Tensor, of: Convolution, grid: Sequence[int]) -> Tensor:
    r"""Return the gradient, in ``W``, of the largest norm that the transfer function has on a grid of frequencies.

    .. math:: S(\theta) = \sum_k W_k\, e^{-i \langle \theta, k \rangle}

    The norm itself is the sum of ``W`` times this gradient. For a circular convolution these blocks, one for each of
    the frequencies of an image, are the whole operator (Sedghi, Gupta and Long, arXiv:1805.10408). A stride s folds s
    frequencies into one block of s times as many columns; groups are blocks of their own.

    Args:
        W: weight, (rows, columns / groups, *kernel).
        of: the convolution.
        grid: the number of frequencies of the output, for each dimension.
    """
    phases = _phases(W, of, grid)
    S = _transfer(W, phases, of.groups)
    blocks, points = of.groups, [phase.shape[2] for phase in phases]
    top = _squared_norms(S.flatten(0, -3)).argmax()
    U, _, Vh = torch.linalg.svd(S.flatten(0, -3).index_select(0, top[None])[0], full_matrices=False)
    block, point = top % blocks, top // blocks
    v = Vh[0].conj().view(W.shape[1], *[phase.shape[1] for phase in phases])
    for phase, count in zip(reversed(phases), reversed(points), strict=True):
        wave = phase.index_select(2, (point % count)[None])[..., 0]
        v = torch.tensordot(v, wave, dims=([-1], [1])).movedim(-1, 1)
        point = point // count
    gradient = torch.tensordot(U[:, 0].conj(), v, dims=0)
    gradient = gradient if W.is_complex() else gradient.real
    chosen = (torch.arange(blocks, device=W.device) == block).to(gradient.dtype)
    placed: Tensor = torch.tensordot(chosen, gradient, dims=0).flatten(0, 1)
    return placed


def _phases(W: Tensor, of: Convolution, grid: Sequence[int]) -> list[Tensor]:
    """Return, for each dimension, what each tap is multiplied with: (kernel, stride, points)."""
    found = []
    for dim, (taps, step, stride, points) in enumerate(
        zip(of.kernel, of.dilation, of.stride, grid, strict=True), 1
    ):
        # Frequencies of opposite sign have conjugate blocks: half of the last dimension tells all.
        count = points if W.is_complex() or dim < len(grid) else points // 2 + 1
        tap = step * torch.arange(taps, dtype=torch.float64, device=W.device)
        frequency = torch.arange(stride, device=W.device)[:, None] * points + torch.arange(
            count, device=W.device
        )
        turns = tap[:, None, None] * frequency / (stride * points)
        wave = torch.polar(torch.full_like(turns, stride**-0.5), -2 * math.pi * turns)
        found.append(wave.to(torch.promote_types(W.dtype, torch.complex64)))
    return found


def _transfer(W: Tensor, phases: Sequence[Tensor], groups: int) -> Tensor:
    """Return the blocks: (*points, groups, rows, columns times strides)."""
    S = W.to(phases[0].dtype)
    for phase in phases:  # the next dimension of the kernel becomes stride and point, at the end
        S = torch.tensordot(S, phase, dims=([2], [0]))
    S = S.view(groups, -1, *S.shape[1:])
    strides, points = ([3 + 2 * dim + offset for dim in range(len(phases))] for offset in (0, 1))
    blocks: Tensor = S.permute(*points, 0, 1, 2, *strides).flatten(-1 - len(phases))
    return blocks


def _squared_norms(S: Tensor) -> Tensor:
    """Return the squared spectral norms of a batch of matrices."""
    if S.shape[-2] > S.shape[-1]:
        S = S.mT
    if S.shape[-2] == 1:
        return S.abs().square().sum((-2, -1))
    largest: Tensor = torch.linalg.eigvalsh(S @ S.mH)[..., -1]
    return largest
