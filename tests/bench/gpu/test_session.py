"""Prove that a session ends on time, continues where it stopped, and survives its measurements."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

from tritium.bench.ends import WrongInputError
from tritium.bench.gpu import page, process, session
from tritium.bench.gpu.blocked import Blocked
from tritium.bench.gpu.process import Died, Late, Worker
from tritium.bench.gpu.tasks import OPERATION, RATES, Task

HERE = Path(__file__).parent
ANSWERING = (sys.executable, str(HERE / "answering.py"))
CPU = torch.device("cpu")


def tasks_of(*names: str, turns: int = 2) -> list[Task]:
    return [
        Task(RATES),
        *(
            Task(OPERATION, op, "small", who, "forward", turn)
            for op in ("softmax", "rope", "swiglu")
            for turn in range(1, turns + 1)
            for who in names
        ),
    ]


@pytest.fixture
def quick(monkeypatch):
    """Sessions whose workers answer at once, and whose limit is short."""
    monkeypatch.setattr(session, "Worker", lambda log: Worker(log, ANSWERING))
    monkeypatch.setattr("tritium.bench.gpu.tasks.LIMIT", 1.0)
    monkeypatch.setattr(session, "PAGE_LEAST", 0.0)
    monkeypatch.setattr(session, "LEAST", 0.2)
    monkeypatch.setattr(session.picture, "draw", lambda found, path: None)


def run(folder: Path, tasks: list[Task], seconds: float = 30.0) -> page.Found:
    made = session.Session(
        folder, seconds / 60, CPU, False, Console(quiet=True), start=time.monotonic()
    )
    made.tasks = tasks
    made.open(seconds / 60)
    made.run(tests=False)
    return page.Found(folder, made.journal.entries, tasks)


def rows_of(found: page.Found) -> set[tuple[str, str]]:
    return {(task.name, task.implementation) for task in found.rows}


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("crashes", "crashed: SIGSEGV"),
        ("exits", "ended with status 3"),
        ("hangs", "no result within 1 s"),
        ("short of memory", "out of memory"),
        ("missing", "ModuleNotFoundError: No module named 'x'"),
    ],
)
def test_a_bad_peer_costs_its_own_rows(quick, tmp_path, bad, reason):
    found = run(tmp_path, tasks_of("Tritium", bad, "eager"))
    ops = ("softmax", "rope", "swiglu")
    assert rows_of(found) == {(op, who) for op in ops for who in ("Tritium", "eager")}
    assert {key: {x.name for x in tasks} for key, tasks in found.problems.items()} == {
        (bad, reason): {"softmax"} if bad == "missing" else {*ops}
    }
    assert not found.unreached
    assert reason in (tmp_path / "results.md").read_text()


def test_a_peer_that_ends_two_shapes_has_no_third():
    blocked = Blocked()
    for shape in ("a", "b"):
        task = Task(OPERATION, "softmax", shape, "peer", "forward")
        assert not blocked.by(task)
        blocked.learn(
            {"kind": "row", "key": task.key, "task": vars(task), "problem": "x", "fatal": True}
        )
        assert blocked.by(Task(OPERATION, "softmax", shape, "peer", "both"))
    assert blocked.by(Task(OPERATION, "softmax", "c", "peer", "forward"))
    assert not blocked.by(Task(OPERATION, "rope", "c", "peer", "forward"))
    assert not blocked.by(Task(OPERATION, "softmax", "c", "other", "forward"))


def test_ends_on_time_and_names_the_rest(quick, tmp_path, monkeypatch):
    monkeypatch.setattr(session, "LEAST", 2.0)  # four times what one takes
    start = time.monotonic()
    found = run(tmp_path, tasks_of("slow", turns=20), seconds=5.0)
    assert time.monotonic() - start < 7.0
    assert not found.of("cut")  # none is begun that has no time to end
    assert found.rows
    assert found.unreached
    text = (tmp_path / "results.md").read_text()
    assert f"{found.measured} of 61 measurements. Not reached: " in text
    assert "swiglu, small (20)" in text


def test_a_measurement_that_the_end_cuts_is_measured_next_time(quick, tmp_path, monkeypatch):
    monkeypatch.setattr("tritium.bench.gpu.tasks.LIMIT", 60.0)
    tasks = [Task(RATES), Task(OPERATION, "softmax", "small", "hangs", "forward")]
    for _ in range(3):  # not even the third time is it taken for what ends sessions
        found = run(tmp_path, tasks, seconds=1.5)
        assert [task.implementation for task in found.unreached] == ["hangs"]
        assert not found.problems


def test_a_second_call_measures_the_rest_alone(quick, tmp_path):
    tasks = tasks_of("Tritium", "eager")
    first = run(tmp_path, tasks[:5])
    found = run(tmp_path, tasks)
    assert not found.unreached
    keys = [entry["key"] for entry in found.of("row")]
    assert len(keys) == len(set(keys)) == len(tasks)
    assert [entry["key"] for entry in first.of("row")] == keys[:5]
    assert len(found.sessions) == 2


def test_turns_are_merged(quick, tmp_path):
    found = run(tmp_path, tasks_of("Tritium"))
    assert {row.milliseconds for row in found.rows.values()} == {3.5}  # of 3 and 4
    assert found.drifting == [task.each for task in found.rows]


class SlowSuite:
    """Stands for the suite, and its clock: it collects for some seconds, then runs without end."""

    missing, command, started, running, now = "", "pytest", False, False, 0.0

    def __init__(self, collects: float) -> None:
        self.collects = collects

    def start(self) -> None:
        self.running, self.started = True, True

    @property
    def left(self) -> int | None:
        return None if self.now < self.collects else 5

    def end(self) -> str:
        return "cut"

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.mark.parametrize(("collects", "ends"), [(0, 42), (15, 42), (30, 51), (60, 72), (90, 72)])
def test_tests_run_for_half_their_share_where_pytest_was_slow(
    quick, tmp_path, monkeypatch, collects, ends
):
    """They end with their share; later where pytest took it to collect them, within a limit."""
    suite = SlowSuite(collects)
    monkeypatch.setattr(session, "Suite", lambda *a, **k: suite)
    monkeypatch.setattr(session, "time", suite)
    at = session.Session(tmp_path, 2.0, CPU, False, Console(quiet=True), start=0.0)
    at.tasks = []
    at.open(2.0)
    at.run(tests=True)
    assert suite.now == pytest.approx(ends, abs=0.5)
    (ended,) = at.journal.of("tests")
    assert ended["left"] == (None if collects > ends else 5)


@pytest.mark.parametrize("name", ["device", "code", "versions"])
def test_refuses_to_mix_devices_and_code(quick, tmp_path, name):
    run(tmp_path, tasks_of("Tritium", turns=1))
    path = tmp_path / session.JOURNAL
    first, *rest = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps(json.loads(first) | {name: "other"}), *rest, ""]))
    with pytest.raises(WrongInputError, match=f"{name} was other, is .*; name another folder"):
        run(tmp_path, tasks_of("Tritium", turns=1))


def test_what_killed_the_session_twice_is_left_out(quick, tmp_path):
    tasks = tasks_of("Tritium", turns=1)
    made = session.Session(tmp_path, 1.0, CPU, False, Console(quiet=True))
    for _ in range(2):
        made.journal.append(kind="begin", key=tasks[1].key)
    found = run(tmp_path, tasks)
    assert ("softmax", "Tritium") not in rows_of(found)
    assert ("rope", "Tritium") in rows_of(found)
    assert not found.unreached


PROGRAM = """
import sys, time, torch
from pathlib import Path
sys.path.insert(0, {here!r})
import test_session as t
from tritium.bench.gpu import session
session.Worker = lambda log: t.Worker(log, t.ANSWERING)
session.picture.draw = lambda found, path: None
t.run(Path({folder!r}), t.tasks_of("slow", turns=20), seconds=60.0)
"""


def test_a_kill_loses_no_row(quick, tmp_path):
    program = PROGRAM.format(here=str(HERE), folder=str(tmp_path))
    killed = subprocess.Popen([sys.executable, "-c", program], cwd=process.ROOT)
    path = tmp_path / session.JOURNAL
    deadline = time.monotonic() + 120
    while not path.exists() or path.read_bytes().count(b'"row": {') < 3:
        assert time.monotonic() < deadline
        assert killed.poll() is None
        time.sleep(0.05)
    killed.kill()
    killed.wait()
    before = list(map(json.loads, path.read_text().splitlines()[:-1]))
    rows = [entry["key"] for entry in before if entry["kind"] == "row"]
    assert len(rows) >= 3
    # A measurement that kills the session again and again is known by what was begun.
    assert [entry["key"] for entry in before if entry["kind"] == "begin"][: len(rows)] == rows
    found = run(tmp_path, tasks_of("slow", turns=2))
    assert [entry["key"] for entry in found.of("row")][: len(rows)] == rows
    assert not found.unreached


def test_a_worker_dies_with_its_session(tmp_path):
    # The worker of `tritium.bench.gpu.worker` is not needed: what it calls first is.
    program = (
        "import subprocess, sys, time\n"
        "child = 'from tritium.bench.gpu.process import die_with_parent as d; d(); '\n"
        "child += 'print(1, flush=True); import time; time.sleep(60)'\n"
        "p = subprocess.Popen([sys.executable, '-c', child], stdout=subprocess.PIPE)\n"
        "p.stdout.readline(); print(p.pid, flush=True); time.sleep(60)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, cwd=process.ROOT
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 10
    while _runs(child):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status != "Z"


def test_an_answer_that_never_comes_ends_the_process(tmp_path):
    with (tmp_path / "log").open("wb") as log:
        worker = Worker(log, ANSWERING)
        with pytest.raises(Late, match="no result within 0 s"):
            worker.ask({"task": {"kind": OPERATION, "implementation": "hangs"}}, 0.3)
        assert not worker.alive
        with pytest.raises(Died):
            worker.ask({"task": {}}, 1.0)
        worker.end()


def test_one_session_at_a_time(tmp_path):
    second = pytest.raises(WrongInputError, match="is in use by another session")
    with session.alone(tmp_path), second, session.alone(tmp_path):
        pass
    with session.alone(tmp_path):
        pass


def test_one_cache_of_compiled_kernels(monkeypatch):
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.setenv("TRITON_HOME", "/somewhere")
    assert process.environment()["TRITON_CACHE_DIR"] == "/somewhere/.triton/cache"
    monkeypatch.setenv("TRITON_CACHE_DIR", "/elsewhere")
    assert process.environment()["TRITON_CACHE_DIR"] == "/elsewhere"
    assert os.fspath(process.ROOT) in process.environment()["PYTHONPATH"].split(os.pathsep)
