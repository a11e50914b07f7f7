"""Tokens that Muon needs to AdamW's loss: `python -m tritium.bench tokens_to_loss`.

Both train one small model at the same learning rates, over several seeds, in turns; each counts by
its best rate, the one of the lowest mean loss. Muon is also trained, at that rate, on a quarter and
on half of the tokens, its learning rate decaying within them, and the tokens at which it has the
loss that AdamW has at the end, of the same seed, are found between these runs on the straight line
of ln loss over ln tokens. The model and its runs are those of `bench scaling`, and Muon is that of
its preset: rows normalized, hidden matrices at twice the rate of the rest.

Seconds are those of the steps, in proportion to their number, and are a neighbour's too.
"""

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import exp, inf, isfinite, log, nan
from pathlib import Path
from statistics import mean

import torch
from rich.table import Table

from tritium.bench import tables
from tritium.bench.ends import WrongInputError, at_least, split_flags
from tritium.bench.harness import device_name
from tritium.bench.runs._trials import Outcome, Trial, TrialError, difference, run_all
from tritium.bench.runs.scaling import COMMON, CONTEXT, PRESET, arguments, hidden, shape

RESULTS = "tokens_to_loss.md"
WIDTH = 110
SHARES = 0.25, 0.5  # of the tokens, on which Muon is trained too
BATCH = 4  # sequences, of every run
TOKENS_PER_STEP = BATCH * CONTEXT
RULES = "AdamW", "Muon"
RATIO = (PRESET.optimizer.muon_learning_rate or 0.0) / PRESET.schedule.learning_rate


@dataclass(frozen=True)
class Pair:
    """One seed: AdamW's end, and where Muon has the same loss. NaN where it has not."""

    loss: float
    """Nats per token of held-out text."""
    tokens: tuple[float, float]
    """Those that AdamW and Muon were trained on, until then."""
    seconds: tuple[float, float]
    """The same, in seconds of the steps."""


def main(
    size: float = 48e3,
    steps: int = 600,
    rates: tuple[float, ...] = (4e-3, 8e-3, 16e-3),
    seeds: int = 3,
    data: Path | None = None,
    flags: str = "",
    out: Path = Path("runs/tokens_to_loss"),
    write: bool = False,
) -> None:
    """Sweep the learning rates of AdamW and Muon, and compare the tokens to the same loss.

    Args:
        size: parameters of the model without the embedding; it gets the shape that is nearest.
        steps: length of the runs, of 512 tokens each.
        rates: peak learning rates that both are tried with, growing.
        seeds: runs of each, from seed 0.
        data: text file or folder. None: Python's standard library.
        flags: flags of train.py for all runs.
        out: folder of the runs; those that ended there are not run again.
        write: keep the table as tokens_to_loss.md in the folder of results.
    """
    if len(rates) < 3 or not all(a < b for a, b in pairwise((0, *rates))):
        got = " ".join(map(str, rates))
        raise WrongInputError(f"--rates must be 3 or more numbers, growing from above 0, got {got}")
    at_least(40, steps=steps)
    at_least(1, size=size, seeds=seeds)
    model = shape(size)

    def runs(names: Iterable[str], chosen: Iterable[float], share: float = 1.0) -> list[Trial]:
        length = round(share * steps)
        warm_up = min(PRESET.schedule.warmup_steps, length // 10)
        flags = {"batch-size": BATCH, "max-steps": length, "warmup-steps": warm_up}
        usual = arguments(model, flags)
        return [
            Trial(f"{name} at {lr:g}, {share:g} of tokens", (*usual, *_rule(name, lr)), seed)
            for seed in range(seeds) for lr in chosen for name in names
        ]  # fmt: skip

    given = [*COMMON, *([] if data is None else ["--data", str(data)]), *split_flags(flags)]
    swept = by_rate(run_all(runs(RULES, rates), out, given), rates, seeds)
    best = {name: choose(each) for name, each in swept.items()}
    parts = {1.0: swept["Muon"][best["Muon"]]}
    for share in SHARES:
        parts[share] = run_all(runs(["Muon"], [best["Muon"]], share), out, given)
    pairs = [
        reach(end, {share: each[seed] for share, each in parts.items()})
        for seed, end in enumerate(swept["AdamW"][best["AdamW"]])
    ]
    asked = f"--size {size:g} --steps {steps} --rates {' '.join(f'{x:g}' for x in rates)}"
    asked += f" --seeds {seeds}" + (f" --data {shlex.quote(str(data))}" if data else "")
    asked += f" --flags {shlex.quote(flags)}" if flags else ""
    lines = (
        f"`python -m tritium.bench tokens_to_loss {asked}`, torch {torch.__version__}, "
        f"{device_name(torch.device('cpu'))}",
        f"{model.n_layers} layers of width {model.d_model}, {hidden(model):,} parameters without "
        f"the embedding; {steps * TOKENS_PER_STEP:,} tokens, which are bytes. Loss in nats per "
        "token of held-out text.",
        *verdict(pairs, best, rates),
    )
    kept = tables.results() / RESULTS if write else None
    tables.present(lines, _sweep(swept, best), _pairs(pairs), width=WIDTH, write_to=kept)


def _rule(name: str, lr: float) -> tuple[str, ...]:
    if name == "Muon":
        return "--learning-rate", f"{lr:g}", "--muon-learning-rate", f"{RATIO * lr:g}"
    plain = "--optimizer", "adamw", "--row-beta2", "None", "--muon-learning-rate", "None"
    return "--learning-rate", f"{lr:g}", *plain


def by_rate(
    outcomes: Sequence[Outcome], rates: Sequence[float], seeds: int
) -> dict[str, dict[float, list[Outcome]]]:
    """Return the outcomes of each optimizer by rate, in the order of their seeds."""
    each = iter(outcomes)
    found = {name: {lr: [] for lr in rates} for name in RULES}
    for _ in range(seeds):
        for lr in rates:
            for name in RULES:
                found[name][lr].append(next(each))
    return found


def choose(swept: dict[float, list[Outcome]]) -> float:
    """Return the rate of the lowest mean loss; one at which a run diverged is not chosen.

    Raises:
        TrialError: runs diverged at every rate.
    """
    losses = {lr: mean(x.val_loss for x in each) for lr, each in swept.items()}
    finite = {lr: loss for lr, loss in losses.items() if isfinite(loss)}
    if not finite:
        raise TrialError("runs diverged at every learning rate; give lower --rates")
    return min(finite, key=lambda lr: finite[lr])


def reach(end: Outcome, parts: dict[float, Outcome]) -> Pair:
    """Return where Muon has the loss that AdamW has at its end.

    Below the first of `parts` it is that one, so that what is said is too little, not too much.
    """
    curve = [(x.tokens, x.val_loss) for _, x in sorted(parts.items())]
    needed = nan
    if curve[0][1] <= end.val_loss:
        needed = float(curve[0][0])
    else:
        for (a, high), (b, low) in pairwise(curve):
            if low <= end.val_loss < high:
                way = log(high / end.val_loss) / log(high / low)
                needed = exp(log(a) + way * log(b / a))
                break
    whole = parts[1.0]
    return Pair(
        end.val_loss, (end.tokens, needed), (end.seconds, whole.seconds * needed / whole.tokens)
    )


def verdict(pairs: Sequence[Pair], best: dict[str, float], rates: Sequence[float]) -> list[str]:
    """Return sentences: ratios of tokens and of seconds, and a best rate that ends the sweep."""
    said = []
    for what, each in {"tokens": [x.tokens for x in pairs],
                       "seconds": [x.seconds for x in pairs]}.items():  # fmt: skip
        apart, half = difference(*([log(x[i]) for x in each] for i in (0, 1)))
        if not isfinite(apart):
            return [*_edges(best, rates), "Muon did not come to AdamW's loss with every seed."]
        interval = ""
        if half != inf:
            interval = f" (95 % interval {exp(apart - half):.2f} to {exp(apart + half):.2f})"
        said.append(f"AdamW took {exp(apart):.2f} times the {what} of Muon to its loss{interval}.")
    return [*_edges(best, rates), *said]


def _edges(best: dict[str, float], rates: Sequence[float]) -> list[str]:
    return [
        f"{name} was best at {lr:g}, an end of the sweep: a rate beyond it may be better."
        for name, lr in best.items()
        if lr in (rates[0], rates[-1])
    ]


def _sweep(swept: dict[str, dict[float, list[Outcome]]], best: dict[str, float]) -> Table:
    table = Table("optimizer", "learning rate", "mean loss", "loss of each seed", "best")
    for name, each in swept.items():
        for lr, outcomes in each.items():
            losses = [x.val_loss for x in outcomes]
            table.add_row(
                name, f"{lr:g}", f"{mean(losses):.4f}", " ".join(f"{x:.4f}" for x in losses),
                "yes" if lr == best[name] else "",
            )  # fmt: skip
    return table


def _pairs(pairs: Sequence[Pair]) -> Table:
    table = Table("seed", "loss", "AdamW tokens", "Muon tokens", "ratio", "AdamW s", "Muon s")
    for seed, x in enumerate(pairs):
        table.add_row(
            str(seed), f"{x.loss:.4f}", *(f"{y:,.0f}" for y in x.tokens),
            f"{x.tokens[0] / x.tokens[1]:.2f}", *(f"{y:.0f}" for y in x.seconds),
        )  # fmt: skip
    return table
