"""Runs of train.py to be compared: each in a process of its own, its result kept as it ends."""

import json
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import inf, isfinite, nan, sqrt
from pathlib import Path
from statistics import mean, stdev, variance
from typing import TypeVar

from rich.progress import track

import tritium.bench
from tritium.bench.ends import FailedError, WrongInputError, writable
from tritium.data import json_lines
from tritium.data.json_text import with_nan
from tritium.training.run.run_folder import RunFolderError, lock_folder, read_lines

SCRIPT = Path(tritium.bench.__file__).parents[1] / "train.py"
UNSEEN = "--no-keep-best", "--keep-last", "1", "--sample-tokens", "0"
WRONG_INPUT, DIVERGED = 2, 70  # exit statuses of train.py

# 97.5 % points of Student's t by degrees of freedom; beyond the last it is within 3 % of 1.96.
T_POINTS = (
    nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
    2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056,
    2.052, 2.048, 2.045,
)  # fmt: skip

Kept = TypeVar("Kept")  # a dataclass of numbers and texts


class TrialError(FailedError):
    """A run that could not be made at all."""


class RefusedError(WrongInputError):
    """A run that train.py refused; the sentence is train.py's.

    Attributes:
        name: that of the run.
    """

    def __init__(self, message: str, name: str):
        super().__init__(message)
        self.name = name


@dataclass(frozen=True)
class Trial:
    """One run of train.py."""

    name: str
    arguments: tuple[str, ...]
    seed: int


@dataclass(frozen=True)
class Outcome:
    """The end of a run; NaN where it diverged."""

    name: str
    arguments: tuple[str, ...]
    seed: int
    val_loss: float = nan
    """Nats per token of held-out text."""
    bits_per_byte: float = nan
    """Bits per byte of held-out text."""
    tokens: int = 0
    """Tokens trained on."""
    seconds: float = nan
    """Seconds of the training steps."""
    processor_seconds: float = nan
    """Processor time of the whole run, its start and validation included."""


def run_all(
    trials: Sequence[Trial], folder: Path, common: Iterable[str], *, only_ended: bool = False
) -> list[Outcome]:
    """Run what `folder` does not hold yet, one after another, and return all outcomes.

    Args:
        trials: the runs; equal ones run once.
        folder: where their run folders go, and trials.jsonl, a line for each that ended. Called
            again after a stop, those lines are not run again; what a run left that was killed is
            deleted, and the run made again.
        common: arguments of every run, in front of its own.
        only_ended: run none, and return the outcomes that `folder` holds.

    Raises:
        TrialError: train.py is not there, or failed.
        RefusedError: train.py refused its arguments, or a run is in progress there.
    """
    if not SCRIPT.is_file():
        raise TrialError(f"{SCRIPT} is not there; run it in a checkout, which has train.py")
    kept = folder / "trials.jsonl"
    if not only_ended:
        writable(kept)
    common = tuple(common)
    ended = json_lines.read(kept) if only_ended else json_lines.opened(kept)
    known = {_key(x): x for x in map(_outcome, ended)}
    wanted = {}
    for trial in trials:
        whole = Trial(trial.name, (*common, *trial.arguments), trial.seed)
        wanted[_key(whole)] = whole
    if only_ended:
        return [known[key] for key in wanted if key in known]
    left = [(key, trial) for key, trial in wanted.items() if key not in known]
    for key, trial in track(left, "runs", transient=True):
        known[key] = _run(trial, folder / f"{len(known)}-{_plain(trial.name)}-{trial.seed}")
        json_lines.append(kept, asdict(known[key]))
    return [known[key] for key in wanted]


def once(out: Path, key: str, make: Callable[[], Kept], kind: type[Kept]) -> Kept:
    """Return what was kept under `key` in ended.jsonl of a folder, or make and keep it."""
    kept = out / "ended.jsonl"
    writable(kept)
    ended = {x["key"]: x["run"] for x in json_lines.opened(kept)}
    if key in ended:
        return kind(**with_nan(ended[key]))
    run = make()
    json_lines.append(kept, {"key": key, "run": vars(run)})
    return run


def check_status(status: int, log: Path, name: str) -> None:
    """Refuse the end of a run.

    Args:
        status: that train.py ended with.
        log: all that it said.
        name: that of the run.

    Raises:
        RefusedError: it was wrong input.
        TrialError: it was anything else but success.
    """
    said = log.read_text().strip()
    last = (said.splitlines() or ["nothing said"])[-1]
    if status == WRONG_INPUT:
        sentence = re.split(r"^train\.py: ", said, flags=re.MULTILINE)
        raise RefusedError(sentence[-1] if len(sentence) > 1 else last, name)
    if status:
        raise TrialError(f"{name}: train.py ended with status {status}: {last} (all: {log})")


def difference(changed: Sequence[float], unchanged: Sequence[float]) -> tuple[float, float]:
    """Return the mean of paired differences, and half of its 95 % interval (Student's t).

    NaN in a pair makes both NaN; of one pair there is no interval, and it is infinite.
    """
    apart = [x - y for x, y in zip(changed, unchanged, strict=True)]
    return interval(apart) if all(map(isfinite, apart)) or len(apart) < 2 else (nan, nan)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean, and half of its 95 % interval; of one value that is infinite."""
    if len(values) < 2:
        return values[0], inf
    return mean(values), _t_point(len(values) - 1) * stdev(values) / sqrt(len(values))


def welch(later: Sequence[float], earlier: Sequence[float]) -> tuple[float, float]:
    """Return the difference of two means, and half of its 95 % interval (Welch's t).

    Their spreads may differ, and their numbers, each two or more. Degrees of freedom are those of
    Welch and Satterthwaite, rounded down.
    """
    squares = [variance(x) / len(x) for x in (later, earlier)]
    between, together = mean(later) - mean(earlier), sum(squares)
    if together == 0:
        return between, 0.0
    parts = (s**2 / (len(x) - 1) for s, x in zip(squares, (later, earlier), strict=True))
    return between, _t_point(int(together**2 / sum(parts) + 1e-9)) * sqrt(together)


def _t_point(freedom: int) -> float:
    return T_POINTS[freedom] if freedom < len(T_POINTS) else 1.96 + 2.5 / freedom


def _run(trial: Trial, run: Path) -> Outcome:
    before = processor_seconds()
    entries = train(trial, run)
    if entries is None:
        return Outcome(trial.name, trial.arguments, trial.seed)
    last = next(entry for entry in reversed(entries) if "val_loss" in entry)
    return Outcome(
        trial.name, trial.arguments, trial.seed, last["val_loss"], last["val_bits_per_byte"],
        last["tokens"], last["tokens"] / last["tokens_per_s_overall"],
        processor_seconds() - before,
    )  # fmt: skip


def train(
    trial: Trial, run: Path, environment: Mapping[str, str] | None = None,
    wait: Callable[[subprocess.Popen], object] = subprocess.Popen.wait,
) -> list[dict] | None:  # fmt: skip
    """Train by train.py in a process of its own, and return the lines of its log.

    Args:
        trial: the run.
        run: its folder; one that a killed run left there is deleted.
        environment: that of the process. None: this one's.
        wait: returns when the process has ended.

    Returns:
        The lines, the last of which that is a step has been validated; None if it diverged.

    Raises:
        TrialError: train.py failed, or took no step in its time.
        RefusedError: train.py refused its arguments, or a run is in progress there.
    """
    if run.exists():
        try:
            with lock_folder(run, resume=True):
                shutil.rmtree(run)
        except RunFolderError as error:
            raise RefusedError(str(error), trial.name) from None
    command = [sys.executable, SCRIPT, *trial.arguments, "--seed", str(trial.seed), *UNSEEN]
    log = run.with_suffix(".txt")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as said:
        command = [*map(str, command), "--out", str(run)]
        with subprocess.Popen(
            command, stdout=said, stderr=subprocess.STDOUT, env=environment
        ) as process:
            try:
                wait(process)
            except BaseException:  # of Ctrl-C too, as subprocess.run does
                process.kill()
                raise
    status = process.returncode
    if status == DIVERGED:
        return None
    check_status(status, log, trial.name)
    lines = read_lines(run / "log.jsonl")
    if not any("val_loss" in line for line in lines):
        raise TrialError(
            f"{trial.name}, seed {trial.seed}: its time had passed before the first step (all: "
            f"{log}); make it longer, or free the machine"
        )
    return lines


def processor_seconds() -> float:
    """Return the processor time of all processes that this one has started and that ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _outcome(line: dict) -> Outcome:
    return Outcome(**with_nan(line) | {"arguments": tuple(line["arguments"])})


def _key(trial: Trial | Outcome) -> str:
    return json.dumps([*trial.arguments, trial.seed])


def _plain(name: str) -> str:
    return "".join(x if x.isalnum() else "-" for x in name)
