"""What a run shows on the terminal while it goes on."""

from __future__ import annotations

import time

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from .meters import columns
from .schedule import Budget

BAR = 1000  # what the bar counts to

console = Console(highlight=False, soft_wrap=True)


class Display:
    """The line that shows how far the run is; without a terminal, one every ten seconds."""

    def __init__(self, budget: Budget, step: int, seconds: float):
        self._budget, self._printed = budget, 0.0
        self._first, self._started = budget.used(step, seconds), 0.0
        self._bar = Progress(
            BarColumn(24), TextColumn("{task.description}"), console=console, transient=True,
            disable=not console.is_terminal,
        )  # fmt: skip
        self._task = self._bar.add_task(
            "first step ...", total=BAR, completed=round(BAR * self._first)
        )

    def __enter__(self) -> Display:
        self._bar.start()
        self._started = time.perf_counter()
        return self

    def __exit__(self, *_) -> None:
        self._bar.stop()

    def show(self, entry: dict, seconds: float) -> None:
        """Show a step's entry of the log, `seconds` after the run began."""
        now = time.perf_counter()
        used = self._budget.used(entry["step"], seconds)
        left = (now - self._started) / max(used - self._first, 1e-9) * (1 - used)
        of = f"/{self._budget.steps}" if self._budget.steps else ""
        text = (
            f"step {entry['step']}{of}  loss {entry['loss']:.3f} nats/token  lr {entry['lr']:.2e}  "
            f"grad norm {entry['grad_norm']:.2f}  {entry['tokens_per_s']:,} tokens/s"
        )
        text = "  ".join([text, *columns(entry)])
        if "val_loss" in entry:
            text += (
                f"  validation {entry['val_loss']:.3f} nats/token, "
                f"{entry['val_bits_per_byte']:.3f} bits/byte"
            )
        text += f"  {clock(left)} left"
        self._bar.update(self._task, completed=BAR * used, description=text)
        if "val_loss" in entry or not (console.is_terminal or now - self._printed < 10):
            console.print(text)
            self._printed = now


def group_table(optimizer: torch.optim.Optimizer) -> Table:
    """Return a table of an optimizer's parameter groups, with its options as title."""
    hidden = {"params", "name", "lr", "weight_decay", "maximize"}
    options = {k: x for k, x in optimizer.param_groups[0].items() if k not in hidden}
    title = ", ".join(f"{name} {value}" for name, value in options.items())
    title = f"{type(optimizer).__name__}: {title}"
    table = Table("group", box=None, title=title, title_justify="left", title_style="")
    for column in ("tensors", "parameters", "weight decay"):
        table.add_column(column, justify="right")
    for group in optimizer.param_groups:
        ps = group["params"]
        numbers = f"{len(ps):,}", f"{sum(p.numel() for p in ps):,}", f"{group['weight_decay']:g}"
        table.add_row(group["name"], *numbers)
    return table


def clock(seconds: float) -> str:
    """Format a duration as minutes and seconds, or hours and minutes."""
    minutes, seconds = divmod(round(seconds), 60)
    return (
        f"{minutes} min {seconds:02} s"
        if minutes < 60
        else f"{minutes // 60} h {minutes % 60:02} min"
    )


def count(model: torch.nn.Module) -> str:
    """Say how many parameters a model has."""
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters"
