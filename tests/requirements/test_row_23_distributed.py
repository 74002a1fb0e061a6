"""Row 23: parametrizations come and go under torch's distributed engines, as on one process."""

from __future__ import annotations

import pytest

from distributed import ddp_operations, fsdp_operations
from distributed.ranks import RankError, Ranks

from .table import Impl, row

pytestmark = pytest.mark.slow
NORMS = pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm", "orthogonal"])


@NORMS
@row(23, "DeepSpeed 1045", torch="a step sees tensors that are sharded in part", raises=RankError)
def test_23_registering_after_fully_shard(ranks: Ranks, impl: Impl, norm: str) -> None:
    ranks.run(fsdp_operations.OPERATIONS["shard, register, train"], impl=impl, norm=norm)


@NORMS
@row(23, "DeepSpeed 1045", torch="the class that FSDP makes has no property to remove", raises=RankError)
def test_23_removing_under_fully_shard(ranks: Ranks, impl: Impl, norm: str) -> None:
    ranks.run(fsdp_operations.OPERATIONS["register, shard, remove, train on"], impl=impl, norm=norm)


@NORMS
@row(23, "DeepSpeed 1045", torch="the reducer has the parameters of before", raises=RankError)
def test_23_registering_after_wrapping(ranks: Ranks, impl: Impl, norm: str) -> None:
    ranks.run(ddp_operations.after, impl=impl, norm=norm)


@NORMS
@row(23, "DeepSpeed 1045", torch="the reducer has the parameters of before", raises=RankError)
def test_23_removing_under_the_wrapper(ranks: Ranks, impl: Impl, norm: str) -> None:
    ranks.run(ddp_operations.goes_on_after_removal, impl=impl, norm=norm)


@NORMS
@row(23, "DeepSpeed 1045")
def test_23_two_forwards_and_one_backward(ranks: Ranks, impl: Impl, norm: str) -> None:
    ranks.run(ddp_operations.two_forwards, impl=impl, norm=norm)


@row(
    23,
    "DeepSpeed 1045",
    torch="recomputing a segment under fully_shard advances the vectors again",
    raises=RankError,
)
def test_23_recomputation_under_fully_shard(ranks: Ranks, impl: Impl) -> None:
    ranks.run(fsdp_operations.recomputes, impl=impl, norm="spectral_norm")
