"""Row 12: pickle, torch.save of a whole model, copy.copy and other processes keep a model and its parametrizations."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import torch
import torch.multiprocessing
from torch import nn

from parametrize.oracle import snapshot

from .table import Impl, row

REFUSED = "torch refuses to pickle a parametrized module"
X = torch.linspace(-1, 1, 8).reshape(2, 4)


def layers(impl: Impl) -> nn.Module:
    return nn.Sequential(
        impl.N.weight_norm(nn.Linear(4, 4)),
        impl.N.spectral_norm(impl.N.orthogonal(nn.Linear(4, 4))),
        impl.N.spectral_norm(nn.Linear(4, 3), "bias"),
    ).eval()


class Recurrent(nn.Module):
    """A user's module around an LSTM that has been run."""

    def __init__(self, impl: Impl) -> None:
        super().__init__()
        self.lstm = impl.N.weight_norm(nn.LSTM(4, 3), "weight_hh_l0")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lstm(x)[0]


def pickled(protocol: int) -> Callable[[nn.Module], nn.Module]:
    return lambda model: pickle.loads(pickle.dumps(model, protocol))


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def saved_in_the_old_format(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file, _use_new_zipfile_serialization=False)
    file.seek(0)
    return torch.load(file, weights_only=False)


def cloudpickled(model: nn.Module) -> nn.Module:
    return pickle.loads(cloudpickle.dumps(model))


ROUND_TRIPS = {
    **{f"pickle {protocol}": pickled(protocol) for protocol in (2, 4, 5)},
    "torch.save": saved,
    "torch.save, old format": saved_in_the_old_format,
    "cloudpickle": cloudpickled,
}


@pytest.mark.parametrize("make", [layers, Recurrent])
@pytest.mark.parametrize("trip", ROUND_TRIPS.values(), ids=ROUND_TRIPS)
@row(12, "ZEST 4", torch=REFUSED, raises=RuntimeError)
def test_12_a_round_trip(
    impl: Impl, make: Callable[[Impl], nn.Module], trip: Callable[[nn.Module], nn.Module]
) -> None:
    model = make(impl)
    before, expected = snapshot(model), model(X)
    replica = trip(model)
    assert snapshot(replica) == before
    assert [type(one) for one in replica.modules()] == [type(one) for one in model.modules()]
    assert torch.equal(replica(X), expected)
    replica(X).sum().backward()
    assert all(tensor.grad is not None for tensor in replica.parameters() if tensor.requires_grad)
    for module in list(replica.modules()):
        for name in list(getattr(module, "parametrizations", ())):
            impl.P.remove_parametrizations(module, name)
    assert snapshot(model) == before  # nothing done to the replica reached it


@row(12, "ZEST 4", torch=REFUSED, raises=RuntimeError)
def test_12_a_class_that_only_the_sender_has_travels_by_value(impl: Impl) -> None:
    class Local(nn.Linear):
        """Known to no importable module."""

    layer = impl.N.weight_norm(Local(4, 3))
    replica = pickle.loads(cloudpickle.dumps(layer))
    assert torch.equal(replica(X), layer(X))
    assert impl.P.is_parametrized(replica, "weight")


@row(12, "geotorch 6", torch=REFUSED, raises=RuntimeError)
def test_12_a_shallow_copy_reads_the_same(impl: Impl) -> None:
    layer = impl.N.weight_norm(nn.Linear(4, 3))
    replica = copy.copy(layer)
    assert replica is not layer
    assert type(replica) is type(layer)
    assert torch.equal(replica.weight, layer.weight)
    assert all(mine is its for mine, its in zip(replica.parameters(), layer.parameters(), strict=True))


FRESH = """
import sys, torch
import torchkiln
model = torch.load(sys.argv[1], weights_only=False)
assert torchkiln.parametrize.is_parametrized(model[0], "weight")
print(model(torch.linspace(-1, 1, 8).reshape(2, 4)).tolist())
"""


def python(*arguments: str) -> str:
    command = [sys.executable, "-W", "error", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@row(12, "ZEST 4", torch=REFUSED, raises=RuntimeError)
def test_12_a_saved_model_opens_in_a_fresh_process(impl: Impl, tmp_path: Path) -> None:
    model = layers(impl)
    torch.save(model, tmp_path / "model.pt")
    assert python("-c", FRESH, str(tmp_path / "model.pt")) == str(model(X).tolist())


def answer(model: nn.Module, queue: Any) -> None:
    queue.put((type(model[0]).__name__, model(X).tolist()))


@row(12, "ray 23894", torch=REFUSED, raises=RuntimeError)
def test_12_a_spawned_process_gets_the_model(impl: Impl) -> None:
    model = layers(impl)
    expected = ("ParametrizedLinear", model(X).tolist())
    context = torch.multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    process = context.Process(target=answer, args=(model.share_memory(), queue))
    process.start()
    assert queue.get() == expected
    process.join()
    assert process.exitcode == 0


@row(12, "ZEST 4", torch=REFUSED, raises=RuntimeError)
def test_12_weights_only_loads_what_the_caller_declares_safe(impl: Impl) -> None:
    layer = impl.N.weight_norm(nn.Linear(4, 3))
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    file.seek(0)
    with torch.serialization.safe_globals([find(name) for name in names] + [type(layer)]):
        replica = torch.load(file, weights_only=True)
    assert torch.equal(replica(X), layer(X))


def find(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(sys.modules[module], name)


@row(12, "geotorch 6")
def test_12_a_state_dict_loads_with_weights_only(impl: Impl) -> None:
    model, other = layers(impl), layers(impl)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(X), model(X))
