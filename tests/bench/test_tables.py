"""Prove that a report survives its file, and that its table and plot say what was measured."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from doubling import ROWS, doubling, raising, report_of
from rich.console import Console

from tritium.bench import tables


def test_a_report_survives_its_file(tmp_path):
    written = replace(report_of(doubling(), ROWS), axis="N")
    tables.save(written, tmp_path / "results" / "x.json")
    assert tables.load(tmp_path / "results" / "x.json") == written
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["x.json"]


def test_an_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    tables.write(path, b"old")
    monkeypatch.setattr(Path, "replace", raising(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        tables.write(path, b"new")
    assert path.read_bytes() == b"old"


def test_the_file_says_how_it_was_made(tmp_path):
    tables.save(report_of(doubling(), ROWS), tmp_path / "x.json")
    content = json.loads((tmp_path / "x.json").read_text())
    assert content["measured_on"] == "CPU"
    assert content["command"] == "python -m tritium.bench softmax"
    assert {"torch", "triton", "python"} <= content["versions"].keys()
    assert content["rates"]["copy"] == 1e9
    assert content["date"].startswith("20")


def test_the_table_has_units_and_says_cpu(capsys):
    done = report_of(doubling(), ROWS)
    Console(width=170).print(tables.table(done))
    text = capsys.readouterr().out
    for words in (
        "softmax, float32, a machine (measured on a CPU, not a GPU)",
        "1.50 ms (1.25 ms to 2.00 ms)", "2.00 GB/s", "1.33 TFLOP/s", "out of memory",
        "1.05 MB", "1.0e-03", "a (M=2 N=64)",
    ):  # fmt: skip
        assert words in text, text
    for words in ("launches", "host", "state", "% of copy"):
        assert words not in text, text
    gpu = replace(done, measured_on="GPU", device="NVIDIA H200")
    assert "CPU" not in gpu.title
    assert gpu.path("json") == tables.results() / "softmax-nvidia-h200.json"


@pytest.mark.parametrize("rows", [ROWS, ROWS[1:2], ()])
def test_draws_a_plot(rows, tmp_path):
    path = tmp_path / "x.png"
    tables.plot(replace(report_of(doubling(), rows), axis="N"), path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size < 300_000
