"""The processes of a run, as torchrun starts them: their numbers, and what they agree upon.

Rank 0 is the first: it alone writes the run folder and prints. A run without torchrun has one rank,
for which nothing here communicates.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from tritium.training.monitor.display import console
from tritium.training.run.run_folder import lock_folder

LAUNCHED = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
PATIENCE = timedelta(days=7)  # of ranks that wait for the first one to prepare data
LINGER = 10.0  # seconds for which a rank that lost another waits for torchrun to see the cause
TORCHRUN_SENDS = "SIGTERM", "SIGINT"  # to the ranks, after one has failed or it was stopped
LOST = re.compile(
    r"connection (closed|reset|refused)|broken pipe|socket|gloo/transport|nccl|aborted", re.I
)


_c10d: Any = dist  # not all of it is exported


class LostRankError(RuntimeError):
    """Another rank is gone."""


class Ranks:
    """The ranks of a run, seen from one of them. Those of a process without torchrun are one.

    Every rank must call the methods that communicate, in the same order.

    Args:
        rank: number of this process, from 0.
        size: number of processes.
        group: process group of what is on the host; None: the default one.

    Attributes:
        rank: as given.
        size: as given.
        group: as given.
        stopped_by: name of the signal that has asked this process to stop; None: none has.
    """

    def __init__(self, rank: int = 0, size: int = 1, group: dist.ProcessGroup | None = None):
        self.rank, self.size, self.group = rank, size, group
        self.stopped_by: str | None = None
        self._patient: Any = None

    @property
    def first(self) -> bool:
        """Whether this rank writes and prints."""
        return self.rank == 0

    @property
    def place(self) -> dict[str, int]:
        """The arguments by which a loader reads this rank's share of each batch."""
        return {"rank": self.rank, "world_size": self.size}

    def sum(self, x: Tensor) -> Tensor:
        """Add `x` over all ranks, in place, and return it; on a GPU without waiting for it."""
        if self.size > 1:
            dist.all_reduce(x, group=self.group)
        return x

    def most(self, value: float) -> float:
        """Return the largest `value` of all ranks."""
        if self.size == 1:
            return value
        largest = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)
        return largest.item()

    def from_first(self, value: Any) -> Any:
        """Return the `value` of the first rank."""
        if self.size == 1:
            return value
        held = [value]
        dist.broadcast_object_list(held, group=self.group, device=torch.device("cpu"))
        return held[0]

    def on_first(self, do: Callable[[], None]) -> None:
        """Call `do` on the first rank; an OSError there is raised on all."""
        failure = None
        if self.first:
            try:
                do()
            except OSError as error:
                failure = error
        if (failure := self.from_first(failure)) is not None:
            raise failure

    def wait(self) -> None:
        """Wait until every rank has come here, for days if need be."""
        if self.size > 1:
            self._patient = self._patient or dist.new_group(timeout=PATIENCE, backend="gloo")
            dist.all_reduce(torch.zeros(1), group=self._patient)

    @contextmanager
    def first_before_others(self) -> Iterator[None]:
        """Run the block on the first rank, then on the others."""
        if not self.first:
            self.wait()
        yield
        if self.first:
            self.wait()

    def another(self) -> Ranks:
        """Return the same ranks with a process group of their own, for use in another thread."""
        if self.size == 1:
            return self
        return Ranks(self.rank, self.size, _c10d.new_group(backend="gloo"))

    def seed_step(self, seed: int, step: int) -> None:
        """Seed PyTorch's generators for a step, by the run's seed, the step and the rank.

        So ranks draw different numbers, and a resumed run the same ones. A single rank, whose
        checkpoints hold the state of its generators, is left as it is.
        """
        if self.size > 1:
            (drawn,) = np.random.SeedSequence((seed, step, self.rank)).generate_state(1, np.uint64)
            torch.manual_seed(int(drawn))

    @contextmanager
    def folder(self, run: Path, *, resume: bool) -> Iterator[Path]:
        """Open the run folder on the first rank, and on the others a temporary one, to be deleted.

        Args:
            run: the run folder.
            resume: whether it may hold a run already.

        Raises:
            RunFolderError: it cannot be this run's.
        """
        if self.first:
            with lock_folder(run, resume=resume):
                self.wait()
                yield run
        else:
            self.wait()
            with TemporaryDirectory(prefix="tritium-rank-") as own:
                yield Path(own)


SINGLE = Ranks()
"""The only rank of a process without torchrun."""


def launched() -> bool:
    """Whether torchrun started this process."""
    return os.environ.keys() >= LAUNCHED


def speaker() -> str:
    """Return the name under which this process reports its errors."""
    return f"train.py: rank {os.environ['RANK']}" if launched() else "train.py"


def launcher() -> str:
    """Return the program that starts processes like this one."""
    if not launched():
        return "python"
    return f"torchrun --nproc-per-node {os.environ.get('LOCAL_WORLD_SIZE', 1)}"


def restarted() -> bool:
    """Whether torchrun started the processes anew, after one of them had failed."""
    return launched() and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def recorded(main: Callable[[], None]) -> Callable[[], None]:
    """Return `main`; under torchrun one whose error torchrun repeats at its end.

    That is an exception that leaves it, or one for which it exits with a status; not a rank that
    is gone, which torchrun names itself. A process that lost another ends without the end of its
    interpreter, for whose seconds others would wait, and which may wait for the lost one.
    """
    if not launched():
        return main
    from torch.distributed.elastic.multiprocessing.errors import record

    def explained() -> None:
        try:
            main()
        except SystemExit as stop:
            cause, file = stop.__context__, os.environ.get("TORCHELASTIC_ERROR_FILE")
            if isinstance(cause, LostRankError):
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(int(stop.code or 0))
            if isinstance(cause, Exception) and file:
                told = {"message": str(cause), "timestamp": int(time.time())}
                Path(file).write_text(json.dumps(told))
            raise

    return record(explained)  # type: ignore[return-value]


@contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """Join the ranks of this run, inside the block; only the first one prints.

    Args:
        device: where the model is trained; of several GPUs each rank takes its own.

    Raises:
        ValueError: there is no GPU for this rank.
        LostRankError: another rank is gone, and the message was printed.
    """
    if not launched():
        yield SINGLE
        return
    rank, size, local = (int(os.environ[x]) for x in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"torchrun --nproc-per-node must be at most the number of GPUs, "
                f"{torch.cuda.device_count()}, got a process {local + 1} of this machine; lower it"
            )
        torch.cuda.set_device(local)
    console.quiet = rank > 0
    store, *_ = next(iter(rendezvous("env://")))
    # torchrun's store outlives a restart, and with it the addresses of processes that are gone.
    store = _c10d.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    ranks = Ranks(rank, size)
    try:
        yield ranks
    except RuntimeError as error:
        if not LOST.search(str(error)):
            raise
        cause = str(error).partition("\n")[0]
        print(
            f"{speaker()}: the connection to another rank is lost ({cause}); torchrun names the "
            "one that failed first",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        # Gloo wakes those that wait for a rank that ends, no others: whoever stays, holds them up.
        if ranks.stopped_by not in TORCHRUN_SENDS:  # else torchrun has seen the cause
            time.sleep(LINGER)
        raise LostRankError from error
    else:
        dist.destroy_process_group()
    finally:
        console.quiet = False
