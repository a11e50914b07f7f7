"""Cost of another busy process to a run: `python -m tritium.bench contention [--write]`.

The run is train.py's default one on a CPU, its own step on random tokens, four times side by side:

    default      as train.py does it: threads sleep while they wait where others want the cores
    spinning     as OpenMP does it by default, which was train.py's way once
    one thread   --threads 1
    passive      OMP_WAIT_POLICY=passive: threads always sleep

Each is a process of its own, and they take turns, first alone on the machine, then beside a process
that does nothing but use a core. Of every turn the first seconds, in which the load is noticed, do
not count.
"""

import os
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import torch
from rich.progress import Progress
from rich.table import Table

from train import accumulate_gradients
from tritium.bench import tables
from tritium.bench.ends import at_least
from tritium.bench.harness import device_name
from tritium.kernels.units import counted
from tritium.model import Transformer
from tritium.training.device import keep_freed_memory, set_threads
from tritium.training.optim import set_rate
from tritium.training.settings import PRESETS
from tritium.training.waiting import ThreadWaiting

RESULTS = "contention.md"  # in the folder of results
WIDTH = 110
RUNS = {
    "default": (0, {}),
    "spinning": (0, {"GOMP_SPINCOUNT": "300000"}),  # libgomp's own figure
    "one thread": (1, {}),
    "passive": (0, {"OMP_WAIT_POLICY": "passive"}),
}
"""The threads, 0 for one a core, and the environment of each."""
OPENMP = "OMP_", "GOMP_", "KMP_"  # how variables of it begin
LOADS = "alone", "beside a busy process"


def main(rounds: int = 4, seconds: float = 1.5, settle: float = 2.2, write: bool = False) -> None:
    """Measure four ways to run, alone and beside a busy process, in turns.

    Args:
        rounds: how often each is measured.
        seconds: of one measurement.
        settle: seconds of a turn before it.
        write: keep the table in contention.md, in the folder of results.
    """
    at_least(1, rounds=rounds)
    at_least(0.1, seconds=seconds)
    at_least(0, settle=settle)
    rates: dict[tuple[str, str], list[float]] = {(n, load): [] for n in RUNS for load in LOADS}
    with ExitStack() as stack:
        progress = stack.enter_context(Progress(transient=True, auto_refresh=False))
        runs = {name: stack.enter_context(_run(*RUNS[name])) for name in RUNS}
        for run in runs.values():
            run.recv()
        task = progress.add_task("rates", total=rounds * len(rates))
        for _ in range(rounds):
            for load in LOADS:
                with ExitStack() as beside:
                    if load != LOADS[0]:
                        beside.enter_context(_busy())
                    for name, run in runs.items():
                        run.send((settle, seconds))
                        rates[name, load].append(run.recv())
                        progress.advance(task)
                        progress.refresh()
    table = Table("run", *(f"{load}, tokens/s" for load in LOADS), "left")
    for name in RUNS:
        cells = (_cell(rates[name, load]) for load in LOADS)
        alone, busy = (statistics.median(rates[name, load]) for load in LOADS)
        table.add_row(name, *cells, f"{busy / alone:.0%}")
    command = f"python -m tritium.bench contention --rounds {rounds} --seconds {seconds:g} --write"
    lines = (
        f"`{command}`, torch {torch.__version__}",
        f"{device_name(torch.device('cpu')).rpartition(',')[0]}, "
        f"{counted(len(os.sched_getaffinity(0)), 'core')}; medians of {counted(rounds, 'round')}, "
        "the lowest and the highest in parentheses",
    )
    kept = tables.results() / RESULTS if write else None
    tables.present(lines, table, width=WIDTH, write_to=kept)


def _cell(rates: list[float]) -> str:
    return f"{statistics.median(rates):,.0f} ({min(rates):,.0f}–{max(rates):,.0f})"


@contextmanager
def _run(threads: int, environment: dict[str, str]) -> Iterator[Connection]:
    """Start a run in an environment of its own, and end it with the block."""
    actual, its = get_context("spawn").Pipe()
    before = os.environ.copy()
    process = get_context("spawn").Process(target=_train, args=(its, threads), daemon=True)
    try:  # OpenMP reads it once, when the process loads it
        for name in [name for name in before if name.startswith(OPENMP)]:
            del os.environ[name]
        os.environ.update(environment)
        process.start()
    finally:
        os.environ.clear()
        os.environ.update(before)
    with _ended(process):
        yield actual


@contextmanager
def _busy() -> Iterator[None]:
    process = get_context("spawn").Process(target=_use_a_core, daemon=True)
    process.start()
    with _ended(process):
        yield


@contextmanager
def _ended(process: BaseProcess) -> Iterator[None]:
    try:
        yield
    finally:
        process.kill()
        process.join()


def _use_a_core() -> None:
    while True:
        pass


def _train(connection: Connection, threads: int) -> None:
    """Train whenever asked to, for seconds that do not count and seconds that do; send tokens/s."""
    config, device = PRESETS["small"], torch.device("cpu")
    keep_freed_memory()
    set_threads(threads)
    model = Transformer(config.model)
    arithmetic = config.compute.apply(model, device)
    optimizer = config.optimizer.make(model, record_norms=False)
    set_rate(optimizer, 1e-3)
    shape = (config.batch_size, config.model.max_seq_len)
    batch = tuple(torch.randint(config.model.vocab_size, shape) for _ in range(2))

    def steps(seconds: float) -> float:
        began, n = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            accumulate_gradients(model, batch, config.batch_size, arithmetic.cast)
            optimizer.step()
            optimizer.zero_grad()
            n += 1
        return n * batch[0].numel() / (time.perf_counter() - began)

    steps(0.5)
    connection.send("ready")
    with ThreadWaiting(lambda line: None):
        while True:
            settle, seconds = connection.recv()
            steps(settle)
            connection.send(steps(seconds))
