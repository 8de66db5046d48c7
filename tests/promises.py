"""A pytest plugin: under `--promises` a session fails unless every test that docs/promises.md links has run.

A row of the table is `| number | promise | [name](file), ... | CUDA |`, each link that of a test function in a file. A
test with parameters has run if it ran with any of them. One marked `gpu` need not run if the row's last cell says "not
yet measured on CUDA" or "measured DATE, DEVICE", one marked `slow` need not if the row links another that ran.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

__all__ = ["Row", "read_rows"]

HEADING = "# What is promised, and the test of it"
UNMEASURED = "not yet measured on CUDA"
MEASURED = re.compile(r"measured \d{4}-\d\d-\d\d, .+")
LINK = re.compile(r"\[([^\]]+)\]\(\.\./(tests/[^)]+)\)")


@dataclass(frozen=True)
class Row:
    """One promise: its number, the node ids of its tests, and what is said of CUDA."""

    number: int
    tests: tuple[str, ...]
    cuda: str


def read_rows(page: str) -> list[Row]:
    """The rows of the table below the heading, in order."""
    _, found, section = page.partition(HEADING + "\n")
    if not found:
        raise ValueError(f"docs/promises.md has no section {HEADING!r}")
    rows = []
    for line in section.split("\n## ")[0].splitlines():
        if match := re.match(r"\| *(\d+) *\|", line):
            tests = tuple(f"{path}::{name}" for name, path in LINK.findall(line))
            rows.append(Row(int(match[1]), tests, line.rstrip().removesuffix("|").rpartition("|")[2].strip()))
    return rows


@dataclass
class _Seen:
    """What the session saw of one test function, over all its parameters."""

    marks: list[set[str]] = field(default_factory=list)
    ran: bool = False


class Promises:
    """Watches a session and compares it with the table."""

    def __init__(self, page: Path) -> None:
        self.page = page
        self.seen: dict[str, _Seen] = {}
        self.broken: list[str] = []

    def pytest_itemcollected(self, item: pytest.Item) -> None:
        marks = {mark.name for mark in item.iter_markers()}
        self.seen.setdefault(_function(item.nodeid), _Seen()).marks.append(marks)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and not report.skipped:
            self.seen.setdefault(_function(report.nodeid), _Seen()).ran = True

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """A worker of pytest-xdist has ended: it collected the tests, and reports of those that it ran came here."""
        for function, marks in getattr(node, "workeroutput", {}).get("promises", {}).items():
            self.seen.setdefault(function, _Seen()).marks += map(set, marks)

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(session.config, "workeroutput"):
            collected = {function: list(map(sorted, seen.marks)) for function, seen in self.seen.items()}
            session.config.workeroutput["promises"] = collected
            return
        self.broken = list(self._complaints())
        if self.broken and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.broken:
            terminalreporter.section("promises without a test that ran", red=True)
            for line in self.broken:
                terminalreporter.write_line(line)

    def _complaints(self) -> Iterator[str]:
        try:
            rows = read_rows(self.page.read_text("utf-8"))
        except (OSError, ValueError) as error:
            yield str(error)
            return
        if [row.number for row in rows] != list(range(1, len(rows) + 1)) or not rows:
            yield f"the rows of the table are not numbered 1, 2, 3 ...: {[row.number for row in rows]}"
        for row in rows:
            if not row.tests:
                yield f"promise {row.number} links no test"
            another_ran = any(test in self.seen and self.seen[test].ran for test in row.tests)
            for test in row.tests:
                if why := self._why_unproven(test, row, another_ran):
                    yield f"promise {row.number}: {test} {why}"

    def _why_unproven(self, test: str, row: Row, another_ran: bool) -> str | None:
        if test not in self.seen:
            return "does not exist, or its file was not collected"
        seen = self.seen[test]
        if seen.ran:
            return None
        if all("gpu" in marks for marks in seen.marks):
            known = row.cuda == UNMEASURED or MEASURED.fullmatch(row.cuda)
            return None if known else f'needs a GPU, and the row says neither when it was measured nor "{UNMEASURED}"'
        if all(marks & {"gpu", "slow"} for marks in seen.marks):
            return None if another_ran else "is slow, and the row links no other test that ran"
        return "was not run, or every run of it was skipped"


def _function(node_id: str) -> str:
    return node_id.partition("[")[0]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--promises", action="store_true", help="fail unless every test that docs/promises.md links has run"
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("promises") and not config.option.collectonly:
        config.pluginmanager.register(Promises(config.rootpath / "docs/promises.md"))
