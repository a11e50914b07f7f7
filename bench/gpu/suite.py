"""Tests' part of a session: a sample of every file, in parallel, each result kept at once."""

import json
import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import IO

from tritium.bench.gpu.process import ROOT, end, environment

TESTS = ("tests/kernels", "tests/model")
CPU_TESTS = tuple(f"tests/kernels/test_{op}.py" for op in ("relu_squared", "swiglu", "mse_loss"))
EXAMPLES = "4"  # of a property
RESULTS, KNOWN, LOG = "tests.jsonl", "tests-known.txt", "tests.log"
FAILURES = "tests-failed.txt"
STARTED, COLLECTED, BEGUN = "started", "collected", "begun"  # entries that are no test's result
PLUGIN = "tritium.bench.gpu.pytest_results"
FOLDER = "TRITIUM_BENCH_FOLDER"


class Suite:
    """Pytest in processes of its own, until it ends or is ended.

    Args:
        folder: of the session.
        processes: that run tests at a time.
        cuda: whether they use the GPU; without one they are few.
        tests: files and folders, in place of those.
        root: where they are.
    """

    def __init__(
        self,
        folder: Path,
        processes: int,
        cuda: bool,
        tests: tuple[str, ...] = (),
        root: Path = ROOT,
    ) -> None:
        self.folder, self.root = folder, root
        self.tests = tests or (TESTS if cuda else CPU_TESTS)
        self.command = command(processes, self.tests)
        self.cuda = cuda
        self.process: subprocess.Popen | None = None

    @property
    def missing(self) -> str:
        """The reason why no tests can be run, "" if they can."""
        if not (self.root / self.tests[0]).exists():
            return "there are no tests here: they are in a checkout, not in a wheel"
        return "" if find_spec("pytest") else "pytest is not installed"

    def start(self) -> None:
        """Start, without the tests that ran in a session before."""
        ran = results(self.folder)
        # In a file of its own: a process that replaces another must collect the same tests.
        (self.folder / KNOWN).write_text("".join(f"{name}\n" for name in ran))
        variables = {"PYTHONHASHSEED": "0", "TRITIUM_EXAMPLES": EXAMPLES, FOLDER: str(self.folder)}
        if not self.cuda:
            variables |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        with (self.folder / LOG).open("ab") as log:
            self.process = self._popen(environment() | variables, log)

    def _popen(self, variables: dict[str, str], log: IO) -> subprocess.Popen:
        return subprocess.Popen(
            self.command, cwd=self.root, env=variables, stdin=subprocess.DEVNULL, stdout=log,
            stderr=log, start_new_session=True,
        )  # fmt: skip

    @property
    def running(self) -> bool:
        """Whether tests run."""
        return self.process is not None and self.process.poll() is None

    @property
    def left(self) -> int | None:
        """Tests that this run has collected and not ended; None while it collects."""
        collected, ended = None, set()
        for entry in _entries(self.folder):
            if entry["outcome"] == STARTED:
                collected, ended = None, set()
            elif entry["outcome"] == COLLECTED:
                collected = entry["tests"]
            elif entry["outcome"] != BEGUN:
                ended.add(entry["test"])
        return None if collected is None else collected - len(ended)

    def end(self) -> str:
        """End it; return how it ended: complete, cut, or with what status."""
        if self.process is None:
            return "not started"
        if self.running:
            end(self.process)
            return "cut"
        status = self.process.returncode
        return "complete" if status in (0, 1, 5) else f"pytest ended with status {status}: {LOG}"


def command(processes: int, tests: tuple[str, ...]) -> list[str]:
    """The command that runs them, in parallel if pytest-xdist is installed."""
    words = [sys.executable, "-m", "pytest", "-q", "-p", PLUGIN, "-p", "no:benchmark"]
    words += ["-p", "no:cacheprovider", "--tb=short"]
    if processes > 1 and find_spec("xdist"):
        words += ["-n", str(processes), "--maxschedchunk=4", "--max-worker-restart=1000"]
    return [*words, *tests]


def results(folder: Path) -> dict[str, dict]:
    """The last result of each test that ran, by name."""
    entries = (x for x in _entries(folder) if x["test"] and x["outcome"] != BEGUN)
    return {entry["test"]: entry for entry in entries}


def _entries(folder: Path) -> list[dict]:
    """The complete lines of the results; pytest may be writing another."""
    path = folder / RESULTS
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


def costs(folder: Path) -> dict[str, float]:
    """Seconds that each test function took, in its longest case; inf where the end cut one."""
    found: dict[str, float] = {}
    last = {entry["test"]: entry for entry in _entries(folder) if entry["test"]}
    for name, entry in last.items():
        function = name.partition("[")[0]
        found[function] = max(found.get(function, 0.0), entry.get("seconds", math.inf))
    return found


def processes_here(cuda: bool) -> int:
    """Processes for the tests: one a core, with a few cores left for the compilations."""
    cores = len(os.sched_getaffinity(0))
    return max(1, min(cores - cores // 4, 16)) if cuda else max(1, min(cores // 2, 8))
