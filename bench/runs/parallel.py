"""One training on several processes, in every way to share it: `python -m tritium.bench parallel`.

The same run, with the same seed and global batch, in one process and by torchrun in several, on
gloo and CPUs. Losses are compared step by step and final weights tensor by tensor, as one process
reads them. Then runs that were saved half-way by four processes are resumed by other numbers of
processes, in other modes, and compared with the run that nobody stopped.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import track
from rich.table import Table
from torch import Tensor

from tritium.bench import tables
from tritium.bench.harness import device_name
from tritium.bench.runs._trials import SCRIPT
from tritium.model.saved import FILES, read_record, read_tensors
from tritium.training.run import checkpoint
from tritium.training.run.run_folder import read_lines

RESULTS = "parallel.md"  # in the folder of results
WIDTH = 110
TEXT = Path(json.__file__).parent  # a corpus that is on every machine and small
TOLERANCE = 1e-4  # nats per token


@dataclass(frozen=True)
class Sharing:
    """One way to share a run."""

    processes: int
    mode: str
    group: int = 0

    def __str__(self) -> str:
        """Name it as the table does."""
        if self.processes == 1:
            return "1 process"
        groups = f", groups of {self.group}" if self.group else ""
        return f"{self.processes} processes, {self.mode}{groups}"

    @property
    def flags(self) -> list[str]:
        """The flags of train.py that choose it."""
        return ["--parallel", self.mode, *(["--group-size", str(self.group)] if self.group else [])]


ALONE = Sharing(1, "auto")
SHARINGS = (
    Sharing(2, "ddp"), Sharing(4, "ddp"), Sharing(2, "fsdp"), Sharing(4, "fsdp"),
    Sharing(2, "tp", 2), Sharing(4, "hsdp", 2), Sharing(4, "tp", 2),
)  # fmt: skip
RESUMED = (
    (Sharing(4, "fsdp"), Sharing(2, "fsdp")),
    (Sharing(4, "fsdp"), ALONE),
    (Sharing(4, "hsdp", 2), Sharing(2, "tp", 2)),
    (Sharing(4, "tp", 2), Sharing(2, "ddp")),
)
"""Who saved the middle of a run, and who resumed it."""


class RunError(Exception):
    """A run of train.py did not end well."""


class Runs:
    """Runs of one training, in a folder.

    Args:
        folder: where they go.
        arguments: of train.py, those of every run.
        steps: of every run; a checkpoint is kept half-way.
    """

    def __init__(self, folder: Path, arguments: list[str], steps: int):
        self._folder = folder
        every = str(steps // 2)
        self._arguments = [*arguments, "--max-steps", str(steps), "--save-every", every]
        self._steps = steps

    def run(self, sharing: Sharing, folder: str, *more: str) -> Path:
        """Run, or resume, train.py; return its folder.

        Raises:
            RunError: it failed; the message is its own.
        """
        out = self._folder / folder
        command = [sys.executable]
        if sharing.processes > 1:
            command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
            command.append(str(sharing.processes))
        command += [str(SCRIPT), *self._arguments, *sharing.flags, "--out", str(out), *more]
        done = subprocess.run(
            command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
        )
        if done.returncode:
            raise RunError(f"{sharing}: exit status {done.returncode}\n{done.stdout}{done.stderr}")
        return out

    def resumed(self, whole: Path, by: Sharing, folder: str) -> Path:
        """Resume from the middle of a run, on other processes; return the folder of the copy."""
        out = self._folder / folder
        shutil.copytree(whole, out)
        shutil.rmtree(out / "checkpoints" / f"step-{self._steps:08d}")
        return self.run(by, folder, "--resume", "--resume-anyway")


def losses(run: Path) -> list[float]:
    """Return the loss of every step."""
    return [entry["loss"] for entry in read_lines(run / "log.jsonl")]


def weights(run: Path) -> dict[str, Tensor]:
    """Return the final weights, in double precision."""
    last = checkpoint.checkpoints(run / "checkpoints")[-1]
    found = read_tensors(last, FILES[0], read_record(last))
    return {name: x.double() for name, x in found.items()}


def apart(run: Path, alone: Path) -> tuple[float, float]:
    """Compare a run with another.

    Returns:
        The largest difference of a step's losses, in nats per token; the norm of the difference of
        a weight over that of the weight, of the tensor where it is largest.
    """
    pairs = zip(losses(run), losses(alone), strict=True)
    got, wanted = weights(run), weights(alone)
    if got.keys() != wanted.keys():
        raise RunError(f"{run.name}: the weights have other names")
    return (
        max(abs(x - y) for x, y in pairs),
        max(((got[name] - x).norm() / x.norm()).item() for name, x in wanted.items()),
    )


def main(steps: int = 100, write: bool = False) -> None:
    """Train the preset tiny in every way to share it, and compare losses and weights.

    Args:
        steps: optimizer steps of each run; an even number.
        write: keep the tables in parallel.md, in the folder of results.
    """
    if steps < 2 or steps % 2:
        raise SystemExit(f"bench parallel: steps must be even, at least 2, got {steps}")
    arguments = ["tiny", "--data", str(TEXT), "--sample-tokens", "0", "--device", "cpu"]
    trained = Table("processes", "loss of the last step", "losses apart", "weights apart")
    resumed = Table("saved half-way by", "resumed by", "losses apart", "weights apart")
    largest = 0.0
    with tempfile.TemporaryDirectory() as folder:
        runs = Runs(Path(folder), arguments, steps)
        alone = runs.run(ALONE, "alone")
        trained.add_row(str(ALONE), f"{losses(alone)[-1]:.6f}", "", "")
        whole = {}
        for sharing in track(SHARINGS, "runs", transient=True):
            run = whole[sharing] = runs.run(sharing, f"{sharing.mode}-{sharing.processes}")
            far = apart(run, alone)
            largest = max(largest, far[0])
            cells = (f"{x:.1e}" for x in far)
            trained.add_row(str(sharing), f"{losses(run)[-1]:.6f}", *cells)
        for number, (by, then) in enumerate(track(RESUMED, "resumed", transient=True)):
            run = runs.resumed(whole[by], then, f"resumed-{number}")
            far = apart(run, alone)
            largest = max(largest, far[0])
            resumed.add_row(str(by), str(then), *(f"{x:.1e}" for x in far))
    agree = "agree" if largest < TOLERANCE else "DISAGREE"
    lines = [
        f"`python -m tritium.bench parallel --steps {steps} --write`, torch {torch.__version__}, "
        f"{device_name(torch.device('cpu'))}, gloo.",
        f"The preset tiny, {steps} steps in float32, the same seed and global batch in every run. "
        "Apart: the largest difference from the losses of one process, in nats per token, over all "
        "steps; and of the final weights, the norm of the difference over that of the tensor, "
        "where it is largest.",
        f"All losses {agree} to {TOLERANCE:g}: the largest difference is {largest:.1e}.",
    ]
    path = tables.results() / RESULTS if write else None
    tables.present(lines, trained, resumed, width=WIDTH, write_to=path)
    if largest >= TOLERANCE:
        raise SystemExit(1)
