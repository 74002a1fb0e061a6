"""Ranks that disagree on a change get the same error, each of them, and nothing is changed."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import torchkiln
from distributed.ranks import Ranks
from parametrize.oracle import anatomy
from torchkiln import ParametrizationError, parametrizations
from torchkiln.distributed import _agreement

engines = pytest.mark.parametrize("engine", ["ddp", "fsdp"])


def wrapped(engine: str, *layers: nn.Module) -> nn.Sequential:
    model = nn.Sequential(*layers)
    model.wrapper = [DistributedDataParallel(model)] if engine == "ddp" else [fully_shard(model)]
    return model


def registers_another_norm(engine: str) -> str:
    model = wrapped(engine, nn.Linear(4, 4))
    before = anatomy(model[0]) if engine == "ddp" else None
    norms = [parametrizations.weight_norm, parametrizations.spectral_norm]
    with pytest.raises(ParametrizationError, match="the ranks disagree") as caught:
        norms[dist.get_rank()](model[0])
    assert before is None or anatomy(model[0]) == before
    assert type(model[0]) is nn.Linear
    return str(caught.value)


@pytest.mark.slow
@engines
def test_another_norm_on_another_rank_is_named_on_every_rank(ranks: Ranks, engine: str) -> None:
    first, second = ranks.run(registers_another_norm, engine=engine)
    assert first == second
    assert "rank 0: register _WeightNorm on Linear.weight; rank 1: parametrize Linear.weight" in first


def bakes_another_part(engine: str) -> str:
    layers = [parametrizations.weight_norm(nn.Linear(4, 4)) for _ in range(2)]
    model = wrapped(engine, *layers)
    with pytest.raises(ParametrizationError, match="the ranks disagree") as caught:
        torchkiln.bake(model, f"{dist.get_rank()}.weight")
    assert len(torchkiln.summary(model)) == 2
    return str(caught.value)


@pytest.mark.slow
@engines
def test_another_tensor_on_another_rank_is_named_on_every_rank(ranks: Ranks, engine: str) -> None:
    first, second = ranks.run(bakes_another_part, engine=engine)
    assert first == second
    assert "rank 0: compute 0.weight (weight_norm); rank 1: compute 1.weight (weight_norm)" in first


def comes_alone(engine: str) -> None:
    model = wrapped(engine, nn.Linear(4, 4))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_agreement, "PATIENCE", timedelta(seconds=1))
        if dist.get_rank() == 0:
            with pytest.raises(
                ParametrizationError, match=r"within 1 s.*\n.*on Linear.weight; rank 1: nothing"
            ):
                parametrizations.weight_norm(model[0])


@pytest.mark.slow
@engines
def test_a_rank_that_does_not_come_is_named_after_a_bounded_time(ranks: Ranks, engine: str) -> None:
    ranks.run(comes_alone, engine=engine)
