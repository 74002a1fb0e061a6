"""What outside code does to the cache: counts it up and down, and writes to its dict."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from torchkiln import parametrize
from torchkiln.parametrize import cached

from .counting import counted, is_kept

WRITES: dict[str, Callable[[Any, Any, Tensor], object]] = {
    "item": lambda cache, key, value: cache.__setitem__(key, value),
    "update": lambda cache, key, value: cache.update({key: value}),
    "or": lambda cache, key, value: cache.__ior__({key: value}),
    "del, setdefault": lambda cache, key, value: (cache.__delitem__(key), cache.setdefault(key, value)),
    "pop, setdefault": lambda cache, key, value: (cache.pop(key), cache.setdefault(key, value)),
    "popitem, item": lambda cache, key, value: (cache.popitem(), cache.__setitem__(key, value)),
    "clear, item": lambda cache, key, value: (cache.clear(), cache.__setitem__(key, value)),
}


@pytest.mark.parametrize("write", WRITES)
def test_a_value_put_in_the_place_of_one_in_use_is_read(write: str) -> None:
    layer, other = counted()[0], torch.ones(3, 3)
    with cached():
        assert is_kept(layer)
        WRITES[write](parametrize._cache, (id(layer), "weight"), other)
        assert layer.weight is other
        assert is_kept(layer)


@pytest.mark.parametrize("write", ["pop", "popitem", "clear"])
def test_a_value_in_use_that_is_taken_out_is_computed_again(write: str) -> None:
    layer, calls = counted()
    with cached():
        assert is_kept(layer)
        key = [(id(layer), "weight")] if write == "pop" else []
        getattr(parametrize._cache, write)(*key)
        assert is_kept(layer)
    assert len(calls) == 2


def test_a_value_put_in_while_the_count_is_up_is_read_in_the_place_of_one_in_use() -> None:
    layer, other = counted()[0], torch.ones(3, 3)
    with cached():
        assert is_kept(layer)
        change_count(+1)
        try:
            parametrize._cache[id(layer), "weight"] = other
            assert layer.weight is other
        finally:
            change_count(-1)
        assert is_kept(layer)


def in_a_thread(layer: Any) -> bool:
    seen: list[bool] = []
    thread = threading.Thread(target=lambda: seen.append(is_kept(layer)))
    thread.start()
    thread.join()
    return seen[0]


def count() -> int:
    value: int = parametrize._cache_enabled
    return value


def change_count(change: int) -> None:
    parametrize._cache_enabled += change


def test_a_count_raised_inside_and_lowered_after_the_scope() -> None:
    layer = counted()[0]
    with cached():
        change_count(+1)
        assert count() == 2
    assert count() == 1
    assert is_kept(layer)
    change_count(-1)
    assert count() == 0
    assert not is_kept(layer)
    assert not in_a_thread(layer)


def test_a_count_set_to_zero_inside_leaves_the_next_scope_working() -> None:
    layer = counted()[0]
    with cached():
        parametrize._cache_enabled = 0
    assert count() == 0
    assert not is_kept(layer)
    with cached():
        assert is_kept(layer)


def test_the_count_reaches_every_thread() -> None:
    layer = counted()[0]
    change_count(+1)
    try:
        assert in_a_thread(layer)
    finally:
        change_count(-1)
    assert not in_a_thread(layer)


def test_a_scope_within_the_count_leaves_its_values() -> None:
    layer = counted()[0]
    change_count(+1)
    try:
        value = layer.weight
        with cached():
            pass
        assert layer.weight is value
    finally:
        change_count(-1)


def test_the_count_is_of_scopes_for_every_module() -> None:
    layer = counted()[0]
    with cached(layer):
        assert count() == 0
        with cached():
            assert count() == 1
