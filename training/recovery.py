"""The recovery ladder: what a run does about losses that are not finite, or far above the others.

1. Skip: such a step changes no weight. The optimizer leaves out a step whose gradient is not
   finite, and `guard` makes it so where the loss is above a limit, which lies on the device.
2. Go back: after `max_skips` such steps in a row, to the last healthy checkpoint, and on past all
   the data read since it was made.
3. Lower the rate: the same, and the learning rate is multiplied by `lower_lr` for good.
4. Stop, with a report.

The limit is `spike_zscore` standard deviations above the mean of the last `spike_window` good
losses. It is set, and a rung is climbed, only where losses are read, so the host never waits for
the device in between. Once a run is `spike_window` steps beyond the step at which it went back, the
ladder begins anew; before, each further streak of bad steps is the next rung.
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
from tritium.training.run.run_folder import RunLog
from tritium.training.run.saver import Saver

SMALLEST_DEVIATION = 0.02  # nats; a model that knows its data by heart has hardly any
NO_LIMIT = torch.finfo(torch.float32).max  # which an infinite loss exceeds
GO_BACK, LOWER_RATE, STOP = 1, 2, 3


@dataclass(frozen=True)
class RecoveryConfig:
    """What to do about losses that are not finite or far too high."""

    recovery: bool = True
    """Skip steps whose loss spikes; where bad steps follow one another, go back to the last healthy
    checkpoint and past the data, then lower the learning rate, then stop with a report."""
    spike_zscore: float = 6.0
    """Standard deviations above the mean of the losses before at which a loss is a spike."""
    spike_window: int = 128
    """Losses that mean and deviation are taken of; until there are so many, no loss is a spike."""
    max_skips: int = 5
    """Bad steps in a row, skipped, after which the run goes back."""
    lower_lr: float = 0.5
    """Factor of the learning rate where going back alone did not help."""


class UnrecoverableError(RuntimeError):
    """Nothing on the ladder helped; the message is the report."""


class Recovery:
    """The ladder of one run.

    Args:
        config: how it is climbed.
        model: the model that is trained; one of its gradients tells the optimizer to skip.
        batch: data windows per step.
        report: is told, in a sentence, of everything that is done.

    Attributes:
        due: whether `climb` will climb a rung.
        lr_factor: what the schedule's learning rate is to be multiplied by.
        went_back: every time the run went back: `from_step`, `to_step`, the `windows` of the data
            left behind (first, and the one after the last), and the `lr_factor` from then on.
    """

    def __init__(
        self, config: RecoveryConfig, model: nn.Module, batch: int, report: Callable[[str], None]
    ):
        trained = [p for p in model.parameters() if p.requires_grad]
        self._config, self._batch, self._report = config, batch, report
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
    def guard(self, loss: Tensor) -> Tensor:
        """Make the optimizer skip this step if its loss, on the device, is above the limit.

        To be called between the backward pass and the step. Nothing changes below the limit. The
        loss is returned, as it came.
        """
        if self._config.recovery and self._marked.grad is not None:
            usual = loss <= self._limit_on_device  # as a loss that is not a number is not
            self._marked.grad.masked_fill_(usual.logical_not(), math.nan)
        return loss

    def judge(self, entries: list[dict], position: int) -> None:
        """Mark the steps that were skipped, set the next limit, and decide what `climb` does.

        Args:
            entries: of the log, of all steps since the last call. One that was skipped gets
                `skipped` (why) and `windows` (first, and the one after the last); the first after
                the run went back gets `recovery`, which is what `went_back` has of it.
            position: data windows that were read so far.
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
        if begun:  # of a streak that continues, nothing more is said
            more = sum(entry["step"] > begun[0]["step"] for entry in skipped)
            others = f"; {more} more until step {entries[-1]['step']:,}" if more else ""
            self._report(f"Skipped {_place(begun[0])}{others}")
        self.due = self._config.recovery and self._streak >= self._config.max_skips
        if self.due:
            step = entries[-1]["step"]
            self._rung = GO_BACK if step > self._until else self._rung + 1
            self._until = step + self._config.spike_window
            if self._rung == STOP:
                entries[-1]["recovery"] = {"stopped": True}

    def climb(
        self, saver: Saver, log: RunLog, model: Transformer, optimizer
    ) -> tuple[int, dict | None] | None:
        """Climb a rung if it is due.

        The weights, the optimizer and the random number generators go back to the last healthy
        checkpoint that a good step followed on; the position in the data does not. Without such a
        checkpoint the run continues as it is: a step that was skipped left no trace.

        Args:
            saver: of the run's checkpoints.
            log: which gives up the entries of the steps that are done again.
            model: gets its weights of that time.
            optimizer: gets its state of that time.

        Returns:
            The step that the run went back to, and the best validation of that time; or None.

        Raises:
            UnrecoverableError: all this was tried already.
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
            self._load_losses(saved.get("recovery", {}))
            start = saved["loader"]["windows"]
            saver.forget_after(step)
        if self._rung == LOWER_RATE:
            self.lr_factor *= self._config.lower_lr
        done = {"from_step": last, "to_step": step, "windows": [start, self._position]}
        self.went_back.append(done | {"lr_factor": self.lr_factor})
        log.rewind(step, len(self.went_back))
        self._report(f"{self._streak} bad steps in a row. Going {_told(self.went_back[-1])}")
        self._note, self._streak = self.went_back[-1], 0
        return None if saved is None else (step, saved["best"])

    def healthy(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> bool:
        """Whether the last loss read was good, and every weight and moment is finite."""
        return self._good and all_finite(model, optimizer)

    def state(self) -> dict:
        """Return what a resumed run needs to do the same, as JSON."""
        return {
            "losses": list(self._losses), "rung": self._rung, "until": self._until,
            "streak": self._streak, "first_bad": self._first_bad, "note": self._note,
            "lr_factor": self.lr_factor, "went_back": self.went_back,
        }  # fmt: skip

    def load_state(self, state: dict, *, same_data: bool = True) -> None:
        """Go on from what `state` returned; losses of other data say nothing about these."""
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
        tried = "".join(f"\n  after step {x['from_step']:,} {_told(x)}" for x in self.went_back)
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
    """Put weights, optimizer and random number generators where a checkpoint has them.

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
    """Whether every weight and every moment is finite; waits for the device."""
    moments = [x for state in optimizer.state.values() for x in state.values()]
    tensors = [x.detach() for x in (*model.parameters(), *moments) if torch.is_floating_point(x)]
    return math.isfinite(get_total_norm(tensors, norm_type=math.inf).item())


def _essence(entry: dict) -> dict:
    return {name: entry[name] for name in ("step", "windows", "skipped")}


def _place(bad: dict) -> str:
    start, end = bad["windows"]
    return f"step {bad['step']:,} (windows {start:,} to {end - 1:,}): {bad['skipped']}"


def _told(back: dict) -> str:
    start, end = back["windows"]
    where = "back to" if back["to_step"] < back["from_step"] else "on from"
    rate = f", at {back['lr_factor']:g} of the learning rate" if back["lr_factor"] < 1 else ""
    return f"{where} step {back['to_step']:,}, past windows {start:,} to {end - 1:,}{rate}"
