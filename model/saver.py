"""Saving while training goes on, and which checkpoints are kept."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from . import checkpoint
from .checkpoint import Snapshot
from .transformer import Transformer


class SaveError(RuntimeError):
    """The last step of a run is not on the disk."""


class Saver:
    """Write the checkpoints of one run, delete those not to be kept, and survive a full disk.

    Kept are the newest `keep_last`, the best if `keep_best`, and those of every step that
    `keep_every` divides. An older one is deleted only when a newer is on the disk. A save that
    fails is reported and leaves everything as it was; training may go on and save again.

    Args:
        folder: where the checkpoints lie; what a killed process left there is cleared away. No
            other process may write there.
        keep_last: how many of the newest to keep, at least 1.
        keep_best: whether to keep the one of the step that `save` is told was the best.
        keep_every: keep every step that this divides. None: no such.
        asynchronous: write in a thread of its own, from a copy in memory of the host.
        report: is told, in a sentence, of every save that failed.

    Attributes:
        last_step: step of the newest checkpoint that is on the disk; None if there is none.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep_last: int,
        keep_best: bool = False,
        keep_every: int | None = None,
        asynchronous: bool = False,
        report: Callable[[str], None],
    ):
        self._folder, self._report = folder, report
        self._keep_last, self._keep_best, self._keep_every = keep_last, keep_best, keep_every
        self._thread = ThreadPoolExecutor(1, "checkpoint") if asynchronous else None
        self._writing: Future[None] | None = None
        checkpoint.tidy(folder)
        newest = self.newest()
        self.last_step = None if newest is None else checkpoint.step_of(newest)

    def newest(self) -> Path | None:
        """Return the newest checkpoint, or None."""
        found = checkpoint.checkpoints(self._folder)
        return found[-1] if found else None

    def save(
        self,
        step: int,
        model: Transformer,
        optimizer: torch.optim.Optimizer,
        state: dict,
        *,
        best_step: int | None = None,
    ) -> None:
        """Save a checkpoint, or begin to; the arguments are those of `checkpoint.snapshot`.

        Args:
            best_step: the step whose checkpoint `keep_best` keeps.
        """
        self.wait()
        asynchronous = self._thread is not None
        taken = checkpoint.snapshot(step, model, optimizer, state, copy=asynchronous)
        if self._thread is None:
            self._write(taken, best_step)
        else:
            self._writing = self._thread.submit(self._write, taken, best_step)

    def wait(self) -> None:
        """Wait until what `save` began is on the disk, or has failed."""
        if self._writing is not None:
            self._writing.result()
            self._writing = None

    def finish(self, step: int) -> None:
        """Wait, and raise SaveError unless the newest checkpoint is that of `step`."""
        self.wait()
        if self.last_step != step:
            last = "none" if self.last_step is None else f"that of step {self.last_step:,}"
            raise SaveError(f"step {step:,} could not be saved; the last checkpoint is {last}")

    def _write(self, taken: Snapshot, best_step: int | None) -> None:
        try:
            checkpoint.write(self._folder, taken)
            self.last_step = taken.step
            self._prune(best_step)
        except OSError as error:
            last = "none yet" if self.last_step is None else f"that of step {self.last_step:,}"
            self._report(
                f"Could not save step {taken.step:,}: {error}. The last checkpoint is {last}; "
                "make room, the next save tries again."
            )

    def _prune(self, best_step: int | None) -> None:
        for old in checkpoint.checkpoints(self._folder)[: -self._keep_last]:
            step = checkpoint.step_of(old)
            best = self._keep_best and step == best_step
            if not best and not (self._keep_every and step % self._keep_every == 0):
                checkpoint.remove(old)
