"""Speed of the trainer, beside a plain PyTorch GPT: `python -m tritium.bench throughput`.

The shape is that of nanoGPT's published command for a CPU: 4 layers of 4 heads, 128 wide, batches
of 12 sequences of 64 tokens, vocabulary 65. The plain GPT (plain_gpt.py) is of PyTorch's own
modules, with `torch.optim.AdamW` at its defaults behind `clip_grad_norm_`; this project's model is
a Llama-like one of as many parameters, to within 1 %, in `train.py`'s own step with all that it
does by default. Both learn the same batches in the same precision, each in a process of its own.
They take turns, one beginning each second turn, and "of plain" is the median over the turns, with
its quartiles.
"""

import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection

import torch
from rich.progress import Progress, TaskID
from rich.table import Table
from torch import Tensor, nn

from train import accumulate_gradients
from tritium.bench import tables
from tritium.bench.ends import at_least
from tritium.bench.harness import device_name
from tritium.bench.runs.plain_gpt import PlainGPT
from tritium.kernels.units import counted
from tritium.model import ModelConfig, Transformer
from tritium.training.device import keep_freed_memory
from tritium.training.monitor.observer import ObserveConfig
from tritium.training.optim import OptimizerConfig, set_rate

RESULTS = "throughput.md"  # in the folder of results
WIDTH = 110
VOCABULARY, LENGTH, LAYERS, WIDE, HEADS, BATCH = 65, 64, 4, 128, 4, 12
CONFIG = ModelConfig(
    vocab_size=VOCABULARY, n_layers=LAYERS, d_model=WIDE, n_heads=HEADS, d_ff=344,
    max_seq_len=LENGTH,
)  # fmt: skip
LEARNING_RATE = 1e-3
MAX_NORM = 1.0
PAUSE = 0.05  # seconds, for the threads of the one before, which continue spinning for a while
PRECISIONS = torch.float32, torch.bfloat16
COLUMNS = "threads", "precision", "model", "parameters", "ms/step", "tokens/s", "of plain"

Batch = tuple[Tensor, Tensor]
Step = Callable[[Batch, torch.autocast], None]


def main(
    turns: int = 40, steps: int = 10, threads: tuple[int, ...] = (1, 2), write: bool = False
) -> None:
    """Train both models in turns and show their rates.

    Args:
        turns: how often each is measured.
        steps: of one measurement.
        threads: numbers of CPU threads to measure with.
        write: keep the table in throughput.md, in the folder of results.
    """
    at_least(1, turns=turns, steps=steps, threads=min(threads, default=0))
    table = Table(*COLUMNS)
    runs = [(n, dtype) for n in threads for dtype in PRECISIONS]
    # Shown between turns alone: a thread that refreshed it would take a core from one of them.
    with Progress(transient=True, auto_refresh=False) as progress:
        task = progress.add_task("rates", total=len(runs) * (turns + 1))
        for n, dtype in runs:
            for row in _rows(n, dtype, turns, steps, partial(_advance, progress, task)):
                table.add_row(str(n), *row)
    command = f"python -m tritium.bench throughput --turns {turns} --steps {steps}"
    command += f" --threads {' '.join(map(str, threads))} --write"
    lines = (
        f"`{command}`, torch {torch.__version__}",
        f"{device_name(torch.device('cpu')).rpartition(',')[0]}, "
        f"{counted(len(os.sched_getaffinity(0)), 'core')}, load {os.getloadavg()[1]:.1f} from "
        f"this and other processes; {LAYERS} layers, {HEADS} heads, {WIDE} wide, "
        f"batches of {BATCH} × {LENGTH} tokens; medians, quartiles in parentheses",
    )
    kept = tables.results() / RESULTS if write else None
    tables.present(lines, table, width=WIDTH, write_to=kept)


def plain() -> tuple[nn.Module, Step]:
    """Return the plain model with its training step."""
    model = PlainGPT(VOCABULARY, LENGTH, LAYERS, WIDE, HEADS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)

    def step(batch: Batch, cast: torch.autocast) -> None:
        with cast:
            loss = model(*batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()

    return model, step


def tritium_step() -> tuple[nn.Module, Step]:
    """Return this project's model with `train.py`'s step, at its defaults."""
    keep_freed_memory()
    model = Transformer(CONFIG)
    observing, config = ObserveConfig(), OptimizerConfig(max_grad_norm=MAX_NORM)
    optimizer = config.make(model, record_norms=observing.records_norms)
    set_rate(optimizer, LEARNING_RATE)
    steps = itertools.count(1)

    def step(batch: Batch, cast: torch.autocast) -> None:
        optimizer.records_norms = observing.takes_norms(next(steps))
        accumulate_gradients(model, batch, BATCH, cast)
        optimizer.step()
        optimizer.zero_grad()

    return model, step


IMPLEMENTATIONS = {"plain PyTorch GPT": plain, "train.py": tritium_step}


def _serve(asked: Connection, name: str, threads: int, dtype: torch.dtype, steps: int) -> None:
    """Send the number of parameters, then seconds per step whenever asked; None ends it."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model, step = IMPLEMENTATIONS[name]()
    cast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)
    sequences = torch.randint(VOCABULARY, (steps, BATCH, LENGTH + 1))
    batches = [(x[:, :-1].contiguous(), x[:, 1:].contiguous()) for x in sequences]
    asked.send(sum(p.numel() for p in model.parameters()))
    while asked.recv():
        step(batches[0], cast)  # brings back to the caches what the other implementation drove out
        start = time.perf_counter()
        for batch in batches:
            step(batch, cast)
        asked.send((time.perf_counter() - start) / steps)


@contextmanager
def _processes(threads: int, dtype: torch.dtype, steps: int) -> Iterator[dict[str, Connection]]:
    """Each implementation in a process of its own, as a user has it."""
    context, connections = get_context("spawn"), {}
    with ExitStack() as stack:
        for name in IMPLEMENTATIONS:
            connections[name], expected = context.Pipe()
            process = context.Process(
                target=_serve, args=(expected, name, threads, dtype, steps), daemon=True
            )
            process.start()
            expected.close()  # so that a process that died is noticed
            stack.callback(process.join)
            stack.callback(connections[name].send, None)
        yield connections


def _advance(progress: Progress, task: TaskID) -> None:
    progress.advance(task)
    progress.refresh()


def _rows(
    threads: int, dtype: torch.dtype, turns: int, steps: int, advance: Callable[[], None]
) -> Iterator[tuple[str, ...]]:
    with _processes(threads, dtype, steps) as connections:
        sizes = {name: connection.recv() for name, connection in connections.items()}
        times: dict[str, list[float]] = {name: [] for name in connections}
        for turn in range(-1, turns):
            advance()
            for name in [*connections][:: -1 if turn % 2 else 1]:
                time.sleep(PAUSE)
                connections[name].send(True)
                seconds = connections[name].recv()
                if turn >= 0:  # the first is for warming up
                    times[name].append(seconds)
    plain = next(iter(times.values()))
    for name, seconds in times.items():
        low, median, high = statistics.quantiles(seconds, n=4)
        ratios = [a / b for a, b in zip(plain, seconds, strict=True)]
        worst, ratio, best = statistics.quantiles(ratios, n=4)
        yield (
            str(dtype)[6:],
            name,
            f"{sizes[name]:,}",
            f"{median * 1e3:.1f} ({low * 1e3:.1f}-{high * 1e3:.1f})",
            f"{BATCH * LENGTH / median:,.0f}",
            f"{ratio:.2f} ({worst:.2f}-{best:.2f})",
        )
