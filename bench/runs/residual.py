"""Loss of runs with a residual stream in bfloat16: `python -m tritium.bench residual`.

A small language model learns the bytes of Python's standard library from the same seeds twice, its
matrix products in bfloat16 both times; only the dtype of the residual stream differs, as `train.py
--residual` sets it on a GPU. On a CPU, where the model would keep float32, the embedded tokens are
converted as they are there. The seed decides weights and batches.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from statistics import mean, stdev
from unittest import mock

import torch
from rich.progress import track
from rich.table import Table
from torch import Tensor

from tritium.bench import tables
from tritium.bench.ends import WrongInputError, at_least
from tritium.bench.harness import device_name
from tritium.bench.runs import low_precision
from tritium.kernels import AdamW
from tritium.model import Transformer
from tritium.model import transformer as model_file
from tritium.training.schedule import Budget, Schedule

RESULTS = "residual.md"  # in the folder of results
WIDTH = 100
CONFIG = replace(low_precision.CONFIG, n_layers=6)
BATCH = 16  # sequences
DTYPES = {"float32": torch.float32, "bfloat16": None}  # residual_dtype: None is the products'


def train(
    make: Callable[[], Transformer], seed: int, steps: int, data: tuple[Tensor, Tensor]
) -> float:
    """Train from `seed` and return the loss on the sequences kept aside, in nats per byte.

    Args:
        make: makes a model of the length of `CONFIG`.
        seed: of weights and batches.
        steps: optimizer steps.
        data: bytes to train on, and sequences to validate on.
    """
    tokens, validation = data
    torch.manual_seed(seed)
    model = make().to(tokens.device)
    optimizer = AdamW(
        model.parameters(), weight_decay=0.1, betas=(0.9, 0.99), max_grad_norm=1.0, seed=seed
    )
    generator = torch.Generator().manual_seed(seed)
    offs_L = torch.arange(CONFIG.max_seq_len + 1)
    schedule = Schedule(learning_rate=3e-3, warmup_steps=steps // 20, final_lr=0.1)
    with mock.patch.object(model_file, "as_multiplied", lambda x: x.to(torch.bfloat16)):
        for step in range(steps):
            lr = schedule.rate(step, Budget(steps=steps))
            for group in optimizer.param_groups:
                group["lr"] = lr
            first_B = torch.randint(len(tokens) - len(offs_L), (BATCH, 1), generator=generator)
            loss_of(model, tokens[first_B + offs_L]).backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            return loss_of(model, validation).item()


def loss_of(model: Transformer, tokens: Tensor) -> Tensor:
    """Return the loss of sequences `[B, L + 1]`, with products in bfloat16."""
    with torch.autocast(tokens.device.type, torch.bfloat16):
        return model(tokens[:, :-1], tokens[:, 1:])


def verdict(losses: dict[str, list[float]]) -> str:
    """Say whether the mean losses agree within two standard errors of their difference.

    Args:
        losses: of both kinds, seed by seed; the usual one first.
    """
    (name, usual), (other, tried) = losses.items()
    off = mean(tried) - mean(usual)
    error = ((stdev(tried) ** 2 + stdev(usual) ** 2) / len(usual)) ** 0.5
    pairs = [x - y for x, y in zip(tried, usual, strict=True)]
    paired = stdev(pairs) / len(pairs) ** 0.5
    holds = "agree" if abs(off) <= 2 * error else "DO NOT AGREE"
    seed_by_seed = "agree" if abs(off) <= 2 * paired else "DO NOT AGREE"
    return (
        f"{other} less {name}: {off:+.5f} nats per byte. The means {holds} within two standard "
        f"errors of their difference ({error:.5f}); compared seed by seed ({paired:.5f}) they "
        f"{seed_by_seed}."
    )


def compare(
    makers: Mapping[str, Callable[[], Transformer]], seeds: int, steps: int,
    data: tuple[Tensor, Tensor],
) -> dict[str, list[float]]:  # fmt: skip
    """Train each kind of model from every seed; return their losses."""
    losses: dict[str, list[float]] = {name: [] for name in makers}
    runs = [(name, seed) for seed in range(seeds) for name in makers]
    for name, seed in track(runs, "training", transient=True):
        losses[name].append(train(makers[name], seed, steps, data))
    return losses


def table_of(title: str, losses: dict[str, list[float]]) -> Table:
    """Return a row for each kind, with the losses of its seeds and their mean."""
    seeds = len(next(iter(losses.values())))
    table = Table(title, *(f"seed {seed}" for seed in range(seeds)), "mean")
    for name, each in losses.items():
        table.add_row(name, *(f"{x:.5f}" for x in each), f"{mean(each):.5f}")
    return table


def main(steps: int = 600, seeds: int = 3, write: bool = False) -> None:
    """Train with both residual streams and compare the losses.

    Args:
        steps: optimizer steps of each run.
        seeds: runs of each; two or more.
        write: keep the table in residual.md, in the folder of results.
    """
    if seeds < 2:
        raise WrongInputError(f"two seeds or more have a standard error, got {seeds}")
    at_least(1, steps=steps)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokens, validation = low_precision.sequences()
    data = tokens.to(device), validation.to(device)
    makers: dict[str, Callable[[], Transformer]] = {
        name: partial(Transformer, CONFIG, residual_dtype=x) for name, x in DTYPES.items()
    }
    losses = compare(makers, seeds, steps, data)
    table = table_of("residual stream", losses)
    lines = [
        f"`python -m tritium.bench residual --steps {steps} --seeds {seeds} --write`, torch "
        f"{torch.__version__}, {device_name(device)}",
        f"Validation loss in nats per byte: {CONFIG.n_layers} layers, {CONFIG.d_model} wide, "
        f"{steps} steps of {BATCH} sequences of {CONFIG.max_seq_len} bytes, products in bfloat16.",
        verdict(losses),
    ]
    path = tables.results() / RESULTS if write else None
    tables.present(lines, table, width=WIDTH, write_to=path)
