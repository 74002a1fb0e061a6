"""What fuzzing found is read again in every run, and hypothesis makes up more where no fuzzer runs."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.mutation import PICKLED, mutated
from tests.fuzz.targets import TARGETS, read_everything, seeds

FOUND = sorted(path for path in (Path(__file__).parent / "found").rglob("*") if path.is_file())

# torch warns of protocols and dtypes that damage makes up.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("path", FOUND, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_what_was_found_is_refused(path: Path, tmp_path: Path) -> None:
    assert not read_everything(TARGETS[path.parent.name], path.read_bytes(), tmp_path)


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_are_checkpoints(name: str, tmp_path: Path) -> None:
    assert [read_everything(TARGETS[name], seed, tmp_path) for seed in seeds(name)].count(False) == 0


@cache
def _made_once(name: str) -> list[bytes]:
    """Return the seeds: torch's older format writes addresses, which hypothesis must not see change."""
    return list(seeds(name))


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=15, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_damaged_seeds_are_read_or_refused(name: str, data: st.DataObject) -> None:
    """Cut, repeat and overwrite pieces, which keeps more of the structure than single bytes do."""
    content = bytearray(data.draw(st.sampled_from(_made_once(name))))
    for _ in range(data.draw(st.integers(1, 3))):
        start, stop = sorted(data.draw(st.tuples(*[st.integers(0, len(content))] * 2)))
        piece = data.draw(st.one_of(st.binary(max_size=12), st.just(bytes(content[start:stop][:100]) * 2)))
        content[start:stop] = piece
    with tempfile.TemporaryDirectory() as folder:
        read_everything(TARGETS[name], bytes(content), Path(folder))


@pytest.mark.parametrize("name", sorted(PICKLED))
@settings(max_examples=15, suppress_health_check=[HealthCheck.too_slow])
@given(numbers=st.lists(st.integers(0, 1 << 32), min_size=1, max_size=4))
def test_pickles_of_other_opcodes_are_read_or_refused(name: str, numbers: list[int]) -> None:
    data = _made_once(name)[0]
    for number in numbers:
        data = mutated(data, 20_000, number, bytewise=lambda content, size: content[:size])
    with tempfile.TemporaryDirectory() as folder:
        read_everything(TARGETS[name], data, Path(folder))


def test_other_opcodes_are_a_checkpoint_more_often_than_never(tmp_path: Path) -> None:
    data = next(seeds("dcp_pickles"))
    others = {mutated(data, 20_000, number, bytewise=lambda content, _: content) for number in range(30)} - {
        data
    }
    read = [
        read_everything(TARGETS["dcp_pickles"], other, tmp_path / str(i)) for i, other in enumerate(others)
    ]
    assert 0 < read.count(True) < len(others)
