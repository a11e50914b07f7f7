"""Checkpoint saving, asynchronous if wanted, and the choice of checkpoints to keep."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch

from tritium.model.transformer import Transformer
from tritium.training.run import checkpoint, sharded
from tritium.training.run.checkpoint import CheckpointError, Snapshot
from tritium.training.run.ranks import SINGLE, Ranks


@dataclass(frozen=True)
class SaveConfig:
    """Frequency, manner and retention of checkpoints."""

    save_every: int = 500
    """Steps from one checkpoint to the next; the last step is always saved."""
    save_async: bool = False
    """Continue training while a checkpoint is written, from a copy in host memory."""
    keep_last: int = 2
    """Number of newest checkpoints to keep."""
    keep_best: bool = True
    """Save whenever the validation loss is the lowest so far, and keep that checkpoint."""
    keep_every: int | None = None
    """Keep the checkpoints of the steps that this divides. None: only those above."""


class SaveError(RuntimeError):
    """The last step of a run is not on the disk."""


class Saver:
    """Write the checkpoints of one run, delete those not to be kept, and survive a full disk.

    An old one is deleted only when a newer is on the disk, and the last healthy one only when there
    is a newer healthy one. A save that fails is reported and leaves everything as it was; training
    may continue and save again. A context manager, whose end waits for the write in progress, so
    that the folder lock is held until the write finishes.

    Args:
        folder: folder of the checkpoints; remains of a killed process are deleted. No other process
            may write there.
        config: its settings.
        log: called with a one-line message for each failed save.
        ranks: the processes of the run, which see the same folder. The first one writes, and if the
            model is sharded all of them; all load what the first one finds.

    Attributes:
        on_failure: called, in addition to `log`, with the step and the message of each failed save,
            from the thread that writes.
        last_step: step of the checkpoint that was written last, or that a run is to resume from;
            None if there is none.
    """

    def __init__(
        self, folder: Path, config: SaveConfig, *, log: Callable[[str], None],
        ranks: Ranks = SINGLE,
    ):  # fmt: skip
        self._folder, self._config, self._log, self._ranks = folder, config, log, ranks
        self.on_failure: Callable[[int, str], None] = lambda step, text: None
        self._thread = ThreadPoolExecutor(1, "checkpoint") if config.save_async else None
        self._writing: Future[None] | None = None
        self._writers: Ranks | None = None  # of a sharded model
        if ranks.first:
            checkpoint.tidy(folder)
        ranks.wait()
        last = self._last_healthy() or self.newest()
        self.last_step = None if last is None else checkpoint.step_of(last)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.wait()

    def newest(self) -> Path | None:
        """Return the newest checkpoint, or None."""
        found = checkpoint.checkpoints(self._folder)
        return found[-1] if found else None

    def to_resume(self) -> Path | None:
        """Return the newest healthy checkpoint, else the newest, or None; say if it is not healthy.

        Raises:
            CheckpointError: the newest is damaged.
        """
        return self._ranks.from_first(self._to_resume())

    def _to_resume(self) -> Path | None:
        newest = self.newest()
        if newest is None or checkpoint.is_healthy(newest):
            return newest
        last = self._last_healthy() or newest
        steps = f"step {checkpoint.step_of(newest):,}", f"step {checkpoint.step_of(last):,}"
        self._log(f"The checkpoint of {steps[0]} is not healthy: resuming from {steps[1]}.")
        return last

    def last_healthy(self, before: int | None = None) -> Path | None:
        """Return the newest healthy checkpoint, or None.

        Args:
            before: a step; those that are older come first.
        """
        return self._ranks.from_first(self._last_healthy(before))

    def _last_healthy(self, before: int | None = None) -> Path | None:
        healthy = [*filter(_is_healthy, checkpoint.checkpoints(self._folder))]
        older = [p for p in healthy if before is not None and checkpoint.step_of(p) < before]
        return (older or healthy or [None])[-1]

    def forget_after(self, step: int) -> None:
        """Delete the checkpoints of later steps, after a rollback."""
        if not self._ranks.first:
            return
        for undone in checkpoint.checkpoints(self._folder):
            if checkpoint.step_of(undone) > step:
                checkpoint.remove(undone)

    def save(
        self,
        step: int,
        model: Transformer,
        optimizer: torch.optim.Optimizer,
        state: dict,
        *,
        healthy: bool = True,
        best_step: int | None = None,
    ) -> None:
        """Save a checkpoint, or begin to; the arguments are those of `checkpoint.snapshot`.

        Once it is on the disk, those of later steps are deleted.

        Args:
            healthy: whether recovery may roll back to it.
            best_step: the step whose checkpoint `keep_best` keeps.
        """
        self.wait()
        parts = sharded.is_sharded(model)
        if not self._ranks.first and not parts:
            return
        asynchronous = self._thread is not None
        taken = checkpoint.snapshot(step, model, optimizer, state, healthy, copy=asynchronous)
        if parts and self._writers is None:  # the thread must not meet what the run communicates
            self._writers = self._ranks.another()
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
        self.last_step = self._ranks.from_first(self.last_step)
        if self.last_step != step:
            last = "none" if self.last_step is None else f"that of step {self.last_step:,}"
            raise SaveError(f"step {step:,} could not be saved; the last checkpoint is {last}")

    def _write(self, taken: Snapshot, best_step: int | None) -> None:
        try:
            checkpoint.write(self._folder, taken, self._writers or SINGLE)
            self.last_step = taken.step
            if self._ranks.first:
                self._prune(taken.step, best_step)
        except OSError as error:
            last = "none yet" if self.last_step is None else f"that of step {self.last_step:,}"
            if not self._ranks.first:
                return
            failure = (
                f"Could not save step {taken.step:,}: {error}. The last checkpoint is {last}; "
                "make room, the next save tries again."
            )
            self._log(failure)
            self.on_failure(taken.step, failure)

    def _prune(self, written: int, best_step: int | None) -> None:
        keep = self._config
        self.forget_after(written)
        healthy = self._last_healthy()
        for old in checkpoint.checkpoints(self._folder)[: -keep.keep_last]:
            step = checkpoint.step_of(old)
            best = keep.keep_best and step == best_step
            kept = best or (keep.keep_every and step % keep.keep_every == 0)
            if not kept and old != healthy:
                checkpoint.remove(old)


def _is_healthy(path: Path) -> bool:
    try:
        return checkpoint.is_healthy(path)
    except CheckpointError:  # of one that nothing needs yet
        return False
