"""Trackers that receive the log: TensorBoard and Weights & Biases, if installed."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from math import isfinite
from pathlib import Path
from typing import Any, Literal, Protocol
from uuid import uuid4

Name = Literal["tensorboard", "wandb"]


class Tracker(Protocol):
    """A destination of scalars."""

    def log(self, step: int, scalars: dict[str, float]) -> None:
        """Log the scalars of one step."""

    def close(self) -> None:
        """Send what is left."""


class TensorBoard:
    """Event files in the run folder, for `tensorboard --logdir runs`."""

    def __init__(self, run: Path, config: dict, step: int):
        writer = import_module("torch.utils.tensorboard").SummaryWriter
        # Steps that a resumed run repeats are hidden.
        self._writer: Any = writer(str(run / "tensorboard"), purge_step=step + 1)

    def log(self, step: int, scalars: dict[str, float]) -> None:
        """Log the scalars of one step."""
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


class WeightsAndBiases:
    """A run of the W&B project "tritium", which a resumed run continues with.

    W&B's environment variables override project, mode and account.
    """

    def __init__(self, run: Path, config: dict, step: int):
        wandb: Any = import_module("wandb")
        kept = run / "wandb-id"
        name = kept.read_text() if step and kept.exists() else uuid4().hex[:8]
        kept.write_text(name)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "tritium"), id=name, resume="allow",
            name=run.name, dir=str(run), config=config,
        )  # fmt: skip
        # W&B's own count refuses the steps that a resumed run repeats.
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, scalars: dict[str, float]) -> None:
        """Log the scalars of one step."""
        self._run.log({"step": step, **scalars})

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()


TRACKERS: dict[str, Callable[[Path, dict, int], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
}


def require(names: tuple[str, ...]) -> None:
    """Raise ValueError, with the command that installs it, if a tracker's package is missing."""
    for name in names:
        if find_spec(name) is None:
            raise ValueError(
                f"--track {name} needs the package {name}, which is not installed; run: "
                f"pip install {name}"
            )


class Trackers:
    """The trackers of one run. One that fails is reported and left out; the run continues.

    Args:
        names: keys of `TRACKERS`.
        run: the run folder.
        config: settings of the run, to be shown.
        step: the step that the run resumes from.
        log: called with one line for each tracker that failed.
    """

    def __init__(
        self, names: tuple[str, ...], run: Path, config: dict, step: int,
        log: Callable[[str], None],
    ):  # fmt: skip
        self._log = log
        self._trackers: dict[str, Tracker] = {}
        for name in names:
            try:
                self._trackers[name] = TRACKERS[name](run, config, step)
            except Exception as error:
                self._drop(name, error)

    def log(self, entry: dict) -> None:
        """Send the finite numbers of an entry of a log, those in `layers` by layer."""
        if not self._trackers:
            return
        scalars = {k: x for k, x in entry.items() if isinstance(x, (int, float)) and k != "step"}
        for layer, (gradient, update, weight) in entry.get("layers", {}).items():
            scalars[f"gradient norm/{layer}"] = gradient
            if weight:
                scalars[f"update ratio/{layer}"] = update / weight
        finite = {name: float(x) for name, x in scalars.items() if isfinite(x)}
        self._each(lambda tracker: tracker.log(entry["step"], finite))

    def close(self) -> None:
        """Send what is left."""
        self._each(lambda tracker: tracker.close())

    def _each(self, action: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                action(tracker)
            except Exception as error:  # network or disk errors do not end a run
                self._drop(name, error)

    def _drop(self, name: str, error: Exception) -> None:
        self._trackers.pop(name, None)
        self._log(f"{name} failed ({error}); the run continues without it.")
