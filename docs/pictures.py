"""Draw docs/pictures/GROUP.png, what each group does to random numbers: ``python docs/pictures.py [GROUP ...]``.

Needs matplotlib, which the extra `docs` brings.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import matplotlib as mpl
import torch
from torch import Tensor

from torchkiln import families as f
from torchkiln._core.base import Parametrization

mpl.use("Agg")
from matplotlib import pyplot as plt  # after the choice of backend
from matplotlib.axes import Axes  # the same

PICTURES = Path(__file__).resolve().parent / "pictures"
BEFORE, AFTER = "0.6", "C0"


def normal(*shape: int) -> Tensor:
    """Return the same normal numbers each time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


# --- ways to look at a family --------------------------------------------------------------------------------------


def curve(axes: Axes, *chosen: Parametrization) -> None:
    """Draw the value of one number against its original."""
    x = torch.linspace(-4, 4, 200, dtype=torch.float64)
    for family in chosen:
        axes.plot(x, family(x), label=_label(family).replace(", ", ",\n"))
    axes.legend(fontsize=6, frameon=False, loc="upper left")
    axes.set(ylim=(-4, 8))
    axes.set_xlabel("original", fontsize=7)


def cloud(axes: Axes, family: Parametrization) -> None:
    """Draw where normal points of the plane go."""
    x = 1.2 * normal(600, 2)
    axes.scatter(*x.T, s=2, color=BEFORE)
    axes.scatter(*family(x).T, s=2, color=AFTER)
    axes.set(xlim=(-3, 3), ylim=(-3, 3), aspect="equal", title=_label(family))


def triangle(axes: Axes, family: Parametrization) -> None:
    """Draw where normal points go on the simplex of three probabilities."""
    corners = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, 0.75**0.5]], dtype=torch.float64)
    axes.fill(*corners.T, facecolor="none", edgecolor=BEFORE)
    axes.scatter(*(family(1.2 * normal(600, 3)) @ corners).T, s=3, color=AFTER, clip_on=False)
    axes.set(aspect="equal", title=_label(family))
    axes.axis("off")


def heatmap(axes: Axes, family: Parametrization | None, X: Tensor) -> None:
    """Draw the matrix that a random one becomes."""
    value = X if family is None else family.project(X)
    bound = float(value.abs().max())
    axes.imshow(value, cmap="RdBu", vmin=-bound, vmax=bound)
    axes.set(xticks=[], yticks=[], title="a random matrix" if family is None else _label(family))


def singular_values(axes: Axes, family: Parametrization, X: Tensor) -> None:
    """Draw the singular values before and after."""
    places = torch.arange(1, min(X.shape) + 1)
    axes.plot(places, torch.linalg.svdvals(X), "o", color=BEFORE, ms=4, label="before")
    axes.plot(places, torch.linalg.svdvals(family.project(X)), "o", color=AFTER, ms=4, label="after")
    axes.set(ylim=(0, None), xticks=places[::3], title=_label(family))


def eigenvalues(axes: Axes, family: Parametrization, X: Tensor) -> None:
    """Draw the eigenvalues in the complex plane, before and after."""
    axes.axhline(0, color="0.9", zorder=0)
    axes.axvline(0, color="0.9", zorder=0)
    axes.add_patch(plt.Circle((0, 0), 1, fill=False, color="0.9", zorder=0))
    for matrices, color in ((X, BEFORE), (family.project(X), AFTER)):
        values = torch.linalg.eigvals(matrices).flatten()
        axes.plot(values.real, values.imag, ".", color=color, ms=4)
    axes.set(aspect="equal", title=_label(family))


def _label(family: Parametrization) -> str:
    return repr(family).removesuffix("()")


# --- the pictures --------------------------------------------------------------------------------------------------

Draw = Callable[[Axes], None]


def heatmaps(chosen: Iterable[Parametrization], X: Tensor) -> list[Draw]:
    """Return the drawing of a matrix, and one of what each family makes of it."""
    return [lambda axes, one=one: heatmap(axes, one, X) for one in (None, *chosen)]  # type: ignore[misc]


def _each(look: Callable[..., None], chosen: Iterable[Parametrization], *inputs: Tensor) -> list[Draw]:
    return [lambda axes, one=one: look(axes, one, *inputs) for one in chosen]  # type: ignore[misc]


STABLE = [f.HurwitzStable(), f.HurwitzStable(1.0), f.SchurStable(), f.SchurStable(0.5)]
FIGURES: dict[str, list[Draw]] = {
    "elementwise": [
        lambda axes: curve(axes, *(f.Positive(name) for name in ("softplus", "exp", "square"))),
        lambda axes: curve(axes, f.GreaterThan(1.0), f.LessThan(-1.0)),
        lambda axes: curve(axes, f.Interval(-1.0, 2.0), f.Interval(-1.0, 2.0, map="tanh")),
        lambda axes: curve(axes, f.Clamped(-1.0, 2.0)),
    ],
    "simplex": [
        *_each(triangle, [f.Simplex(), f.SparseSimplex()]),
        *_each(cloud, [f.L1Ball(), f.L2Ball(), f.LInfBall()]),
        lambda axes: heatmap(axes, f.DoublyStochastic(), (3 * normal(8, 8)).exp()),
    ],
    "norm": [
        *_each(cloud, [f.WeightNorm(gain=1.0)]),
        *_each(singular_values, [f.SpectralNorm(), f.SpectralNorm(4.0, cap=True)], normal(12, 12)),
    ],
    "scale": [
        *_each(cloud, [f.UnitNorm(), f.MaxNorm(1.0), f.ZeroSum()]),
        *heatmaps([f.Centered(), f.WeightStandardization()], normal(6, 8) + 1.5 * normal(6, 1)),
        lambda axes: singular_values(axes, f.OperatorNormBound(2, 4.0), normal(12, 12)),
    ],
    "symmetric": heatmaps([f.Symmetric(), f.SkewSymmetric(), f.TraceFree()], normal(8, 8)),
    "patterned": heatmaps(
        [
            f.Triangular(),
            f.Triangular("upper", "unit"),
            f.Banded(1, 2),
            f.Toeplitz(),
            f.Hankel(),
            f.Circulant(),
            f.BlockCirculant(4),
        ],
        normal(8, 8),
    ),
    "structured": heatmaps(
        [f.BlockDiagonal(4), f.Kronecker(4, 4), f.Monarch(4), f.Butterfly()], normal(16, 16)
    ),
    "definite": [
        *_each(eigenvalues, [f.PositiveDefinite(), f.Correlation()], normal(6, 6, 6) / 2),
        *_each(eigenvalues, STABLE, normal(6, 6, 6) / 2),
    ],
    "orthogonal": [
        *_each(singular_values, [f.Orthogonal(), f.AlmostOrthogonal(0.3)], normal(12, 12) / 3),
        *_each(eigenvalues, [f.SpecialOrthogonal()], normal(6, 6, 6) / 2),
    ],
    "lowrank": _each(singular_values, [f.LowRank(4), f.FixedRank(4), f.SpecialLinear()], normal(12, 12) / 3),
}


def draw(group: str) -> None:
    """Draw one picture, its parts side by side in one or two rows."""
    parts = FIGURES[group]
    lines = 1 + (len(parts) > 5)
    columns = -(-len(parts) // lines)
    figure, grid = plt.subplots(lines, columns, figsize=(2.4 * columns, 2.4 * lines), squeeze=False)
    for axes, part in zip(grid.flat, parts, strict=False):
        axes.tick_params(labelsize=7)
        with torch.no_grad():
            part(axes)
        axes.title.set_fontsize(7.5)
    for axes in grid.flat[len(parts) :]:
        axes.axis("off")
    figure.tight_layout()
    figure.savefig(PICTURES / f"{group}.png", dpi=80, metadata={"Software": None})
    plt.close(figure)


if __name__ == "__main__":
    for chosen in sys.argv[1:] or FIGURES:
        draw(chosen)
