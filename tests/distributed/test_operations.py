"""Engine x operation x built-in: all that torch's engines do with parametrized models, as on one process.

The table of ``docs/distributed.md`` has the same on torch's own parametrizations; it is written by

    python -m pytest tests/distributed/test_operations.py --distributed-table docs/distributed.md
"""

from __future__ import annotations

import pytest

from distributed import ddp_operations, fsdp_operations, tensor_operations
from distributed.ranks import RankError, Ranks
from distributed.training import BUILT_INS
from parametrize.oracle import OURS, TORCH, Impl

ENGINES = {
    "DDP": ddp_operations.OPERATIONS,
    "FSDP2": fsdp_operations.OPERATIONS,
    "tensor parallel": tensor_operations.OPERATIONS,
}
CASES = [(engine, operation) for engine, operations in ENGINES.items() for operation in operations]


@pytest.mark.slow
@pytest.mark.operation
@pytest.mark.parametrize("impl", [TORCH, OURS], ids=str)
@pytest.mark.parametrize("norm", BUILT_INS)
@pytest.mark.parametrize(("engine", "operation"), CASES)
def test_an_operation(
    ranks: Ranks, record_property: object, engine: str, operation: str, norm: str, impl: Impl
) -> None:
    record_property("operation", (engine, operation, norm, impl.name))  # type: ignore[operator]  # pytest's fixture
    try:
        ranks.run(ENGINES[engine][operation], impl=impl, norm=norm)
    except RankError as error:
        if impl is TORCH:
            pytest.xfail(str(error).strip().splitlines()[-1])  # it is the table that says so
        raise
