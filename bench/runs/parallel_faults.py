"""Runs on four processes, of which one is killed: `python -m tritium.bench parallel_faults`.

torchrun starts train.py on four ranks of gloo. One of them, drawn at random, is killed by SIGKILL
at a random moment of a random step; torchrun starts all anew, and the end is compared with that of
a run that nobody killed, bit for bit. Another run is killed without a restart, and in a third
torchrun itself gets SIGTERM. Times are seen from outside: by the file system and by the lines that
torchrun prints.
"""

import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table

from tritium.bench import tables
from tritium.bench.ends import FailedError, at_least
from tritium.bench.harness import device_name
from tritium.bench.runs.resume import final_state
from tritium.model.saved import FILES, read_record, read_tensors
from tritium.training.run import checkpoint

ROOT = Path(__file__).parents[2]
RESULTS = "parallel_faults.md"  # in the folder of results
WIDTH = 150
TEXT = Path(json.__file__).parent  # a corpus that is on every machine and small
RANKS, STEPS = 4, 24
MODES = "ddp", "fsdp"
ARGUMENTS = (
    "tiny", "--data", str(TEXT), "--max-steps", str(STEPS), "--save-every", "2", "--dropout", "0.1",
    "--eval-every", "100", "--eval-tokens", "512", "--sample-tokens", "0", "--no-keep-best",
)  # fmt: skip
PATIENCE = 1200  # seconds for a run on a busy machine
NAMED = re.compile(r"failed \(exitcode: -9\) local_rank: (\d+)")
COLUMNS = (
    "run", "mode", "killed", "after step", "rank named after, s", "first step again after, s",
    "end state", "exit status",
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """A run in which something was killed."""

    name: str
    mode: str
    killed: str
    after_step: int
    named: float | None
    """Seconds until torchrun printed which rank had failed; None: it never did."""
    again: float | None
    """Seconds until a restarted run logged a step; None: it was not to."""
    end: str
    status: int
    right: bool
    said: tuple[str, ...] = ()
    """Lines that the user sees about it."""

    def cells(self) -> tuple[str, ...]:
        """The run as a row of the table."""
        times = ("" if x is None else f"{x:.1f}" for x in (self.named, self.again))
        end = self.end if self.right else f"WRONG: {self.end}"
        return (
            self.name, self.mode, self.killed, str(self.after_step), *times, end, str(self.status),
        )  # fmt: skip


class Launched:
    """torchrun on four ranks.

    Args:
        run: the run folder.
        home: cache of prepared data.
        flags: more arguments of train.py.
        restarts: how often torchrun may start the ranks anew.
    """

    def __init__(self, run: Path, home: Path, *flags: str, restarts: int = 0):
        self.run, self.lines = run, list[tuple[float, str]]()
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        environment |= {
            "TRITIUM_HOME": str(home), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
            "COLUMNS": "1000",
        }  # fmt: skip
        launcher = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)
        self.process = subprocess.Popen(
            [sys.executable, *launcher, "--max-restarts", str(restarts), "train.py", *ARGUMENTS,
             "--out", str(run), *flags],
            cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append((time.perf_counter(), line.rstrip()))

    def ranks(self) -> dict[int, int]:
        """Return the process of each rank that runs now."""
        found = {}
        for task in Path(f"/proc/{self.process.pid}/task").glob("*/children"):
            for pid in map(int, task.read_text().split()):
                try:
                    environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                except OSError:
                    continue
                (rank,) = [int(x[5:]) for x in environment if x.startswith(b"RANK=")] or [None]
                if rank is not None:
                    found[rank] = pid
        return found

    def wait_for(self, ready: Callable[[], bool]) -> bool:
        """Wait until something is so; return False if the run ended before."""
        while not ready():
            if self.process.poll() is not None:
                return False
            time.sleep(0.002)
        return True

    def logged(self) -> int:
        """Return how many steps are in the log."""
        path = self.run / "log.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def finish(self) -> int:
        """Wait for the end; return the exit status of torchrun."""
        try:
            status = self.process.wait(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            status = self.process.wait()
        self._reader.join(timeout=5)
        return status

    def said(self, *parts: str) -> tuple[str, ...]:
        """Return the lines that contain one of these, once each, without folders."""
        found = dict.fromkeys(x for _, x in self.lines if any(part in x for part in parts))
        return tuple(re.sub(r"/\S*/(?=\w)", "", x) for x in found)


class Trial:
    """Runs of one mode in a folder, each compared with the one that nobody killed.

    Args:
        folder: where they go.
        mode: of `--parallel`.
    """

    def __init__(self, folder: Path, mode: str):
        self.folder, self.mode, self.home = folder, mode, folder / "home"
        whole = self._start("whole")
        whole.wait_for(lambda: whole.logged() > 0)
        began = time.perf_counter()
        if status := whole.finish():
            raise FailedError(f"{mode}: torchrun ended with {status}: {whole.said('')[-20:]}")
        self.seconds = time.perf_counter() - began
        self.whole = end_of(whole.run)

    def _start(self, name: str, *flags: str, restarts: int = 0) -> Launched:
        run = self.folder / f"{self.mode}-{name}"
        mode = "--parallel", self.mode
        return Launched(run, self.home, *mode, *flags, restarts=restarts)

    def kill(self, name: str, seed: int, *, restarts: int = 1) -> Outcome:
        """Kill a rank at a random moment; without a restart, resume the run by hand."""
        draw = random.Random(seed)
        rank, step, delay = draw.randrange(RANKS), draw.randrange(1, STEPS - 2), draw.random()
        run = self._start(name, restarts=restarts)
        run.wait_for(lambda: run.logged() >= step)
        time.sleep(delay * self.seconds / STEPS)
        pid = run.ranks().get(rank)
        if pid is None:
            raise FailedError(f"{run.run.name} ended before it could be killed")
        after, killed = run.logged(), time.perf_counter()
        os.kill(pid, signal.SIGKILL)
        again = None
        if restarts:
            started = run.run / "log.jsonl"
            changed = started.stat().st_mtime_ns

            def resumed() -> bool:
                new = run.ranks().get(rank) not in (None, pid)
                return new and started.stat().st_mtime_ns != changed

            again = time.perf_counter() - killed if run.wait_for(resumed) else None
        status = run.finish()
        ended = time.perf_counter() - killed
        seen = [(at - killed, NAMED.search(x)) for at, x in run.lines]
        named = next((at for at, x in seen if x and int(x[1]) == rank), None)
        said = run.said("failed (exitcode", "connection to another rank")
        right = named is not None and (status == 0) == (restarts > 0)
        if not restarts:
            said = (*said, f"torchrun ended with status {status} after {ended:.1f} s")
            second = self._start(name, "--resume")
            status = second.finish()
        same = end_of(run.run) == self.whole
        end = "identical" if same else "DIFFERENT"
        return Outcome(
            name, self.mode, f"rank {rank}", after, named, again,
            end if restarts else f"{end}, resumed by hand", status, right and same and status == 0,
            said,
        )  # fmt: skip

    def stop(self) -> Outcome:
        """Send SIGTERM to torchrun in the middle of a run, and resume it."""
        run = self._start("stopped")
        run.wait_for(lambda: run.logged() >= STEPS // 4)
        after, sent = run.logged(), time.perf_counter()
        run.process.terminate()
        status = run.finish()
        ended = time.perf_counter() - sent
        last = checkpoint.step_of(checkpoint.checkpoints(run.run / "checkpoints")[-1])
        saved = last == run.logged() < STEPS
        second = self._start("stopped", "--resume")
        resumed = second.finish()
        same = end_of(run.run) == self.whole
        said = run.said("Stopped by", "another rank")
        return Outcome(
            "stop", self.mode, "SIGTERM to torchrun", after, None, None,
            f"saved at step {last} and ended in {ended:.1f} s; resumed: "
            f"{'identical' if same else 'DIFFERENT'}",
            status, saved and same and resumed == 0, said,
        )  # fmt: skip


def end_of(run: Path) -> dict:
    """Return what two runs must agree in: weights and optimizer by their bytes, state, curves."""
    last = checkpoint.checkpoints(run / "checkpoints")[-1]
    record = read_record(last)
    state = final_state(run, set())
    del state["files"]  # of shards the index names files and times
    tensors = {
        (name, key): x.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        for name in FILES
        for key, x in read_tensors(last, name, record).items()
    }
    return {"tensors": tensors, **state}


def main(kills: int = 10, seed: int = 0, write: bool = False) -> None:
    """Kill one of four ranks at random moments, and compare what the runs end in.

    Args:
        kills: how many runs with a restart, taken in turns from ddp and fsdp.
        seed: decides ranks and moments.
        write: keep the table in parallel_faults.md, in the folder of results.
    """
    at_least(0, kills=kills)
    outcomes = []
    with tempfile.TemporaryDirectory() as folder:
        for outcome in _outcomes(Path(folder), kills, seed):
            outcomes.append(outcome)
            _show(outcomes, f"python -m tritium.bench parallel_faults --kills {kills}", write)
    if not all(x.right for x in outcomes):
        raise SystemExit(1)


def _outcomes(folder: Path, kills: int, seed: int) -> Iterator[Outcome]:
    trials = [Trial(folder, mode) for mode in MODES]
    for i in range(kills):
        yield trials[i % len(trials)].kill(str(i + 1), seed + i)
    for trial in trials:
        yield trial.stop()
        yield trial.kill("no restart", seed + kills, restarts=0)


def _show(outcomes: list[Outcome], command: str, write: bool) -> None:
    table = Table(*COLUMNS)
    for outcome in outcomes:
        table.add_row(*outcome.cells())
    named = [x.named for x in outcomes if x.named is not None]
    again = [x.again for x in outcomes if x.again is not None]
    head = [
        f"`{command} --write`, torch {torch.__version__}, {device_name(torch.device('cpu'))}, "
        f"{RANKS} ranks on gloo",
        f"{sum(x.right for x in outcomes)} of {len(outcomes)} runs ended as they must."
        + (f" torchrun named the rank that failed after {max(named):.1f} s at most." * bool(named))
        + (
            f" A restarted run logged its next step after {min(again):.0f} to {max(again):.0f} s, "
            f"of which the start of {RANKS} Python processes is a large part."
            if again
            else ""
        ),
    ]
    for outcome in (x for x in outcomes if x.again is None):
        head.append(f"{outcome.mode}, {outcome.name}:\n\n    " + "\n    ".join(outcome.said))
    path = tables.results() / RESULTS
    tables.present(head, table, width=WIDTH, write_to=path if write else None)
