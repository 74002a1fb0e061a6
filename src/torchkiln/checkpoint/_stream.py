"""Reading and computing in one thread while another writes, one tensor apart."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass
from queue import Queue

__all__ = ["Advance", "Job", "pump"]

Advance = Callable[[int, str], None]
"""Called with the bytes of a tensor and its name when it is on its way."""

# Small tensors may wait for their turn in numbers; of large ones only one does.
_MOST_WAITING = 16 << 20


@dataclass(frozen=True)
class Job:
    """One tensor to write.

    Attributes:
        name: What to call it.
        size: Its size in bytes.
        write: Writes it.
        held: How much memory it takes until it is written: none where its bytes are copied from file to file.
    """

    name: str
    size: int
    write: Callable[[], None]
    held: int


def pump(jobs: Generator[Job, None, None], advance: Advance) -> None:
    """Do each job in another thread, in order, while the next one is being made.

    Making a job computes its tensor, so the tensor being written and the one being computed are in memory, no more.

    Args:
        jobs: The jobs, each made when it is asked for.
        advance: Told of each job, in the thread of the caller.

    Raises:
        BaseException: The first error of either side; nothing more is written then.
    """
    writer = _Writer()
    try:
        for job in jobs:
            writer.give(job)
            advance(job.size, job.name)
            del job  # its tensor is the writer's now
        writer.finish()
    finally:
        writer.end()
        jobs.close()  # what making a job has changed for its time ends here, and not when an error is forgotten


class _Writer:
    """A thread that does jobs one after another, and nothing more after an error."""

    def __init__(self) -> None:
        self._given: Queue[Job | None] = Queue()
        self._done: Queue[BaseException | None] = Queue()
        self._waiting: deque[int] = deque()
        self._thread = threading.Thread(target=self._run, name="torchkiln-writer", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        failed = False
        while (job := self._given.get()) is not None:
            error: BaseException | None = None
            try:
                if not failed:
                    job.write()
            except BaseException as raised:  # noqa: BLE001  # it is raised again in the caller's thread
                error, failed = raised, True
            del job
            self._done.put(error)

    def give(self, job: Job) -> None:
        """Queue a job as soon as there is room for what it holds."""
        while self._waiting and (
            not self._done.empty() or (job.held and sum(self._waiting) + job.held > _MOST_WAITING)
        ):
            self._collect()
        self._waiting.append(job.held)
        self._given.put(job)

    def finish(self) -> None:
        """Wait for every job."""
        while self._waiting:
            self._collect()

    def _collect(self) -> None:
        error = self._done.get()
        self._waiting.popleft()
        if error is not None:
            raise error

    def end(self) -> None:
        """End the thread; jobs that have not begun are not done."""
        while not self._given.empty():
            self._given.get()
        self._given.put(None)
        self._thread.join()
