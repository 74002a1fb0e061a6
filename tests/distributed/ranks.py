"""A pool of processes that runs one function on every rank, started once and used for many cases.

::

    def case(impl: Impl) -> list[float]:             # at the top level of a module; asserts, and may return
        model = DistributedDataParallel(impl.N.weight_norm(nn.Linear(3, 4)))
        ...

    def test_it(ranks: Ranks, impl: Impl) -> None:
        first, second = ranks.run(case, impl=impl)       # the results by rank; world=4 for four

Each case gets a process group of its own, seed 0 on each rank, and a bounded time. What a rank raises fails the test
with that rank's traceback; a rank that hangs is killed, and its stack shown.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch.distributed as dist

from . import worker

# How long the other ranks may go on after one has failed, before they are taken to wait for it.
GRACE = 5.0
PRELOADED = [worker.__name__, "pytest", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor"]


class RankError(AssertionError):
    """A case failed on some rank."""


@dataclass(frozen=True)
class Outcome:
    """What became of a case on one rank: its value, or the text of its failure."""

    rank: int
    value: Any = None
    failure: str | None = None


class _Rank:
    """One process of the pool and the connection to it."""

    def __init__(self, rank: int, port: int, folder: Path) -> None:
        self.rank = rank
        self.dump = folder / f"stack-of-rank-{rank}-{time.monotonic_ns()}"
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)  # torch is imported once, and the ranks fork from that
        ours, theirs = context.Pipe()
        self.connection: Connection = ours
        arguments = (theirs, rank, port, self.dump)
        self.process: ForkServerProcess = context.Process(target=worker.serve, args=arguments, daemon=True)
        self.process.start()
        theirs.close()

    def stack(self) -> str:
        """Return where the process is now."""
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGUSR1)
        time.sleep(0.5)
        return self.dump.read_text()

    def end(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.join()


class Ranks:
    """The pool; the fixture ``ranks`` of ``tests/conftest.py`` holds the one of the session.

    Args:
        folder: Where the processes may write.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pool: list[_Rank] = []
        self.cases = 0
        self.store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)

    def run(
        self, case: Callable[..., Any], *, world: int = 2, timeout: float = 60.0, **arguments: Any
    ) -> list[Any]:
        """Run ``case(**arguments)`` on ``world`` ranks and return its values by rank.

        Raises:
            RankError: It failed on some rank, or took longer than ``timeout`` seconds.
        """
        outcomes = self.outcomes(case, world=world, timeout=timeout, **arguments)
        failures = [f"rank {outcome.rank}: {outcome.failure}" for outcome in outcomes if outcome.failure]
        if failures:
            raise RankError("\n".join(failures))
        return [outcome.value for outcome in outcomes]

    def outcomes(
        self, case: Callable[..., Any], *, world: int = 2, timeout: float = 60.0, **arguments: Any
    ) -> list[Outcome]:
        """Run a case of which some ranks may fail or die, and return what became of each."""
        self.cases += 1
        message = pickle.dumps((self.cases, world, pickle.dumps((case, arguments))))
        while len(self.pool) < world:
            self.pool.append(_Rank(len(self.pool), self.store.port, self.folder))
        members = self.pool[:world]
        for member in members:
            member.connection.send_bytes(message)
        outcomes = self._collect(members, timeout)
        late = [member for member in members if member.rank not in outcomes]
        for member in late:
            outcomes[member.rank] = Outcome(
                member.rank, failure=f"did not finish; it is at\n{member.stack()}"
            )
        if late or not all(member.process.is_alive() for member in members):
            self.close()
        return [outcomes[member.rank] for member in members]

    def _collect(self, members: list[_Rank], timeout: float) -> dict[int, Outcome]:
        """Take the outcomes as they come, until all are there or the time is over."""
        deadline = time.monotonic() + timeout
        outcomes: dict[int, Outcome] = {}
        while waiting := {m.connection: m for m in members if m.rank not in outcomes}:
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                assert isinstance(connection, Connection)
                outcome = self._received(waiting[connection])
                outcomes[outcome.rank] = outcome
                if outcome.failure:
                    deadline = min(deadline, time.monotonic() + GRACE)
        return outcomes

    def _received(self, member: _Rank) -> Outcome:
        try:
            number, value, failure = pickle.loads(member.connection.recv_bytes())
        except (EOFError, ConnectionResetError):
            member.process.join(GRACE)
            return Outcome(member.rank, failure=f"died with exit status {member.process.exitcode}")
        assert number == self.cases
        return Outcome(member.rank, value, failure)

    def close(self) -> None:
        """End the processes; the next case starts new ones."""
        for member in self.pool:
            member.end()
        self.pool = []
