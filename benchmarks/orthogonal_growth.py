"""Plot how an orthogonal weight and its gradient grow with the matrix: ``python -m benchmarks.orthogonal_growth``."""

from __future__ import annotations

import argparse
import time
import timeit
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks._libraries import LIBRARIES, Library
from benchmarks._timing import OURS
from benchmarks.orthogonal import forward_backward, moved

_MAPS = ("matrix_exp", "cayley", "householder")
_COLORS = {"matrix_exp": "tab:blue", "cayley": "tab:orange", "householder": "tab:green"}
# What torch is not asked for, in seconds: the next n, eight times as long, if that is longer.
_LONGEST = 4.0

_PANELS = {
    "square, n x n": [(n, n) for n in (16, 32, 64, 128, 256, 512)],
    "tall, n x 32, no base": [(n, 32) for n in (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)],
    "tall, 1024 x k, no base": [(1024, k) for k in (1, 8, 64, 256)],
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.orthogonal_growth", description=__doc__)
    target = Path(__file__).with_name("orthogonal_growth.png")
    parser.add_argument("-o", "--output", type=Path, default=target, help=f"default: {target.name} beside it")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found = {title: _measure(shapes) for title, shapes in _PANELS.items()}
    _plot(found, options.output)


def _measure(shapes: Sequence[tuple[int, int]]) -> dict[tuple[str, str], list[tuple[int, float]]]:
    """Return milliseconds by library and map, for as many of ``shapes`` as do not take too long."""
    found: dict[tuple[str, str], list[tuple[int, float]]] = {}
    along = 0 if len({n for n, _ in shapes}) > 1 else 1
    for name, library in LIBRARIES.items():
        for map_name in _MAPS:
            points = found[name, map_name] = []
            for shape in shapes:
                seconds = _seconds(library, map_name, shape)
                points.append((shape[along], 1e3 * seconds))
                print(f"{name} {map_name} {shape}: {1e3 * seconds:.3g} ms", flush=True)
                if along == 0 and 8 * seconds > _LONGEST and name != OURS:
                    break
    return found


def _seconds(library: Library, map_name: str, shape: tuple[int, int]) -> float:
    """Return processor time for one call: the least of as many as take a third of a second."""
    n, k = shape
    options = {"orthogonal_map": map_name, "use_trivialization": n == k}
    layer = moved(library.parametrizations.orthogonal(torch.nn.Linear(k, n, bias=False), **options))
    loop = forward_backward(layer)
    call = timeit.Timer(loop.statement, timer=time.process_time, globals=loop.names)
    first = call.timeit(1)  # builds what later calls reuse; of a slow one the only call
    times = [first] if first > 1 else [call.timeit(1)]
    while sum(times) < 0.3:
        calls = max(1, round(0.02 / times[-1]))
        times.append(call.timeit(calls) / calls)
    return min(times)


def _plot(found: dict[str, dict[tuple[str, str], list[tuple[int, float]]]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import NullFormatter

    figure, panels = plt.subplots(1, len(found), figsize=(13, 4.2), layout="constrained")
    for axes, (title, lines) in zip(panels, found.items(), strict=True):
        for (name, map_name), points in lines.items():
            style: Any = {"marker": "o", "markersize": 3, "color": _COLORS[map_name]}
            style["linestyle"] = "-" if name == OURS else "--"
            axes.loglog(*zip(*points, strict=True), label=f"{map_name}, {name}", **style)
        axes.set(title=title, xlabel="k" if "x k" in title else "n")
        sizes = sorted({size for points in lines.values() for size, _ in points})
        every = 1 + len(sizes) // 7
        axes.set_xticks(sizes[::every], map(str, sizes[::every]))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(which="major", alpha=0.3)
    panels[0].set_ylabel("forward and backward, ms")
    panels[0].legend(fontsize="small")
    figure.savefig(path, dpi=80)
    print(f"written: {path}")


if __name__ == "__main__":
    main()
