"""Session on a GPU that one has for N minutes: `python -m tritium.bench gpu --minutes N`.

In order: a sample of all tests, and beside them the compilation of what will be measured; the
training step; the optimizers; the operations. Measurements come one after the other, each in a
process that may crash, hang or run out of memory at the cost of its own row; implementations take
turns. Every row is on the disk when the next one begins. The command ends on time, and with the
same folder it continues where it stopped.
"""

import fcntl
import hashlib
import re
import shutil
import signal
import subprocess
import time
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

import torch
from rich.console import Console

from tritium.bench import harness, tables
from tritium.bench.compare import command_line, versions
from tritium.bench.ends import WrongInputError
from tritium.bench.gpu import START, ahead, page, picture
from tritium.bench.gpu.blocked import Blocked
from tritium.bench.gpu.journal import Journal
from tritium.bench.gpu.process import Died, Late, Worker
from tritium.bench.gpu.progress import Progress
from tritium.bench.gpu.suite import Suite, processes_here
from tritium.bench.gpu.tasks import RATES, Task, tasks
from tritium.training.run.fingerprint import code_version

JOURNAL, WORKER_LOG = "rows.jsonl", "worker.log"
SECONDS = {"cuda": 0.1, "cpu": 0.03}  # of one timing
TESTS_SHARE, TESTS_MOST = 0.35, 300.0  # of the minutes; seconds
TESTS_LATEST = 0.6  # of the minutes, where pytest took most of the share to collect its tests
PAGE_SHARE, PAGE_LEAST = 0.03, 5.0  # of the minutes, for the page and the picture; seconds
LEAST = 2.0  # seconds below which no measurement is begun
PAGE_EVERY = 30.0  # seconds between pages while it runs
CLOCKS = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw")


class Session:
    """One call of the command.

    Args:
        folder: of the results; that of a session before continues it.
        minutes: of this call, the start of Python's libraries included.
        device: where measurements run.
        compiled: whether torch.compile is measured.
        console: for progress.
        start: when the minutes began, by `time.monotonic`.
    """

    def __init__(
        self,
        folder: Path,
        minutes: float,
        device: torch.device,
        compiled: bool,
        console: Console,
        start: float = START,
    ) -> None:
        self.folder, self.device, self.compiled = folder, device, compiled
        self.start, self.console = start, console
        self.seconds = 60 * minutes
        reserve = max(PAGE_LEAST, PAGE_SHARE * self.seconds)
        self.deadline = start + self.seconds - reserve
        self.journal = Journal(folder / JOURNAL)
        self.tasks = list(tasks(device, compiled))
        self.log: IO | None = None
        self.worker: Worker | None = None
        self.spare: Worker | None = None
        self.rates: dict | None = None
        self.blocked = Blocked()
        for entry in self.journal.entries:
            self._learn(entry)

    @property
    def left(self) -> float:
        """Seconds until no measurement runs any more."""
        return self.deadline - time.monotonic()

    def open(self, minutes: float) -> None:
        """Write what this call is; refuse to mix it with another device's or other code's."""
        cuda = self.device.type == "cuda"
        now = {
            "device": harness.device_name(self.device), "cuda": cuda, "versions": versions(),
            "code": hashlib.sha256(repr(sorted(code_version().items())).encode()).hexdigest()[:12],
        }  # fmt: skip
        for before in self.journal.of("session")[:1]:
            if different := [name for name in now if before[name] != now[name]]:
                found = "; ".join(f"{x} was {before[x]}, is {now[x]}" for x in different)
                raise WrongInputError(
                    f"{self.folder} must hold measurements of one device and one "
                    f"version of the code: {found}; name another folder with --out"
                )
        date = datetime.now(UTC).isoformat(timespec="seconds")
        self.journal.append(
            kind="session", date=date, minutes=minutes, command=command_line(), **now
        )

    def run(self, tests: bool) -> None:
        """Do as much as the time allows; the page and the picture are made at the end."""
        with (self.folder / WORKER_LOG).open("ab") as self.log:
            try:
                self.spare = self._start()  # imports what it needs while the tests run
                self._tests_and_compilations(tests)
                self._measurements()
            finally:
                for worker in (self.worker, self.spare):
                    if worker is not None:
                        worker.end()
                self.close()

    def close(self) -> None:
        """Write the page and draw the picture of all that is there."""
        self.journal.append(kind="end", seconds=round(time.monotonic() - self.start, 1))
        found = page.Found(self.folder, self.journal.entries, self.tasks)
        picture.draw(found, self.folder / "results.png")
        page.write(found, self.folder / "results.md")
        self.console.print(f"{found.summary}\nWrote {self.folder / 'results.md'}", markup=False)

    def _tests_and_compilations(self, tests: bool) -> None:
        share = min(TESTS_SHARE * self.seconds, TESTS_MOST)
        until = min(self.start + share, self.deadline)
        latest = min(max(self.start + TESTS_LATEST * self.seconds, until), self.deadline)
        cuda = self.device.type == "cuda"
        suite = Suite(self.folder, processes_here(cuda), cuda=cuda) if tests else None
        ended = {entry["how"] for entry in self.journal.of("tests")}
        if suite is not None and "complete" not in ended and not suite.missing:
            suite.start()
        compiling = self._ahead() if cuda else None
        try:
            with Progress(self.console, self.folder) as progress:
                while time.monotonic() < until:
                    if not ((suite and suite.running) or (compiling and compiling.running)):
                        break
                    progress.tests(until - time.monotonic(), compiling and compiling.tasks.qsize())
                    time.sleep(0.2)
                    if suite and suite.running and suite.left is None:  # half of it is for running
                        until = min(max(until, time.monotonic() + share / 2), latest)
        finally:
            if compiling is not None:
                compiling.end()
            if suite is not None and (suite.started or suite.missing):
                how, command = suite.missing or suite.end(), suite.command
                self.journal.append(kind="tests", how=how, left=suite.left, command=command)

    def _ahead(self) -> ahead.Ahead:
        known = {entry["key"] for entry in self.journal.of("ahead")}
        todo = [x for x in ahead.compilations(self._unmeasured()) if x.key not in known]

        def done(task: Task, problem: str) -> None:
            self.journal.append(kind="ahead", key=task.key, problem=problem)

        def order(task: Task) -> dict:
            return self._order(task) | {"warm": True}

        return ahead.Ahead(
            todo, ahead.processes_here(), self._start, order, done
        )  # fmt: skip

    def _start(self) -> Worker:
        assert self.log is not None
        return Worker(self.log)

    def _unmeasured(self) -> list[Task]:
        done = {entry["key"] for entry in self.journal.of("row")}
        return [task for task in self.tasks if task.key not in done]

    def _order(self, task: Task) -> dict:
        return {
            "task": asdict(task), "rates": self.rates, "compiled": self.compiled,
            "seconds": SECONDS[self.device.type],
        }  # fmt: skip

    def _measurements(self) -> None:
        todo = self._unmeasured()
        shown, group = time.monotonic(), None
        with Progress(self.console, self.folder) as progress:
            for i, task in enumerate(todo):
                if self.left < LEAST:
                    return
                if self.blocked.by(task):
                    continue
                if task.kind != RATES and self.rates is None:
                    return  # the device could not be measured: there are no bounds
                if task.group != group:
                    group = task.group
                    self._note_clocks()
                    if time.monotonic() > shown + PAGE_EVERY:
                        found = page.Found(self.folder, self.journal.entries, self.tasks)
                        page.write(found, self.folder / "results.md")
                        shown = time.monotonic()
                progress.task(task, i, len(todo), self.left)
                if not self._measure(task):
                    return

    def _measure(self, task: Task) -> bool:
        """Measure one task and write its row; whether there is time for another."""
        if self.worker is None or not self.worker.alive:
            if self.worker is not None:
                self.worker.end()
            self.worker = self.spare or self._start()
            self.spare = self._start()  # imports what it needs while the other measures
        self.journal.append(kind="begin", key=task.key)
        try:
            answer = self.worker.ask(self._order(task), task.limit, self.deadline)
        except Late as problem:
            if self.left <= 0:
                self.journal.append(kind="cut", key=task.key)
                return False
            self._fatal(task, str(problem))
            return True
        except Died as problem:
            self._fatal(task, str(problem))
            return True
        fields = {name: answer[name] for name in ("row", "rates", "text") if name in answer}
        self._write(task, **fields, problem=answer.get("problem"))
        return True

    def _fatal(self, task: Task, problem: str) -> None:
        self._write(task, problem=problem, fatal=True)

    def _write(self, task: Task, **fields: object) -> None:
        self.journal.append(kind="row", key=task.key, task=asdict(task), **fields)
        self._learn(self.journal.entries[-1])

    def _learn(self, entry: dict) -> None:
        """Take from an entry what later measurements depend on."""
        self.blocked.learn(entry)
        self.rates = entry.get("rates") or self.rates

    def _note_clocks(self) -> None:
        if found := clocks(self.device):
            self.journal.append(kind="clocks", **found)


def clocks(device: torch.device) -> dict[str, float] | None:
    """Clocks, temperature and power of the GPU now; None where nothing says them."""
    if device.type != "cuda" or not shutil.which("nvidia-smi"):
        return None
    command = ["nvidia-smi", f"--query-gpu={','.join(CLOCKS)}", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=5).stdout
        return dict(zip(CLOCKS, map(float, said.splitlines()[0].split(",")), strict=True))
    except (subprocess.TimeoutExpired, ValueError, IndexError):
        return None


@contextmanager
def alone(folder: Path):
    """Keep a second session out of the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise WrongInputError(
                f"{folder} is in use by another session; wait for it, or name another "
                "folder with --out"
            ) from None
        yield


def main(
    minutes: float = 10.0,
    out: Path | None = None,
    tests: bool = True,
    compile: bool = torch.cuda.is_available(),
) -> None:
    """Use a GPU for some minutes: tests, training step, optimizers, operations, a page of results.

    Args:
        minutes: when to end. What was not reached is named; call it once more to continue.
        out: folder of results; gpu-DEVICE in the folder of results if left out.
        tests: run a sample of the tests first.
        compile: measure torch.compile too; on a CPU it takes minutes.
    """
    if minutes < 0.5:
        raise WrongInputError(f"--minutes must be 0.5 or more, got {minutes:g}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a page of what is there, even then
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = re.sub(r"[^a-z0-9]+", "-", harness.device_name(device).lower()).strip("-")
    folder = out or tables.results() / f"gpu-{name}"
    console = Console(stderr=True)
    with alone(folder):
        session = Session(folder, minutes, device, compile, console)
        session.open(minutes)
        if device.type == "cpu":
            console.print("No GPU: shapes are cut to size, and prove the instrument, no kernel.")
        try:
            session.run(tests)
        except KeyboardInterrupt:
            console.print("Interrupted; the same command continues.")
            raise SystemExit(130) from None
