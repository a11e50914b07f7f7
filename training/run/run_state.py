"""The state of a run in addition to its weights and moments, as a checkpoint's JSON."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch

from tritium.training.memory.retry import MemoryRetry
from tritium.training.recovery import Recovery, restore
from tritium.training.run import checkpoint, random_state
from tritium.training.run.fingerprint import best_of
from tritium.training.schedule import Budget


class Positioned(Protocol):
    """A loader of data."""

    def state(self) -> dict:
        """Return the position."""
        ...

    def load_state(self, state: dict) -> None:
        """Seek to a position; raises ValueError if it belongs to other data."""


class RunState:
    """The state of a run; `capture` and `restore` name the same entries.

    Args:
        source: the checkpoint to resume from; None at the start of a run.

    Attributes:
        fingerprint: the fingerprint in the checkpoint.
        threads: CPU threads, 0 at the start.
        plan: the memory plan; None at the start.
        best: step and val_loss of the lowest validation so far, or None.
        seconds: time used by the run so far.
        budget: the length of the run when it was last started; None at the start.
    """

    def __init__(self, source: Path | None):
        saved: dict = {} if source is None else checkpoint.read_record(source)["state"]
        self._source, self._saved = source, saved
        self.fingerprint: dict = saved.get("fingerprint", {})
        self.threads: int = saved.get("threads", 0)
        self.plan: dict | None = saved.get("plan")
        self.best: dict | None = saved.get("best")
        self.seconds: float = saved.get("seconds", 0.0)
        self.budget = Budget(**saved["budget"]) if "budget" in saved else None

    def forget_best(self, fingerprint: dict) -> str:
        """Drop `best` if it is of other validation text than this run's; return a line about it.

        Args:
            fingerprint: that of this run.
        """
        best, self.best = self.best, best_of(self._saved, fingerprint)
        if best is None or self.best is not None:
            return ""
        return (
            f"The lowest validation loss so far, {best['val_loss']:.4f} nats per token after step "
            f"{best['step']:,}, is of other validation text and no longer counts."
        )

    def capture(
        self, loader: Positioned, recovery: Recovery, plan: MemoryRetry, optimizer: Any,
        device: torch.device, *, seconds: float, budget: Budget, fingerprint: dict, threads: int,
    ) -> dict:  # fmt: skip
        """Return what `restore` and a new RunState need, as JSON."""
        return {
            "fingerprint": fingerprint, "threads": threads, "plan": plan.state(),
            "best": self.best, "seconds": seconds, "budget": asdict(budget),
            "loader": loader.state(), "recovery": recovery.state(),
            "random": random_state.capture(device), "skipped": optimizer.skipped.item(),
        }  # fmt: skip

    def restore(
        self, loader: Positioned, recovery: Recovery, model: Any, optimizer: Any,
        device: torch.device, *, anyway: bool, same: bool, log: Callable[[str], None],
    ) -> int:  # fmt: skip
        """Restore everything from the checkpoint, and return its step.

        Args:
            anyway: accept another model of the same shapes, and begin other data at its start.
            same: whether the fingerprints are the same.
            log: called with one line if the data is read from its start.

        Raises:
            CheckpointError: the checkpoint is damaged or does not fit.
            ValueError: the position belongs to other data.
        """
        assert self._source is not None
        # Weights, moments, random numbers and the count of skipped steps:
        step, saved = restore(self._source, model, optimizer, device, same_model=not anyway)
        recovery.load_state(saved.get("recovery", {}), same_data=same)
        seek(loader, saved["loader"], anyway=anyway, log=log)
        return step


def seek(loader: Positioned, position: dict, *, anyway: bool, log: Callable[[str], None]) -> None:
    """Put the loader where the checkpoint was; other data is begun at its start, if `anyway`."""
    try:
        loader.load_state(position)
    except ValueError as error:
        if not anyway:
            raise
        log(f"The data is read from its beginning: {error}")
