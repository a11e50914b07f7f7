"""What a run leaves to be looked at, besides its log: norms of layers, samples, events."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock
from typing import Self

from tritium.model.sampling import Tokenizer, write_on
from tritium.model.transformer import Transformer
from tritium.training.monitor import trackers
from tritium.training.monitor.layer_stats import LayerNorms, LayerWatch
from tritium.training.monitor.plot import draw, plot_layers
from tritium.training.optim import Optimizer
from tritium.training.run.run_folder import RunLog

SEED = 1  # of samples, all of them, so that only the model makes them differ


@dataclass(frozen=True)
class ObserveConfig:
    """What is looked at while the run continues; nothing of it changes the run."""

    layer_norms_every: int = 10
    """Steps from one look at the gradient, update and weight norms of every layer to the next. 0:
    none."""
    sample_every: int = 0
    """Steps from one sample of text to the next, kept in samples.jsonl. 0: one at the end only."""
    sample_prompt: str = "def "
    """Text that samples resume from."""
    sample_tokens: int = 200
    """Length of a sample, in tokens. 0: none."""
    track: tuple[trackers.Name, ...] = ()
    """Where else the log goes; the package of that name must be installed."""

    @property
    def records_norms(self) -> bool:
        """Whether the optimizer must record norms."""
        return self.layer_norms_every > 0

    def takes_norms(self, step: int) -> bool:
        """Whether it is the turn of a step's norms."""
        return self.records_norms and (step == 1 or step % self.layer_norms_every == 0)


class Observer:
    """Keeps layers.jsonl, samples.jsonl and events.jsonl, warns, and feeds the trackers.

    Nothing here waits for the device but `log`, which is called where the losses are read. To be
    used as a context manager, whose end closes the trackers.

    Args:
        run: the run folder.
        config: what to look at.
        model: what is trained.
        tokenizer: for the samples.
        step: where the run continues; what the files hold of later steps is cut off.
        settings: of the run, shown by trackers.
        report: is told, in a sentence, what the user should know.
        times: how often the run has gone back.
    """

    def __init__(
        self, run: Path, config: ObserveConfig, model: Transformer, tokenizer: Tokenizer,
        step: int, settings: dict, report: Callable[[str], None], times: int = 0,
    ):  # fmt: skip
        self._run, self._config, self._report = run, config, report
        self._model, self._tokenizer = model, tokenizer
        self._layers, self._samples, self._events = (
            RunLog(run / f"{name}.jsonl", step, report, times)
            for name in ("layers", "samples", "events")
        )
        self._lock = Lock()
        self._norms = LayerNorms(model)
        self._watch = LayerWatch(model, self._layers.entries)
        self._trackers = trackers.Trackers(config.track, run, settings, step, report)
        if step:
            self._keep_event(step, "resume", f"Resumed from step {step:,}.")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self._trackers.close()

    def prepare(self, step: int, optimizer: Optimizer) -> None:
        """Have the optimizer record the norms of a step where they will be taken.

        On a GPU it records those of all: they cost nothing there, and a CUDA graph repeats itself.
        """
        if not optimizer.param_groups[0]["params"][0].is_cuda:
            optimizer.records_norms = self._config.takes_norms(step)

    def take(self, step: int, optimizer: Optimizer) -> None:
        """Keep the norms of the step just taken, if it is their turn, on the device."""
        if self._config.takes_norms(step):
            self._norms.take(step, optimizer)

    def log(self, entries: list[dict]) -> None:
        """Read what was taken, warn of layers in trouble, and hand all on to the trackers."""
        for entry in entries:
            self._trackers.log(entry)
            for kind in ("skipped", "recovery"):
                if kind in entry:
                    self._keep_event(entry["step"], kind, _spoken(entry[kind]))
        readings = self._norms.read()
        for reading in readings:
            self._trackers.log(reading)
            for warning in self._watch.judge(reading):
                self.warn(reading["step"], warning)
        if readings:
            self._layers.append(readings)

    def stopped(self, step: int, signal: str) -> None:
        """Keep that a signal stopped the run after a step."""
        self._keep_event(step, "stop", f"Stopped by {signal} after step {step:,}.")

    def rewind(self, step: int, times: int) -> None:
        """Give up what was kept of later steps, as the run goes back there for the n-th time."""
        self._layers.rewind(step, times)
        self._samples.rewind(step, times)
        self._watch = LayerWatch(self._model, self._layers.entries)

    def warn(self, step: int, warning: str) -> None:
        """Tell the user, and keep it."""
        self._report(f"Warning: {warning}")
        self._keep_event(step, "warning", warning)

    def save_failed(self, step: int, text: str) -> None:
        """Keep that a step could not be saved; from any thread."""
        self._keep_event(step, "save failed", text)

    def samples(self, step: int) -> bool:
        """Whether it is the turn of a sample."""
        return self._config.sample_every > 0 and step % self._config.sample_every == 0

    def sample(self, step: int) -> str:
        """Let the model write, and keep it; "" if samples are not wanted.

        The random numbers of training are not used.
        """
        prompt, length = self._config.sample_prompt, self._config.sample_tokens
        if not length:
            return ""
        text = write_on(self._model, self._tokenizer, prompt, length, SEED)
        entry = {"step": step, "prompt": prompt, "text": text}
        if entry not in self._samples.entries[-1:]:  # of a run that had come to its end
            self._samples.append([entry])
        return text

    def draw(self, title: str) -> None:
        """Draw layers.png, if there is anything to draw."""
        if self._layers.entries:
            picture = self._run / "layers.png"
            draw(self._report, plot_layers, self._layers.entries, picture, title)

    def _keep_event(self, step: int, kind: str, text: str) -> None:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        with self._lock:  # a checkpoint that could not be written is reported by its own thread
            self._events.append([{"step": step, "kind": kind, "time": now, "text": text}])


def _spoken(what: str | dict) -> str:
    if isinstance(what, str):
        return f"{what[:1].upper()}{what[1:]}."
    parts = (
        name if value is True else f"{name.replace('_', ' ')} {value}"
        for name, value in what.items()
    )
    return _spoken(", ".join(parts))
