"""Trials of train.py on a GPU: `python -m tritium.bench trainer [--save]`.

    graph   100 steps with and without --cuda-graph: the losses must be the same bits, and so the
            weights. With PyTorch's deterministic algorithms, because the gradient of attention is
            not deterministic otherwise; eager is run twice to show that it repeats itself.
    speed   tokens per second and MFU, eager and captured
    curves  the loss in float32, with products in bfloat16, and with weights in bfloat16

Without a GPU there is nothing to capture: `graph` is left out, and said so; the rest runs, of a
tiny model. Every run is train.py's own, in a process of its own.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from statistics import median
from typing import Literal

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from tritium.bench import tables
from tritium.bench.ends import FailedError, WrongInputError, at_least
from tritium.bench.harness import device_name
from tritium.bench.runs._trials import WRONG_INPUT
from tritium.training.monitor.plot import moving_average
from tritium.training.run import checkpoint
from tritium.training.run.run_folder import read_lines

ROOT = Path(__file__).parents[2]
RESULTS = "trainer.md"  # in the folder of results
WIDTH = 130
GRAPH_STEPS = 100
SPEED_STEPS = 60
SMALLER = ("--batch-size", "16", "--micro-batch-size", "16", "--eval-tokens", "32768")
DETERMINISTIC = """
import runpy, sys, torch
torch.use_deterministic_algorithms(True, warn_only=True)
torch.utils.deterministic.fill_uninitialized_memory = False
sys.argv[0] = "train.py"
runpy.run_path("train.py", run_name="__main__")
"""
GRAPHS = {"eager": (), "eager, again": (), "CUDA graph": ("--cuda-graph",)}
SPEEDS = {
    "eager": (),
    "CUDA graph": ("--cuda-graph",),
}
CURVES = {
    "float32": ("--precision", "float32"),
    "bfloat16 products": ("--precision", "bfloat16"),
    "bfloat16 weights, float32 master": ("--precision", "bfloat16-true"),
    "bfloat16 weights, stochastic rounding": (
        "--precision", "bfloat16-true", "--master-weights", "stochastic",
    ),
}  # fmt: skip

Part = Literal["graph", "speed", "curves"]


@dataclass(frozen=True)
class Run:
    """Results of a run of train.py."""

    name: str
    entries: tuple[dict, ...] = ()
    """Entries of its log."""
    weights: str = ""
    """Digest of the last checkpoint's."""
    problem: str = ""
    """The last line of what it said, if it failed."""

    @property
    def losses(self) -> list[float]:
        """Loss of every step."""
        return [entry["loss"] for entry in self.entries]

    def rate(self, name: str) -> float:
        """Return the median of a rate over the second half of the steps."""
        half = self.entries[len(self.entries) // 2 :]
        return median(entry.get(name, float("nan")) for entry in half)


@dataclass(frozen=True)
class Trial:
    """Runs of one model on one text, in a folder."""

    folder: Path
    preset: str
    data: str | None
    failed: list[str] = field(default_factory=list)
    """Names of the runs that failed so far."""

    def run(self, name: str, flags: tuple[str, ...], *, deterministic: bool = False) -> Run:
        """Train from the beginning to the end; a failure is shown, and stops nothing else.

        Raises:
            WrongInputError: train.py refused what it was given; the sentence is its own.
        """
        out = self.folder / hashlib.sha256(repr((name, flags)).encode()).hexdigest()[:12]
        arguments = [self.preset, "--out", str(out), "--sample-tokens", "0", *flags]
        arguments += [] if self.preset == "tiny" else SMALLER
        arguments += [] if self.data is None else ["--data", self.data]
        program = ["-c", DETERMINISTIC] if deterministic else ["train.py"]
        environment = os.environ | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
        done = subprocess.run(
            [sys.executable, *program, *arguments], cwd=ROOT, env=environment, text=True,
            capture_output=True,
        )  # fmt: skip
        if done.returncode:
            lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
            problem = lines[-1] if lines else f"status {done.returncode}"
            if done.returncode == WRONG_INPUT:
                raise WrongInputError(problem)
            self.failed.append(name)
            return Run(name, problem=problem)
        entries = tuple(read_lines(out / "log.jsonl"))
        last = checkpoint.checkpoints(out / "checkpoints")[-1]
        digest = hashlib.sha256((last / checkpoint.FILES[0]).read_bytes()).hexdigest()
        return Run(name, entries, digest)


def graph(trial: Trial) -> Iterator[Table]:
    """Compare captured steps with eager ones, bit by bit."""
    steps = ("--max-steps", str(GRAPH_STEPS), "--eval-every", str(GRAPH_STEPS))
    runs = [trial.run(name, (*flags, *steps), deterministic=True) for name, flags in GRAPHS.items()]
    table = Table("steps taken", "equal losses", "weights", "last loss, nats/token")
    for run in runs:
        equal = sum(map(float.__eq__, run.losses, runs[0].losses))
        same = "identical" if run.weights == runs[0].weights else "DIFFERENT"
        table.add_row(*_cells(run, f"{equal} of {GRAPH_STEPS}", same, _loss(run)))
    yield table


def speed(trial: Trial) -> Iterator[Table]:
    """Measure tokens per second; the median of the second half of the steps."""
    cuda = torch.cuda.is_available()
    table = Table("step", "tokens/s", "MFU, datasheet", "MFU, measured", "memory, GiB")
    for name, flags in SPEEDS.items():
        if "--cuda-graph" in flags and not cuda:
            table.add_row(name, "needs a GPU")
            continue
        steps = ("--max-steps", str(SPEED_STEPS), "--eval-every", str(SPEED_STEPS))
        run = trial.run(name, (*flags, *steps))
        shares = (run.rate(key) if run.entries else 0 for key in ("mfu", "mfu_measured"))
        shares = ("" if share != share else f"{share:.1%}" for share in shares)
        memory = f"{run.entries[-1]['memory_gib']:.2f}" if run.entries else ""
        rate = f"{run.rate('tokens_per_s'):,.0f}" if run.entries else ""
        table.add_row(*_cells(run, rate, *shares, memory))
    yield table


def curves(trial: Trial, steps: int, picture: Path | None) -> Iterator[Table]:
    """Train in every precision from the same seed on the same batches."""
    every = ("--max-steps", str(steps), "--eval-every", str(max(1, steps // 5)))
    runs = [trial.run(name, (*flags, *every)) for name, flags in CURVES.items()]
    table = Table("precision", "last tenth, nats/token", "off float32", "validation, nats/token")
    for run in runs:
        last, first = (_last_tenth(x) for x in (run, runs[0]))
        validation = f"{run.entries[-1]['val_loss']:.4f}" if run.entries else ""
        table.add_row(*_cells(run, f"{last:.4f}", f"{last - first:+.4f}", validation))
    yield table
    if picture is not None:
        plot([run for run in runs if run.entries], picture)


def plot(runs: list[Run], path: Path) -> None:
    """Draw the losses above, and below the distance of each from the first run's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (above, below) = plt.subplots(
        2, sharex=True, figsize=(8, 6), layout="constrained", height_ratios=(2, 1)
    )
    base = list(moving_average(runs[0].losses))
    for run in runs:
        smooth = list(moving_average(run.losses))
        steps = range(1, len(smooth) + 1)
        above.plot(steps, smooth, linewidth=1.2, label=run.name)
        below.plot(steps, [x - y for x, y in zip(smooth, base, strict=True)], linewidth=1.2)
    above.set(ylabel="training loss, smoothed\n(nats per token)", title="Precisions, one seed")
    below.set(ylabel=f"minus {runs[0].name}\n(nats per token)", xlabel="optimizer step")
    for axes in (above, below):
        axes.grid(alpha=0.3)
    above.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}")
    figure.savefig(draft, dpi=130, format="png")
    plt.close(figure)
    draft.rename(path)


def main(
    parts: tuple[Part, ...] = ("graph", "speed", "curves"),
    steps: int = 500,
    data: str | None = None,
    save: bool = False,
) -> None:
    """Run train.py in every way that a GPU offers, and show what came of it.

    Args:
        parts: what to run.
        steps: of each loss curve.
        data: text to learn from, as train.py takes it; Python's standard library by default.
        save: keep tables and curves in trainer.md and trainer.png, in the folder of results.

    Raises:
        WrongInputError: train.py refused the text, or `steps` is below 1.
        FailedError: a run failed; the others were made, and are kept with `save`.
    """
    at_least(1, steps=steps)
    cuda = torch.cuda.is_available()
    preset = "gpt2" if cuda else "tiny"
    picture = (tables.results() / RESULTS).with_suffix(".png") if save else None
    calls: dict[str, Callable[[Trial], Iterator[Table]]] = {
        "graph": graph, "speed": speed, "curves": lambda trial: curves(trial, steps, picture),
    }  # fmt: skip
    command = f"python -m tritium.bench trainer --parts {' '.join(parts)} --steps {steps} --save"
    command += "" if data is None else f" --data {data}"
    lines: list[str | Table] = [
        f"`{command}`, torch {torch.__version__}, preset {preset}"
        + (f" {' '.join(SMALLER)}" if cuda else "")
        + f", {device_name(torch.device('cuda' if cuda else 'cpu'))}"
    ]
    console = Console(width=WIDTH)
    failed: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for part in parts:
            if part == "graph" and not cuda:
                shown = ["graph: there is no GPU to capture a CUDA graph on; left out"]
            else:
                shown = list(calls[part](Trial(Path(folder), preset, data, failed)))
            for each in shown:
                if isinstance(each, Table):
                    each.box = box.SIMPLE
                console.print(each)
            lines += shown
    if save:
        tables.write(tables.results() / RESULTS, _markdown(lines, "curves" in parts).encode())
    if failed:
        raise FailedError(f"{len(failed)} of the runs failed: {', '.join(failed)}")


def _markdown(lines: list[str | Table], picture: bool) -> str:
    file = StringIO()
    console = Console(file=file, width=WIDTH)
    for line in lines:
        if isinstance(line, Table):
            line.box = box.MARKDOWN
            console.print(line)
        else:
            print(line, "", sep="\n", file=file)
    if picture:
        print(
            "![Losses of the precisions, and their distance from float32](trainer.png)", file=file
        )
    return file.getvalue()


def _cells(run: Run, *cells: str) -> tuple[str, ...]:
    return (run.name, f"failed: {run.problem}") if run.problem else (run.name, *cells)


def _loss(run: Run) -> str:
    return f"{run.losses[-1]:.6f}" if run.entries else ""


def _last_tenth(run: Run) -> float:
    last = run.losses[-max(1, len(run.losses) // 10) :]
    return sum(last) / len(last) if last else float("nan")
