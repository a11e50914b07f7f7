"""Timing, peak memory and error of single calls, on a GPU or a CPU.

Time is that of single calls, between CUDA events or by the host's clock. Every call takes the next
of several copies of its inputs, together more than twice the last-level cache, and its outputs live
until that copy's next turn: no call finds its data in a cache. On a GPU the queue is filled behind
a kernel that sleeps for twice the time that the host takes to fill it, so that the host's launches
are not measured. Where it wakes too early and the host is slower than the GPU, no time is given.
"""

import itertools
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tritium.kernels.roofline import Device

Call = Callable[[], object]
Outputs = dict[str, list[Tensor]]  # by pass

PASSES = ("forward", "backward", "both")
BATCH = 50  # calls between two synchronisations with the GPU
CYCLES = 2e9  # of a GPU in a second, about
LEAST_LEAD, MOST_LEAD = 0.01, 0.5  # seconds of the host's lead over a batch
GAPS = 0.05  # of a call's time: where the host leaves more of the GPU idle, it is what is timed
MOST_CALLS = 500


def device_name(device: torch.device) -> str:
    """The name of the GPU, or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    threads = torch.get_num_threads()
    model = models[0] if models else platform.machine()
    return f"CPU {model}, {threads} thread{'s' * (threads > 1)}"


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
        ys = _tuple(function(*inputs))
        dys = [_gradient_for(y) for y in ys]
        return lambda: torch.autograd.grad(ys, leaves, dys, retain_graph=True)
    dys = [_gradient_for(y) for y in _tuple(forward())]
    return lambda: torch.autograd.grad(_tuple(function(*inputs)), leaves, dys)


def _gradient_for(y: Tensor) -> Tensor:
    return torch.ones_like(y) if y.dim() == 0 else torch.randn_like(y)


def _tuple(ys) -> tuple[Tensor, ...]:
    return ys if isinstance(ys, tuple) else (ys,)


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
    """GPU seconds of `n` calls, none of which waited for the host."""
    host = _host_seconds(call, clock)
    batch = min(BATCH, max(int(MOST_LEAD / max(2 * host, 1e-9)), 1))
    lead = min(max(2 * host * batch, LEAST_LEAD), MOST_LEAD)
    taken, late = [], False
    for done in range(0, n, batch):
        seconds, ahead = _cuda_batch(call, min(batch, n - done), lead)
        taken += seconds
        late |= not ahead
    # A late host that is the faster of the two leaves no gaps: the queue is full again at once.
    if late and host > (1 - GAPS) * statistics.median(taken):
        raise HostBoundError(f"the host takes {host * 1e6:.0f} us for a call")
    return taken


def _host_seconds(call: Callable[[], None], clock: Callable[[], float], n: int = 5) -> float:
    """Seconds that the host takes to launch a call: the median of `n` on an idle GPU."""
    taken = []
    for _ in range(n):
        torch.cuda.synchronize()
        start = clock()
        call()
        taken.append(clock() - start)
    torch.cuda.synchronize()
    return statistics.median(taken)


def _cuda_batch(call: Callable[[], None], n: int, lead: float) -> tuple[list[float], bool]:
    """GPU seconds of `n` calls, and whether all were launched while the GPU still slept."""
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(n)]
    awake = torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(int(lead * CYCLES))
    awake.record()
    for start, end in pairs:
        start.record()
        call()
        end.record()
    ahead = not awake.query()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in pairs], ahead


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


def outputs_of(function: Callable, inputs: Sequence[Tensor]) -> Outputs:
    """Outputs of `function` in every pass, the incoming gradients always the same."""
    leaves = [x for x in inputs if x.requires_grad]
    ys = _tuple(function(*inputs))
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(y.shape, generator=generator) if y.dim() else torch.ones(()) for y in ys]
    # Rounded to bfloat16, so that every dtype has the same.
    dys = [dy.bfloat16().to(y) for dy, y in zip(noise, ys, strict=True)]
    forward = [y.detach().clone() for y in ys]
    grads = list(torch.autograd.grad(ys, leaves, dys))
    return {"forward": forward, "backward": grads, "both": forward + grads}


def relative_rms(outputs: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The largest over the tensors of |x - exact| / |exact|, as root mean squares."""

    def error(x: Tensor, e: Tensor) -> float:
        return ((x.double() - e).norm() / e.norm().clamp_min(1e-300)).item()

    return max(error(x, e) for x, e in zip(outputs, exact, strict=True))


def errors(function: Callable, exact: Outputs, inputs: Sequence[Tensor]) -> dict[str, float]:
    """The relative RMS error of every pass of `function` against `exact`."""
    fresh = [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]
    actual = outputs_of(function, fresh)
    return {name: relative_rms(actual[name], exact[name]) for name in actual}


def in_float64(inputs: Sequence[Tensor]) -> list[Tensor]:
    """`inputs` in float64, integers as they are."""
    return [
        x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x
        for x in inputs
    ]


def reason(problem: Exception) -> str:
    """One short line about why an implementation has no numbers."""
    if isinstance(problem, torch.OutOfMemoryError):
        return "out of memory"
    if isinstance(problem, HostBoundError):
        return f"host-bound: {problem}"
    lines = str(problem).splitlines() or [""]
    return f"{type(problem).__name__}: {lines[0]}"[:100]
