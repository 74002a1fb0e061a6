"""Train an RNN with an orthogonal recurrent weight on digits, pixel by pixel, ours beside torch's.

``python -m benchmarks.pixels``: scikit-learn's 1797 digits of 8x8 pixels, one pixel for each of 64 time steps. Both
networks start from the same numbers and see the same batches. Times are of the processor, on one thread.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks._libraries import LIBRARIES, Library

_MAPS = ("matrix_exp", "cayley", "householder")
_BATCH = 128


class Digits(NamedTuple):
    """Pixels in sequence, (samples, 64, 1), and what they show."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


class PixelRNN(nn.Module):
    """Read a digit pixel by pixel, and say which it is."""

    def __init__(self, library: Library, width: int, orthogonal_map: str) -> None:
        super().__init__()
        self.take_in = nn.Linear(1, width)
        self.recur = nn.Linear(width, width, bias=False)
        nn.init.orthogonal_(self.recur.weight)
        library.parametrizations.orthogonal(self.recur, orthogonal_map=orthogonal_map)
        self.bias = nn.Parameter(torch.zeros(width))  # of modReLU, arXiv:1511.06464
        self.read_out = nn.Linear(width, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        inputs, weight = self.take_in(pixels), self.recur.weight  # evaluated once for all steps
        h = inputs.new_zeros(len(pixels), weight.shape[0])
        for step in range(inputs.shape[1]):
            z = inputs[:, step] + h @ weight.T
            h = z.sign() * F.relu(z.abs() + self.bias)
        logits: Tensor = self.read_out(h)
        return logits


def digits() -> Digits:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x, y = torch.from_numpy(images).float().unsqueeze(-1) / 16, torch.from_numpy(labels)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    return Digits((x[:1437], y[:1437]), (x[1437:], y[1437:]))


class Run:
    """One network, trained epoch by epoch."""

    def __init__(self, library: Library, width: int, orthogonal_map: str, *, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = PixelRNN(library, width, orthogonal_map)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)
        self.batches = torch.Generator().manual_seed(seed)
        self.seconds: list[float] = []

    def epoch(self, data: tuple[Tensor, Tensor]) -> None:
        start = time.process_time()
        for x, y in self._shuffled(data):
            self.optimizer.zero_grad()
            F.cross_entropy(self.model(x), y).backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
        self.seconds.append(time.process_time() - start)

    def _shuffled(self, data: tuple[Tensor, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        x, y = data
        for batch in torch.randperm(len(y), generator=self.batches).split(_BATCH):
            yield x[batch], y[batch]

    @torch.no_grad()
    def accuracy(self, data: tuple[Tensor, Tensor]) -> float:
        x, y = data
        return float((self.model(x).argmax(-1) == y).float().mean())

    @torch.no_grad()
    def gram_error(self) -> float:
        Q: Any = self.model.recur.weight
        Q = Q.double()
        return float((Q.T @ Q - torch.eye(len(Q), dtype=Q.dtype)).abs().max())


def compare(map_name: str, data: Digits, *, width: int, epochs: int, seeds: int) -> str:
    """Train both in turn from each seed, and return a row of the table: accuracies are means over the seeds."""
    runs: dict[str, list[Run]] = {name: [] for name in LIBRARIES}
    for seed in range(seeds):
        for name, library in LIBRARIES.items():
            runs[name].append(Run(library, width, map_name, seed=seed))
        for _ in range(epochs):
            for one in runs.values():
                one[-1].epoch(data.train)
    both = runs["torchkiln"], runs["torch"]
    accuracies = [[100 * run.accuracy(data.test) for run in each] for each in both]
    ours, theirs = (min(min(run.seconds) for run in each) for each in both)
    cells = [
        map_name,
        *(f"{statistics.mean(each):.1f} +- {statistics.pstdev(each):.1f} %" for each in accuracies),
        *(f"{seconds:.2f} s" for seconds in (ours, theirs)),
        f"{ours / theirs:.2f}",
        *(f"{max(run.gram_error() for run in each):.0e}" for each in both),
    ]
    return f"| {' | '.join(cells)} |"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pixels", description=__doc__)
    parser.add_argument("--width", type=int, default=256, help="hidden units (default: 256)")
    parser.add_argument("--epochs", type=int, default=8, help="epochs (default: 8)")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each, from other numbers (default: 1)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    data = digits()
    print(
        "| map | accuracy, torchkiln | torch | an epoch, torchkiln | torch | ratio | error of Q'Q, torchkiln | torch |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for map_name in _MAPS:
        print(
            compare(map_name, data, width=options.width, epochs=options.epochs, seeds=options.seeds),
            flush=True,
        )


if __name__ == "__main__":
    main()
