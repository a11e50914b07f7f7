"""Loss while the learning rate grows, step by step: `python -m tritium.bench find_lr`.

A run of train.py's settings begins as always, with the weights of --init-from if it is given, but
its learning rate grows from `low` to `high`, by the same factor at every step; the optimizer's
other rates keep their ratio to it. Where the loss begins to rise, the rate is too large for that
moment of a run. A rate of a third of the one at which the loss is lowest is a first guess for the
peak; what is best at the end of a run, only runs to their end can tell
(`python -m tritium.bench ablate`). After Smith, "Cyclical learning rates for training neural
networks", 2017, https://arxiv.org/abs/1506.01186
"""

from collections.abc import Iterator
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import Annotated

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import tyro
from matplotlib.backend_bases import FigureCanvasBase
from rich.console import Console
from rich.progress import track

from train import accumulate_gradients, make_model
from tritium.bench import tables
from tritium.bench.ends import WrongInputError, as_wrong_input, writable
from tritium.data import LOADERS, DataError, Tokenizer, atomic, prepare
from tritium.training.command_line import parse
from tritium.training.device import choose_device
from tritium.training.initial import copy_weights, shaped
from tritium.training.monitor.plot import moving_average
from tritium.training.optim import set_rate
from tritium.training.run.random_state import seed
from tritium.training.settings import TrainConfig
from tritium.training.validation import ConfigError

say = Console(highlight=False, soft_wrap=True).print
PICTURE = "find_lr.png"  # in the folder of results
SAFE = 3.0  # the guess is the rate of the lowest loss divided by it
RISEN = 1.5  # of the lowest smoothed loss, where the test ends


def main(
    flags: Annotated[tuple[str, ...], tyro.conf.Positional] = (),
    low: float = 1e-5,
    high: float = 1.0,
    steps: int = 200,
    out: Path | None = None,
) -> None:
    """Let the learning rate grow until the loss rises, and draw the loss against it.

    Args:
        flags: a preset and flags of train.py, behind `--`.
        low: the first learning rate.
        high: the last one.
        steps: from one to the other.
        out: the picture; by default find_lr.png in the folder of results.
    """
    if not 0 < low < high or steps < 10:
        raise WrongInputError(
            f"--low must be above 0 and below --high, and --steps at least 10, got "
            f"{low:g}, {high:g}, {steps}"
        )
    out = out or tables.results() / PICTURE
    drawn = FigureCanvasBase.get_supported_filetypes()
    if out.suffix.removeprefix(".").lower() not in drawn:
        raise WrongInputError(f"--out must end with one of .{' .'.join(sorted(drawn))}, got {out}")
    with as_wrong_input(ConfigError, DataError):
        config, preset, _ = parse(list(flags))
        if config.resume:
            raise WrongInputError("a test begins a run; drop --resume, or name it by --init-from")
        config = shaped(config)
        writable(out)
        rates, losses = [], []
        for lr, loss in range_test(config, low, high, steps):
            rates.append(lr)
            losses.append(loss)
    smooth = list(moving_average(losses))
    best = rates[smooth.index(min(smooth))]
    _draw(rates, losses, smooth, best, f"{preset}, {config.optimizer.name}", out)
    say(f"Loss is lowest at a learning rate of {best:.1e}, after {smooth.index(min(smooth)) + 1} "
        f"of {steps} steps from {low:g} to {high:g}.")  # fmt: skip
    if len(rates) == steps and best > 0.8 * high:
        say("It has not risen yet: let --high be larger.")
    else:
        say(f"First guess: --learning-rate {best / SAFE:.1e}. Picture: {out}", markup=False)


def range_test(
    config: TrainConfig, low: float, high: float, steps: int
) -> Iterator[tuple[float, float]]:
    """Yield each step's learning rate and its loss in nats per token, until that has risen."""
    device = choose_device(config.device)
    seed(config.seed)
    folder = prepare(
        config.data, vocab_size=config.model.vocab_size, tokenizer=config.tokenizer,
        field=config.text_field,
    )  # fmt: skip
    shape = config.model
    if config.init_from is None:
        shape = replace(shape, vocab_size=Tokenizer.load(folder).vocab_size)
    loader = LOADERS[config.packing](
        folder, "train", batch_size=config.batch_size, length=shape.max_seq_len, seed=config.seed
    )
    model = make_model(config, shape)
    if config.init_from is not None:
        say(copy_weights(config.init_from, model))
    cast = config.compute.apply(model, device).cast
    optimizer = config.optimizer.make(
        model, learning_rate=config.schedule.learning_rate, record_norms=False
    )
    asked = config.memory.micro_batch_size
    micro_batch = asked if isinstance(asked, int) else config.batch_size
    seen: list[float] = []
    with config.compute.matmul_precision(device):
        for step in track(range(steps), "steps", transient=True):
            lr = low * (high / low) ** (step / (steps - 1))
            set_rate(optimizer, lr)
            loss = accumulate_gradients(model, loader.next_batch(), micro_batch, cast).item()
            optimizer.step()
            optimizer.zero_grad()
            if not isfinite(loss):
                return
            seen.append(loss)
            yield lr, loss
            smooth = list(moving_average(seen))
            if smooth[-1] > RISEN * min(smooth):
                return


def _draw(
    rates: list[float], losses: list[float], smooth: list[float], best: float, title: str, out: Path
) -> None:
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot(rates, losses, color="tab:blue", alpha=0.25, linewidth=0.8)
    axes.plot(rates, smooth, color="tab:blue", label="training loss, smoothed")
    axes.axvline(best, color="tab:orange", label=f"lowest, at {best:.1e}")
    axes.axvline(best / SAFE, color="tab:green", linestyle="--", label=f"guess: {best / SAFE:.1e}")
    axes.set(xscale="log", xlabel="learning rate", ylabel="loss (nats per token)")
    axes.set_ylim(top=1.05 * max(losses[0], min(smooth) * 1.1))
    axes.set_title(title, parse_math=False)
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic.replacing(out) as draft:
        figure.savefig(draft, dpi=110)
    plt.close(figure)
