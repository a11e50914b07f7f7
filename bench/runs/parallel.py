"""One training on several processes, in every way to share it: `python -m tritium.bench parallel`.

The same run, with the same seed and global batch, in one process and in several, on gloo and a CPU.
Losses are compared step by step and final weights tensor by tensor, as one process reads them. Then
runs that were saved half-way by four processes are resumed by other numbers of processes, in other
modes, and compared with the run that nobody stopped.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.progress import track
from rich.table import Table
from torch import Tensor

import tritium
from tritium.bench import tables
from tritium.bench.ends import FailedError, WrongInputError
from tritium.bench.harness import device_name
from tritium.model.saved import FILES, read_record, read_tensors
from tritium.training.run import checkpoint
from tritium.training.run.run_folder import read_lines

MODULE = "tritium.bench.runs.parallel"
RESULTS = {"adamw": "parallel.md", "muon": "parallel_muon.md"}  # in the folder of results
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
"""Pairs: the sharing that saved the middle of a run, and the one that resumed it."""


class RunError(FailedError):
    """A run of train.py did not end well."""


class Runs:
    """Runs of one training, in a folder.

    Args:
        folder: where they go.
        arguments: of train.py, those of every run.
        steps: of every run; a checkpoint is kept half-way.
    """

    def __init__(self, folder: Path, arguments: list[str], steps: int):
        self._folder, self._steps = folder, steps
        often = ["--max-steps", str(steps), "--eval-every", str(steps)]
        self._arguments = [*arguments, *often, "--save-every", str(steps // 2)]

    def job(self, sharing: Sharing, name: str, *more: str) -> list[str]:
        """Return the arguments of a run in the folder of that name."""
        return [*self._arguments, *sharing.flags, "--out", str(self._folder / name), *more]

    def resuming(self, whole: str, by: Sharing, name: str) -> list[str]:
        """Return the arguments of a run that resumes a copy of another from its middle."""
        out = self._folder / name
        shutil.copytree(self._folder / whole, out)
        shutil.rmtree(out / "checkpoints" / f"step-{self._steps:08d}")
        return self.job(by, name, "--resume", "--resume-anyway")

    def take(self, processes: int, jobs: list[list[str]]) -> None:
        """Run train.py with one list of arguments after another, in the same processes.

        They have torchrun's variables; starting them once for all runs saves half of the time.

        Raises:
            RunError: a run failed; the message is its own.
        """
        ports = [_free_port() for _ in jobs]
        file = self._folder / "jobs.json"
        file.write_text(json.dumps([*zip(jobs, ports, strict=True)]))
        started = []
        for rank in range(processes):
            torchrun = {
                "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": 0,
                "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1",
            }  # fmt: skip
            variables = {k: str(x) for k, x in torchrun.items()} if processes > 1 else {}
            started.append(
                subprocess.Popen(
                    [sys.executable, "-m", MODULE, str(file)], text=True,
                    env=os.environ | variables | {"OMP_NUM_THREADS": "1"},
                    stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                )
            )  # fmt: skip
        said = [process.communicate()[0] for process in started]
        if any(process.returncode for process in started):
            raise RunError("\n".join(said))


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _take(file: Path) -> None:
    """Run the jobs of a file as the rank that the environment names."""
    import train

    for arguments, port in json.loads(file.read_text()):
        os.environ["MASTER_PORT"] = str(port)
        sys.argv = ["train.py", *arguments]
        train.main()


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


def main(
    steps: int = 100, optimizer: Literal["adamw", "muon"] = "adamw", write: bool = False
) -> None:
    """Train the preset tiny in every way to share it, and compare losses and weights.

    Args:
        steps: optimizer steps of each run; an even number.
        optimizer: that of the runs; muon with second moments of rows.
        write: keep the tables in parallel.md or parallel_muon.md, in the folder of results.
    """
    if steps < 2 or steps % 2:
        raise WrongInputError(f"--steps must be even, at least 2, got {steps}")
    torch.set_num_threads(1)  # as every process of the runs has
    arguments = ["tiny", "--data", str(TEXT), "--device", "cpu", "--no-self-check"]
    arguments += ["--sample-tokens", "0", "--layer-stats-every", "0"]
    arguments += ["--optimizer", optimizer]
    if optimizer == "muon":
        arguments += ["--row-beta2", "0.95"]
    trained = Table("processes", "loss of the last step", "losses apart", "weights apart")
    resumed = Table("saved half-way by", "resumed by", "losses apart", "weights apart")
    names = {sharing: f"{sharing.mode}-{sharing.processes}" for sharing in SHARINGS}
    middles = {pair: f"resumed-{number}" for number, pair in enumerate(RESUMED)}
    with tempfile.TemporaryDirectory() as folder:
        runs = Runs(Path(folder), arguments, steps)
        for processes in track((4, 1, 2), "processes", transient=True):
            jobs = [runs.job(x, name) for x, name in names.items() if x.processes == processes]
            if processes == 1:
                jobs.append(runs.job(ALONE, "alone"))
            for (by, then), name in middles.items():
                if then.processes == processes:
                    jobs.append(runs.resuming(names[by], then, name))
            runs.take(processes, jobs)
        alone = Path(folder, "alone")
        trained.add_row(str(ALONE), f"{losses(alone)[-1]:.6f}", "", "")
        far = {
            name: apart(Path(folder, name), alone) for name in (*names.values(), *middles.values())
        }
        for sharing, name in names.items():
            last = losses(Path(folder, name))[-1]
            trained.add_row(str(sharing), f"{last:.6f}", *(f"{x:.1e}" for x in far[name]))
        for (by, then), name in middles.items():
            resumed.add_row(str(by), str(then), *(f"{x:.1e}" for x in far[name]))
    largest = max(loss for loss, _ in far.values())
    agree = "agree" if largest < TOLERANCE else "DISAGREE"
    lines = [
        f"`python -m tritium.bench parallel --steps {steps} --optimizer {optimizer} --write`, "
        f"torch {torch.__version__}, "
        f"{device_name(torch.device('cpu'))}, gloo.",
        f"The preset tiny, {steps} steps in float32, the same seed and global batch in every run. "
        "Apart: the largest difference from the losses of one process, in nats per token, over all "
        "steps; and of the final weights, the norm of the difference over that of the tensor, "
        "where it is largest.",
        f"All losses {agree} to {TOLERANCE:g}: the largest difference is {largest:.1e}.",
    ]
    path = tables.results() / RESULTS[optimizer] if write else None
    tables.present(lines, trained, resumed, width=WIDTH, write_to=path)
    if largest >= TOLERANCE:
        raise SystemExit(1)


if __name__ == "__main__":
    with tritium.interruptible():
        _take(Path(sys.argv[1]))
