"""Prove that every example runs, writes its picture, and that what it learns beats its baseline."""

import ast
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
EXAMPLES = {
    # name: flags that cut it to seconds; figures of the learned and of the baseline, lower first
    "sigmoid_neuron": (["--steps", "60"], r"([\d.]+) after", r"([\d.]+) of the best constant"),
    "classifier_2d": (["--steps", "40"], r"same class .*: ([\d.]+)%", r"not seen: ([\d.]+)%"),
    "computation_graph": ([], None, None),
    "regression": (["--steps", "12"], r"other sums: ([\d.]+)", r"baseline\): ([\d.]+)"),
    "text_embedding": (
        ["--steps", "20", "--files", "60"],
        r"not trained .*one of ten: +([\d.]+)%", r"trained, 20 .*one of ten: +([\d.]+)%",
    ),
    "fine_tuning": (
        ["--steps", "5"], r"fine-tuned: +([\d.]+) bits", r"anew \(baseline\): +([\d.]+) bits",
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def references(monkeypatch):
    monkeypatch.setattr("tritium.kernels.runtime.CPU_KERNELS", False)


@pytest.fixture
def example(monkeypatch, tmp_path, capsys):
    """Run an example as `python -m examples.NAME` does, and return what it printed."""

    def run(name, *flags):
        state = torch.get_rng_state()
        out = tmp_path / "folder" / "picture.png"
        monkeypatch.setattr(sys, "argv", [name, *flags, "--out", str(out)])
        try:
            runpy.run_module(f"examples.{name}", run_name="__main__")
        finally:
            torch.set_rng_state(state)
        assert out.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert out.stat().st_size > 10_000
        return capsys.readouterr().out

    return run


def figures(pattern, printed):
    found = re.search(pattern, printed)
    assert found, f"no {pattern} in\n{printed}"
    return float(found[1])


@pytest.mark.parametrize("name", EXAMPLES)
def test_runs_and_beats_its_baseline(name, example):
    flags, lower, higher = EXAMPLES[name]
    printed = example(name, *flags)
    assert len(printed.splitlines()) < 12
    if lower is not None:
        assert figures(lower, printed) < figures(higher, printed)


def test_gradients_by_hand_are_those_of_autograd(example):
    printed = example("sigmoid_neuron", "--steps", "20")
    assert figures(r"differ by ([\d.e+-]+)", printed) < 1e-6
    for x, y in (("0.7", "-1.2"), ("-3", "0"), ("0", "2.5")):
        printed = example("computation_graph", f"--x={x}", f"--y={y}")
        differences = re.findall(r"difference ([\d.e+-]+)", printed)
        assert len(differences) == 2
        assert all(float(found) < 1e-12 for found in differences)
    assert printed.count(" → × → + → ×") == 2


@pytest.mark.parametrize("activation", ["tanh", "sigmoid"])
def test_the_classifier_takes_every_activation(activation, example):
    flags = "--activation", activation, "--no-batch-norm", "--dropout", "0.2", "--width", "8"
    assert "training loss" in example("classifier_2d", "--steps", "3", *flags)


def test_all_are_here_and_shown():
    files = {file.stem for file in (ROOT / "examples").glob("[!_]*.py")}
    assert files == EXAMPLES.keys()
    page = (ROOT / "examples/README.md").read_text()
    for name in files:
        assert f"`python -m examples.{name}`" in page
        assert f"]({name}.py)" in page
        assert ast.get_docstring(ast.parse((ROOT / f"examples/{name}.py").read_text()))
    pictures = {file.name for file in (ROOT / "examples").glob("*.png")}
    assert pictures == set(re.findall(r"\]\((\w+\.png)\)", page))
    for name in pictures:
        assert (ROOT / "examples" / name).stat().st_size < 100_000
