"""Prove that train.py does what the README promises: it runs, learns, and uses every kernel."""

import gc
import json
import subprocess
from pathlib import Path

import numpy
import pytest
import torch
import triton
from train_runs import log, losses

import train
from tritium.data import Tokenizer

ROOT = Path(__file__).parents[2]
SHORT = ("--max-steps", "12", "--save-every", "3", "--sample-tokens", "5")
KERNELS = (
    "_optimizer_prepare_kernel", "_optimizer_update_kernel", "_cross_entropy_kernel",
    "_grad_norm_partials_kernel", "_norm_forward_tile_kernel", "_norm_backward_tile_kernel",
    "_norm_partials_kernel", "_qk_norm_rope_forward_kernel",
    "_qk_norm_rope_backward_kernel", "_softmax_forward_tile_kernel",
    "_activation_forward_kernel", "_activation_backward_kernel",
)  # fmt: skip


def finish(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("whole") / "run"


def test_a_run_leaves_everything_it_promises(start, whole_run):
    out = finish(start(*SHORT, "--out", str(whole_run)))
    assert "bits per byte" in out
    assert str(whole_run) in out
    assert (whole_run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (
        json.loads((whole_run / "config.json").read_text())["config"]["length"]["max_steps"] == 12
    )
    assert Tokenizer.load(whole_run).vocab_size == 512
    assert [entry["step"] for entry in log(whole_run)] == list(range(1, 13))
    assert {"loss", "lr", "grad_norm", "tokens_per_s"} <= log(whole_run)[0].keys()
    assert {"val_loss", "val_bits_per_byte"} <= log(whole_run)[-1].keys()
    kept = sorted(path.name for path in (whole_run / "checkpoints").iterdir())
    assert kept == ["step-00000010", "step-00000012"]


def test_learns(whole_run):
    assert losses(whole_run)[-1] < losses(whole_run)[0] - 0.1


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts launches of the interpreter")
@pytest.mark.skipif(
    triton.__version__ < "3.7" and numpy.lib.NumpyVersion(numpy.__version__) >= "2.4.0",
    reason="the interpreter of Triton 3.6 fails at range(tensor) with NumPy 2.4; 3.7 mended it",
)
def test_every_kernel_serves_training(start, run, tmp_path):
    small = ("--max-steps", "3", "--batch-size", "2", "--model.max-seq-len", "32",
             "--eval-tokens", "64", "--sample-tokens", "2")  # fmt: skip
    interpreted = start(*small, "--out", str(tmp_path / "kernels"), interpret=True)
    out = finish(interpreted)
    run(tmp_path / "reference", *small)
    assert losses(tmp_path / "kernels") == pytest.approx(losses(tmp_path / "reference"), abs=1e-4)
    for kernel in KERNELS:
        assert kernel in out, f"{kernel} was not launched"


IMPORTED = """
import sys, train
print("imported:", *{"torch._dynamo", "matplotlib.pyplot"} & {*sys.modules})
train.main()
print("imported:", *{"torch._dynamo", "torch._inductor", "sympy"} & {*sys.modules})
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="a run on a GPU may need the compiler")
def test_no_run_on_a_cpu_waits_for_the_compiler_nor_help_for_plots(start, tmp_path):
    flags = ("--optimizer", "muon", "--max-steps", "2", "--out", str(tmp_path / "run"))
    said = finish(start(*flags, script=IMPORTED))
    assert [x for x in said.splitlines() if x.startswith("imported:")] == ["imported:"] * 2, said


def test_no_garbage_is_collected_within_a_step(run, tmp_path, monkeypatch):
    within, collected, before = [], [], gc.get_threshold()
    accumulate, read = train.accumulate_gradients, train.read_losses

    def begin(*arguments):
        within.append(True)
        return accumulate(*arguments)

    def end(unread):
        within.clear()
        return read(unread)

    def collection(phase, _):
        collected.append(bool(within))

    monkeypatch.setattr(train, "accumulate_gradients", begin)
    monkeypatch.setattr(train, "read_losses", end)
    gc.callbacks.append(collection)
    gc.set_threshold(1, 1, 1)
    try:
        assert run(tmp_path / "run", *SHORT, "--log-every", "4") == 0
    finally:
        gc.set_threshold(*before)
        gc.callbacks.remove(collection)
    assert collected.count(False) > 6
    assert not any(collected)
