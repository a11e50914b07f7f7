"""Host cost of a step: number of launches, and time until the call returns.

On a GPU both are those of real calls, which are not waited for. On a CPU the kernels are compiled
for the GPU of `_stub_driver` and launched there, which runs nothing: the host's part is left.
"""

import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
import triton
from triton import knobs

from tritium.bench.compiled._stub_driver import StubDriver
from tritium.bench.harness import Call
from tritium.kernels import runtime

ROUNDS, CALLS = 6, 30
PAUSE = 0.1  # seconds between rounds: a neighbour's disturbance lasts longer than a round
LAUNCH = re.compile(r"cu(da)?(Launch\w*Kernel|Memcpy|Memset|GraphLaunch)")


@dataclass(frozen=True)
class HostCost:
    """Host cost of one call."""

    launches: int | None
    """Kernels, copies and fills that the device was asked for; None if they cannot be counted."""
    microseconds: float
    """The least median of several rounds: what else the host does only adds to it."""


def of_gpu_call(call: Call) -> HostCost:
    """The cost of a call that launches on the GPU."""
    call()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    launches = count_launches(event.name for event in profile.events() or ())
    return HostCost(launches, _microseconds(call, torch.cuda.synchronize))


def count_launches(names: Iterable[str]) -> int:
    """Number of calls of CUDA among `names` that hand work to the device."""
    return sum(LAUNCH.match(name) is not None for name in names)


def of_cpu_call(call: Call) -> HostCost:
    """The time of a call that computes next to nothing, on a CPU."""
    call()
    return HostCost(None, _microseconds(call))


def of_unexecuted_call(call: Call) -> HostCost | None:
    """The cost of a call of Tritium's kernels on CPU tensors; None where they are not compiled."""
    if knobs.runtime.interpret or runtime.REFERENCE:
        return None
    with unexecuted() as launches:
        call()  # compiles
        launches.clear()
        call()
        count = len(launches)
        return HostCost(count, _microseconds(call))


@contextmanager
def unexecuted() -> Iterator[list]:
    """Send CPU tensors to kernels that are compiled and not run; give the list of launches."""
    driver = _stub_driver()
    triton.runtime.driver.set_active(driver)
    before, runtime.CPU_KERNELS = runtime.CPU_KERNELS, True
    try:
        yield driver.launches
    finally:
        runtime.CPU_KERNELS = before


@cache
def _stub_driver() -> StubDriver:
    return StubDriver(90)


def _microseconds(call: Call, wait: Callable[[], object] = lambda: None) -> float:
    """The time of single calls, each until it returns, not until its work is done."""
    medians = []
    for _ in range(ROUNDS):
        time.sleep(PAUSE)
        taken = []
        for _ in range(CALLS):
            wait()
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
        medians.append(statistics.median(taken))
    wait()
    return min(medians) * 1e6
