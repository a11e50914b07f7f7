"""Prove that compilations run in parallel, survive a crash, and end when they are ended."""

import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from tritium.bench.gpu.ahead import Ahead
from tritium.bench.gpu.process import Worker
from tritium.bench.gpu.tasks import OPERATION, Task

ANSWERING = (sys.executable, str(Path(__file__).parent / "answering.py"))


def tasks_of(*names: str) -> list[Task]:
    return [Task(OPERATION, "softmax", str(i), who, "both") for i, who in enumerate(names)]


@pytest.fixture
def started(tmp_path):
    """Processes started, and what starts one."""
    workers: list[Worker] = []
    with (tmp_path / "log").open("wb") as log:

        def start() -> Worker:
            workers.append(Worker(log, ANSWERING))
            return workers[-1]

        yield workers, start
        for worker in workers:
            worker.end()


def compiling(tasks, processes, start):
    done: dict[str, str] = {}
    made = Ahead(
        tasks, processes, start, lambda task: {"task": asdict(task)},
        lambda task, problem: done.update({task.implementation + task.shape: problem}),
    )  # fmt: skip
    return made, done


def wait(made: Ahead, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while made.running:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_crash_costs_its_own_compilation(started):
    workers, start = started
    made, done = compiling(tasks_of("a", "crashes", "b", "c", "d"), 2, start)
    wait(made)
    made.end()
    assert done == {"a0": "", "crashes1": "crashed: SIGSEGV", "b2": "", "c3": "", "d4": ""}
    assert len(workers) <= 3
    assert not any(worker.alive for worker in workers)


def test_ends_at_once_and_reports_nothing_that_it_cut(started):
    workers, start = started
    made, done = compiling(tasks_of("hangs", "hangs", "a"), 2, start)
    while len(workers) < 2:
        time.sleep(0.02)
    before = time.monotonic()
    made.end()
    assert time.monotonic() - before < 5
    assert not any(worker.alive for worker in workers)
    assert done == {}


def test_no_more_processes_than_compilations(started):
    workers, start = started
    made, done = compiling(tasks_of("a"), 8, start)
    wait(made)
    assert len(workers) == 1
    assert done == {"a0": ""}
