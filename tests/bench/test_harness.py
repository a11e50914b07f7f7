"""Prove that times, peak memory and errors of single calls are true, on a GPU and on a CPU."""

import itertools
import os
import statistics
import weakref

import pytest
import torch
from doubling import CPU
from hypothesis import given, settings
from hypothesis import strategies as st

from tritium.bench import harness


class FakeClock:
    """A clock that continues only when a call is made."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def call(self, seconds: float):
        def call() -> None:
            self.now += seconds

        return call


def test_times_single_calls_in_turn():
    clock = FakeClock()
    taken = harness.time_calls([clock.call(1.0), clock.call(3.0)], CPU, 20.0, clock)
    assert set(taken) == {1.0, 3.0}
    assert len(taken) == pytest.approx(10, abs=3)
    assert all(a != b for a, b in itertools.pairwise(taken))


def test_times_a_slow_call_five_times():
    clock = FakeClock()
    assert harness.time_calls([clock.call(60.0)], CPU, 0.3, clock) == [60.0] * 5


def test_does_not_time_the_first_call():
    clock, costs = FakeClock(), iter([100.0])

    def call() -> None:
        clock.now += next(costs, 1.0)

    # Nor does it count as an estimate of how many calls there is time for.
    assert harness.time_calls([call], CPU, 10.0, clock) == [1.0] * 10


class FakeGPU:
    """A GPU on the host's clock, in seconds, and a host that launches a call in `host` of them.

    `slower` is how many times as long a launch takes while the GPU has work. `reads` makes each
    call wait for what the GPU has to do before it, as `.item()` does.
    """

    def __init__(
        self, monkeypatch, host: float, kernel: float, slower: float = 1.0, reads: bool = False
    ) -> None:
        self.host, self.kernel, self.slower, self.reads = host, kernel, slower, reads
        self.now = self.free = 0.0  # where the host is, and when the GPU has done all it was given
        self.log: list[str] = []
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: FakeEvent(self))
        monkeypatch.setattr(torch.cuda, "_sleep", self.sleep)
        monkeypatch.setattr(torch.cuda, "synchronize", self.synchronize)

    def sleep(self, cycles: int) -> None:
        self.log.append("sleep")
        self.free = max(self.free, self.now) + cycles / harness.CYCLES

    def call(self) -> None:
        if self.reads:
            self.now = max(self.now, self.free)
        busy = self.free > self.now
        # Two kernels, of which the second is launched at the end of the host's part.
        self.free = max(self.free, self.now) + self.kernel / 2
        self.now += self.host * (self.slower if busy else 1.0)
        self.free = max(self.free, self.now) + self.kernel / 2

    def synchronize(self) -> None:
        self.log.append("synchronize")
        self.now = max(self.now, self.free)

    def taken(self, seconds: float) -> list[float]:
        return harness.time_calls([self.call], torch.device("cuda"), seconds, lambda: self.now)


class FakeEvent:
    """A CUDA event on a `FakeGPU`."""

    def __init__(self, gpu: FakeGPU) -> None:
        self.gpu = gpu

    def record(self) -> None:
        self.time = max(self.gpu.free, self.gpu.now)

    def query(self) -> bool:
        return self.gpu.now >= self.time

    def elapsed_time(self, end: "FakeEvent") -> float:
        return (end.time - self.time) * 1e3


def test_times_between_cuda_events_behind_a_sleeping_kernel(monkeypatch):
    gpu = FakeGPU(monkeypatch, host=1e-5, kernel=2e-3)
    taken = gpu.taken(75 * 2.01e-3)
    assert 50 < len(taken) <= 75
    assert taken == [pytest.approx(2e-3)] * len(taken)
    assert gpu.log[-4:] == ["sleep", "synchronize"] * 2


@pytest.mark.parametrize("host", [1e-6, 1e-4, 1e-3, 1e-2, 0.1])
def test_a_slow_host_is_not_measured(monkeypatch, host):
    # The sleep grows with the host's time for a launch; 10 ms would end before 50 such launches.
    gpu = FakeGPU(monkeypatch, host, kernel=2e-5)
    taken = gpu.taken(1.0)
    assert len(taken) >= 5
    assert taken == pytest.approx([2e-5] * len(taken), rel=1e-6)


def test_says_host_bound_where_the_gpu_waits(monkeypatch):
    gpu = FakeGPU(monkeypatch, host=1.0, kernel=2e-5)  # slower than any sleep
    with pytest.raises(harness.HostBoundError) as caught:
        gpu.taken(10.0)
    assert harness.reason(caught.value) == "host-bound: the host takes 1000000 us for a call"


@given(
    host=st.floats(1e-6, 1.0),
    kernel=st.floats(1e-6, 0.1),
    slower=st.floats(0.1, 100.0),
    reads=st.booleans(),
    seconds=st.floats(0.01, 0.2),
)
@settings(max_examples=int(os.environ.get("TRITIUM_EXAMPLES", "40")))
def test_no_time_is_given_that_has_gaps(host, kernel, slower, reads, seconds):
    # As on an H100 whose host was slow: 839 us for passes of 38 and 84.
    with pytest.MonkeyPatch.context() as monkeypatch:
        gpu = FakeGPU(monkeypatch, host, kernel, slower, reads)
        try:
            taken = gpu.taken(seconds)
        except harness.HostBoundError:
            assert reads or max(1.0, slower) * host > harness.MOST_LEAD / 2.5
            return
        assert len(taken) >= harness.LEAST_CALLS
        gaps = 1 - kernel / statistics.median(taken)
        assert gaps <= harness.GAPS + 1e-6


def test_a_host_that_slows_down_gets_a_longer_lead(monkeypatch):
    gpu = FakeGPU(monkeypatch, host=1e-3, kernel=2e-5, slower=10.0)
    # Of the first 50 calls about 10 count; of the others, behind a longer sleep, nearly 30.
    assert len(gpu.taken(0.1)) >= 30


@pytest.mark.parametrize("kernel", [3e-2, 3e-4])
def test_a_call_that_reads_back_has_a_time_where_the_host_is_quick(kernel, monkeypatch):
    gpu = FakeGPU(monkeypatch, host=1e-3, kernel=kernel, reads=True)
    if kernel == 3e-2:
        assert statistics.median(gpu.taken(1.0)) == pytest.approx(kernel, rel=0.05)
    else:
        with pytest.raises(harness.HostBoundError):
            gpu.taken(1.0)


def test_peak_memory_is_what_a_call_adds(monkeypatch):
    memory = {"now": 1000, "most": 5000}

    def call() -> None:
        memory["most"] = max(memory["most"], memory["now"] + 300)

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(
        torch.cuda, "reset_peak_memory_stats", lambda: memory.update(most=memory["now"])
    )
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: memory["now"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: memory["most"])
    assert harness.peak_bytes(call, torch.device("cuda")) == 300
    assert harness.peak_bytes(call, CPU) is None


def test_summary_is_median_and_quartiles_in_milliseconds():
    timing = harness.summary([0.001, 0.002, 0.003, 0.004, 0.100])
    assert timing == harness.Timing(pytest.approx(3), pytest.approx(2), pytest.approx(4))


@pytest.mark.parametrize("cache", [0, 1, 1 << 12, 10_000, 1 << 20])
def test_inputs_rotate_beyond_the_cache(cache):
    inputs = [torch.randn(16, 64, requires_grad=True), torch.arange(7)]
    copies = harness.rotated(inputs, cache)
    assert sum(map(harness.tensor_bytes, copies)) > 2 * cache
    assert len({x.data_ptr() for copy in copies for x in copy}) == 2 * len(copies)
    for x, n in copies:
        assert torch.equal(x, inputs[0])
        assert x.requires_grad
        assert x.is_leaf
        assert torch.equal(n, inputs[1])
    assert sum(map(harness.tensor_bytes, copies[:-1])) <= 2 * cache


def test_outputs_live_until_their_turn_comes_again():
    made: list[weakref.ref] = []

    def call() -> torch.Tensor:
        x = torch.zeros(1)
        made.append(weakref.ref(x))
        return x

    in_turn = harness._in_turn([call, call])
    for _ in range(4):
        in_turn()
    assert [ref() is None for ref in made] == [True, True, False, False]


def test_cache_size_is_that_of_this_machine():
    assert 1 << 18 <= harness.cache_bytes(CPU) <= 1 << 31


@pytest.mark.parametrize("pass_name", ["forward", "backward", "both"])
def test_a_pass_computes_what_it_is_named_for(pass_name):
    forwards, x = [], torch.randn(8, requires_grad=True)

    def square(x: torch.Tensor) -> torch.Tensor:
        forwards.append(torch.is_grad_enabled())
        return (x * x).sum()

    call = harness.calls_of(square, [x, torch.arange(3)][:1], pass_name)
    forwards.clear()
    results = [call(), call()]
    assert forwards == {"forward": [False] * 2, "backward": [], "both": [True] * 2}[pass_name]
    expected = (x * x).sum() if pass_name == "forward" else 2 * x
    for result in results:
        torch.testing.assert_close(result if pass_name == "forward" else result[0], expected)
