"""Faults: what a user sees, and what is left: `python -m tritium.bench faults [--write]`.

Each fault is put into a run of a tiny model, or into its data, in a process of its own. The end
state is compared, byte for byte, with that of a run in which nothing went wrong, or in which the
spoilt step was left out, or which began at the other place of the data.
"""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from tritium.bench import tables
from tritium.bench.ends import FailedError
from tritium.bench.harness import device_name
from tritium.bench.runs.resume import final_state
from tritium.data.shards import open_prepared
from tritium.model.saved import read_model
from tritium.model.transformer import Transformer
from tritium.training.run import checkpoint

ROOT = Path(__file__).parents[2]
RESULTS = "faults.md"  # in the folder of results
WIDTH = 150
TEXT = Path(json.__file__).parent  # a corpus that is on every machine and small
ARGUMENTS = (
    "tiny", "--max-steps", "36", "--save-every", "5", "--eval-every", "9", "--dropout", "0.1",
    "--learning-rate", "3e-3", "--spike-window", "10", "--max-skips", "3", "--sample-tokens", "0",
    "--no-keep-best",
)  # fmt: skip
COLUMNS = ("fault", "what is said", "exit status", "end state, compared with", "right")
SMALL_SHARDS = """
import runpy, sys
from tritium.data import shards
from tritium.data.prepare import encoding
shards.SHARD_TOKENS, encoding.BATCH_CHARS = 2000, 4000
sys.argv = ["tritium.data.prepare", *sys.argv[1:]]
runpy.run_module("tritium.data.prepare", run_name="__main__")
"""


@dataclass(frozen=True)
class Outcome:
    """A fault, and what came of it."""

    fault: str
    seen: list[str]
    """Message of the program about it."""
    status: str
    """Exit status, of several runs one after another."""
    end: str
    """The state with which the end state was compared."""
    right: bool

    def cells(self) -> tuple[str, ...]:
        """The fault as a row of the table."""
        right = "yes" if self.right else "NO"
        return self.fault, "\n".join(self.seen), self.status, self.end, right


class Trial:
    """Processes in a folder of their own."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.whole = folder / "whole"
        self.prepared = self._prepare("prepared", TEXT)
        self.train(self.whole)

    def start(self, program: list[str], home: str = "home") -> subprocess.Popen:
        """Start Python with `program`, its cache in the folder `home`."""
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        return subprocess.Popen(
            [sys.executable, *program], cwd=ROOT, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment | {"TRITIUM_HOME": str(self.folder / home), "COLUMNS": "1000"},
        )  # fmt: skip

    def train(self, run: Path, *more: str, fault: str = "") -> "Ended":
        """Train into the folder `run` to the end."""
        return _ended(self.start(self.command(run, *more, fault=fault)))

    def command(self, run: Path, *more: str, fault: str = "") -> list[str]:
        """Return the arguments of Python that train into the folder `run`."""
        program = ["-m", "tritium.bench.runs._injected", fault] if fault else ["train.py"]
        return [*program, *ARGUMENTS, "--data", str(self.prepared), "--out", str(run), *more]

    def _prepare(self, home: str, source: Path, code: str = "") -> Path:
        program = ["-c", code] if code else ["-m", "tritium.data.prepare"]
        out = _ended(self.start([*program, str(source), "--vocab-size", "512"], home)).output
        return Path(next(line for line in out.splitlines() if line.startswith("/")))

    def skipped_step(self, fault: str, name: str) -> Outcome:
        """One step goes wrong."""
        run, other = self.folder / fault, self.folder / "left-out"
        ended = self.train(run, fault=fault)
        if not other.exists():
            self.train(other, "--no-recovery", fault="left-out")
        return Outcome(
            name, ended.lines("Skipped"), ended.status,
            "weights and optimizer of a run in which that step made no update",
            _files(run) == _files(other),
        )  # fmt: skip

    def went_back(self) -> Outcome:
        """Several steps in a row go wrong, and the run is killed after it went back."""
        run, killed, actual, expected = (
            self.folder / name for name in ("back", "killed", "recovered", "stopped")
        )
        ended = self.train(run, fault="much-garbage")
        process = self.start(self.command(killed, fault="much-garbage"))
        _wait_for(process, (killed / "abandoned-log.jsonl").exists)
        process.kill()
        process.communicate()
        self.train(killed, "--resume", fault="much-garbage")
        constant = ("--schedule", "constant")  # so that a run may be made longer
        self.train(actual, *constant, fault="much-garbage")
        self.train(expected, *constant, "--max-steps", "20")
        self.train(expected, *constant, "--resume", fault="further")
        return Outcome(
            "3 batches of garbage in a row", ended.lines("Skipped", "bad steps"), ended.status,
            "a run that was stopped at step 20 and resumed past those batches; and the same run "
            "killed after it went back, and resumed",
            _files(actual) == _files(expected) and _text(run) == _text(killed),
        )  # fmt: skip

    def gave_up(self) -> Outcome:
        """Every step from one on goes wrong."""
        run = self.folder / "gave-up"
        first = self.train(run, fault="nan-for-good")
        kept = checkpoint.checkpoints(run / "checkpoints")
        healthy = all(map(checkpoint.is_healthy, kept))
        second = self.train(run, "--resume")
        return Outcome(
            "NaN in every gradient from step 23 on",
            first.lines("bad steps", "train.py:", "What", "  after", "Last"),
            f"{first.status}, then {second.status}",
            "its checkpoints are healthy; resumed without the fault: the whole run",
            healthy and _text(run) == _text(self.whole),
        )

    def full_disk(self) -> Outcome:
        """No checkpoint can be written from step 30 on."""
        run = self.folder / "full"
        first = self.train(run, fault="full-disk")
        last = checkpoint.step_of(checkpoint.checkpoints(run / "checkpoints")[-1])
        second = self.train(run, "--resume")
        return Outcome(
            "ENOSPC while saving, from step 30 on", first.lines("Could not", "train.py:"),
            f"{first.status}, then {second.status}",
            "the checkpoint of step 25 was kept; resumed with room: the whole run",
            last == 25 and _text(run) == _text(self.whole),
        )  # fmt: skip

    def interrupted_save(self) -> Outcome:
        """SIGTERM comes while a checkpoint is written."""
        run = self.folder / "interrupted"
        process = self.start(self.command(run, fault="slow-save"))
        _wait_for(process, lambda: bool(list(run.glob("checkpoints/.step-00000020.tmp"))))
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        first = _ended(process)
        second = self.train(run, "--resume")
        return Outcome(
            "SIGTERM while the checkpoint of step 20 is written",
            first.lines("SIGTERM:", "Stopped"), f"{first.status}, then {second.status}",
            "resumed: the whole run", _text(run) == _text(self.whole),
        )  # fmt: skip

    def damaged_shard(
        self, name: str, damage: Callable[[bytes], bytes], fault: str = ""
    ) -> Outcome:
        """A shard is not what was written."""
        run, shard = self.folder / f"shard-{name}", self.prepared / "train-00000.bin"
        content = shard.read_bytes()
        shard.write_bytes(damage(content))
        first = self.train(run, "--save-every", "1", fault=fault)
        untouched = not run.exists()
        shard.write_bytes(content)
        if not fault:
            second = self.train(run)
            return Outcome(
                name, first.lines("train.py:"), f"{first.status}, then {second.status}",
                "no run folder was made; with the shard put right: the whole run",
                untouched and _text(run) == _text(self.whole),
            )  # fmt: skip
        return Outcome(
            name, first.lines("train.py:"), first.status,
            "it stopped before step 36, and its checkpoints can be read",
            _readable(run) and len((run / "log.jsonl").read_text().splitlines()) < 36,
        )  # fmt: skip

    def broken_lines(self) -> Outcome:
        """Every fifth line of a table is broken."""
        texts = re.split(r"\n\n+", "\n\n".join(p.read_text() for p in sorted(TEXT.glob("*.py"))))
        records = [json.dumps({"text": text}) for text in texts]
        whole, broken = self.folder / "whole.jsonl", self.folder / "broken.jsonl"
        left = [line for i, line in enumerate(records) if i % 5 != 4]
        whole.write_text("".join(f"{line}\n" for line in left))
        half = (line[: len(line) // 2] if i % 5 == 4 else line for i, line in enumerate(records))
        broken.write_text("".join(f"{line}\n" for line in half))
        arguments = ["-m", "tritium.data.prepare", str(broken), "--vocab-size", "512"]
        ended = _ended(self.start(arguments, "broken"))
        one, other = self._prepare("broken", broken), self._prepare("broken", whole)
        return Outcome(
            f"JSONL, every fifth of {len(records):,} lines broken", ended.lines(": left out"),
            ended.status, "the shards of the same file without those lines",
            open_prepared(one).manifest.splits == open_prepared(other).manifest.splits,
        )  # fmt: skip

    def killed_prepare(self) -> Outcome:
        """SIGKILL comes while text is encoded."""
        whole = self._prepare("at-once", TEXT, SMALL_SHARDS)
        arguments = ["-c", SMALL_SHARDS, str(TEXT), "--vocab-size", "512"]
        process = self.start(arguments, "killed-prepare")
        folder = self.folder / "killed-prepare"
        _wait_for(process, lambda: len(list(folder.glob("prepared/*.tmp/train-*.bin"))) >= 3)
        process.kill()
        process.communicate()
        unfinished = not list(folder.glob("prepared/*/manifest.json"))
        second = _ended(self.start(arguments, "killed-prepare"))
        (made,) = folder.glob("prepared/*/manifest.json")
        same = {p.name: p.read_bytes() for p in whole.iterdir()} == {
            p.name: p.read_bytes() for p in made.parent.iterdir()
        }
        return Outcome(
            "prepare killed by SIGKILL", second.lines("resuming after"),
            f"-9, then {second.status}",
            "the files of a prepare that nobody killed", unfinished and same,
        )  # fmt: skip


@dataclass(frozen=True)
class Ended:
    """A process that has ended."""

    status: str
    output: str

    def lines(self, *beginnings: str) -> list[str]:
        """The lines that contain one of these, without the folder's name."""
        found = [line for line in self.output.splitlines() if any(b in line for b in beginnings)]
        return [re.sub(r"/\S*/(?=[\w.-]+\.(bin|jsonl))|/tmp/\S*/", "", line) for line in found]


def _ended(process: subprocess.Popen) -> Ended:
    output, _ = process.communicate(timeout=300)
    return Ended(str(process.returncode), output)


def _wait_for(process: subprocess.Popen, ready: Callable[[], bool]) -> None:
    while not ready():
        if process.poll() is not None:
            raise FailedError(f"it ended too early: {process.communicate()[0]}")
        time.sleep(0.001)


def _files(run: Path) -> dict:
    return checkpoint.read_record(checkpoint.checkpoints(run / "checkpoints")[-1])["files"]


def _text(run: Path) -> str:
    """The final state, in which NaN equals NaN."""
    return json.dumps(final_state(run, set()))


def _readable(run: Path) -> bool:
    for path in checkpoint.checkpoints(run / "checkpoints"):
        read_model(path, Transformer)
    return True


def _outcomes(folder: Path) -> Iterator[Outcome]:
    trial = Trial(folder)
    yield trial.skipped_step("nan", "NaN in a gradient at step 23")
    yield trial.skipped_step("garbage", "a batch of garbage at step 23")
    yield trial.went_back()
    yield trial.gave_up()
    yield trial.full_disk()
    yield trial.interrupted_save()

    def flip(content: bytes) -> bytes:
        return content[:1000] + bytes([content[1000] ^ 1]) + content[1001:]

    yield trial.damaged_shard("a bit flipped in a shard", flip)
    yield trial.damaged_shard("the same, of more data than is read at once", flip, "much-data")
    yield trial.damaged_shard("a shard cut off", lambda content: content[:-100])
    yield trial.broken_lines()
    yield trial.killed_prepare()


def main(write: bool = False) -> None:
    """Let everything go wrong that a run must get over, one after another.

    Args:
        write: keep the table in faults.md, in the folder of results.
    """
    with tempfile.TemporaryDirectory() as folder:
        outcomes = list(_outcomes(Path(folder)))
    table = Table(*COLUMNS, box=box.SIMPLE)
    for outcome in outcomes:
        table.add_row(*outcome.cells())
        table.add_section()
    device = device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    summary = f"{sum(x.right for x in outcomes)} of {len(outcomes)} end states are right. {device}"
    Console(width=WIDTH).print(table, summary)
    if write:
        rows = [COLUMNS, ("---",) * len(COLUMNS), *(x.cells() for x in outcomes)]
        lines = (" | ".join(cell.replace("\n", "<br>") for cell in row) for row in rows)
        text = "\n".join(f"| {line} |" for line in lines)
        head = (
            f"`python -m tritium.bench faults --write`, torch {torch.__version__}\n\n{summary}\n\n"
        )
        tables.write(tables.results() / RESULTS, f"{head}{text}\n".encode())
    if not all(outcome.right for outcome in outcomes):
        raise SystemExit(1)
