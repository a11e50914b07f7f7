"""Exactness of resuming killed runs: `python -m tritium.bench resume [--runs N]`.

A tiny model with dropout is trained over two epochs, with checkpoints every few steps and wherever
the validation loss is the lowest. Then the same run is started again and again, killed by SIGKILL
at a random moment, and resumed to the end. Half of the runs write in a thread of their own; half
are killed shortly after the first write of a checkpoint that begins after that moment. Every
checkpoint in sight after a kill must be readable. The final state is the bytes of the weights and
of the optimizer, every random number generator, the position in the data, the best validation and
all losses of the log.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from tritium.bench import tables
from tritium.bench.ends import FailedError, at_least
from tritium.bench.harness import device_name
from tritium.model.saved import read_model
from tritium.model.transformer import Transformer
from tritium.training.run import checkpoint

ROOT = Path(__file__).parents[2]
RESULTS = "resume.md"  # in the folder of results
WIDTH = 130
TEXT = Path(json.__file__).parent  # a corpus that is on every machine and small
STEPS = 150  # of 256 tokens: two epochs
ARGUMENTS = (
    "tiny", "--data", str(TEXT), "--save-every", "2", "--keep-best", "--dropout", "0.1",
    "--eval-tokens", "512", "--sample-tokens", "0",
)  # fmt: skip
WRITE_SECONDS = 0.01  # about what a write takes
COLUMNS = (
    "run", "writing", "killed after step", "during", "readable", "resumed from", "final state",
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """One run that was killed and resumed."""

    name: str
    asynchronous: bool
    killed_at: list[int]
    during: list[str]
    """Work in progress when killed: "write" or "delete" of a checkpoint, or "training"."""
    unreadable: int
    """Checkpoints that could not be read after the kills."""
    readable: int
    resumed_from: list[int | None]
    identical: bool

    def cells(self) -> tuple[str, ...]:
        """The run as a row of the table."""
        return (
            self.name,
            "asynchronous" if self.asynchronous else "synchronous",
            _joined(self.killed_at),
            _joined(self.during),
            f"{self.readable} of {self.readable + self.unreadable}",
            _joined("start" if step is None else step for step in self.resumed_from),
            "identical" if self.identical else "DIFFERENT",
        )


class Trial:
    """Runs of one setting in a folder, each compared with the one that nobody killed."""

    def __init__(self, folder: Path, steps: int = STEPS):
        self.folder, self.arguments = folder, (*ARGUMENTS, "--max-steps", str(steps))
        self.whole = folder / "whole"
        last = self.whole / "checkpoints" / f"step-{steps:08}"
        process = self._start(self.whole)
        self._wait_for(process, (self.whole / "log.jsonl").exists)
        began = time.perf_counter()
        self._wait_for(process, last.exists)
        self.seconds = time.perf_counter() - began
        self._finish(process)

    def kill_at_random(
        self, name: str, seed: int, *, asynchronous: bool, in_write: bool = False
    ) -> Outcome:
        """Kill a run at a moment drawn evenly from its training, and resume it.

        With `in_write` it is killed a little after the next write has begun.
        """
        draw = random.Random(seed)
        moment, delay = draw.uniform(0, self.seconds), draw.uniform(0, WRITE_SECONDS)

        def kill(process: subprocess.Popen, run: Path) -> bool:
            self._wait_for(process, (run / "log.jsonl").exists)
            time.sleep(moment)
            if in_write:
                self._wait_for(process, lambda: _interrupted(run) == "write")
                time.sleep(delay)
            return _kill(process)

        for attempt in range(10):
            run = self.folder / f"{name}-{attempt}"
            if outcome := self._kill_and_resume(name, run, [kill], asynchronous=asynchronous):
                return outcome
            moment *= 0.8  # this one was faster
        raise FailedError("ten runs ended before they could be killed")

    def kill_at_steps(
        self, name: str, steps: list[int], *, asynchronous: bool, resume_with: tuple[str, ...] = ()
    ) -> Outcome:
        """Kill a run once it has logged each of `steps`, resuming it in between and at the end."""

        def killer(step: int) -> Callable[[subprocess.Popen, Path], bool]:
            def kill(process: subprocess.Popen, run: Path) -> bool:
                self._wait_for(process, lambda: _logged(run) >= step)
                return _kill(process)

            return kill

        outcome = self._kill_and_resume(
            name, self.folder / f"{name}-{asynchronous}", [killer(step) for step in steps],
            asynchronous=asynchronous, resume_with=resume_with,
        )  # fmt: skip
        if outcome is None:
            raise FailedError(f"{name}: the run ended before it could be killed")
        return outcome

    def _kill_and_resume(
        self,
        name: str,
        run: Path,
        kills: list[Callable[[subprocess.Popen, Path], bool]],
        *,
        asynchronous: bool,
        resume_with: tuple[str, ...] = (),
    ) -> Outcome | None:
        more = ("--save-async",) if asynchronous else ()
        killed_at, during, resumed_from = [], [], []
        readable = unreadable = 0
        for kill in kills:
            if not kill(self._start(run, *more), run):
                return None
            killed_at.append(_logged(run))
            during.append(_interrupted(run))
            found = checkpoint.checkpoints(run / "checkpoints")
            good = sum(map(_is_readable, found))
            readable, unreadable = readable + good, unreadable + len(found) - good
            resumed_from.append(checkpoint.step_of(found[-1]) if found else None)
            more = ("--resume", *more) if "--resume" not in more else more
        self._finish(self._start(run, *more, *resume_with))
        without = {"best"} if resume_with else set()  # it depends on what was evaluated
        same = final_state(run, without) == final_state(self.whole, without)
        return Outcome(
            name, asynchronous, killed_at, during, unreadable, readable, resumed_from, same
        )

    def _start(self, run: Path, *more: str) -> subprocess.Popen:
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        return subprocess.Popen(
            [sys.executable, "train.py", *self.arguments, "--out", str(run), *more], cwd=ROOT,
            env=environment | {"TRITIUM_HOME": str(self.folder / "home")}, text=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip

    def _finish(self, process: subprocess.Popen) -> None:
        _, errors = process.communicate(timeout=300)
        if process.returncode:
            raise FailedError(errors)

    def _wait_for(self, process: subprocess.Popen, ready: Callable[[], bool]) -> None:
        while not ready() and process.poll() is None:
            time.sleep(0.001)


def final_state(run: Path, without: set[str]) -> dict:
    """Return what two runs must agree in; of the weights and the optimizer, checksums."""
    record = checkpoint.read_record(checkpoint.checkpoints(run / "checkpoints")[-1])
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    state = {k: x for k, x in record["state"].items() if k not in {"seconds", *without}}
    curves = [(x["step"], x["loss"], x["lr"], x["grad_norm"]) for x in log]
    return {"step": record["step"], "files": record["files"], "state": state, "curves": curves}


def _kill(process: subprocess.Popen) -> bool:
    """Kill a process; return whether it was still running."""
    process.kill()
    process.communicate()
    return process.returncode == -signal.SIGKILL


def _logged(run: Path) -> int:
    path = run / "log.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _interrupted(run: Path) -> str:
    if list(run.glob("checkpoints/.step-*.tmp")):
        return "write"
    return "delete" if list(run.glob("checkpoints/.step-*.old")) else "training"


def _is_readable(path: Path) -> bool:
    try:
        read_model(path, Transformer)
    except checkpoint.CheckpointError:
        return False
    return True


def _joined(values) -> str:
    return ", ".join(map(str, values))


def main(runs: int = 50, seed: int = 0, write: bool = False) -> None:
    """Kill runs at random moments, resume them, and compare what they end in.

    Args:
        runs: how many to kill.
        seed: decides the moments.
        write: keep the table in resume.md, in the folder of results.
    """
    at_least(0, runs=runs)
    with tempfile.TemporaryDirectory() as folder:
        trial = Trial(Path(folder))
        outcomes = [
            trial.kill_at_random(str(i + 1), seed + i, asynchronous=i % 2 == 1) for i in range(runs)
        ]
        for asynchronous in (False, True):
            twice = trial.kill_at_steps("2nd epoch, twice", [90, 120], asynchronous=asynchronous)
            other = trial.kill_at_steps(
                "other intervals", [70], asynchronous=asynchronous,
                resume_with=("--eval-every", "7", "--log-every", "3"),
            )  # fmt: skip
            outcomes += [twice, other]
    _show(outcomes, f"python -m tritium.bench resume --runs {runs} --seed {seed} --write", write)
    if not all(x.identical and not x.unreadable for x in outcomes):
        raise SystemExit(1)


def _show(outcomes: list[Outcome], command: str, write: bool) -> None:
    def table(style: box.Box) -> Table:
        result = Table(*COLUMNS, box=style)
        for outcome in outcomes:
            result.add_row(*outcome.cells())
        return result

    device = device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    kills = [what for outcome in outcomes for what in outcome.during]
    summary = (
        f"{sum(x.identical for x in outcomes)} of {len(outcomes)} runs ended in the state of the "
        f"run that nobody killed; {sum(x.unreadable for x in outcomes)} checkpoints were "
        f"unreadable; of {len(kills)} kills {kills.count('write')} hit a checkpoint being written "
        f"and {kills.count('delete')} one being deleted. {device}"
    )
    Console(width=WIDTH, soft_wrap=True).print(table(box.SIMPLE), summary, sep="\n")
    if write:
        file = StringIO()
        print(f"`{command}`, torch {torch.__version__}", summary, "", sep="\n\n", file=file)
        Console(file=file, width=WIDTH).print(table(box.MARKDOWN))
        tables.write(tables.results() / RESULTS, file.getvalue().encode())
