"""The two implementations that the tests of the built-ins run on."""

from __future__ import annotations

import pytest

from parametrize.oracle import OURS, TORCH, Impl


@pytest.fixture(params=[TORCH, OURS], ids=str)
def impl(request: pytest.FixtureRequest) -> Impl:
    """torch's modules, then torchkiln's."""
    return request.param
