"""Timing, peak memory and error of single calls, on a GPU or a CPU.

Time is that of single calls, between CUDA events or by the host's clock. Every call takes the next
of several copies of its inputs, together more than twice the last-level cache, and its outputs live
until that copy's next turn: no call finds its data in a cache. On a GPU the queue is filled behind
a kernel that sleeps for twice the time that the host was measured to take for it. A call counts
only if the host had launched all of it before the GPU began with it: then there are no gaps in
which the GPU waited for the host. A call that reads a number back has no such time; it counts where
the host's part, the most that its gaps can be, is 5 % of it at most.
"""

import itertools
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from tritium.bench.errors import as_tuple
from tritium.kernels.roofline import Device
from tritium.kernels.units import counted

Call = Callable[[], object]

PASSES = ("forward", "backward", "both")
BATCH = 50  # calls between two synchronisations with the GPU
CYCLES = 2e9  # of a GPU in a second, about
LEAST_LEAD, MOST_LEAD = 0.001, 0.5  # seconds of the host's lead over a batch
LEAST_CALLS = 5
GAPS = 0.05  # of a call's time: where the GPU may be idle for more, no time is given
MOST_CALLS = 500


def device_name(device: torch.device) -> str:
    """The name of the GPU, or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    threads = torch.get_num_threads()
    model = models[0] if models else platform.machine()
    return f"CPU {model}, {counted(threads, 'thread')}"


def cache_bytes(device: torch.device) -> int:
    """The size of the last-level cache; 32 MiB where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((int(path.read_text().strip()[:-1]) << 10 for path in sizes), default=32 << 20)


def tensor_bytes(tensors: Sequence[Tensor]) -> int:
    """The memory of `tensors` together."""
    return sum(x.numel() * x.element_size() for x in tensors)


def rotated(inputs: Sequence[Tensor], cache: int) -> list[list[Tensor]]:
    """Copies of `inputs`, that exceed twice the cache together."""
    n = 2 * cache // max(tensor_bytes(inputs), 1) + 1
    return [[x.detach().clone().requires_grad_(x.requires_grad) for x in inputs] for _ in range(n)]


def calls_of(function: Callable, inputs: Sequence[Tensor], pass_name: str) -> Call:
    """The call to time: one pass of `function` on `inputs`."""

    def forward():
        with torch.no_grad():
            return function(*inputs)

    if pass_name == "forward":
        return forward
    leaves = [x for x in inputs if x.requires_grad]
    if pass_name == "backward":
        ys = as_tuple(function(*inputs))
        dys = [_gradient_for(y) for y in ys]
        return lambda: torch.autograd.grad(ys, leaves, dys, retain_graph=True)
    dys = [_gradient_for(y) for y in as_tuple(forward())]
    return lambda: torch.autograd.grad(as_tuple(function(*inputs)), leaves, dys)


def _gradient_for(y: Tensor) -> Tensor:
    return torch.ones_like(y) if y.dim() == 0 else torch.randn_like(y)


def time_calls(
    calls: Sequence[Call],
    device: torch.device,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """Seconds of single calls of `calls` in turn, for about `seconds` in all: 5 calls or more."""
    call = _in_turn(calls)
    call()  # compiles
    estimate = _warm_up(call, device, seconds / 4, clock)
    n = min(max(int(seconds / max(estimate, 1e-7)), 5), MOST_CALLS)
    if device.type == "cuda":
        return _cuda_calls(call, n, clock)
    taken = []
    for _ in range(n):
        start = clock()
        call()
        taken.append(clock() - start)
    return taken


def _in_turn(calls: Sequence[Call]) -> Callable[[], None]:
    kept: list[object] = [None] * len(calls)
    turns = itertools.cycle(range(len(calls)))

    def call() -> None:
        turn = next(turns)
        kept[turn] = calls[turn]()

    return call


def _warm_up(
    call: Callable[[], None], device: torch.device, seconds: float, clock: Callable[[], float]
) -> float:
    """Repeat `call` for `seconds`, once or more; return the mean of its seconds."""
    n, start = 0, clock()
    while n < 1 or (clock() - start < seconds and n < MOST_CALLS):
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        n += 1
    return (clock() - start) / n


class HostBoundError(RuntimeError):
    """The GPU waits for the host, so that its time cannot be separated from the host's."""


def _cuda_calls(call: Callable[[], None], n: int, clock: Callable[[], float]) -> list[float]:
    """GPU seconds of up to `n` calls, none of which waited for the host."""
    idle = _host_seconds(call, clock)
    host = statistics.median(idle)
    taken: list[float] = []
    late: list[float] = []
    while len(taken) + len(late) < n or (len(taken) < LEAST_CALLS and len(late) < 2 * n):
        batch = min(BATCH, n, max(int(MOST_LEAD / max(2 * host, 1e-9)), 1))
        lead = min(max(2 * host * batch, LEAST_LEAD), MOST_LEAD)
        found = _cuda_batch(call, batch, lead, clock)
        taken += [seconds for seconds, waited in found.calls if not waited]
        late += [seconds for seconds, waited in found.calls if waited]
        if any(waited for _, waited in found.calls):  # slower than measured, or it reads back
            host = max(host, found.host / batch)
    if len(taken) >= LEAST_CALLS:
        return taken[:n]
    if max(idle) <= GAPS * statistics.median(late) and _reads_back(call, max(idle), clock):
        return late[:n]
    raise HostBoundError(f"the host takes {host * 1e6:.0f} us for a call")


def _host_seconds(call: Callable[[], None], clock: Callable[[], float]) -> list[float]:
    """Seconds that the host takes to launch a call, several times on an idle GPU."""
    taken = []
    for _ in range(LEAST_CALLS):
        torch.cuda.synchronize()
        start = clock()
        call()
        taken.append(clock() - start)
    torch.cuda.synchronize()
    return taken


def _reads_back(call: Callable[[], None], lead: float, clock: Callable[[], float]) -> bool:
    """Whether the host waits in a call until the GPU is there: longer behind a longer sleep."""
    behind = []
    for seconds in (LEAST_LEAD + lead, 3 * (LEAST_LEAD + lead)):
        torch.cuda.synchronize()
        torch.cuda._sleep(int(seconds * CYCLES))
        start = clock()
        call()
        behind.append(clock() - start)
    torch.cuda.synchronize()
    return behind[1] - behind[0] > LEAST_LEAD + lead


class Batch(NamedTuple):
    """Calls in the GPU's queue together."""

    calls: list[tuple[float, bool]]
    """The GPU's seconds of each, and whether the GPU began before all of it was launched."""
    host: float
    """Seconds until all were launched."""


def _cuda_batch(call: Callable[[], None], n: int, lead: float, clock: Callable[[], float]) -> Batch:
    """Time `n` calls behind a kernel that sleeps for `lead` seconds."""
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(n)]
    waited = []
    torch.cuda._sleep(int(lead * CYCLES))
    begin = clock()
    for start, end in pairs:
        start.record()
        call()
        end.record()
        waited.append(start.query())
    host = clock() - begin
    torch.cuda.synchronize()
    seconds = [start.elapsed_time(end) / 1e3 for start, end in pairs]
    return Batch(list(zip(seconds, waited, strict=True)), host)


@dataclass(frozen=True)
class Timing:
    """Milliseconds of single calls."""

    median: float
    lower_quartile: float
    upper_quartile: float


def summary(seconds: Sequence[float]) -> Timing:
    """The median and the quartiles."""
    lower, median, upper = statistics.quantiles(seconds, n=4, method="inclusive")
    return Timing(median * 1e3, lower * 1e3, upper * 1e3)


def peak_bytes(call: Call, device: torch.device) -> int | None:
    """The most memory that `call` holds at a time above what was there; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measured_device(device: torch.device, seconds: float) -> Device:
    """The rates of this device, measured: bounds in the tables are bounds at these rates."""
    cuda = device.type == "cuda"
    source = torch.ones((1 << 30 if cuda else 4 * cache_bytes(device)) // 4, device=device)
    target = torch.empty_like(source)

    def rate(call: Call, amount: float) -> float:
        return amount / min(time_calls([call], device, seconds))  # what is reachable

    def product(dtype: torch.dtype) -> float:
        n = 8192 if cuda else 1024
        a, b = torch.randn(2, n, n, device=device).to(dtype)
        return rate(lambda: torch.mm(a, b), 2 * n**3)

    fp32 = product(torch.float32)
    return Device(
        name=device_name(device),
        cuda_name="",
        copy=rate(lambda: target.copy_(source), 2 * tensor_bytes([source])),
        matrix_16=product(torch.bfloat16),
        matrix_32=fp32,
        arithmetic=fp32,
    )


def reason(problem: Exception) -> str:
    """One short line about why an implementation has no numbers."""
    if isinstance(problem, torch.OutOfMemoryError):
        return "out of memory"
    if isinstance(problem, HostBoundError):
        return f"host-bound: {problem}"
    lines = str(problem).splitlines() or [""]
    return f"{type(problem).__name__}: {lines[0]}"[:100]
