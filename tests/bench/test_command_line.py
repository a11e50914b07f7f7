"""Prove that the bench's commands measure, save and refuse as documented."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from doubling import RATES

from tritium.bench import chunk_error, harness, tables
from tritium.bench.__main__ import main

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("references")


def test_the_command_line_measures_and_says_cpu():
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench", "softmax", "--quick"]
    environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Measured on a CPU, not a GPU" in done.stdout
    assert "Tritium is the PyTorch reference here, not the kernel." in done.stdout
    assert "--compile" in done.stdout


def run_main(monkeypatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", *words])
    main()


def test_saves_and_plots_what_was_asked_for(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(tables, "results", lambda: tmp_path)
    monkeypatch.setattr(harness, "measured_device", lambda device, seconds: RATES)
    words = ("relu_squared", "--sizes", "32", "64", "--dtype", "fp32", "--save", "--plot")
    run_main(monkeypatch, *words)
    saved = tables.load(tmp_path / "relu_squared-a-machine.json")
    assert [row.dims["F"] for row in saved.rows] == [32] * 6 + [64] * 6
    assert saved.command == "python -m tritium.bench " + " ".join(words)
    assert (tmp_path / "relu_squared-a-machine.png").exists()
    assert "Measured on a" in capsys.readouterr().out


def test_refuses_an_unknown_operation_among_known_ones(monkeypatch, capsys):
    with pytest.raises(SystemExit, match="2"):
        run_main(monkeypatch, "softmax", "nonsense")
    said = capsys.readouterr().err
    assert said.startswith("bench: no operation ['nonsense']; there are softmax,")


def test_explains(monkeypatch, capsys):
    shape = "T=8192,V=128_256"
    run_main(monkeypatch, "explain", "cross_entropy", "--shape", shape, "--device", "H200")
    assert "977 us  bound by memory" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("op", "shape", "words"),
    [
        ("softmax", "M=1", "softmax needs M, N"),
        ("softmax", "M=1,N=x", "--shape must be like T=32768,V=50304"),
        ("softmax", "dtype=1,M=1", "--shape must be like"),
        ("nonsense", "M=1", "op must be one of"),
    ],
)
def test_refuses_what_it_cannot_explain(op, shape, words, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="2"):
        run_main(monkeypatch, "explain", op, "--shape", shape, "--device", "H200")
    assert words in capsys.readouterr().err


def test_the_error_does_not_grow_with_the_number_of_chunks(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(tables, "results", lambda: tmp_path)
    found = dict(chunk_error.measure(512, 32, 128))
    actual = found["tritium.kernels.linear_cross_entropy"]
    assert max(actual) < 1.1 * min(actual) < 4e-3
    if hasattr(torch.nn.functional, "linear_cross_entropy"):
        assert found['torch, acc_policy="compact"'][-1] > 3 * actual[-1]
    run_main(monkeypatch, "chunk_error", "--T", "512", "--D", "32", "--V", "128", "--write")
    text = (tmp_path / "chunk_error.md").read_text()
    assert "python -m tritium.bench chunk_error --T 512 --D 32 --V 128 --write" in text
    assert f"{100 * actual[0]:.3f}" in text
