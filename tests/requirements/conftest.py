"""Turn the outcomes of one run of this folder into the table of ``docs/requirements.md``."""

from __future__ import annotations

from pathlib import Path

import pytest

from .table import Outcome, document

OPTION = "--requirements-table"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        OPTION, type=Path, help="run the slow tests too and write the table of requirements here"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "row(number, issue): the row of tests/requirements/table.py")
    config.addinivalue_line(
        "markers", "fails_on(implementation, reason, raises): a strict xfail on one of them"
    )
    target: Path | None = config.getoption(OPTION, default=None)
    if target is not None:
        config.option.markexpr = ""  # the slow tests as well
        config.pluginmanager.register(_Writer(target), "requirements-table")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give each test of a row its xfail, and the facts that its report must carry."""
    for item in items:
        mark = item.get_closest_marker("row")
        if mark is None:
            continue
        name = item.callspec.params["impl"].name  # type: ignore[attr-defined]
        item.user_properties.append(("requirement", (mark.args[0], name)))
        for expected, reason, raises in (known.args for known in item.iter_markers("fails_on")):
            if expected == name:
                item.add_marker(pytest.mark.xfail(reason=reason, raises=raises, strict=True))


class _Writer:
    """Collect the outcomes, which xdist's workers send to the main process, and write the table at the end."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.outcomes: list[Outcome] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        expected_failure = report.skipped and hasattr(report, "wasxfail")
        for key, requirement in report.user_properties:
            if key == "requirement":
                number, name = requirement
                result = "failed" if expected_failure else report.outcome
                self.outcomes.append(Outcome(number, name, result))

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        on_worker = hasattr(session.config, "workerinput")
        if exitstatus == pytest.ExitCode.OK and not on_worker:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self.target.write_text(document(self.outcomes))
