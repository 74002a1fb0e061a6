"""Several processes that write one checkpoint: each does its share, and all of them succeed or fail."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch.distributed as dist

from torchkiln._core.errors import CheckpointError

__all__ = ["ALONE", "Team"]

T = TypeVar("T")


class Team:
    """The processes of a group, each of which makes the same calls in the same order.

    Args:
        group: The group; where it is None, this process is alone.

    Attributes:
        rank: Which of them this process is; the first one is 0.
        size: How many there are.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        self._failed = False  # and every process knows
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)

    def exchange(self, value: T) -> list[T]:
        """Return everybody's value, by rank, once everybody has come here.

        Raises:
            CheckpointError: Another process has failed or ended.
        """
        outcomes = self._gathered((None, value))
        for rank, (failure, _) in enumerate(outcomes):
            if failure is not None:
                self._failed = True
                raise CheckpointError(f"process {rank} of {self.size} failed: {failure}")
        return [value for _, value in outcomes]

    def joined(self, values: list[T]) -> list[T]:
        """Return everybody's values in one list."""
        return [value for part in self.exchange(values) for value in part]

    @contextmanager
    def together(self) -> Iterator[None]:
        """Let an error in the block reach every process: the others raise at their next exchange."""
        try:
            yield
        except Exception as error:
            if not self._failed:
                self._failed = self._group is not None
                lines = str(error).splitlines()
                with suppress(CheckpointError):
                    self._gathered((lines[0] if lines else type(error).__name__, None))
            raise

    def share(self, sizes: Sequence[int]) -> list[int]:
        """Return the indices of the pieces of work that are this process's, of which each has a size.

        Everybody comes to the same result: the largest piece goes to who has least.
        """
        loads = [0] * self.size
        mine = []
        for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
            rank = loads.index(min(loads))
            loads[rank] += max(sizes[index], 1)
            if rank == self.rank:
                mine.append(index)
        return sorted(mine)

    def _gathered(self, outcome: tuple[str | None, Any]) -> list[tuple[str | None, Any]]:
        if self._group is None:
            return [outcome]
        outcomes: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(outcomes, outcome, group=self._group)
        except RuntimeError as error:
            self._failed = True
            raise CheckpointError(
                f"process {self.rank} of {self.size}: another process has ended. Nothing was written."
            ) from error
        return outcomes


ALONE = Team()
