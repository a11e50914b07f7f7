"""Tests' part of a session: a sample of every file, in parallel, each result kept at once."""

import math
import os
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from tritium.bench.gpu.journal import Journal, read
from tritium.bench.gpu.process import ROOT, cause, end, environment

TESTS = ("tests/kernels", "tests/model")
CPU_TESTS = tuple(f"tests/kernels/test_{op}.py" for op in ("relu_squared", "swiglu", "mse_loss"))
EXAMPLES = "4"  # of a property
RESULTS, LOG = "tests.jsonl", "tests.log"
FAILURES = "tests-failed.txt"
COLLECTED, BEGUN = "collected", "begun"  # entries that are no test's result
PLUGIN = "tritium.bench.gpu.pytest_results"
FOLDER, SHARE = "TRITIUM_BENCH_FOLDER", "TRITIUM_BENCH_SHARE"
UNUSABLE = 70  # exit status of a process whose GPU context is broken
ENDED = (0, 1, 5)  # statuses of pytest: all passed, some failed, none was left to run
CRASHES = 20  # of a share, behind which the rest of it is left out


class Suite:
    """Processes of pytest, each with a share of the files, until they end or are ended.

    Each collects its own files alone: with pytest-xdist each collected all, and a host that was
    slow had run 81 tests when 84 seconds were over, where this way it ran 2,530 in 110.

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
        self.folder, self.root, self.cuda = folder, root, cuda
        self.tests = tests or (TESTS if cuda else CPU_TESTS)
        self.shares = [_Share(files) for files in shares(root, self.tests, processes)]
        self.before = 0

    @property
    def command(self) -> str:
        """The command of one process, for its files in place of FILES."""
        return " ".join(["python", *_arguments([]), "FILES"])

    @property
    def missing(self) -> str:
        """The reason why no tests can be run, "" if they can."""
        if not (self.root / self.tests[0]).exists():
            return "there are no tests here: they are in a checkout, not in a wheel"
        return "" if find_spec("pytest") else "pytest is not installed"

    @property
    def started(self) -> bool:
        """Whether a process was started."""
        return any(share.process is not None for share in self.shares)

    def start(self) -> None:
        """Start, without the tests that ran in a session before."""
        path = self.folder / RESULTS
        Journal(path)  # which removes a line that a kill cut short: others append behind it
        self.before = path.stat().st_size if path.exists() else 0
        for number in range(len(self.shares)):
            self._start(number)

    def _start(self, number: int) -> None:
        share = self.shares[number]
        variables = {
            "PYTHONHASHSEED": "0", "TRITIUM_EXAMPLES": EXAMPLES, FOLDER: str(self.folder),
            SHARE: str(number), "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        if not self.cuda:
            variables["TRITON_INTERPRET"] = "1"
        with (self.folder / LOG).open("ab") as log:
            share.process = subprocess.Popen(
                [sys.executable, *_arguments(share.files)], cwd=self.root,
                env=environment() | variables, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip

    @property
    def running(self) -> bool:
        """Whether tests run; a process that died is replaced by one for the rest of its files."""
        states = [self._runs(number) for number in range(len(self.shares))]  # looks at each
        return any(states)

    def _runs(self, number: int) -> bool:
        share = self.shares[number]
        if share.process is None or (status := share.process.poll()) is None:
            return share.process is not None
        if status in ENDED or share.crashes == CRASHES:
            return False
        names = [entry["test"] for entry in self._entries() if entry.get("share") == number]
        last = names[-1] if names else ""
        if last and last not in results(self.folder):
            journal = Journal(self.folder / RESULTS, keep=False)
            journal.append(test=last, outcome="failed", reason=f"the process {cause(status)}")
        elif status != UNUSABLE:
            return False  # no test killed it: files that cannot be collected, or pytest itself
        share.crashes += 1
        self._start(number)
        return True

    def _entries(self) -> list[dict]:
        """Entries since the start."""
        return _entries(self.folder, self.before)

    @property
    def left(self) -> int | None:
        """Tests that were collected and have not ended; None while some are collected."""
        collected: dict[int, int] = {}
        ended = set()
        for entry in self._entries():
            if entry["outcome"] == COLLECTED:
                collected.setdefault(entry["share"], entry["tests"])
            elif entry["outcome"] != BEGUN:
                ended.add(entry["test"])
        if len(collected) < sum(share.process is not None for share in self.shares):
            return None
        return sum(collected.values()) - len(ended)

    def end(self) -> str:
        """End it; return how it ended: complete, cut, or with what status."""
        if not self.started:
            return "not started"
        processes = [share.process for share in self.shares if share.process is not None]
        if any(process.poll() is None for process in processes):
            for process in processes:
                end(process)
            return "cut"
        unusual = {process.returncode for process in processes} - {*ENDED}
        return f"pytest ended with status {min(unusual)}: {LOG}" if unusual else "complete"


@dataclass
class _Share:
    """Files of one process."""

    files: list[str]
    process: subprocess.Popen | None = None
    crashes: int = 0


def shares(root: Path, tests: tuple[str, ...], processes: int) -> list[list[str]]:
    """Divide files among processes so that each has about as many bytes of tests."""
    files: set[Path] = set()
    for test in tests:
        path = root / test
        files |= {*path.rglob("test_*.py")} if path.is_dir() else {path}
    found: list[tuple[int, list[str]]] = [(0, []) for _ in range(min(processes, len(files)))]
    sizes = {file: file.stat().st_size if file.exists() else 0 for file in files}
    for file in sorted(files, key=lambda x: (-sizes[x], x)):
        least = min(range(len(found)), key=lambda i: found[i][0])
        size, names = found[least]
        found[least] = size + sizes[file], [*names, file.relative_to(root).as_posix()]
    return [names for _, names in found]


def _arguments(files: list[str]) -> list[str]:
    without = ("cacheprovider", "benchmark", "xdist")
    off = (word for name in without for word in ("-p", f"no:{name}"))
    return ["-m", "pytest", "-q", "--tb=short", "-p", PLUGIN, *off, *files]


def results(folder: Path) -> dict[str, dict]:
    """The last result of each test that ran, by name."""
    entries = (x for x in _entries(folder) if x["test"] and x["outcome"] != BEGUN)
    return {entry["test"]: entry for entry in entries}


def _entries(folder: Path, start: int = 0) -> list[dict]:
    """The complete lines of the results from a byte on; pytest may be writing another."""
    return read(folder / RESULTS, start)


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
