"""A small training run that can be made on one process and on several, and must come to the same."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from parametrize.oracle import OURS, Impl

BUILT_INS = ["weight_norm", "spectral_norm", "orthogonal"]
every_built_in = pytest.mark.parametrize("norm", BUILT_INS)


def build() -> nn.Sequential:
    """A network whose rows, 5 and 3, do not divide by two."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def register(model: nn.Sequential, norm: str, *, seed: int = 1, impl: Impl = OURS) -> None:
    """Put the first layer under ``norm``; what that draws depends on the seed alone."""
    torch.manual_seed(seed)
    getattr(impl.N, norm)(model[0])


def normed(norm: str, impl: Impl = OURS) -> nn.Sequential:
    model = build()
    register(model, norm, impl=impl)
    return model


def take_out(impl: Impl, model: nn.Sequential, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Take the norm of the first layer out, and return the optimizer to go on with."""
    if impl.name == OURS.name:
        impl.P.remove_parametrizations(model[0], "weight", optimizer=optimizer)
        return optimizer
    impl.P.remove_parametrizations(model[0], "weight")
    return adam(model)  # torch's leaves an optimizer with dead parameters


def shard(model: nn.Sequential, **options: Any) -> nn.Sequential:
    """Shard each layer, and the whole."""
    for layer in (model[0], model[2]):
        fully_shard(layer, **options)
    fully_shard(model, **options)
    return model


def adam(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), 0.05, **options)


def batches(model: nn.Module, *, seed: int = 2) -> Iterator[Tensor]:
    """Batches for all; each rank takes its part of them."""
    generator = torch.Generator().manual_seed(seed)
    is_part = isinstance(model, DistributedDataParallel | FSDPModule)
    while True:
        batch = torch.randn(8, 6, generator=generator)
        yield batch.chunk(dist.get_world_size())[dist.get_rank()] if is_part else batch


def loss(model: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
    return model(batch).float().square().mean()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, *, steps: int = 3, seed: int = 2) -> None:
    for batch in itertools.islice(batches(model, seed=seed), steps):
        loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with whole tensors, by the names of the model inside the wrapper."""
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    state = inner.state_dict()
    return {key: one.full_tensor() if isinstance(one, DTensor) else one for key, one in state.items()}


def assert_same_state(model: nn.Module, expected: nn.Module, *, atol: float = 1e-6) -> None:
    """Compare with the run on one process, and each rank with the first one, bit for bit."""
    state = whole_state(model)
    assert list(state) == list(expected.state_dict())
    torch.testing.assert_close(state, dict(expected.state_dict()), rtol=1e-5, atol=atol)
    states: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(states, state)
    assert all(torch.equal(states[0][key], other[key]) for other in states for key in state)


def trains(
    impl: Impl,
    norm: str,
    *,
    make: Callable[..., nn.Sequential],
    after: bool = False,
    removes: bool = False,
    atol: float = 1e-6,
    **options: Any,
) -> nn.Sequential:
    """Train, take the norm out and train on where asked, as on one process; return the distributed model.

    Args:
        impl: Whose parametrizations.
        norm: Which one.
        make: Returns a distributed model, registered before or after it was distributed.
        after: Which of the two.
        removes: Whether to take the norm out.
        atol: How far the two runs may come apart.
        options: What else `make` takes.
    """
    expected, model = normed(norm, impl), make(impl, norm, after=after, **options)
    for one in (expected, model):
        optimizer = adam(one)
        train(one, optimizer)
        if removes:
            optimizer = take_out(impl, one, optimizer)
            train(one, optimizer, seed=3)
    assert_same_state(model, expected, atol=atol)
    if removes:
        weight = model[0].weight
        assert isinstance(weight, nn.Parameter)
        assert isinstance(weight, DTensor)
        assert weight.placements == (Shard(0),)
    return model


Operation = Callable[[Impl, str], None]


def in_each_order(verb: str, run: Callable[..., None]) -> dict[str, Operation]:
    """Return what calls :func:`trains`, with the norm registered before and after ``verb``, taken out or not."""
    return {
        f"register, {verb}, train": partial(run),
        f"{verb}, register, train": partial(run, after=True),
        f"register, {verb}, remove, train on": partial(run, removes=True),
        f"{verb}, register, remove, train on": partial(run, after=True, removes=True),
    }
