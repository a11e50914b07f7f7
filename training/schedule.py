"""The length of a run, and the learning rate of each of its steps."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, cos, pi, sqrt
from typing import Annotated, Literal

from tyro.conf import arg

from tritium.kernels.units import counted


@dataclass(frozen=True)
class Budget:
    """The length of a run: optimizer steps, or wall-clock time; the other one is None."""

    steps: int | None = None
    """Steps of the run."""
    seconds: float | None = None
    """Seconds of the run, those before a resume included."""

    def __str__(self) -> str:
        if self.seconds is not None:
            return counted(self.seconds / 60, "minute")
        return counted(self.steps or 0, "step")

    def used(self, step: int, seconds: float, *, after: int = 0) -> float:
        """Return how much of it is used, from 0 to 1, after `step` steps and `seconds` seconds.

        Args:
            step: steps taken.
            seconds: time used.
            after: first steps that do not count, of a budget in steps.
        """
        if self.seconds is not None:
            return min(1.0, seconds / self.seconds)
        assert self.steps is not None
        return min(1.0, max(0, step - after) / max(1, self.steps - after))

    def spent(self, step: int, seconds: float) -> bool:
        """Whether no step is left after `step` steps and `seconds` seconds."""
        return seconds >= self.seconds if self.seconds is not None else step >= (self.steps or 0)


@dataclass(frozen=True)
class Length:
    """When a run ends: at the first of so many steps, epochs or tokens, or after so many minutes.

    A length on the command line replaces all lengths of the preset.
    """

    max_steps: int | None = None
    """Optimizer steps of the run."""
    max_epochs: float | None = None
    """Passes over the data, rounded up to whole steps."""
    max_tokens: int | None = None
    """Tokens of the run, rounded up to whole steps."""
    max_minutes: float | None = None
    """Minutes of the run, including start-up and time before a resume, without the last validation
    and the sample. The learning rate follows the clock."""

    def given(self) -> list[str]:
        """Name the lengths that are set."""
        return [name for name, value in vars(self).items() if value is not None]

    def check(self) -> None:
        """Raise ValueError unless they can hold together."""
        if not self.given():
            raise ValueError("a run needs an end; give --max-steps")
        if self.max_minutes is not None and len(self.given()) > 1:
            raise ValueError(f"{' and '.join(self.given())} exclude each other; drop one")

    def budget(self, tokens_per_step: int, epoch: float) -> Budget:
        """Return it in steps or in seconds.

        Args:
            tokens_per_step: tokens of a batch.
            epoch: steps of an epoch, not rounded.
        """
        if self.max_minutes is not None:
            return Budget(seconds=60 * self.max_minutes)
        steps = [] if self.max_steps is None else [self.max_steps]
        if self.max_epochs is not None:
            steps.append(max(1, ceil(self.max_epochs * epoch)))
        if self.max_tokens is not None:
            steps.append(-(-self.max_tokens // tokens_per_step))
        return Budget(steps=min(steps))


@dataclass(frozen=True)
class Schedule:
    """The learning rate: linear warm-up to a peak, then one of five shapes."""

    shape: Annotated[
        Literal["linear", "cosine", "constant", "trapezoid", "inverse-sqrt"], arg(name="schedule")
    ] = "linear"
    """Shape after the warm-up: linear or cosine decay; constant; constant, then linear decay
    (trapezoid); or the peak times the root of warmup-steps / step (inverse-sqrt)."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    warmup_steps: int = 50
    """Steps in which the learning rate grows linearly to its peak."""
    final_lr: float = 0.0
    """Learning rate that a decay ends at, as a fraction of the peak."""
    decay_fraction: float = 0.2
    """Final share of the run after the warm-up in which a trapezoid decays."""

    @property
    def has_end(self) -> bool:
        """Whether the rate depends on the length of the run."""
        return self.shape not in ("constant", "inverse-sqrt")

    def rate(self, step: int, budget: Budget, seconds: float = 0.0) -> float:
        """Return the learning rate of a step.

        Args:
            step: counted from 0.
            budget: length of the run, over which the rate decays.
            seconds: time used so far, for a budget in seconds.
        """
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        progress = budget.used(step, seconds, after=self.warmup_steps)
        left = self._left(step, progress)
        return self.learning_rate * (self.final_lr + (1 - self.final_lr) * left)

    def _left(self, step: int, progress: float) -> float:
        match self.shape:
            case "linear":
                return 1 - progress
            case "cosine":
                return (1 + cos(pi * progress)) / 2
            case "trapezoid":
                return min(1.0, (1 - progress) / self.decay_fraction)
            case "inverse-sqrt":
                return sqrt(max(1, self.warmup_steps) / (step + 1))
            case "constant":
                return 1.0
