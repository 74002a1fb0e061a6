"""Measure contenders side by side: interleaved blocks, so that the drift of a shared machine meets them all alike."""

from __future__ import annotations

import gc
import statistics
import time
import timeit
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

# The contender that every ratio has on top.
OURS = "torchkiln"
# The least work that any implementation of the case has to do.
FLOOR = "floor"


@dataclass(frozen=True)
class Settings:
    """How long to measure, and how large.

    Attributes:
        quick: Whether to take the small sizes, for a look rather than a record.
        scratch: A folder for files, on a disk, removed after the run.
        blocks: The most blocks for each contender.
        block_seconds: How long one block should take at least.
        case_seconds: When to stop a case that has its least number of blocks already.
    """

    quick: bool
    scratch: Path
    blocks: int
    block_seconds: float
    case_seconds: float


class Sample(NamedTuple):
    """One block: seconds for each call, and peak resident memory where the contender ran in a process of its own."""

    seconds: float
    peak_bytes: int | None = None


class Meter(Protocol):
    """A contender, ready to be measured."""

    def sample(self, settings: Settings, /) -> Sample:
        """Run one block."""


@dataclass
class Loop:
    """A call that can be repeated on the same objects, timed in a loop of calibrated length.

    Attributes:
        statement: What to time. Source text spares the loop a function call, which a plain read would notice.
        names: The names that source text uses.
    """

    statement: str | Callable[[], object]
    names: dict[str, Any] = field(default_factory=dict)
    _calls: int = 0

    def sample(self, settings: Settings) -> Sample:
        timer = timeit.Timer(self.statement, globals=self.names)
        if not self._calls:
            self._calls = _calibrate(timer, settings.block_seconds)
        return Sample(timer.timeit(self._calls) / self._calls)


def _calibrate(timer: timeit.Timer, seconds: float) -> int:
    timer.timeit(1)  # the first call builds what later ones reuse
    calls = 1
    # The least of three: whoever else gets the processor meanwhile would leave blocks of a few calls.
    while (taken := min(timer.repeat(3, calls))) < seconds / 4:
        calls *= 2
    call = max(taken / calls, 1e-12)
    # The first call of a block finds the caches as the other contenders left them. A few more outweigh it, up to where
    # a call is so long that it hardly matters.
    return max(1, round(min(max(seconds, 8 * call), 20 * seconds) / call))


@dataclass
class Fresh:
    """A call that uses its object up: each timed call gets one of its own, made before the clock starts."""

    prepare: Callable[[], Any]
    call: Callable[[Any], object]
    calls: int = 1

    def sample(self, settings: Settings) -> Sample:
        objects = [self.prepare() for _ in range(1 if settings.quick else self.calls)]
        with _no_collection():
            start = time.perf_counter_ns()
            for each in objects:
                self.call(each)
            taken = time.perf_counter_ns() - start
        return Sample(taken / 1e9 / len(objects))


@contextmanager
def _no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@dataclass(frozen=True)
class Case:
    """One row of a table.

    Attributes:
        group: The table.
        name: The row.
        build: Makes the contenders, by name; called only when the case is measured.
        floor: What the floor does, in words.
        least_blocks: The fewest blocks for each contender, however slow.
    """

    group: str
    name: str
    floor: str
    build: Callable[[], Mapping[str, Meter]]
    least_blocks: int = 5

    @property
    def path(self) -> str:
        return f"{self.group}/{self.name}"


@dataclass(frozen=True)
class Result:
    """The blocks of one case, by contender."""

    case: Case
    samples: Mapping[str, Sequence[Sample]]

    def median(self, contender: str) -> float:
        return statistics.median(sample.seconds for sample in self.samples[contender])

    def peak(self, contender: str) -> int | None:
        peaks = [sample.peak_bytes for sample in self.samples[contender] if sample.peak_bytes is not None]
        return max(peaks, default=None)

    def ratio(self, contender: str) -> float:
        """Return ours over theirs: the median over rounds, since the blocks of one round saw the same machine."""
        rounds = zip(self.samples[OURS], self.samples[contender], strict=True)
        return statistics.median(ours.seconds / theirs.seconds for ours, theirs in rounds)


def measure(case: Case, settings: Settings) -> Result:
    """Run the contenders of a case in turn, round after round; one more round first, to warm up and calibrate."""
    meters = case.build()
    for meter in meters.values():
        meter.sample(settings)
    samples: dict[str, list[Sample]] = {name: [] for name in meters}
    start = time.perf_counter()
    for done in range(settings.blocks):
        if done >= case.least_blocks and time.perf_counter() - start > settings.case_seconds:
            break
        for name, meter in meters.items():
            samples[name].append(meter.sample(settings))
    return Result(case, samples)
