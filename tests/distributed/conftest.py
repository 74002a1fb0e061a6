"""Turn the outcomes of one run of ``test_operations.py`` into the tables of ``docs/distributed.md``."""

from __future__ import annotations

from pathlib import Path

import pytest

from distributed.page import Outcome, rewritten
from parametrize.oracle import TORCH

OPTION = "--distributed-table"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        OPTION, type=Path, help="run the operations on torch too, and write their table into this page"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "operation: a cell of the table of docs/distributed.md")
    target: Path | None = config.getoption(OPTION, default=None)
    if target is not None:
        config.option.markexpr = ""  # the slow tests as well
        config.pluginmanager.register(_Writer(target), "distributed-table")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the operations on torch, unless the table is asked for: requirement row 23 has torch's failures."""
    if config.getoption(OPTION, default=None) is None:
        operations = [item for item in items if item.get_closest_marker("operation")]
        left_out = [item for item in operations if _implementation(item) == TORCH.name]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def _implementation(item: pytest.Item) -> str:
    name: str = item.callspec.params["impl"].name  # type: ignore[attr-defined]
    return name


class _Writer:
    """Collect the outcomes and the measurements, and write them into the page at the end."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.outcomes: list[Outcome] = []
        self.measured: dict[str, list[str]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call":
            return
        for key, value in report.user_properties:
            if key == "operation":
                self.outcomes.append(Outcome(*value, passed=report.passed))
            elif key == "memory":
                self.measured.setdefault("memory", []).append(value)

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if exitstatus == pytest.ExitCode.OK and not hasattr(session.config, "workerinput"):
            self.target.write_text(rewritten(self.target.read_text(), self.outcomes, self.measured))
