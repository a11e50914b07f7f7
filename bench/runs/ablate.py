"""Ablations: what each of a list of changes does to a run's loss, `python -m tritium.bench ablate`.

The preset is trained as it is, and once more for every change, all from the same seeds and over
the same steps or minutes. A row's effect is the mean over the seeds of (changed - unchanged) in
bits per byte of held-out text, with its 95 % interval (Student's t of the paired differences): an
interval that holds 0 has shown nothing. Losses of changes that do harm are kept as well.
"""

import shlex
from collections.abc import Sequence
from math import inf, isfinite
from pathlib import Path
from statistics import mean
from typing import Annotated

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import tyro
from rich.table import Table

from tritium.bench import tables
from tritium.bench.ends import WrongInputError, at_least, split_flags
from tritium.bench.harness import device_name
from tritium.bench.runs._trials import Outcome, RefusedError, Trial, difference, run_all
from tritium.kernels.units import counted
from tritium.training.settings import PRESETS

RESULTS = "ablations"  # .md and .png, in the folder of results
WIDTH = 118
AS_IT_IS = "unchanged"

SMALL = PRESETS["small"]


def _rates(factor: float) -> tuple[str, ...]:
    given = SMALL.schedule.learning_rate, SMALL.optimizer.muon_learning_rate
    names = "--learning-rate", "--muon-learning-rate"
    return tuple(
        word for name, lr in zip(names, given, strict=True) if lr
        for word in (name, f"{factor * lr:g}")
    )  # fmt: skip


CHANGES: dict[str, tuple[str, ...]] = {
    "AdamW": ("--optimizer", "adamw", "--learning-rate", f"{SMALL.schedule.learning_rate / 2:g}",
              "--row-beta2", "None", "--muon-learning-rate", "None"),
    "learning rates halved": _rates(0.5),
    "learning rates doubled": _rates(2),
    "rows not normalized": ("--row-beta2", "None"),
    "quintic coefficients": ("--ns-coefficients", "quintic"),
    "three Newton-Schulz steps": ("--ns-steps", "3"),
    "no weight decay": ("--weight-decay", "0"),
    "cautious weight decay": ("--cautious-decay",),
    "no clipping": ("--max-grad-norm", "1e30"),
    "cosine": ("--schedule", "cosine"),
    "trapezoid": ("--schedule", "trapezoid"),
    "constant learning rate": ("--schedule", "constant"),
    "no warm-up": ("--warmup-steps", "0"),
    "LayerNorm": ("--model.norm", "layer"),
    "no QK-norm": ("--no-qk-norm",),
    "blunt heads": ("--model.qk-gain", "1"),
    "no token shift": ("--no-token-shift",),
    "GELU without gate": ("--model.activation", "gelu"),
    "SwiGLU": ("--model.activation", "swiglu"),
    "learned positions": ("--model.positions", "learned"),
    "embedding and output layer apart": ("--no-tie-embeddings",),
    "softcap 15": ("--model.softcap", "15"),
    "z-loss 1e-4": ("--z-loss", "1e-4"),
    "label smoothing 0.05": ("--label-smoothing", "0.05"),
    "dropout 0.1": ("--dropout", "0.1"),
}  # fmt: skip
"""Changes by name: flags of train.py behind those of the preset `small`."""


def main(
    changes: Annotated[tuple[str, ...], tyro.conf.Positional] = (),
    preset: str = "small",
    seeds: int = 3,
    steps: int | None = None,
    minutes: float | None = None,
    flags: str = "",
    out: Path = Path("runs/ablations"),
    ended: bool = False,
    write: bool = False,
) -> None:
    """Train with each change over several seeds and show what it does.

    Args:
        changes: names of changes, or changes of your own as "NAME: FLAGS", such as
            "narrow: --model.d-model 128". None given: all that have a name here.
        preset: preset of train.py that is changed.
        seeds: runs of each, from seed 0; one shows no interval.
        steps: length of every run; the preset's if neither this nor minutes is given.
        minutes: the same by the clock, which a slower change pays for.
        flags: flags of train.py for all runs, behind an equals sign: --flags="--threads 1".
        out: folder of the runs; those that ended there are not run again.
        ended: run none, show those that ended, each change with the seeds that it has.
        write: keep the table and the picture as ablations.md and .png in the folder of results.
    """
    if steps is not None and minutes is not None:
        raise WrongInputError("--steps and --minutes exclude each other; drop one")
    at_least(1, seeds=seeds)
    chosen = {AS_IT_IS: ()} | (dict(map(_named, changes)) if changes else CHANGES)
    length = [] if steps is None else ["--max-steps", str(steps)]
    length = length if minutes is None else ["--max-minutes", f"{minutes:g}"]
    trials = [Trial(name, given, seed) for seed in range(seeds) for name, given in chosen.items()]
    common = [preset, *split_flags(flags), *length]
    try:
        outcomes = run_all(trials, out, common, only_ended=ended)
    except RefusedError as error:
        if error.name == AS_IT_IS:
            raise
        raise WrongInputError(f"{error.name}: {error}") from None
    if not any(outcome.name == AS_IT_IS for outcome in outcomes):
        raise WrongInputError(f"no run without a change has ended in {out}; drop --ended")
    table = effects(outcomes)
    asked = [*map(shlex.quote, changes), f"--preset {preset} --seeds {seeds}"]
    if steps is not None:
        asked.append(f"--steps {steps}")
    if minutes is not None:
        asked.append(f"--minutes {minutes:g}")
    if flags:
        asked.append(f"--flags={shlex.quote(flags)}")
    if ended:
        asked.append("--ended")
    command = " ".join(asked)
    lines = (
        f"`python -m tritium.bench ablate {command}`, torch {torch.__version__}, "
        f"{device_name(torch.device('cuda' if torch.cuda.is_available() else 'cpu'))}",
        "Effect: changed less unchanged, bits per byte of held-out text; below 0 is better. "
        "± is half of the 95 % interval of the mean over the seeds, each run compared with the "
        "unchanged one of its seed. The processor's seconds are those of a whole run. Shown: "
        "the interval holds no 0.",
    )
    kept = tables.results() / f"{RESULTS}.md" if write else None
    tables.present(lines, table, width=WIDTH, write_to=kept)
    picture = tables.results() / f"{RESULTS}.png" if write else out / f"{RESULTS}.png"
    plot(outcomes, picture)
    print(f"Picture: {picture}")


def _named(change: str) -> tuple[str, tuple[str, ...]]:
    if change in CHANGES:
        return change, CHANGES[change]
    name, colon, flags = change.partition(":")
    if colon and flags.strip() and name != AS_IT_IS:
        return name, tuple(shlex.split(flags))
    raise WrongInputError(
        f"no change {change!r}; give 'NAME: FLAGS', or one of:\n  " + "\n  ".join(CHANGES)
    )


def by_name(outcomes: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    """Return the outcomes of each change, in the order of their seeds."""
    found: dict[str, list[Outcome]] = {}
    for outcome in sorted(outcomes, key=lambda x: x.seed):
        found.setdefault(outcome.name, []).append(outcome)
    return found


def pairs(outcomes: Sequence[Outcome]) -> dict[str, tuple[list[Outcome], list[float]]]:
    """Return the outcomes of each change, and the losses without it of the same seeds."""
    found = by_name(outcomes)
    unchanged = {x.seed: x.bits_per_byte for x in found[AS_IT_IS]}
    both = {name: [x for x in each if x.seed in unchanged] for name, each in found.items()}
    return {name: (each, [unchanged[x.seed] for x in each]) for name, each in both.items() if each}


def effects(outcomes: Sequence[Outcome]) -> Table:
    """Return a row for each change, the best first, over the seeds that unchanged runs have too."""
    table = Table(
        "change", "seeds", "bits per byte", "effect", "±", "tokens", "s", "processor s", "shown"
    )
    rows = []
    for name, (each, unchanged) in pairs(outcomes).items():
        losses = [x.bits_per_byte for x in each]
        effect, half = difference(losses, unchanged)
        shown = "yes" if abs(effect) > half else "no"
        if not isfinite(effect):
            shown = "diverged"
        if name == AS_IT_IS:
            cells = ("", "", "")
        else:
            cells = (f"{effect:+.4f}", "" if half == inf else f"{half:.4f}", shown)
        rows.append(
            (effect if isfinite(effect) else inf, (
                name, str(len(each)), f"{mean(losses):.4f}", *cells[:2],
                f"{mean(x.tokens for x in each):,.0f}",
                f"{mean(x.seconds for x in each):.0f}",
                f"{mean(x.processor_seconds for x in each):.0f}", cells[2],
            ))
        )  # fmt: skip
    for _, cells in sorted(rows, key=lambda row: row[0]):
        table.add_row(*cells)
    return table


def plot(outcomes: Sequence[Outcome], path: Path) -> None:
    """Draw every effect with its interval, the best on top; changes that diverged are left out.

    An effect of one seed has no interval and a hollow mark.
    """
    found = pairs(outcomes)
    _, unchanged = found.pop(AS_IT_IS)
    rows = []
    for name, (each, same) in found.items():
        effect, half = difference([x.bits_per_byte for x in each], same)
        if isfinite(effect):
            rows.append((effect, half, name))
    rows.sort(reverse=True)
    figure, axes = plt.subplots(figsize=(8, 1.6 + 0.3 * len(rows)), layout="constrained")
    meanings = {}
    for y, (effect, half, _) in enumerate(rows):
        color, meaning = _shown(effect, half)
        bar = axes.errorbar(
            effect, y, xerr=half if isfinite(half) else None, fmt="o", color=color, capsize=3,
            markerfacecolor=color if isfinite(half) else "none",
        )  # fmt: skip
        meanings[meaning] = bar
    axes.axvline(0, color="0.3", linewidth=1)
    axes.set_yticks(range(len(rows)), [name for *_, name in rows])
    axes.set_xlabel("changed less unchanged, bits per byte (left is better)")
    figure.suptitle(  # over the names too, which take up to half of the width
        f"unchanged: {mean(unchanged):.4f} bits per byte, {counted(len(unchanged), 'seed')}; "
        "bars: 95 % intervals",
        fontsize=10,
    )
    figure.legend(meanings.values(), meanings, loc="outside lower center", ncols=2, fontsize=9)
    axes.grid(axis="x", alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _shown(effect: float, half: float) -> tuple[str, str]:
    """Return an effect's color, and what that says of it."""
    if half == inf:
        return "0.6", "one seed, no interval: nothing is shown"
    if abs(effect) <= half:
        return "0.6", "the interval holds 0: nothing is shown"
    if effect < 0:
        return "tab:blue", "better: all of the interval is below 0"
    return "tab:orange", "worse: all of the interval is above 0"
