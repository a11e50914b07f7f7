"""Plugin of pytest: each result to the disk as it comes, and an order that samples every file."""

import math
import os
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pytest

from tritium.bench.gpu.journal import Journal
from tritium.bench.gpu.process import die_with_parent
from tritium.bench.gpu.suite import (
    BEGUN,
    COLLECTED,
    FAILURES,
    FOLDER,
    RESULTS,
    SHARE,
    UNUSABLE,
    costs,
    results,
)

LONGEST = 300  # characters of a reason
SLOW = 2.0  # seconds that a test marked slow takes at least


def pytest_configure(config: pytest.Config) -> None:
    """Prepare the file of results, to which each process of a session adds its own."""
    die_with_parent()
    config.pluginmanager.register(
        Results(Path(os.environ[FOLDER]) / RESULTS, int(os.environ.get(SHARE, "0")))
    )


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what ran before; take one test of every file after the other, quick ones first."""
    folder = Path(os.environ[FOLDER])
    known = results(folder)
    left_out = [item for item in items if item.nodeid in known]
    config.hook.pytest_deselected(items=left_out)
    by_name = {item.nodeid: item for item in items if item.nodeid not in known}
    took = costs(folder)
    seconds = {
        name: took.get(name.partition("[")[0], SLOW if item.get_closest_marker("slow") else 0.0)
        for name, item in by_name.items()
    }
    items[:] = [by_name[name] for name in sample_order(list(by_name), seconds)]


def sample_order(names: list[str], seconds: Mapping[str, float]) -> list[str]:
    """Order names of tests so that a run that is cut has seen as much of each file as it could.

    First those that take up to one of their `seconds`, then those up to two, up to four, and so
    on. Of each: first the first case of the first function of each file, then of the second, and so
    on; then the second case of each function.
    """
    seen: Counter[str] = Counter()
    functions: Counter[str] = Counter()
    places: dict[str, tuple[float, int, int]] = {}
    for name in names:
        function, file = name.partition("[")[0], name.partition("::")[0]
        if not seen[function]:
            functions[file] += 1
        places[name] = (doublings(seconds[name]), seen[function], functions[file])
        seen[function] += 1
    return sorted(names, key=places.__getitem__)  # stable: files keep their order


def doublings(seconds: float) -> float:
    """Doublings of one second until it is `seconds`; 0 for less than one."""
    return math.inf if seconds == math.inf else math.ceil(math.log2(max(seconds, 1.0)))


def pytest_runtest_logfinish(nodeid: str) -> None:
    """End a process whose GPU no longer answers: its next tests would fail through no fault."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(UNUSABLE)  # the session starts another for the rest


class Results:
    """Writes an entry for each test: its name, outcome, what failed; and where, in a text file."""

    def __init__(self, path: Path, share: int) -> None:
        self.journal, self.failures = Journal(path, keep=False), path.with_name(FAILURES)
        self.share = share

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Take the tests that this process has collected."""
        tests = len(session.items)
        self.journal.append(test="", outcome=COLLECTED, tests=tests, share=self.share)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Take the name of a test that begins: one that never ends is last the next time."""
        self.journal.append(test=nodeid, outcome=BEGUN, share=self.share)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take a report of one phase of a test: of its call, or of what went wrong around it."""
        if report.when == "call" or not report.passed:
            reason = "" if report.passed else reason_of(report)
            self.journal.append(
                test=report.nodeid, outcome=report.outcome, seconds=report.duration, reason=reason
            )
        if report.failed:  # pytest prints it at its end, which a cut run does not reach
            with self.failures.open("a") as file:
                file.write(f"{report.nodeid}, {report.when}\n{report.longreprtext}\n\n")


def reason_of(report: pytest.TestReport) -> str:
    """The line that says what failed, or why a test was skipped."""
    if isinstance(report.longrepr, tuple):
        return report.longrepr[2][:LONGEST]
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash else str(report.longrepr)
    return " ".join(text.split())[:LONGEST]
