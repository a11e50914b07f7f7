"""Waiting of OpenMP's threads: spinning on free cores, asleep if other processes want the cores.

A thread that has done its share of an operation spins for some milliseconds, because the next
operation comes sooner than a sleeping thread wakes up. On a core that another process wants, that
spinning takes the time which the other threads of the same operation need, and a run falls to a
tenth of its speed instead of to the half that is left. Which way of waiting is better changes with
the load, so it is chosen while the run continues. The number of threads is not: sums depend on it,
and a run must end in the same bits on a busy machine.

GNU's OpenMP, which PyTorch's packages for Linux bring, shortens the spinning a thousandfold while
the process has more threads of it than cores. So a team with nothing to do, whose threads sleep,
makes the others sleep too. OMP_WAIT_POLICY and GOMP_SPINCOUNT win where a user sets them.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable
from pathlib import Path
from threading import Event, Thread

import torch

SECONDS = 0.5  # from one look at the load to the next
BUSY, FREE = 0.25, 0.1  # cores that are missing: asleep above the one, spinning below the other
CALM = 3  # looks in a row that find the cores free, before threads spin again
SPEAK_AGAIN = 60.0  # seconds after the last line
STAT = Path("/proc/stat")


class ThreadWaiting:
    """Inside the block, chooses by the machine's load how idle threads wait, and says so.

    Nothing happens without GNU's OpenMP, with one thread, where /proc/stat cannot be read, or where
    the user has chosen in the environment.

    Args:
        log: called with one line on every change, at most once a minute.
    """

    def __init__(self, log: Callable[[str], None]):
        self._log, self._spoken = log, -SPEAK_AGAIN
        self._calm, self._team = 0, SleepingTeam()
        self._stop = Event()
        self._watcher: Thread | None = None

    def __enter__(self) -> ThreadWaiting:
        chosen = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys()
        if SleepingTeam.possible() and not chosen:
            self._watcher = Thread(target=self._watch, name="load", daemon=True)
            self._watcher.start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        if self._watcher is not None:
            self._watcher.join()
        self._team.dismiss()

    @property
    def asleep(self) -> bool:
        """Whether threads sleep while they wait."""
        return self._team.present

    def judge(self, others: float, now: float) -> None:
        """Choose.

        Args:
            others: cores that other processes have used since the last look.
            now: seconds, of any clock.
        """
        cores, threads = len(os.sched_getaffinity(0)), torch.get_num_threads()
        missing = threads + others - cores
        self._calm = self._calm + 1 if missing < FREE else 0
        if threads > 1 and not self.asleep and missing > BUSY:
            self._team.assemble(threads)
            self._say(
                now,
                f"The cores are busy: others use {others:.1f} of {cores}, so {threads} threads "
                "sleep while they wait for each other; no bit of the result changes.",
            )
        elif self.asleep and self._calm >= CALM:
            self._team.dismiss()
            self._say(now, f"The cores are free again: {threads} threads spin while they wait.")

    def _say(self, now: float, line: str) -> None:
        if now - self._spoken >= SPEAK_AGAIN:
            self._spoken = now
            self._log(line)

    def _watch(self) -> None:
        try:
            load = Load()
            while not self._stop.wait(SECONDS):
                self.judge(load.of_others(), time.perf_counter())
        except (
            OSError,
            ValueError,
            RuntimeError,
        ):  # no /proc/stat as Linux has it, no more threads
            return


class Load:
    """Measures how much of the cores that this process may use goes to others."""

    def __init__(self):
        self._last = self._read()

    def of_others(self) -> float:
        """Return the cores that other processes have used since the last call."""
        before, self._last = self._last, self._read()
        wall, used, own = (b - a for a, b in zip(before, self._last, strict=True))
        return max(0.0, (used - own) / max(wall, 1e-9))

    @staticmethod
    def _read() -> tuple[float, float, float]:
        """Return seconds: of a clock, that the cores were in use, and that this process used."""
        used = cpu_seconds(STAT.read_text(), os.sched_getaffinity(0))
        return time.perf_counter(), used, time.process_time()


def cpu_seconds(stat: str, cores: set[int]) -> float:
    """Return how long cores have been in use, or taken by a hypervisor, from /proc/stat's text."""
    ticks = 0
    for line in stat.splitlines():
        name, *fields = line.split()
        if name.startswith("cpu") and name != "cpu" and int(name[3:]) in cores:
            user, nice, system, _idle, _waiting, interrupts, soft, stolen = map(int, fields[:8])
            ticks += user + nice + system + interrupts + soft + stolen
    return ticks / os.sysconf("SC_CLK_TCK")


class SleepingTeam:
    """A second team of OpenMP threads, with nothing to do: with it there are more than cores."""

    def __init__(self):
        self._end = Event()
        self._leader: Thread | None = None

    @staticmethod
    def possible() -> bool:
        """Whether this process runs on GNU's OpenMP."""
        return hasattr(ctypes.CDLL(None), "GOMP_parallel")

    @property
    def present(self) -> bool:
        """Whether the team is there."""
        return self._leader is not None

    def assemble(self, threads: int) -> None:
        """Start the team, in addition to the process's team of so many threads."""
        self._end, there = Event(), Event()
        self._leader = Thread(
            target=self._lead, args=(threads, self._end, there), name="team", daemon=True
        )
        self._leader.start()
        there.wait()

    def dismiss(self) -> None:
        """End the team, if it is there; its threads end with the one that leads them."""
        if self._leader is not None:
            self._end.set()
            self._leader.join()
            self._leader = None

    @staticmethod
    def _lead(threads: int, end: Event, there: Event) -> None:
        library = ctypes.CDLL(None)
        nothing = ctypes.cast(library.sched_yield, ctypes.c_void_p)  # it has to call something
        missing = max(0, library.omp_get_num_procs() - threads)
        library.GOMP_parallel(nothing, None, missing + 2, 0)  # of which the leader itself is one
        there.set()
        end.wait()
