"""Runs of train.py in the process of the test, and what they leave."""

import itertools
import json
import sys
from pathlib import Path

import torch

import train
from tritium.training.run import checkpoint

RANDOM = ("--max-steps", "12", "--save-every", "3", "--dropout", "0.2", "--eval-every", "5",
          "--keep-best")  # fmt: skip


class CrashError(Exception):
    """The process ends here."""


def crash():
    raise CrashError


def log(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    return [entry["loss"] for entry in log(run)]


def weights(run: Path) -> bytes:
    return (
        checkpoint.checkpoints(run / "checkpoints")[-1].joinpath(checkpoint.FILES[0]).read_bytes()
    )


class Run:
    """Runs of train.py in this process, on the references where there is no GPU, as a user's."""

    def __init__(self, monkeypatch, home: Path, corpus: Path, capsys):
        monkeypatch.setattr("tritium.kernels.runtime.CPU_KERNELS", False)
        monkeypatch.setenv("TRITIUM_HOME", str(home))
        monkeypatch.setattr(
            "tritium.training.monitor.plot.plot_losses", lambda *_: None
        )  # half of a run's time
        self.monkeypatch, self.corpus, self.capsys = monkeypatch, corpus, capsys

    def __call__(self, run: Path, *arguments: str) -> int:
        """Return the exit status."""
        threads, state = torch.get_num_threads(), torch.get_rng_state()
        fixed = ["tiny", "--data", str(self.corpus), "--out", str(run), "--sample-tokens", "0"]
        self.monkeypatch.setattr(sys, "argv", ["train.py", *fixed, *arguments])
        try:
            train.main()
        except SystemExit as stop:
            return int(stop.code or 0)
        finally:
            torch.set_num_threads(threads)
            torch.set_rng_state(state)
        return 0

    def at_step(self, step: int, happen) -> None:
        """Let something happen in the middle of that step, once."""
        steps, accumulate = itertools.count(1), train.accumulate_gradients

        def accumulate_gradients(*arguments):
            if next(steps) == step:
                self.monkeypatch.setattr(train, "accumulate_gradients", accumulate)
                happen()
            return accumulate(*arguments)

        self.monkeypatch.setattr(train, "accumulate_gradients", accumulate_gradients)

    def output(self) -> str:
        return "".join(self.capsys.readouterr())
