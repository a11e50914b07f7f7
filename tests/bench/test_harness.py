"""The instrument tells the truth: times, bounds, errors, failures, and what it measured on."""

import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tritium.bench import chunk_error, compare, harness, tables
from tritium.bench.__main__ import main
from tritium.bench.operations import OPERATIONS, Operation
from tritium.kernels import runtime
from tritium.kernels.roofline import Bound, Device

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
RATES = Device("a machine", "", copy=1e9, matrix_16=1e9, matrix_32=1e9, arithmetic=1e9)
SETTINGS = compare.Settings(CPU, RATES, 0, torch.float32, quick=True, seconds=1e-6)


@pytest.fixture(autouse=True)
def references(monkeypatch):
    """The kernels themselves are tested elsewhere, and slow in the interpreter."""
    monkeypatch.setattr(runtime, "REFERENCE", True)


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
    """A GPU on the host's clock, in seconds, and a host that launches a call in `host` of them."""

    def __init__(self, monkeypatch, host: float, kernel: float) -> None:
        self.host, self.kernel = host, kernel
        self.now = self.free = 0.0  # where the host is, and when the GPU has done all it was given
        self.log: list[str] = []
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: FakeEvent(self))
        monkeypatch.setattr(torch.cuda, "_sleep", self.sleep)
        monkeypatch.setattr(torch.cuda, "synchronize", self.synchronize)

    def sleep(self, cycles: int) -> None:
        self.log.append("sleep")
        self.free = max(self.free, self.now) + cycles / harness.CYCLES

    def call(self) -> None:
        self.now += self.host
        self.free = max(self.free, self.now) + self.kernel

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


def test_a_late_host_that_is_faster_than_the_gpu_leaves_no_gaps(monkeypatch):
    monkeypatch.setattr(harness, "MOST_LEAD", 0.0)
    monkeypatch.setattr(harness, "LEAST_LEAD", 0.0)
    gpu = FakeGPU(monkeypatch, host=1e-4, kernel=1e-3)
    assert statistics.median(gpu.taken(0.1)) < 1.11e-3


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


def test_percent_of_bound():
    bound = Bound(bytes=1000, flops=0, microseconds=500.0, resource="memory")
    assert compare.percent_of_bound(bound, 1.0) == 50
    assert compare.percent_of_bound(bound, 0.5) == 100


def test_relative_error_is_that_of_the_worst_tensor():
    exact = [torch.full((4,), 2.0).double(), torch.ones(9).double()]
    off = [exact[0].clone(), exact[1] + 0.25]
    assert harness.relative_rms(off, exact) == pytest.approx(0.25)
    assert harness.relative_rms([exact[0] * 1.5, exact[1]], exact) == pytest.approx(0.5)
    assert harness.relative_rms(exact, exact) == 0
    assert math.isnan(harness.relative_rms([exact[0] * math.nan, exact[1]], exact))


def doubling(**options) -> Operation:
    """x ↦ 2x, in which "Tritium" errs by 1 % of the output and nothing in the gradient."""
    return Operation(
        shapes={"two": {"M": 2}}, axis="M", smallest={"M": 4, "N": 8},
        inputs=lambda make, M, N: (make(M, N),),
        tritium={"Tritium": lambda: lambda x: 2 * x + 0.02 * x.detach()},
        eager=lambda x: 2 * x,
        **options,
    )  # fmt: skip


def raising(problem: Exception):
    def fail(*inputs: torch.Tensor, **dims: int) -> torch.Tensor:
        raise problem

    return fail


def test_rows_hold_what_was_measured():
    rows = list(compare.measure("softmax", doubling(), SETTINGS))
    names = [(row.implementation, row.pass_name) for row in rows]
    passes = ("forward", "backward", "both")
    assert names == [(who, name) for who in ("Tritium", "eager") for name in passes]
    errors = {name: row.error for name, row in zip(names, rows, strict=True)}
    assert errors["Tritium", "forward"] == pytest.approx(0.01, rel=1e-4)
    assert errors["Tritium", "backward"] == 0
    assert errors["Tritium", "both"] == pytest.approx(0.01, rel=1e-4)
    assert errors["eager", "both"] == 0
    assert [row.bytes for row in rows[:3]] == [2 * 128, 3 * 128, 5 * 128]
    for row in rows:
        assert row.lower_quartile <= row.milliseconds <= row.upper_quartile
        assert row.percent_of_bound == pytest.approx(row.bytes / 1e9 / row.milliseconds * 1e5)
        assert row.peak_bytes is None
        assert row.problem is None


@pytest.mark.parametrize(
    ("problem", "text"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 TiB"), "out of memory"),
        (ValueError("softmax: no\nsecond line"), "ValueError: softmax: no"),
        (AssertionError(), "AssertionError: "),
    ],
)
def test_an_implementation_that_fails_is_a_row(problem, text):
    peers = {"broken": lambda: raising(problem), "fine": lambda: lambda x: 2 * x}
    rows = list(compare.measure("softmax", doubling(peers=peers), SETTINGS))
    assert [row.problem for row in rows if row.implementation == "broken"] == [text] * 3
    assert all(row.milliseconds for row in rows if row.implementation != "broken")
    assert len(rows) == 12


def test_inputs_that_do_not_fit_are_rows():
    operation = replace(doubling(), inputs=raising(torch.OutOfMemoryError()))
    rows = list(compare.measure("softmax", operation, SETTINGS))
    assert [row.problem for row in rows] == ["out of memory"] * 6


def test_a_kernel_that_cannot_be_imported_is_a_row():
    def load():
        raise ModuleNotFoundError("No module named 'kernels.nonsense'")

    rows = list(
        compare.measure("softmax", replace(doubling(), tritium={"Tritium": load}), SETTINGS)
    )
    assert rows[0].problem == "ModuleNotFoundError: No module named 'kernels.nonsense'"
    assert rows[3].milliseconds


def test_a_peer_that_is_not_installed_is_a_note():
    peers = {"absent": lambda: __import__("no_such_library")}
    operation = doubling(peers=peers, gradient_in_forward=("eager", "absent"))
    done = report_of(operation, tuple(compare.measure("softmax", operation, SETTINGS)))
    assert {row.implementation for row in done.rows} == {"Tritium", "eager"}
    assert "Not installed: absent." in done.notes
    assert [row.pass_name for row in done.rows if row.implementation == "eager"] == [
        "forward",
        "both",
    ]
    assert "No backward alone for eager: its forward pass makes the gradient." in done.notes
    assert not any("for absent" in note for note in done.notes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_is_called_as_it_wants(name, dtype):
    operation = replace(OPERATIONS[name], peers={})
    rows = list(compare.measure(name, operation, replace(SETTINGS, dtype=dtype)))
    assert {row.implementation for row in rows} == {*operation.tritium, "eager"}
    assert {row.pass_name for row in rows} == set(harness.PASSES)
    for row in rows:
        assert row.problem is None, row.problem
        if row.implementation in operation.tritium:
            assert row.error is not None
            # One rounding in bfloat16; in float32 also those of the sums.
            assert row.error < {torch.float32: 1e-6, torch.bfloat16: 4e-3}[dtype], row


@pytest.mark.parametrize("name", OPERATIONS)
def test_shapes_are_complete_and_their_sizes_tell_them_apart(name):
    operation = OPERATIONS[name]
    for device in (CPU, torch.device("cuda")):
        cases = operation.cases(device, (), quick=False)
        assert all(dims.keys() == operation.smallest.keys() for dims in cases.values())
        sizes = [dims[operation.axis] for dims in cases.values()]
        assert sorted(set(sizes)) == sizes
    (case,) = operation.cases(CPU, (96,), quick=False).values()
    assert case[operation.axis] == 96
    assert case.keys() == operation.smallest.keys()


@pytest.mark.parametrize(
    ("reference", "interpreter", "words"),
    [(True, True, "reference"), (False, True, "interpreter"), (False, False, "reference")],
)
def test_says_what_tritium_is_on_a_cpu(reference, interpreter, words, monkeypatch):
    monkeypatch.setattr(runtime, "REFERENCE", reference)
    monkeypatch.setattr(runtime, "CPU_KERNELS", interpreter)
    (note,) = (note for note in report_of(doubling(), ()).notes if note.startswith("Tritium"))
    assert words in note


def report_of(operation: Operation, rows: tuple[tables.Row, ...]) -> tables.Report:
    notes = compare._notes(operation, SETTINGS)
    return compare.make_report(
        "softmax",
        operation.axis,
        "float32",
        SETTINGS,
        "python -m tritium.bench softmax",
        notes,
        rows,
    )


ROWS = (
    tables.Row("a", {"M": 2, "N": 64}, "Tritium", "forward", 1.5, 1.25, 2.0, 3_000_000, 10,
               "memory",
               80.0, peak_bytes=1 << 20, error=1e-3),
    tables.Row("a", {"M": 2, "N": 64}, "eager", "forward", problem="out of memory"),
    tables.Row("b", {"M": 2, "N": 4096}, "Tritium", "forward", 1.5, 1.25, 2.0, 10, 2_000_000_000,
               "matrix products", 180.0),
    tables.Row("b", {"M": 2, "N": 4096}, "eager", "both", 1.5, 1.25, 2.0, 10, 10, "memory", 0.5),
)  # fmt: skip


def test_a_report_survives_its_file(tmp_path):
    written = replace(report_of(doubling(), ROWS), axis="N")
    tables.save(written, tmp_path / "results" / "x.json")
    assert tables.load(tmp_path / "results" / "x.json") == written
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["x.json"]


def test_an_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    tables.write(path, b"old")
    monkeypatch.setattr(Path, "replace", raising(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        tables.write(path, b"new")
    assert path.read_bytes() == b"old"


def test_the_file_says_how_it_was_made(tmp_path):
    tables.save(report_of(doubling(), ROWS), tmp_path / "x.json")
    content = json.loads((tmp_path / "x.json").read_text())
    assert content["measured_on"] == "CPU"
    assert content["command"] == "python -m tritium.bench softmax"
    assert {"torch", "triton", "python"} <= content["versions"].keys()
    assert content["rates"]["copy"] == 1e9
    assert content["date"].startswith("20")


def test_the_table_has_units_and_says_cpu(capsys):
    from rich.console import Console

    done = report_of(doubling(), ROWS)
    Console(width=170).print(tables.table(done))
    text = capsys.readouterr().out
    for words in (
        "softmax, float32, a machine (measured on a CPU, not a GPU)",
        "1.50 ms (1.25 ms to 2.00 ms)", "2.00 GB/s", "1.33 TFLOP/s", "out of memory",
        "1.05 MB", "1.0e-03", "a (M=2 N=64)",
    ):  # fmt: skip
        assert words in text, text
    for words in ("launches", "host", "state", "% of copy"):
        assert words not in text, text
    gpu = replace(done, measured_on="GPU", device="NVIDIA H200")
    assert "CPU" not in gpu.title
    assert gpu.path("json") == tables.results() / "softmax-nvidia-h200.json"


@pytest.mark.parametrize("rows", [ROWS, ROWS[1:2], ()])
def test_draws_a_plot(rows, tmp_path):
    path = tmp_path / "x.png"
    tables.plot(replace(report_of(doubling(), rows), axis="N"), path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size < 300_000


def test_the_command_line_measures_and_says_cpu():
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench", "softmax", "--quick"]
    environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Measured on a CPU, not a GPU" in done.stdout
    assert "Tritium is the PyTorch reference here, not the kernel." in done.stdout
    assert "--compile" in done.stdout


def run_main(monkeypatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", *words])
    main()


def test_saves_and_plots_what_was_asked_for(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(tables, "results", lambda: tmp_path)
    monkeypatch.setattr(harness, "measured_device", lambda device, seconds: RATES)
    words = ("relu_squared", "--sizes", "32", "64", "--dtype", "fp32", "--save", "--plot")
    run_main(monkeypatch, *words)
    saved = tables.load(tmp_path / "relu_squared-a-machine.json")
    assert [row.dims["F"] for row in saved.rows] == [32] * 6 + [64] * 6
    assert saved.command == "python -m tritium.bench " + " ".join(words)
    assert (tmp_path / "relu_squared-a-machine.png").exists()
    assert "Measured on a" in capsys.readouterr().out


def test_refuses_an_unknown_operation_among_known_ones(monkeypatch):
    with pytest.raises(SystemExit, match=r"no operation \['nonsense'\]; there are softmax,"):
        run_main(monkeypatch, "softmax", "nonsense")


def test_explains(monkeypatch, capsys):
    shape = "T=8192,V=128_256"
    run_main(monkeypatch, "explain", "cross_entropy", "--shape", shape, "--device", "H200")
    assert "977 us  bound by memory" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("op", "shape", "words"),
    [
        ("softmax", "M=1", "softmax needs M, N"),
        ("softmax", "M=1,N=x", "--shape must be like T=32768,V=50304"),
        ("softmax", "dtype=1,M=1", "--shape must be like"),
        ("nonsense", "M=1", "op must be one of"),
    ],
)
def test_refuses_what_it_cannot_explain(op, shape, words, monkeypatch):
    with pytest.raises(SystemExit, match=words):
        run_main(monkeypatch, "explain", op, "--shape", shape, "--device", "H200")


def test_the_error_does_not_grow_with_the_number_of_chunks(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(tables, "results", lambda: tmp_path)
    found = dict(chunk_error.measure(512, 32, 128))
    actual = found["tritium.kernels.linear_cross_entropy"]
    assert max(actual) < 1.1 * min(actual) < 4e-3
    if hasattr(torch.nn.functional, "linear_cross_entropy"):
        assert found['torch, acc_policy="compact"'][-1] > 3 * actual[-1]
    run_main(monkeypatch, "chunk_error", "--T", "512", "--D", "32", "--V", "128", "--write")
    text = (tmp_path / "chunk_error.md").read_text()
    assert "python -m tritium.bench chunk_error --T 512 --D 32 --V 128 --write" in text
    assert f"{100 * actual[0]:.3f}" in text
