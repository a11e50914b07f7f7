"""Progress of a run on the terminal, and its summary."""

from __future__ import annotations

import time
from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich import box
from rich.columns import Columns
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tritium.data import Loader
from tritium.kernels.units import counted
from tritium.model import Transformer
from tritium.model.native import FormatError, model_type
from tritium.training.monitor.terminal import printable
from tritium.training.monitor.throughput import figures_of
from tritium.training.schedule import Budget

if TYPE_CHECKING:
    from tritium.training.settings import TrainConfig

SMOOTHED = 50  # steps
WIDTH = 120  # characters, where the terminal is as wide

console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)


class Display:
    """The progress panel of a run; without a terminal, a line every ten seconds.

    Args:
        budget: length of the run.
        step: the first step, counted from 0.
        seconds: time used before it.
        title: title of the panel.
        log: entries of earlier steps, so that a resumed run shows the same panel.
        to: the console.
    """

    def __init__(
        self, budget: Budget, step: int, seconds: float, title: str = "",
        log: Sequence[dict] = (), *, to: Console = console,
    ):  # fmt: skip
        self._budget, self._title, self._to = budget, Text(printable(title)), to
        self._printed = 0.0
        self._first, self._began = budget.used(step, seconds), seconds
        self._sum = self._weight = 0.0
        self._validation = next((_validation(x) for x in reversed(log) if "val_loss" in x), "")
        for entry in log[-10 * SMOOTHED :]:
            self._smooth(entry["loss"])
        self._panel = self._draw(self._first, "first step ...", {})
        self._live = Live(
            console=to, transient=True, refresh_per_second=4, get_renderable=lambda: self
        )

    def __enter__(self) -> Display:
        if self._to.is_terminal:
            self._live.start()
        return self

    def __rich__(self) -> Panel:
        return self._panel

    def __exit__(self, *_) -> None:
        self._live.stop()

    def show(self, entries: list[dict], seconds: float) -> None:
        """Show the last of the log's new entries.

        Args:
            entries: in order, at least one.
            seconds: used by the run so far.
        """
        for other in entries:
            self._smooth(other["loss"])
        entry, now = entries[-1], time.perf_counter()
        used = self._budget.used(entry["step"], seconds)
        left = (seconds - self._began) / max(used - self._first, 1e-9) * (1 - used)
        figures = {
            "loss": f"{entry['loss']:.3f} nats/token",
            "smoothed": f"{self._sum / self._weight:.3f} nats/token" if self._weight else "–",
            "lr": f"{entry['lr']:.2e}",
            "grad norm": f"{entry['grad_norm']:.2f}",
            "speed": f"{entry['tokens_per_s']:,} tokens/s",
            **figures_of(entry),
        }
        if evaluated := "val_loss" in entry:
            self._validation = _validation(entry)
        of = f"/{self._budget.steps}" if self._budget.steps else ""
        step, left = f"step {entry['step']}{of}", f"{clock(left)} left"
        self._panel = self._draw(used, f"{step}  {left}", figures)
        if evaluated or not (self._to.is_terminal or now - self._printed < 10):
            wide = ("smoothed",) if self._to.is_terminal else figures  # the panel has the others
            parts = [step, *(f"{name} {figures[name]}" for name in wide)]
            self._to.print("  ".join([*parts, *[self._validation] * evaluated, left]))
            self._printed = now

    def _smooth(self, loss: float) -> None:
        """Update the exponential moving average of the loss, over SMOOTHED steps."""
        if isfinite(loss):
            kept = 1 - 1 / SMOOTHED
            self._sum = kept * self._sum + (1 - kept) * loss
            self._weight = kept * self._weight + (1 - kept)

    def _draw(self, used: float, text: str, figures: dict[str, str]) -> Panel:
        progress = Table.grid(padding=(0, 2), expand=True)
        progress.add_column(ratio=1)
        progress.add_column(justify="right", no_wrap=True)
        progress.add_row(ProgressBar(1.0, used), f"{used:.0%}  {text}")
        cells = [
            Text.assemble((name, "dim"), "\n", (value, "bold")) for name, value in figures.items()
        ]
        last = [Text(f"last {self._validation}", "cyan")] if self._validation else []
        return Panel(
            Group(progress, *([Columns(cells, padding=(0, 3))] if cells else []), *last),
            title=self._title, title_align="left", width=min(WIDTH, self._to.width),
            border_style="dim", box=box.HORIZONTALS,
        )  # fmt: skip


def _validation(entry: dict) -> str:
    return (
        f"validation {entry['val_loss']:.3f} nats/token, {entry['val_bits_per_byte']:.3f} bits/byte"
        + (f", gap {entry['gap']:+.3f} nats/token" if "gap" in entry else "")
    )


def print_start(
    config: TrainConfig, preset: str, run: Path, model: Transformer,
    optimizer: torch.optim.Optimizer, loader: Loader, machine: dict, step: int, budget: Budget,
) -> None:  # fmt: skip
    """Print the preset, model, device, data and length of a run."""
    batch = config.batch_size * model.config.max_seq_len
    length = f"{budget}, steps of {batch:,} tokens"
    if budget.steps is not None:
        epochs = budget.steps * config.batch_size / loader.n_windows
        length = f"{budget} of {batch:,} tokens, {epochs:.2f} epochs"
    console.print(
        f"Preset {preset}: {count(model)}, {counted(model.config.n_layers, 'layer')} of width "
        f"{model.config.d_model}, on {machine['device']}, "
        f"{counted(machine['threads'], 'thread')}, in {machine['dtype'][6:]}\n"
        f"Data: {loader.n_tokens:,} tokens from {config.data or 'the Python standard library'}, "
        f"vocabulary {loader.vocab_size:,}\n"
        f"Length: {length}"
        + (f"; resumed from step {step:,}, epoch {loader.epoch:.2f}" if step else "")
        + f"\nRun folder: {run}"
    )
    try:
        model_type(model.config)
    except FormatError as error:
        console.print(f"It can be trained, not exported: {error}.")
    console.print(group_table(optimizer))


def group_table(optimizer: torch.optim.Optimizer) -> Table:
    """Return a table of an optimizer's parameter groups, with the options it uses as title."""
    hidden = {"params", "name", "lr", "weight_decay", "decoupled_weight_decay", "splits"}
    hidden |= {"splits_by_shard", "lr_scale", "use_muon"}
    group = optimizer.param_groups[0]
    options = {k: x for k, x in group.items() if k not in hidden and x not in (None, False, 0)}
    title = ", ".join(f"{name} {value}" for name, value in options.items())
    title = f"{type(optimizer).__name__}: {title}"
    table = Table("group", box=None, title=Text(title), title_justify="left", title_style="")
    for column in ("tensors", "parameters", "weight decay"):
        table.add_column(column, justify="right")
    for group in optimizer.param_groups:
        ps = group["params"]
        numbers = f"{len(ps):,}", f"{sum(p.numel() for p in ps):,}", f"{group['weight_decay']:g}"
        table.add_row(Text(group["name"]), *numbers)
    return table


def show_end(run: Path, history: list[dict], sample: str, seconds: float) -> None:
    """Print a sample and the result.

    Args:
        run: the run folder.
        history: all entries of the log.
        sample: text that the model wrote; may be empty.
        seconds: duration of the run.
    """
    if sample:
        console.rule("sample")
        console.print(sample)
        console.rule()
    measured = [entry for entry in history if "val_loss" in entry]
    if measured:
        console.print(
            f"Validation: {measured[-1]['val_loss']:.4f} nats per token, "
            f"{measured[-1]['val_bits_per_byte']:.4f} bits per byte, after {clock(seconds)}"
        )
    if measured and "report_loss" in measured[-1]:
        last = measured[-1]
        console.print(
            f"Report: {last['report_loss']:.4f} nats per token, {last['report_bits_per_byte']:.4f} "
            f"bits per byte, after step {last['report_step']:,}, on the validation documents that "
            "nothing was chosen by"
        )
    console.print(
        f"Run folder: {run} (loss.png, layers.png, log.jsonl, config.json, tokenizer.json, "
        "checkpoints)"
    )


def clock(seconds: float) -> str:
    """Format a duration as minutes and seconds, or hours and minutes."""
    minutes, seconds = divmod(round(seconds), 60)
    return (
        f"{minutes} min {seconds:02} s"
        if minutes < 60
        else f"{minutes // 60} h {minutes % 60:02} min"
    )


def count(model: torch.nn.Module) -> str:
    """Format the number of parameters of a model."""
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters"
