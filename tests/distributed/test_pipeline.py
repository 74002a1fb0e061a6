"""Pipeline stages: what is done to a stage concerns its process alone, and the others go on."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

import torchkiln
from distributed.ranks import Ranks
from distributed.training import adam, every_built_in
from torchkiln import parametrizations


def stages(norm: str) -> list[nn.Sequential]:
    make = getattr(parametrizations, norm)
    torch.manual_seed(0)
    return [nn.Sequential(make(nn.Linear(6, 6)), nn.Tanh()) for _ in range(2)]


def square(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean()


def bakes_one_stage(norm: str) -> None:
    """Train, bake the second stage on its process, train on; the first stage never hears of it."""
    rank, data = dist.get_rank(), torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    whole, mine = nn.Sequential(*stages(norm)), stages(norm)[rank]
    schedule = ScheduleGPipe(PipelineStage(mine, rank, 2, torch.device("cpu")), 2, loss_fn=square)
    optimizers = adam(whole), adam(mine)
    for is_baked in (False, True):
        if is_baked:
            torchkiln.bake(whole[1], optimizer=optimizers[0])
            if rank == 1:
                torchkiln.bake(mine, optimizer=optimizers[1])
        for _ in range(3):
            for part in data.chunk(2):  # the schedule's microbatches
                (square(whole(part), part) / 2).backward()
            schedule.step(data) if rank == 0 else schedule.step(target=data)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    assert list(mine.state_dict()) == list(whole[rank].state_dict())
    torch.testing.assert_close(dict(mine.state_dict()), dict(whole[rank].state_dict()))


@pytest.mark.slow
@every_built_in
def test_a_stage_is_baked_on_its_process_and_the_pipeline_trains_on(ranks: Ranks, norm: str) -> None:
    ranks.run(bakes_one_stage, norm=norm)
