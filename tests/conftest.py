"""What holds for every test: a fixed seed, one thread, no model hub, no global state left changed."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator

import hypothesis
import pytest
import torch

from distributed.ranks import Ranks

# Model libraries look for a hub when they are imported; the tests build every model from a configuration.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# No deadline, since no test asserts a time, and no database, since no test writes outside its tmp_path.
hypothesis.settings.register_profile("torchkiln", deadline=None, database=None, print_blob=True)
hypothesis.settings.load_profile("torchkiln")

# Two xdist workers on two cores: more threads would only wait for each other.
torch.set_num_threads(1)

# What install() may exchange, and a test must put back.
_PATCHED = ("torch.nn.utils.parametrize", "torch.nn.utils.parametrizations")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked ``gpu`` where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """The processes that distributed tests run on; they start with the first case."""
    pool = Ranks(tmp_path_factory.mktemp("ranks"))
    yield pool
    pool.close()


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Turn the cyclic collector off for a test: what is freed then is freed by its last reference."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture(scope="module", autouse=True)
def _small_heap() -> None:
    """Take what is there before a module's tests out of the collector's sight.

    Thousands of tests and all of torch make half a million objects. Each collection, and each search for who holds a
    parameter, would go through them, which is most of the time of some tests.
    """
    gc.freeze()


def _global_state() -> dict[str, object]:
    """Everything process-wide that a test could leave changed for the next one."""
    state: dict[str, object] = {name: sys.modules[name] for name in _PATCHED}
    state["default dtype"] = torch.get_default_dtype()
    state["grad mode"] = torch.is_grad_enabled()
    state["working directory"] = os.getcwd()
    return state


@pytest.fixture(autouse=True)
def _isolated() -> Iterator[None]:
    """Start from seed 0, and fail the test that leaves global state changed."""
    torch.manual_seed(0)
    before = _global_state()
    yield
    after = _global_state()
    changed = [name for name in before if before[name] is not after[name] and before[name] != after[name]]
    assert not changed, f"the test left changed: {', '.join(changed)}"
