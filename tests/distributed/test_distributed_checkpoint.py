"""A checkpoint of a sharded model loads into other numbers of processes, other shardings and every spelling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import torchkiln
from distributed.ranks import Ranks
from distributed.sharding import STEPS, full, line
from torchkiln import CheckpointError, checkpoint, parametrize

pytestmark = pytest.mark.slow

every_step = pytest.mark.parametrize("step", ["weight norm", "spectral norm", "exponential"])


def network(step: str | None) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6))
    for index in (0, 2) if step else ():
        STEPS[str(step)](model[index])
    return model


def shard(model: nn.Sequential) -> nn.Sequential:
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=line())
    return fully_shard(model, mesh=line())


def parallelize(model: nn.Sequential) -> nn.Sequential:
    parallelize_module(model, line(), {"0": ColwiseParallel(), "2": RowwiseParallel()})
    return model


def train(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.ones(3, 6)).square().sum().backward()
        optimizer.step()
    model(torch.ones(3, 6))  # and the state that belongs to the last weights
    model.eval()


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(torch.linspace(-1, 1, 12).view(2, 6))
    return full(result)


def trains_and_saves(step: str, folder: Path, how: str) -> Tensor:
    model = shard(network(step))
    train(model)
    state = {"model": get_model_state_dict(model), "step": 2}
    if how == "async":
        dcp.async_save(state, checkpoint_id=folder).result()
    else:
        dcp.save(state, checkpoint_id=folder)
    return outputs(model)


def loads(step: str | None, sharded: str, folder: Path) -> tuple[Tensor, bool]:
    model = network(step)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    if sharded != "no":
        model = (shard if sharded == "fsdp" else parallelize)(model)
    checkpoint.load_weights(model.eval(), folder)
    return outputs(model), all(isinstance(p, DTensor) for p in model.parameters())


@every_step
@pytest.mark.parametrize("how", ["at once", "async"])
def test_another_number_of_processes(ranks: Ranks, tmp_path: Path, step: str, how: str) -> None:
    expected = ranks.run(trains_and_saves, world=4, step=step, folder=tmp_path / "saved", how=how)[0]
    for got, is_sharded in ranks.run(loads, world=2, step=step, sharded="fsdp", folder=tmp_path / "saved"):
        torch.testing.assert_close(got, expected)
        assert is_sharded


@pytest.mark.parametrize("sharded", ["fsdp", "tensor parallel"])
@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        ("weight norm", None),
        ("spectral norm", None),
        ("exponential", "cayley"),
        ("weight norm", "weight norm of columns"),
    ],
)
def test_another_spelling_and_sharding(
    ranks: Ranks, tmp_path: Path, saved: str, loaded: str | None, sharded: str
) -> None:
    expected = ranks.run(trains_and_saves, step=saved, folder=tmp_path / "saved", how="at once")[0]
    arguments: dict[str, Any] = {"step": loaded, "sharded": sharded, "folder": tmp_path / "saved"}
    if saved == "exponential":
        arguments["folder"] = tmp_path / "plain"
        checkpoint.bake(tmp_path / "saved", tmp_path / "plain", assume={"*": "matrix_exp"})
    for got, is_sharded in ranks.run(loads, **arguments):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        assert is_sharded


def test_one_process_without_a_group(ranks: Ranks, tmp_path: Path) -> None:
    expected = ranks.run(trains_and_saves, step="weight norm", folder=tmp_path / "saved", how="at once")[0]
    assert not dist.is_initialized()
    torch.testing.assert_close(loads(None, "no", tmp_path / "saved")[0], expected)
    torch.testing.assert_close(loads("weight norm", "no", tmp_path / "saved")[0], expected)
    legacy = network(None)
    for index in (0, 2):
        torch.nn.utils.weight_norm(legacy[index])
    checkpoint.load_weights(legacy, tmp_path / "saved", at="model")
    torch.testing.assert_close(outputs(legacy), expected)


def test_a_state_dict_that_is_not_there_is_named(tmp_path: Path) -> None:
    torch.save({"model": network(None).state_dict(), "ema": network(None).state_dict()}, tmp_path / "two.pt")
    with pytest.raises(
        CheckpointError, match=r"expected at=None to be one of its state dicts, found 'model', 'ema'"
    ):
        checkpoint.load_weights(network(None), tmp_path / "two.pt")


def names_and_spellings() -> dict[str, list[str]]:
    model = shard(network("weight norm"))
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    plain = torchkiln.state_dict(model, spelling="plain")
    assert all(isinstance(tensor, DTensor) for tensor in plain.values())
    torch.testing.assert_close(full(plain["0.weight"]), full(model[0].weight))
    legacy = torchkiln.state_dict(model, spelling="legacy")
    return {
        "own": list(get_model_state_dict(model)),
        "full": list(whole),
        "plain": list(plain),
        "legacy": list(legacy),
    }


def test_state_dicts_of_a_sharded_model_in_each_spelling(ranks: Ranks) -> None:
    for names in ranks.run(names_and_spellings):
        expected = network("weight norm")
        assert names["own"] == list(expected.state_dict())
        if names["full"]:  # torch gives the full one to every rank, or to the first alone
            assert names["full"] == names["own"]
        assert names["plain"] == list(torchkiln.state_dict(expected, spelling="plain"))
        assert names["legacy"] == list(torchkiln.state_dict(expected, spelling="legacy"))


def full_into_sharded() -> None:
    source, model = network("weight norm"), shard(network("spectral norm"))
    with pytest.warns(torchkiln.TorchkilnWarning, match="loaded is the projection"):
        torchkiln.load_state_dict(model, source.state_dict())
    expected = network("spectral norm")
    with pytest.warns(torchkiln.TorchkilnWarning, match="loaded is the projection"):
        torchkiln.load_state_dict(expected, source.state_dict())
    assert parametrize.is_parametrized(model[0], "weight")
    torch.testing.assert_close(full(model.eval()[0].weight), expected.eval()[0].weight.detach())


def test_a_full_state_dict_loads_into_a_sharded_model(ranks: Ranks) -> None:
    ranks.run(full_into_sharded)
