"""How fast the trainer trains, beside a plain PyTorch GPT: `python -m bench throughput`.

The shape is that of nanoGPT's published command for a CPU: 4 layers of 4 heads, 128 wide, batches
of 12 sequences of 64 tokens, vocabulary 65. The plain GPT (bench/plain_gpt.py) is of PyTorch's own
modules, with `torch.optim.AdamW` at its defaults behind `clip_grad_norm_`; this project's model is
a Llama-like one of as many parameters, to within 1 %, in `train.py`'s own step. Both learn the same
batches in the same precision. They take turns, one beginning each second turn, and "of plain" is
the median over the turns, with its quartiles.
"""

import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from model import ModelConfig, Transformer
from model.optim import OptimizerConfig
from train import accumulate_gradients

from .harness import device_name
from .plain_gpt import PlainGPT

RESULTS = Path(__file__).parent / "results" / "throughput.md"
WIDTH = 110
VOCABULARY, LENGTH, LAYERS, WIDE, HEADS, BATCH = 65, 64, 4, 128, 4, 12
CONFIG = ModelConfig(
    vocab_size=VOCABULARY, n_layers=LAYERS, d_model=WIDE, n_heads=HEADS, d_ff=344,
    max_seq_len=LENGTH,
)  # fmt: skip
LEARNING_RATE = 1e-3
MAX_NORM = 1.0
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
        write: keep the table in bench/results/throughput.md.
    """
    table = Table(*COLUMNS)
    before = torch.get_num_threads()
    runs = [(n, dtype) for n in threads for dtype in PRECISIONS]
    try:
        for n, dtype in track(runs, "rates", transient=True):
            torch.set_num_threads(n)
            for row in _rows(dtype, turns, steps):
                table.add_row(str(n), *row)
    finally:
        torch.set_num_threads(before)
    command = f"python -m bench throughput --turns {turns} --steps {steps}"
    command += f" --threads {' '.join(map(str, threads))} --write"
    lines = (
        f"`{command}`, torch {torch.__version__}",
        f"{device_name(torch.device('cpu')).rpartition(',')[0]}, "
        f"{len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[1]:.1f} from this and other "
        f"processes; {LAYERS} layers, {HEADS} heads, {WIDE} wide, batches of {BATCH} × {LENGTH} "
        "tokens; medians, quartiles in parentheses",
    )
    _print(Console(width=WIDTH), box.SIMPLE, lines, table)
    if write:
        with RESULTS.open("w") as file:
            _print(Console(file=file, width=WIDTH), box.MARKDOWN, lines, table)


def contenders() -> dict[str, tuple[nn.Module, Step]]:
    """Return each model with its training step, the plain one first."""
    torch.manual_seed(0)
    plain = PlainGPT(VOCABULARY, LENGTH, LAYERS, WIDE, HEADS)
    plain_optimizer = torch.optim.AdamW(plain.parameters(), lr=LEARNING_RATE)
    ours = Transformer(CONFIG)
    optimizer = OptimizerConfig(max_grad_norm=MAX_NORM).make(ours)
    for group in optimizer.param_groups:
        group["lr"] = LEARNING_RATE

    def plain_step(batch: Batch, cast: torch.autocast) -> None:
        with cast:
            loss = plain(*batch)
        loss.backward()
        nn.utils.clip_grad_norm_(plain.parameters(), MAX_NORM)
        plain_optimizer.step()
        plain_optimizer.zero_grad()

    def step(batch: Batch, cast: torch.autocast) -> None:
        accumulate_gradients(ours, batch, BATCH, cast)
        optimizer.step()
        optimizer.zero_grad()

    return {"plain PyTorch GPT": (plain, plain_step), "train.py": (ours, step)}


def _rows(dtype: torch.dtype, turns: int, steps: int) -> Iterator[tuple[str, ...]]:
    models = contenders()
    cast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)
    sequences = torch.randint(VOCABULARY, (steps, BATCH, LENGTH + 1))
    batches = [(x[:, :-1].contiguous(), x[:, 1:].contiguous()) for x in sequences]
    times: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(-1, turns):
        for name in [*models][:: -1 if turn % 2 else 1]:
            step = models[name][1]
            start = time.perf_counter()
            for batch in batches:
                step(batch, cast)
            if turn >= 0:  # the first is for warming up
                times[name].append((time.perf_counter() - start) / steps)
    plain = next(iter(times.values()))
    for name, seconds in times.items():
        low, median, high = statistics.quantiles(seconds, n=4)
        ratios = [a / b for a, b in zip(plain, seconds, strict=True)]
        worst, ratio, best = statistics.quantiles(ratios, n=4)
        yield (
            str(dtype)[6:],
            name,
            f"{sum(p.numel() for p in models[name][0].parameters()):,}",
            f"{median * 1e3:.1f} ({low * 1e3:.1f}-{high * 1e3:.1f})",
            f"{BATCH * LENGTH / median:,.0f}",
            f"{ratio:.2f} ({worst:.2f}-{best:.2f})",
        )


def _print(console: Console, style: box.Box, lines: tuple[str, ...], table: Table) -> None:
    table.box = style
    console.print(*lines, sep="\n\n", soft_wrap=True)
    console.print("", table, sep="\n")
