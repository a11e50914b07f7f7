"""Plugin of pytest: each result to the disk as it comes, and an order that samples every file."""

import os
from collections import Counter
from pathlib import Path

import pytest

from tritium.bench.gpu.journal import Journal
from tritium.bench.gpu.process import die_with_parent
from tritium.bench.gpu.suite import FOLDER, KNOWN, RESULTS

UNUSABLE = 70  # exit status of a process whose GPU context is broken
LONGEST = 300  # characters of a reason


def pytest_configure(config: pytest.Config) -> None:
    """Prepare the file of results, in the one process that gets all of them."""
    die_with_parent()
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Results(Path(os.environ[FOLDER]) / RESULTS))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what ran before, and take one test of every file after the other."""
    known = {*(Path(os.environ[FOLDER]) / KNOWN).read_text().splitlines()}
    left_out = [item for item in items if item.nodeid in known]
    config.hook.pytest_deselected(items=left_out)
    by_name = {item.nodeid: item for item in items if item.nodeid not in known}
    items[:] = [by_name[name] for name in sample_order(list(by_name))]


def sample_order(names: list[str]) -> list[str]:
    """Order names of tests so that a run that is cut has seen as much of each file as it could.

    First the first case of the first function of each file, then of the second, and so on; then
    the second case of each function.
    """
    seen: Counter[str] = Counter()
    functions: Counter[str] = Counter()
    places: dict[str, tuple[int, int]] = {}
    for name in names:
        function, file = name.partition("[")[0], name.partition("::")[0]
        if not seen[function]:
            functions[file] += 1
        places[name] = (seen[function], functions[file])
        seen[function] += 1
    return sorted(names, key=places.__getitem__)  # stable: files keep their order


def pytest_runtest_logfinish(nodeid: str) -> None:
    """End a process whose GPU no longer answers: its next tests would fail through no fault."""
    import torch

    if "PYTEST_XDIST_WORKER" in os.environ and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(UNUSABLE)  # pytest-xdist starts another, and names this test


class Results:
    """Writes an entry for each test: its name, outcome, and what failed."""

    def __init__(self, path: Path) -> None:
        self.journal = Journal(path)
        self.journal.append(test="", outcome="started")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take a report of one phase of a test: of its call, or of what went wrong around it."""
        if report.when == "call" or not report.passed:
            reason = "" if report.passed else reason_of(report)
            self.journal.append(
                test=report.nodeid, outcome=report.outcome, seconds=report.duration, reason=reason
            )


def reason_of(report: pytest.TestReport) -> str:
    """The line that says what failed, or why a test was skipped."""
    if isinstance(report.longrepr, tuple):
        return report.longrepr[2][:LONGEST]
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash else str(report.longrepr)
    return " ".join(text.split())[:LONGEST]
