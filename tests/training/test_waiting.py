"""Prove that idle threads sleep where others want the cores, spin where not, and change no bit."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tritium.training import waiting
from tritium.training.waiting import (
    BUSY,
    CALM,
    FREE,
    SPEAK_AGAIN,
    Load,
    SleepingTeam,
    ThreadWaiting,
)

ROOT = Path(__file__).parents[2]
CORES = len(os.sched_getaffinity(0))

# What a thread burns that has nothing to do: an operation, then a pause, fifty times.
BURNT = """
import ctypes, os, sys, time, torch
from tritium.training.waiting import SleepingTeam
torch.set_num_threads(2)
x, y = torch.rand(64, 1024), torch.rand(1024, 64)
team, products = SleepingTeam(), []
def burnt():
    took = 0.0
    for _ in range(50):
        products.append(x.exp() @ y)
        before = time.process_time()
        time.sleep(0.004)
        took += time.process_time() - before
    return took
def threads(): return len(os.listdir("/proc/self/task"))
burnt()
rest = threads()
spinning = burnt()
team.assemble(2)
more = threads() - rest
asleep = burnt()
team.dismiss()
time.sleep(0.1)
print(spinning, asleep, burnt(), more, threads() - rest)
assert all(torch.equal(products[0], other) for other in products)
"""


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(CORES + 1)  # so that the cores suffice for nobody else
    yield
    torch.set_num_threads(before)


def test_a_team_makes_waiting_threads_sleep_and_its_end_lets_them_spin():
    environment = {k: x for k, x in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    done = subprocess.run(
        [sys.executable, "-c", BURNT], cwd=ROOT, env=environment, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    spinning, asleep, again, more, left = map(float, done.stdout.split())
    assert asleep < 0.025, "an idle thread has burnt more than an eighth of 0.2 seconds"
    assert more >= 2
    assert left == 0
    if CORES > 1:  # with one, threads never spin
        assert asleep < min(spinning, again)


def test_the_load_of_others_is_what_the_cores_did_less_what_this_process_did(monkeypatch, tmp_path):
    stat = tmp_path / "stat"
    monkeypatch.setattr(waiting, "STAT", stat)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 10})
    clocks = iter([(0.0, 5.0), (2.0, 6.0), (4.0, 9.0)])
    now = [0.0, 0.0]
    monkeypatch.setattr(waiting.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(waiting.time, "process_time", lambda: now[1])

    def at(*ticks: str) -> None:
        now[:] = next(clocks)
        stat.write_text("cpu  9 9 9 9 9 9 9 9 0 0\n" + "\n".join(ticks) + "\nintr 5 0\n")

    tick = os.sysconf("SC_CLK_TCK")
    at("cpu0 0 0 0 50 7 0 0 0 0 0", "cpu1 0 0 0 0 0 0 0 0 0 0", "cpu10 0 0 0 0 0 0 0 0 0 0")
    load = Load()
    at(  # three seconds of core 0, one of core 10, of which one is Tritium's; core 1 is not for us
        f"cpu0 {tick} {tick} 0 5000 70 0 0 {tick} 0 0",
        f"cpu1 {99 * tick} 0 0 0 0 0 0 0 0 0",
        f"cpu10 0 0 0 0 0 {tick} 0 0 0 0",
    )
    assert load.of_others() == pytest.approx(3 / 2)
    at(  # nothing but ourselves, counted in ticks that lag behind
        f"cpu0 {3 * tick} {tick} 0 5000 70 0 0 {tick} 0 0", "cpu10 0 0 0 0 0 0 0 0 0 0"
    )
    assert load.of_others() == 0


LOADS = st.lists(st.sampled_from([0.0, FREE, BUSY, 1.0]), max_size=60)


@settings(max_examples=50)
@given(others=LOADS)
def test_every_history_of_load_ends_in_the_right_way_to_wait(others):
    said, before = [], torch.get_num_threads()
    torch.set_num_threads(max(2, CORES))
    spare = CORES - torch.get_num_threads()
    chooser = ThreadWaiting(said.append)
    expected, calm = False, 0
    try:
        for i, load in enumerate(others):
            chooser.judge(load + spare, float(i))
            calm = calm + 1 if load < FREE else 0
            expected = load > BUSY or (expected and calm < CALM)
            assert chooser.asleep == expected
    finally:
        chooser.__exit__()
        torch.set_num_threads(before)
    assert not chooser.asleep
    assert bool(said) == any(load > BUSY for load in others)
    assert len(said) <= 1 + len(others) // SPEAK_AGAIN  # once a minute, at a look a second


def test_one_thread_has_nobody_to_wait_for():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        chooser = ThreadWaiting(print)
        chooser.judge(float(CORES), 0.0)
        assert not chooser.asleep
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT"])
def test_what_the_user_set_stays(name, monkeypatch, two_threads):
    monkeypatch.setattr(waiting, "SECONDS", 0.01)
    monkeypatch.setattr(Load, "of_others", lambda _: 1.0)
    said = []
    for user_chose in (True, False):
        if user_chose:
            monkeypatch.setenv(name, "7")
        else:
            monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
            monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
        with ThreadWaiting(said.append) as chooser:
            chooser._stop.wait(0.3)
            assert chooser.asleep == (not user_chose and SleepingTeam.possible())
    assert len(said) == SleepingTeam.possible()


@pytest.mark.parametrize("text", [None, "cpu0 1 2\n", "cpu0 a b c d e f g h\n"])
def test_a_system_without_such_a_stat_is_left_as_it_is(text, monkeypatch, tmp_path, two_threads):
    monkeypatch.setattr(waiting, "STAT", tmp_path / "stat")
    monkeypatch.setattr(waiting, "SECONDS", 0.01)
    if text is not None:
        (tmp_path / "stat").write_text(text)
    said = []
    with ThreadWaiting(said.append) as chooser:
        chooser._stop.wait(0.05)
    assert not said
