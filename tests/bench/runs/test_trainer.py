"""Prove that the trainer's bench runs what a CPU can, says what it cannot, and keeps it."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import torch

from tritium.bench.ends import FailedError, WrongInputError
from tritium.bench.runs import trainer
from tritium.bench.runs.trainer import Run, Trial

TEXT = str(Path(json.__file__).parent)


@pytest.fixture(autouse=True)
def results(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("TRITIUM_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(trainer.tables, "results", lambda: tmp_path)
    return tmp_path / "trainer.md"


@pytest.mark.skipif(torch.cuda.is_available(), reason="takes minutes there: run the bench itself")
def test_does_what_a_cpu_can(results, monkeypatch, capsys):
    curves = dict(list(trainer.CURVES.items())[::3])
    monkeypatch.setattr(trainer, "CURVES", curves)
    trainer.main(parts=("graph", "curves"), steps=4, data=TEXT, save=True)
    assert "graph: there is no GPU to capture a CUDA graph on; left out" in capsys.readouterr().out
    text = results.read_text()
    assert "python -m tritium.bench trainer --parts graph curves --steps 4 --save" in text
    for name in curves:
        assert f"| {name}" in text
    assert results.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_text_that_is_not_there_ends_all_with_the_sentence_of_train_py(tmp_path):
    missing = str(tmp_path / "missing.txt")
    with pytest.raises(WrongInputError, match=re.escape(missing)):
        trainer.main(parts=("curves",), steps=1, data=missing)


def test_a_run_that_fails_stops_no_other_and_is_named_at_the_end(monkeypatch, capsys):
    def end(command, **_):
        status = 70 if "bfloat16" in command else 1
        return subprocess.CompletedProcess(command, status, "", f"it ended with {status}\n")

    monkeypatch.setattr(trainer.subprocess, "run", end)
    monkeypatch.setattr(trainer, "CURVES", dict(list(trainer.CURVES.items())[:2]))
    with pytest.raises(FailedError, match=r"2 of the runs failed: float32, bfloat16 products"):
        trainer.main(parts=("curves",), steps=1)
    shown = capsys.readouterr().out
    assert "failed: it ended with 1 " in shown
    assert "failed: it ended with 70 " in shown


def test_compares_losses_bit_by_bit(monkeypatch):
    def run(self, name, flags, *, deterministic):
        assert deterministic
        losses = [1.0, 2.0, 3.0 + (name == "CUDA graph") * 2**-50]
        return Run(name, tuple({"loss": loss} for loss in losses), "graph"[: len(name)])

    monkeypatch.setattr(Trial, "run", run)
    monkeypatch.setattr(trainer, "GRAPH_STEPS", 3)
    (table,) = trainer.graph(Trial(Path(), "tiny", None))
    assert list(table.columns[1].cells) == ["3 of 3", "3 of 3", "2 of 3"]
