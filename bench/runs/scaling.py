"""A ladder of models, and the loss of the next one predicted: `python -m tritium.bench scaling`.

    python -m tritium.bench scaling --sizes 6e3 12e3 24e3 48e3 96e3 --minutes 10

Every size is trained twice, on a quarter of its tokens and on all, which are as many for each
parameter at every size. Laws of the loss (`scaling_laws`) are fitted to these runs, the loss of the
next size is predicted and said, and only then is it trained. Whether the outcome is within the
interval is judged by Chinchilla's form; the others are shown beside it.

Runs are those of train.py's preset `characters` in float32 on one thread, tokens being bytes. Width
grows with depth as in that preset. Batch, learning rates, decay and warm-up of each run follow from
its width and tokens by the laws of `training.depth`: with the same batch and warm-up everywhere the
shortest runs are far from their best, which bends the curve (Porian et al.), and with the same
decay the longest ones.

The interval counts an error of the form. For each size of the ladder, sizes at least as far below
it as the ladder is below the next size are fitted alone, and predict it: the errors that the form
made where the outcome is known. See `scaling_laws.hindcasts`.

Porian et al., "Resolving Discrepancies in Compute-Optimal Scaling of Language Models", 2024.
https://arxiv.org/abs/2406.19146
"""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise
from math import isfinite, log, sqrt
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from rich.table import Table

from tritium.bench import tables
from tritium.bench.ends import WrongInputError, at_least, split_flags
from tritium.bench.harness import device_name
from tritium.bench.runs._trials import Outcome, Trial, TrialError, run_all
from tritium.bench.runs.scaling_laws import LAWS, Estimate, Fit, Point, divisions, hindcasts
from tritium.kernels.units import counted
from tritium.model.config import ModelConfig
from tritium.model.shapes import flops_per_token, num_parameters
from tritium.training.depth import fit_to_depth
from tritium.training.schedule import Length
from tritium.training.settings import PRESETS, TrainConfig

RESULTS = "scaling"  # .md and .png, in the folder of results
WIDTH = 130
PRESET = PRESETS["characters"]
VOCAB = 257  # bytes, and the end of a text
CONTEXT = 128
SHARES = 0.25, 1.0  # of the tokens that a size gets
LEAST_SIZES = 5
# A single layer cannot look up what followed a token before (Olsson et al., "In-context Learning
# and Induction Heads", 2022, https://arxiv.org/abs/2209.11895): its losses are on another curve.
LEAST_LAYERS = 2
LEAST_STEPS = 10
LEAST_HINDCASTS = 2  # of one error no spread is known
TRIED = 40  # steps of the two runs that measure the speed
HOFFMANN = 20.0  # tokens for each parameter, of several bytes each
JUDGE = "Chinchilla"
COMMON = (
    "characters", "--threads", "1", "--device", "cpu", "--precision", "float32",
    "--no-self-check", "--eval-every", "1000000", "--eval-tokens", "65536", "--log-every", "50",
    "--model.max-seq-len", str(CONTEXT), "--model.vocab-size", str(VOCAB),
)  # fmt: skip


def main(
    sizes: tuple[float, ...] = (6e3, 12e3, 24e3, 48e3, 96e3),
    predict: float | None = None,
    minutes: float | None = None,
    tokens_per_parameter: float | None = None,
    seeds: int = 1,
    data: Path | None = None,
    flags: str = "",
    out: Path = Path("runs/scaling"),
    write: bool = False,
) -> None:
    """Train a ladder of sizes, fit laws of the loss, predict the next size's, and train that.

    Args:
        sizes: parameters without the embedding, growing; each gets the shape that is nearest.
        predict: the size that is predicted. None: as far above the last as that is above the one
            before.
        minutes: length of all training steps together, by the speed of two short runs before them;
            start-up and validations are not in it.
        tokens_per_parameter: length of the runs instead; 20 if minutes are not given either, as
            Hoffmann et al. found for tokens of several bytes.
        seeds: runs of each size and length, from seed 0.
        data: text file or folder. None: Python's standard library.
        flags: flags of train.py for all runs.
        out: folder of the runs; those that ended there are not run again.
        write: keep table and picture as scaling.md and .png in the folder of results.
    """
    _check(sizes, predict, minutes, tokens_per_parameter, seeds)
    predict = predict or sizes[-1] ** 2 / sizes[-2]
    *ladder, last = (shape(size) for size in (*sizes, predict))
    for smaller, larger in pairwise([*ladder, last]):
        if hidden(larger) <= hidden(smaller):
            raise WrongInputError(
                f"sizes must differ by more than the step between shapes; two have "
                f"{hidden(larger):,} parameters, take them further apart"
            )
    n = len(divisions([_point(x, 1) for x in ladder], _point(last, 1)))
    if n < LEAST_HINDCASTS:
        raise WrongInputError(
            f"an interval needs {LEAST_HINDCASTS} sizes with 3 others as far below as the ladder "
            f"is below {predict:g}, got {n}; add sizes, or take --predict nearer"
        )
    given = [*COMMON, *([] if data is None else ["--data", str(data)]), *split_flags(flags)]
    ratio = tokens_per_parameter or HOFFMANN
    if minutes is not None:
        ratio = _affordable([*ladder, last], minutes, seeds, out, given)
        print(f"{counted(minutes, 'minute')} are {ratio:.2f} tokens for each parameter.")
    trials = [trial(x, ratio * s, seed) for x in ladder for s in SHARES for seed in range(seeds)]
    points = _points(trials, run_all(trials, out, given))
    fits = fit(points, ratio)
    expected = _planned(trial(last, ratio, 0), last)
    errors = {name: hindcasts(x.law, x.points, expected) for name, x in fits.items()}
    predictions = {name: x.predict(expected, errors=errors[name]) for name, x in fits.items()}
    for name, value in predictions.items():
        print(f"Predicted by {name}: {_interval(value)} nats per token")
    trials = [trial(last, ratio, seed) for seed in range(seeds)]
    outcomes = _points(trials, run_all(trials, out, given))
    asked = [f"--sizes {' '.join(f'{x:g}' for x in sizes)} --predict {predict:g}"]
    asked += [f"--minutes {minutes:g}"] if minutes else [f"--tokens-per-parameter {ratio:g}"]
    asked += [f"--seeds {seeds}"] + ([f"--data {shlex.quote(str(data))}"] if data else [])
    asked += [f"--flags {shlex.quote(flags)}"] if flags else []
    lines = (
        f"`python -m tritium.bench scaling {' '.join(asked)}`, torch {torch.__version__}, "
        f"{device_name(torch.device('cpu'))}",
        f"{len(sizes)} sizes on a quarter of {ratio:.3g} tokens (bytes) for each parameter and on "
        "all of them, then the next size. Loss in nats per token of held-out text, which for "
        "bytes is 1.44 bits per byte each. Intervals hold 95 %.",
        verdict(predictions[JUDGE], [x.loss for x in outcomes]),
        f"{JUDGE}'s form inside the ladder, of each size from those as far below it, trained less "
        f"predicted: {', '.join(f'{100 * x:+.2f} %' for x in errors[JUDGE])}. The intervals of "
        "predictions hold errors as large; constants have those of the fit alone.",
        f"{JUDGE}'s form is least for that size's {expected.flops:.2e} FLOPs at "
        "{:.3g} ({:.3g} to {:.3g}) tokens for each parameter.".format(
            *fits[JUDGE].best_ratio(expected.flops)
        ),
    )
    kept = tables.results() / f"{RESULTS}.md" if write else None
    shown = _runs_table([*points, *outcomes], fits[JUDGE]), _laws_table(fits, predictions, outcomes)
    tables.present(lines, *shown, width=WIDTH, write_to=kept)
    picture = tables.results() / f"{RESULTS}.png" if write else out / f"{RESULTS}.png"
    plot(points, outcomes, fits, predictions, picture)
    print(f"Picture: {picture}")


def _check(
    sizes: Sequence[float], predict: float | None, minutes: float | None, ratio: float | None,
    seeds: int,
) -> None:  # fmt: skip
    wrong = None
    if len(sizes) < LEAST_SIZES or not all(a < b for a, b in pairwise((0, *sizes))):
        got = " ".join(map(str, sizes))
        wrong = f"--sizes must be {LEAST_SIZES} or more numbers, growing from above 0, got {got}"
    elif predict is not None and predict <= sizes[-1]:
        wrong = f"--predict must be above the largest of --sizes, {sizes[-1]:g}, got {predict:g}"
    elif minutes is not None and ratio is not None:
        wrong = "--minutes and --tokens-per-parameter exclude each other; drop one"
    elif minutes is not None and not 0 < minutes < float("inf"):
        wrong = f"--minutes must be above 0, got {minutes:g}"
    elif ratio is not None and not 0 < ratio < float("inf"):
        wrong = f"--tokens-per-parameter must be above 0, got {ratio:g}"
    if wrong:
        raise WrongInputError(wrong)
    at_least(1, seeds=seeds)


def shape(size: float) -> ModelConfig:
    """Return the shape of about so many parameters without the embedding.

    Its width is a multiple of 8 and about as many times its depth as that of the preset, with two
    layers at least.
    """
    aspect = PRESET.model.d_model / PRESET.model.n_layers
    layers = max(LEAST_LAYERS, round((size / (12 * aspect**2)) ** (1 / 3)))
    width = 8 * max(2, round(sqrt(size / (12 * layers)) / 8))
    heads = max(n for n in range(1, width // 16 + 1) if width % (2 * n) == 0)
    return replace(
        PRESET.model, vocab_size=VOCAB, n_layers=layers, d_model=width, n_heads=heads,
        max_seq_len=CONTEXT,
    )  # fmt: skip


@cache
def _parameters(model: ModelConfig) -> int:
    return num_parameters(model)


def hidden(model: ModelConfig) -> int:
    """Return the number of parameters without the embedding."""
    return _parameters(model) - model.vocab_size * model.d_model


def settings(model: ModelConfig, ratio: float) -> TrainConfig:
    """Return settings of a model that sees `ratio` tokens for each parameter."""
    length = Length(max_tokens=max(CONTEXT * LEAST_STEPS, round(ratio * _parameters(model))))
    return fit_to_depth(
        replace(PRESET, model=model, length=length), PRESET, {"max-tokens"}, power_of_two=False
    )


def arguments(model: ModelConfig, flags: Mapping[str, object]) -> tuple[str, ...]:
    """Return flags of train.py: a model's shape, and others by their names."""
    shaped = {
        "model.d-model": model.d_model, "model.n-layers": model.n_layers,
        "model.n-heads": model.n_heads,
    }  # fmt: skip
    return tuple(word for name, x in {**shaped, **flags}.items() for word in (f"--{name}", str(x)))


def trial(model: ModelConfig, ratio: float, seed: int, length: int | None = None) -> Trial:
    """Return the run of a model over its tokens, or over their first `length` steps."""
    config = settings(model, ratio)
    tokens = config.length.max_tokens or 0
    length = length or max(LEAST_STEPS, round(tokens / (config.batch_size * CONTEXT)))
    flags = {
        "batch-size": config.batch_size, "max-steps": length,
        "warmup-steps": min(config.schedule.warmup_steps, length // 10),
        "learning-rate": f"{config.schedule.learning_rate:.4g}",
        "muon-learning-rate": f"{config.optimizer.muon_learning_rate:.4g}",
        "weight-decay": f"{config.optimizer.weight_decay:.4g}",
    }  # fmt: skip
    name = f"{model.n_layers} x {model.d_model}, {length} steps of {config.batch_size}"
    return Trial(name, arguments(model, flags), seed)


def _affordable(
    models: Sequence[ModelConfig], minutes: float, seeds: int, out: Path, common: list[str]
) -> float:
    """Return the tokens per parameter for which all runs together take so many minutes."""
    ends = models[0], models[-1]
    tried = run_all([trial(x, HOFFMANN, 0, TRIED) for x in ends], out, common)
    (low, a), (high, b) = (
        (flops_per_token(x), outcome.seconds / outcome.tokens)
        for x, outcome in zip(ends, tried, strict=True)
    )
    rise = max(0.0, b - a) / (high - low)  # a token's seconds are linear in its FLOPs

    def seconds(model: ModelConfig) -> float:
        return _parameters(model) * (a + rise * (flops_per_token(model) - low))

    each = sum(SHARES) * sum(map(seconds, models[:-1])) + seconds(models[-1])
    return 60 * minutes / (seeds * each)


def _point(model: ModelConfig, tokens: int, loss: float = float("nan")) -> Point:
    return Point(
        _parameters(model), hidden(model), tokens, flops_per_token(model) * tokens, loss
    )  # fmt: skip


def _planned(trial: Trial, model: ModelConfig, loss: float = float("nan")) -> Point:
    given = dict(zip(trial.arguments[::2], trial.arguments[1::2], strict=True))
    return _point(model, int(given["--max-steps"]) * int(given["--batch-size"]) * CONTEXT, loss)


def _points(trials: Sequence[Trial], outcomes: Sequence[Outcome]) -> list[Point]:
    found = []
    for trial, outcome in zip(trials, outcomes, strict=True):
        if not isfinite(outcome.val_loss):
            raise TrialError(f"{outcome.name}, seed {outcome.seed}: diverged; lower its rates")
        given = dict(zip(trial.arguments[::2], trial.arguments[1::2], strict=True))
        model = replace(
            PRESET.model, vocab_size=VOCAB, max_seq_len=CONTEXT,
            **{x: int(given[f"--model.{x.replace('_', '-')}"])
               for x in ("d_model", "n_layers", "n_heads")},
        )  # fmt: skip
        found.append(_planned(trial, model, outcome.val_loss))
    return found


def fit(points: Sequence[Point], ratio: float) -> dict[str, Fit]:
    """Fit each law: that of compute to the runs that saw all of their tokens."""
    longest = [x for x in points if x.tokens > ratio * x.parameters * sum(SHARES) / 2]
    return {name: Fit(law, longest if name == "compute" else points) for name, law in LAWS.items()}


def verdict(predicted: Estimate, losses: Sequence[float]) -> str:
    """Return in a sentence whether what was trained is within its interval."""
    got = ", ".join(f"{x:.4f}" for x in losses)
    inside = sum(map(predicted.holds, losses))
    whether = "within" if inside == len(losses) else "NOT within"
    if 0 < inside < len(losses):
        whether = f"{inside} of {len(losses)} within"
    return (
        f"{JUDGE}'s form predicted {_interval(predicted)} for the next size, unseen by the fit; "
        f"trained: {got}, {whether} the interval."
    )


def _number(x: float) -> str:
    """Return a constant; 0 for one that has vanished, whose logarithm has gone far down."""
    return f"{x:.3g}" if abs(x) > 1e-6 else "0"


def _interval(x: Estimate) -> str:
    return f"{x.value:.4f} ({x.low:.4f} to {x.high:.4f})"


def _runs_table(points: Sequence[Point], judge: Fit) -> Table:
    table = Table("parameters", "without embedding", "tokens", "FLOPs", "loss",
                  f"less {JUDGE}'s", "bits per byte")  # fmt: skip
    for x in points:
        table.add_row(
            f"{x.parameters:,.0f}", f"{x.hidden:,.0f}", f"{x.tokens:,.0f}", f"{x.flops:.2e}",
            f"{x.loss:.4f}", f"{x.loss - judge.predict(x).value:+.4f}", f"{x.loss / log(2):.4f}",
        )  # fmt: skip
    return table


def _laws_table(
    fits: dict[str, Fit], predictions: dict[str, Estimate], outcomes: Sequence[Point]
) -> Table:
    table = Table("law", "loss", "constants", "spread, %", "predicted", "trained", "within")
    for name, each in fits.items():
        constants = "; ".join(
            "{} {} ({} to {})".format(k, *map(_number, x)) for k, x in each.constants().items()
        )
        inside = [predictions[name].holds(x.loss) for x in outcomes]
        table.add_row(
            name, each.law.formula, constants, f"{100 * each.spread:.2f}",
            _interval(predictions[name]), ", ".join(f"{x.loss:.4f}" for x in outcomes),
            ", ".join("yes" if x else "no" for x in inside),
        )  # fmt: skip
    return table


def plot(
    points: Sequence[Point], outcomes: Sequence[Point], fits: dict[str, Fit],
    predictions: dict[str, Estimate], path: Path,
) -> None:  # fmt: skip
    """Draw loss against parameters, tokens and compute, the law's curves, and the prediction."""
    panels = {"parameters": "parameters", "tokens": "training tokens (bytes)",
              "flops": "training compute (FLOP)"}  # fmt: skip
    every = [*points, *outcomes]
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.3), sharey=True, layout="constrained")
    expected = predictions[JUDGE]
    for panel, (field, label) in zip(axes, panels.items(), strict=True):
        for color, share in zip(("tab:blue", "tab:orange"), reversed(SHARES), strict=True):
            runs = [x for x in every if _share(x, every) == share]
            name = "all" if share == 1 else f"{share:g}"
            curve = sorted((getattr(x, field), fits[JUDGE].predict(x).value) for x in runs)
            panel.plot(*zip(*curve, strict=True), color=color, linewidth=1,
                       label=f"{JUDGE}'s form, {name} of the tokens")  # fmt: skip
            ladder = [x for x in runs if x in points]
            panel.plot(
                [getattr(x, field) for x in ladder], [x.loss for x in ladder], "o", color=color,
                markersize=5, label=f"trained, {name} of the tokens",
            )  # fmt: skip
        at = getattr(outcomes[0], field)
        panel.errorbar(
            at, expected.value,
            [[expected.value - expected.low], [expected.high - expected.value]], fmt="s",
            color="0.4", markersize=5, capsize=4, label="predicted, 95 % interval",
        )  # fmt: skip
        panel.plot([at] * len(outcomes), [x.loss for x in outcomes], "*", color="tab:red",
                   markersize=11, label="then trained")  # fmt: skip
        panel.set(xscale="log", yscale="log", xlabel=label)
        panel.grid(alpha=0.3, which="both")
    axes[0].set_ylabel("held-out loss (nats per token)")
    axes[0].yaxis.set_major_formatter("{x:g}")
    axes[0].yaxis.set_minor_formatter("{x:g}")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    figure.suptitle(verdict(expected, [x.loss for x in outcomes]), fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _share(point: Point, points: Sequence[Point]) -> float:
    """Return the share of its size's tokens that a run saw."""
    most = max(x.tokens for x in points if x.parameters == point.parameters)
    return min(SHARES, key=lambda share: abs(share - point.tokens / most))
