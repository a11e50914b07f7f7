"""Run monitor: layer norms, text samples and events, as .jsonl files and tracker metrics."""

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
from tritium.training.monitor.layer_stats import LayerStats, LayerWatch
from tritium.training.monitor.plot import draw, plot_layers
from tritium.training.optim import Optimizer
from tritium.training.run.run_folder import RunLog

BETWEEN = "\n---\n"
OTHER_TEXT = "other validation text"
"""Kind of the event up to whose step validations are of other text than those behind it."""
SEED = 1  # of all samples, so that they differ by the model alone


@dataclass(frozen=True)
class ObserveConfig:
    """Monitoring. Does not affect the result."""

    layer_stats_every: int = 10
    """Steps between records of every layer's gradient, update and weight norms. 0: none."""
    sample_every: int = 0
    """Steps between text samples, kept in samples.jsonl. 0: one at the end only."""
    sample_prompt: tuple[str, ...] = ()
    """Prompts that samples continue. None given: the first words of three documents that are not
    trained on."""
    sample_tokens: int = 100
    """Length of each continuation, in tokens. 0: no samples."""
    track: tuple[trackers.Name, ...] = ()
    """Trackers that receive the log; the package of that name must be installed."""

    @property
    def records_norms(self) -> bool:
        """Whether the optimizer must record norms."""
        return self.layer_stats_every > 0

    def takes_norms(self, step: int) -> bool:
        """Whether the norms of a step are recorded."""
        return self.records_norms and (step == 1 or step % self.layer_stats_every == 0)


class Observer:
    """Keeps layers.jsonl, samples.jsonl and events.jsonl, warns, and feeds the trackers.

    Only `log`, which is called when the losses are read, waits for the device. A context manager
    that closes the trackers.

    Args:
        run: the run folder.
        config: its settings.
        model: the model that is trained.
        tokenizer: tokenizer of the samples.
        prompts: what samples continue.
        step: the step that the run resumes from; entries of later steps are deleted.
        settings: settings of the run, shown by trackers.
        log: called with a one-line message for each warning and event.
        n_rollbacks: rollbacks so far.
    """

    def __init__(
        self, run: Path, config: ObserveConfig, model: Transformer, tokenizer: Tokenizer,
        prompts: tuple[str, ...], step: int, settings: dict, log: Callable[[str], None],
        n_rollbacks: int = 0,
    ):  # fmt: skip
        self._run, self._config, self._log = run, config, log
        self._model, self._tokenizer, self._prompts = model, tokenizer, prompts
        self._layers, self._samples, self._events = (
            RunLog(run / f"{name}.jsonl", step, log, n_rollbacks)
            for name in ("layers", "samples", "events")
        )
        self._lock = Lock()
        self._norms = LayerStats(model)
        self._watch = LayerWatch(model, self._layers.entries)
        self._trackers = trackers.Trackers(config.track, run, settings, step, log)
        if step:
            self._keep_event(step, "resume", f"Resumed from step {step:,}.")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self._trackers.close()

    def enable_norms(self, step: int, optimizer: Optimizer) -> None:
        """Have the optimizer record the norms of a step if they are wanted.

        On a GPU it records every step: there it costs nothing, and a CUDA graph cannot change.
        """
        if not optimizer.param_groups[0]["params"][0].is_cuda:
            optimizer.records_norms = self._config.takes_norms(step)

    def record_norms(self, step: int, optimizer: Optimizer) -> None:
        """Keep the norms of the step just taken, if they are wanted, on the device."""
        if self._config.takes_norms(step):
            self._norms.record(step, optimizer)

    def log(self, entries: list[dict]) -> None:
        """Read the norms, warn of vanishing or exploding layers, and feed the trackers."""
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
        """Record that a signal stopped the run after a step."""
        self._keep_event(step, "stop", f"Stopped by {signal} after step {step:,}.")

    def rewind(self, step: int, n_rollbacks: int) -> None:
        """Discard the entries of later steps, after the n-th rollback."""
        self._layers.rewind(step, n_rollbacks)
        self._samples.rewind(step, n_rollbacks)
        self._watch = LayerWatch(self._model, self._layers.entries)

    def warn(self, step: int, warning: str) -> None:
        """Log a warning, and record it."""
        self._log(f"Warning: {warning}")
        self._keep_event(step, "warning", warning)

    def forgot_best(self, step: int, text: str) -> None:
        """Log and record that validations up to a step are of other text than those to come."""
        self._log(text)
        self._keep_event(step, OTHER_TEXT, text)

    def save_failed(self, step: int, text: str) -> None:
        """Record that a step could not be saved; from any thread."""
        self._keep_event(step, "save failed", text)

    def samples(self, step: int) -> bool:
        """Whether a step ends with a sample."""
        return self._config.sample_every > 0 and step % self._config.sample_every == 0

    def sample(self, step: int) -> str:
        """Continue each prompt, and record the texts; "" if samples are not wanted.

        The random numbers of training are not used.
        """
        length = self._config.sample_tokens
        if not length:
            return ""
        texts = (
            write_on(self._model, self._tokenizer, prompt, length, SEED) for prompt in self._prompts
        )
        text = BETWEEN.join(x.rstrip("\n") for x in texts)
        entry = {"step": step, "prompts": [*self._prompts], "text": text}
        if entry not in self._samples.entries[-1:]:  # of a run that had come to its end
            self._samples.append([entry])
        return text

    def draw(self, title: str) -> None:
        """Draw layers.png, if any norms were recorded."""
        if self._layers.entries:
            picture = self._run / "layers.png"
            draw(self._log, plot_layers, self._layers.entries, picture, title)

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
