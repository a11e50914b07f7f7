"""Prove that every way to compute a step resumes exactly, is refused in time, and checks itself."""

import json
import re
from importlib import import_module

import pytest
import torch
from paths import path
from train_runs import RANDOM, CrashError, crash, log, losses, weights

from tritium.bench.runs import resume
from tritium.kernels import runtime
from tritium.model import Transformer

SHORT = (*RANDOM, "--max-steps", "10", "--threads", "1")
TRUE = ("--precision", "bfloat16-true")
PRECISIONS = [
    ("--precision", "bfloat16"),
    TRUE,
    (*TRUE, "--master-weights", "split", "--state-dtype", "bfloat16"),
    (*TRUE, "--master-weights", "stochastic", "--state-dtype", "uint8"),
    ("--state-dtype", "uint8"),
]


@pytest.mark.parametrize("flags", PRECISIONS, ids=" ".join)
def test_a_crashed_run_ends_in_the_same_state_in_every_precision(flags, run, tmp_path):
    whole, crashed = tmp_path / "whole", tmp_path / "crashed"
    assert run(whole, *SHORT, *flags) == 0
    run.at_step(8, crash)
    with pytest.raises(CrashError):
        run(crashed, *SHORT, *flags)
    assert run(crashed, *SHORT, *flags, "--resume") == 0
    assert resume.final_state(crashed, set()) == resume.final_state(whole, set())
    assert losses(whole)[-1] < losses(whole)[0]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_run_leaves_the_precision_of_the_process_as_it_was(precision, run, tmp_path):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")  # which no run sets
    try:
        assert run(tmp_path / "run", "--max-steps", "1", "--precision", precision) == 0
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_run_in_bfloat16_is_sampled_from(run, tmp_path):
    assert run(tmp_path / "run", "--max-steps", "2", *TRUE) == 0
    model = Transformer.load(tmp_path / "run")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.cos_LK.dtype == torch.float32
    assert model.generate(torch.tensor([[1]]), 3).shape == (1, 4)


def test_another_precision_is_another_run(run, tmp_path):
    folder = tmp_path / "run"
    assert run(folder, "--max-steps", "2", *TRUE) == 0
    before = weights(folder)
    assert run(folder, "--max-steps", "2", "--resume", "--precision", "float32") == 2
    assert "machine.weights: torch.bfloat16, now absent" in run.output()
    other = ("--resume", "--resume-anyway", "--precision", "float32")
    assert run(folder, "--max-steps", "4", *other) == 2
    out = run.output()
    assert "is of another precision: weights in bfloat16, now in float32" in out
    assert "damaged" not in out
    assert "delete" not in out
    assert weights(folder) == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--master-weights", "split"), "add --precision bfloat16-true"),
        (("--master-weights", "float32", "--precision", "bfloat16"), "add --precision bfloat16-tr"),
        (("--optimizer", "sgd", "--state-dtype", "int8"), "--state-dtype"),
    ],
)  # fmt: skip
def test_refuses_what_cannot_be_computed(flags, message, run, tmp_path):
    assert run(tmp_path / "run", *flags) == 2
    assert message in " ".join(run.output().split())
    assert not (tmp_path / "run").exists()


def test_says_what_runs_where(run, tmp_path):
    assert run(tmp_path / "run", "--max-steps", "2", "--device", "cpu") == 0
    out = run.output()
    assert out.count("runs on its PyTorch reference") == 1
    entry = log(tmp_path / "run")[-1]
    assert {"tokens_per_s", "tokens_per_s_overall", "mfu_measured", "memory_gib"} <= entry.keys()
    assert "of measured" in out


@pytest.mark.skipif(torch.cuda.is_available(), reason="plants faults in what is interpreted")
def test_a_run_goes_on_without_the_kernels_that_are_wrong(run, tmp_path, monkeypatch):
    small = ("--max-steps", "2", "--batch-size", "2", "--model.max-seq-len", "16",
             "--model.d-model", "16", "--model.d-ff", "16", "--eval-tokens", "32")  # fmt: skip
    assert run(tmp_path / "reference", *small) == 0
    monkeypatch.setattr(runtime, "_fallen", frozenset())

    def does_not_launch(*_):
        raise RuntimeError("PTX was compiled with an unsupported toolchain")

    with path(False):
        activate = import_module("tritium.kernels.swiglu").activate_packed
        monkeypatch.setattr(
            import_module("tritium.kernels.swiglu"),
            "activate_packed",
            lambda *args: 2 * activate(*args),
        )
        monkeypatch.setattr(
            import_module("tritium.kernels.qk_norm_rope"), "_forward", does_not_launch
        )
        assert run(tmp_path / "run", *small) == 0
    out = run.output()
    assert re.search("swiglu falls back to its reference: its (output|gradient) . errs by", out)
    assert "rope falls back to its reference: it does not run (RuntimeError: PTX was" in out
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "reference"), abs=1e-4)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["fingerprint"]["machine"]["references"] == "qk_norm_rope, swiglu"
