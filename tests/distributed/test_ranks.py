"""The pool runs a case on every rank, and reports what fails, dies or hangs with its rank."""

from __future__ import annotations

import os
import re
import time

import pytest
import torch
import torch.distributed as dist

from distributed.ranks import RankError, Ranks


def total(number: int) -> float:
    value = torch.tensor(float(number + dist.get_rank()))
    dist.all_reduce(value)
    return value.item()


def draw() -> float:
    return torch.rand(()).item()


def fail_on_one(rank: int) -> None:
    assert dist.get_rank() != rank, "this rank is wrong"
    dist.barrier()  # the others wait for the one that failed


def die() -> None:
    if dist.get_rank() == 1:
        os._exit(7)


def hang() -> None:
    time.sleep(60)


def test_a_case_runs_on_every_rank(ranks: Ranks) -> None:
    assert ranks.run(total, number=3) == [7.0, 7.0]
    assert len(set(ranks.run(draw))) == 1


@pytest.mark.slow
def test_a_case_runs_on_four_ranks_and_then_on_two(ranks: Ranks) -> None:
    assert ranks.run(total, world=4, number=1) == [10.0] * 4
    assert ranks.run(total, world=2, number=1) == [3.0] * 2


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_failure_is_reported_with_its_rank_and_the_others_do_not_hang(ranks: Ranks, rank: int) -> None:
    with pytest.raises(RankError, match=f"(?s)rank {rank}: .*in fail_on_one\n.*this rank is wrong"):
        ranks.run(fail_on_one, rank=rank)
    assert ranks.run(total, number=0) == [1.0, 1.0]


@pytest.mark.slow
def test_a_death_is_reported_and_the_pool_starts_anew(ranks: Ranks) -> None:
    assert ranks.outcomes(die)[1].failure == "died with exit status 7"
    assert ranks.run(total, number=0) == [1.0, 1.0]


@pytest.mark.slow
def test_a_rank_that_hangs_is_killed_and_its_stack_shown(ranks: Ranks) -> None:
    with pytest.raises(RankError) as caught:
        ranks.run(hang, timeout=1.0)
    assert len(re.findall("did not finish; it is at\n(?s:.*?) in hang", str(caught.value))) == 2
    assert ranks.run(total, number=0) == [1.0, 1.0]
