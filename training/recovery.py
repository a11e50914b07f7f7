"""The recovery ladder: what a run does about losses that are not finite, or far above the others.

1. Skip: such a step changes no weight. The optimizer leaves out a step whose gradient is not
   finite, and `mark_spike` makes it so if the loss is above a limit, which is kept on the device.
2. Roll back: after `max_skips` such steps in a row, to the last healthy checkpoint, skipping all
   the data read since it was made.
3. Lower the rate: as 2, and the learning rate is multiplied by `lower_lr` for good.
4. Stop, with a report.

The limit is `spike_zscore` standard deviations above the mean of the last `spike_window` good
losses. The limit is set, and the run rolled back, only when losses are read, so the host never
waits for the device in between. Once a run is `spike_window` steps beyond the step at which it
rolled back, it begins again with 1; before, each further streak of bad steps takes the next
measure.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from tritium.model.transformer import Transformer
from tritium.training.run import checkpoint, random_state
from tritium.training.run.fingerprint import best_of, same_data
from tritium.training.run.run_folder import RunLog
from tritium.training.run.saver import Saver
from tritium.training.run.sharded import local

SMALLEST_DEVIATION = 0.02  # nats; a model that knows its data by heart has hardly any
NO_LIMIT = torch.finfo(torch.float32).max  # which an infinite loss exceeds
GO_BACK, LOWER_RATE, STOP = 1, 2, 3


@dataclass(frozen=True)
class RecoveryConfig:
    """Recovery from losses that are not finite or far too high."""

    recovery: bool = True
    """Skip steps whose loss spikes; after several in a row, roll back to the last healthy
    checkpoint and skip the data, then lower the learning rate, then stop with a report."""
    spike_zscore: float = 6.0
    """Standard deviations above the mean of earlier losses at which a loss is a spike."""
    spike_window: int = 128
    """Losses over which mean and deviation are taken; until there are so many, none is a spike."""
    max_skips: int = 5
    """Consecutive bad steps after which the run rolls back."""
    lower_lr: float = 0.5
    """Factor of the learning rate if rolling back alone did not help."""


class UnrecoverableError(RuntimeError):
    """Training diverged, and nothing helped; the message is the report."""


def check_end(history: list[dict]) -> None:
    """Raise an UnrecoverableError if a run ends with a model whose loss is not finite.

    The last steps of a run may make it so: a training loss is that of the weights before its step.

    Args:
        history: all entries of the log.
    """
    measured = [entry for entry in history if "val_loss" in entry]
    if not measured or math.isfinite(loss := measured[-1]["val_loss"]):
        return
    raise UnrecoverableError(
        f"the model diverged: after step {measured[-1]['step']:,} its validation loss is {loss}\n"
        "What to try, in a new run: a lower --learning-rate or --max-grad-norm, more "
        "--warmup-steps; --precision float32 if bfloat16 overflows"
    )


class Recovery:
    """The ladder of one run.

    Args:
        config: thresholds and limits.
        model: the model that is trained; an infinite gradient makes the optimizer skip a step.
        batch: data windows per step.
        log: called with a one-line message for each skip and rollback.

    Attributes:
        due: whether the next `roll_back_if_due` acts.
        lr_factor: factor to apply to the schedule's learning rate.
        went_back: every rollback: `from_step`, `to_step`, the `windows` of the data that are
            skipped (first, and the one after the last), and the `lr_factor` from then on.
    """

    def __init__(
        self, config: RecoveryConfig, model: nn.Module, batch: int, log: Callable[[str], None]
    ):
        trained = [p for p in model.parameters() if p.requires_grad]
        self._config, self._batch, self._log = config, batch, log
        self._marked = min(trained, key=torch.numel)
        self._limit = NO_LIMIT
        self._limit_on_device = torch.full(
            (), NO_LIMIT, dtype=torch.float32, device=self._marked.device
        )
        self._losses: deque[float] = deque(maxlen=config.spike_window)
        self._streak, self._first_bad = 0, {}  # of bad steps, up to the last one read
        self._rung, self._until, self._position, self._good = 0, 0, 0, True
        self._note: dict | None = None
        self.due, self.lr_factor, self.went_back = False, 1.0, []

    @torch.no_grad()
    def mark_spike(self, loss: Tensor) -> Tensor:
        """Make the optimizer skip this step if its loss, on the device, is above the limit.

        Call it between the backward pass and the step. Below the limit gradients are unchanged.
        Returns the loss, unchanged.
        """
        if self._config.recovery and self._marked.grad is not None:
            usual = loss <= self._limit_on_device  # False for NaN
            local(self._marked.grad).masked_fill_(usual.logical_not(), math.nan)
        return loss

    def detect_bad_steps(self, entries: list[dict], position: int) -> None:
        """Mark skipped steps, set the next limit, and decide what `roll_back_if_due` does.

        Args:
            entries: log entries of all steps since the last call. A skipped one gets `skipped`
                (the reason) and `windows` (first, and the one after the last); the first after
                a rollback gets `recovery`, its entry of `went_back`.
            position: data windows read so far.
        """
        if self._note and entries:
            entries[0]["recovery"], self._note = self._note, None
        first = position - self._batch * len(entries)
        skipped, begun = [], []
        for i, entry in enumerate(entries):
            if why := self._fault(entry):
                start = first + self._batch * i
                entry |= {"skipped": why, "windows": [start, start + self._batch]}
                skipped.append(entry)
                if not self._streak:
                    self._first_bad = _essence(entry)
                    begun.append(entry)
                self._streak += 1
            else:
                self._streak = 0
                self._losses.append(entry["loss"])
        self._position, self._good = position, self._streak == 0
        self._set_limit()
        if begun:  # a streak is logged once
            more = sum(entry["step"] > begun[0]["step"] for entry in skipped)
            others = f"; {more} more until step {entries[-1]['step']:,}" if more else ""
            self._log(f"Skipped {_place(begun[0])}{others}")
        self.due = self._config.recovery and self._streak >= self._config.max_skips
        if self.due:
            step = entries[-1]["step"]
            self._rung = GO_BACK if step > self._until else self._rung + 1
            self._until = step + self._config.spike_window
            if self._rung == STOP:
                entries[-1]["recovery"] = {"stopped": True}

    def roll_back_if_due(
        self, saver: Saver, log: RunLog, model: Transformer, optimizer, fingerprint: dict
    ) -> tuple[int, dict | None] | None:
        """Roll back if it is due.

        Restores weights, optimizer and random number generators from the last healthy checkpoint
        that a good step followed; the position in the data stays. Without such a checkpoint the
        run continues as it is: a skipped step changed nothing.

        Args:
            saver: the saver of the run's checkpoints.
            log: the log, which discards the entries of the steps to repeat.
            model: restored in place.
            optimizer: restored in place.
            fingerprint: that of the run; losses of a checkpoint of other text count no more.

        Returns:
            The step rolled back to and the best validation until then; or None.

        Raises:
            UnrecoverableError: every recovery step was tried.
        """
        if not self.due:
            return None
        saver.wait()
        if self._rung == STOP:
            raise UnrecoverableError(self._account(saver.last_healthy()))
        bad = self._first_bad
        last = bad["step"] + self._streak - 1
        source = saver.last_healthy(before=bad["step"] - 1)  # a good step followed on those
        step, saved, start = last, None, bad["windows"][0]
        if source is not None:
            step, saved = restore(source, model, optimizer, self._marked.device)
            self._load_losses(saved["recovery"] if same_data(saved, fingerprint) else {})
            start = saved["loader"]["windows"]
            saver.forget_after(step)
        if self._rung == LOWER_RATE:
            self.lr_factor *= self._config.lower_lr
        done = {"from_step": last, "to_step": step, "windows": [start, self._position]}
        self.went_back.append(done | {"lr_factor": self.lr_factor})
        log.rewind(step, len(self.went_back))
        move = _described(self.went_back[-1])
        self._log(f"{self._streak} bad steps in a row. {move[0].upper()}{move[1:]}")
        self._note, self._streak = self.went_back[-1], 0
        return None if saved is None else (step, best_of(saved, fingerprint))

    def healthy(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> bool:
        """Whether the last loss read was good, and every weight and moment is finite."""
        return self._good and all_finite(model, optimizer)

    def state(self) -> dict:
        """Return the state for a checkpoint, as JSON."""
        return {
            "losses": list(self._losses), "rung": self._rung, "until": self._until,
            "streak": self._streak, "first_bad": self._first_bad, "note": self._note,
            "lr_factor": self.lr_factor, "went_back": self.went_back,
        }  # fmt: skip

    def load_state(self, state: dict, *, same_data: bool = True) -> None:
        """Restore what `state` returned; without `same_data`, without its losses."""
        state = self.state() | state
        self._rung, self._until, self._note = state["rung"], state["until"], state["note"]
        self._streak, self._first_bad = state["streak"], state["first_bad"]
        self.lr_factor, self.went_back = state["lr_factor"], state["went_back"]
        if same_data:
            self._load_losses(state)

    def _load_losses(self, state: dict) -> None:
        self._losses = deque(state.get("losses", ()), maxlen=self._config.spike_window)
        self._set_limit()

    def _set_limit(self) -> None:
        self._limit = NO_LIMIT
        if self._config.recovery and len(self._losses) == self._config.spike_window:
            losses = np.array(self._losses)
            above = self._config.spike_zscore * max(losses.std(), SMALLEST_DEVIATION)
            limit = min(losses.mean() + above, NO_LIMIT)
            self._limit = float(np.float32(limit))  # as the device compares it
        self._limit_on_device.fill_(self._limit)

    def _fault(self, entry: dict) -> str | None:
        loss = entry["loss"]
        if not math.isfinite(loss):
            return f"loss {loss}"
        if loss > self._limit:
            return f"loss {loss:.3f} above the limit {self._limit:.3f}"
        return None if math.isfinite(entry["grad_norm"]) else "gradient not finite"

    def _account(self, source: Path | None) -> str:
        tried = "".join(
            f"\n  after step {x['from_step']:,}: {_described(x)}" for x in self.went_back
        )
        bad = self._first_bad
        last = "none; start a new run" if source is None else f"step {checkpoint.step_of(source):,}"
        return (
            f"the losses do not recover, stopped after step {bad['step'] + self._streak - 1:,}\n"
            f"What happened: {self._streak} bad steps in a row, first {_place(bad)}\n"
            f"What was tried:{tried}\n"
            f"Last healthy checkpoint: {last}\n"
            "What to try, with --resume --resume-anyway: a lower --learning-rate, --max-grad-norm "
            "or --beta2; --precision float32 if bfloat16 overflows; a higher --spike-zscore if "
            "such losses belong to the data; other data if these windows are broken"
        )


def restore(
    source: Path, model: Transformer, optimizer, device: torch.device, *, same_model: bool = True
) -> tuple[int, dict]:
    """Restore weights, optimizer and random number generators from a checkpoint.

    Returns:
        The step, and the state that was saved with it.

    Raises:
        CheckpointError: it is damaged or does not fit.
    """
    step, saved = checkpoint.load(source, model, optimizer, same_model=same_model)
    random_state.restore(saved["random"], device)
    optimizer.skipped = torch.tensor(saved["skipped"], device=device)
    return step, saved


def all_finite(model: nn.Module, optimizer: torch.optim.Optimizer) -> bool:
    """Whether every weight and every moment on this rank is finite; waits for the device."""
    moments = [x for state in optimizer.state.values() for x in state.values()]
    tensors = [x.detach() for x in (*model.parameters(), *moments) if torch.is_floating_point(x)]
    tensors = [*map(local, tensors)]
    return math.isfinite(get_total_norm(tensors, norm_type=math.inf).item())


def _essence(entry: dict) -> dict:
    return {name: entry[name] for name in ("step", "windows", "skipped")}


def _place(bad: dict) -> str:
    start, end = bad["windows"]
    return f"step {bad['step']:,} (windows {start:,} to {end - 1:,}): {bad['skipped']}"


def _described(back: dict) -> str:
    start, end = back["windows"]
    where = "going back to" if back["to_step"] < back["from_step"] else "continuing from"
    rate = f", at {back['lr_factor']:g} of the learning rate" if back["lr_factor"] < 1 else ""
    return f"{where} step {back['to_step']:,}, past windows {start:,} to {end - 1:,}{rate}"
