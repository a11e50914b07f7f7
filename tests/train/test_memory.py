"""Prove that a run adapts to its memory without help, and that no result depends on how."""

import itertools
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from train_runs import RANDOM, CrashError, crash, losses

from tritium.bench.runs import resume
from tritium.model import Transformer
from tritium.training.run import checkpoint


def state(run, *, without=()):
    return resume.final_state(run, set(without))


def record(run):
    return checkpoint.read_record(checkpoint.checkpoints(run / "checkpoints")[-1])["state"]


@contextmanager
def limited_memory(monkeypatch, fits, *, from_pass=5):
    """Let passes of which `fits(model, size)` says no fail at their end, from that one on."""
    forward, passes = Transformer.forward, itertools.count(1)

    def failing(model, tokens, targets=None):
        loss = forward(model, tokens, targets)
        real = type(tokens) is torch.Tensor and torch.is_grad_enabled()
        if real and next(passes) >= from_pass and not fits(model, len(tokens)):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return loss

    with monkeypatch.context() as patch:
        patch.setattr(Transformer, "forward", failing)
        yield


def test_a_run_that_computes_again_instead_ends_in_the_same_bytes(run, tmp_path, monkeypatch):
    assert run(tmp_path / "whole", *RANDOM) == 0
    with limited_memory(monkeypatch, lambda model, _: model.activation_checkpointing == "full"):
        assert run(tmp_path / "short", *RANDOM) == 0
    out = run.output()
    assert "CUDA out of memory with --activation-checkpointing none --micro-batch-size 4: " in out
    assert record(tmp_path / "short")["plan"]["now"]["activation_checkpointing"] == "full"
    assert state(tmp_path / "short", without={"plan"}) == state(
        tmp_path / "whole", without={"plan"}
    )


def test_a_run_that_takes_smaller_passes_learns_the_same(run, tmp_path, monkeypatch):
    short, whole = tmp_path / "short", tmp_path / "whole"
    steps = ("--max-steps", "12", "--eval-every", "5", "--save-every", "3")
    assert run(whole, *steps, "--micro-batch-size", "2") == 0
    # The second pass of a step fails, when the first has left gradients.
    with limited_memory(monkeypatch, lambda _, size: size == 1, from_pass=6):
        assert run(short, *steps, "--micro-batch-size", "2") == 0
    assert record(short)["plan"]["now"]["micro_batch_size"] == 1
    assert losses(short) == pytest.approx(losses(whole), abs=2e-5)
    actual, expected = (
        load_file(checkpoint.checkpoints(x / "checkpoints")[-1] / checkpoint.FILES[0])
        for x in (short, whole)
    )
    for name, x in actual.items():
        np.testing.assert_allclose(x, expected[name], atol=2e-4)


def test_a_resumed_run_keeps_the_plan_that_it_fell_back_to(run, tmp_path, monkeypatch):
    with limited_memory(monkeypatch, lambda _, size: size <= 2):
        assert run(tmp_path / "whole", *RANDOM) == 0
    run.at_step(14, crash)  # counting those that failed
    with pytest.raises(CrashError), limited_memory(monkeypatch, lambda _, size: size <= 2):
        run(tmp_path / "crashed", *RANDOM)
    before = losses(tmp_path / "crashed")
    assert before == losses(tmp_path / "whole")[: len(before)]
    assert 6 <= len(before) < 12
    assert run(tmp_path / "crashed", *RANDOM, "--resume") == 0
    assert state(tmp_path / "crashed") == state(tmp_path / "whole")


def test_auto_is_the_same_as_asking_for_what_it_chooses(run, tmp_path):
    asked, auto = tmp_path / "asked", tmp_path / "auto"
    steps = ("--max-steps", "6", "--save-every", "3")
    small = ("--micro-batch-size", "auto", "--activation-checkpointing", "auto")
    assert run(auto, *steps, *small, "--memory-gib", "0.003") == 0
    plan = record(auto)["plan"]
    assert plan["first"] == plan["now"]
    assert plan["now"]["micro_batch_size"] < 4 or plan["now"]["activation_checkpointing"] != "none"
    assert "Best: --activation-checkpointing" in run.output()
    chosen = [str(value) for name, value in plan["now"].items()]
    flags = ("--activation-checkpointing", chosen[0], "--micro-batch-size", chosen[1])
    assert run(asked, *steps, *flags) == 0
    assert state(asked)["files"] == state(auto)["files"]
    # There is memory enough now, but a run keeps its plan.
    assert run(auto, "--max-steps", "6", *small, "--resume", "--memory-gib", "50") == 0
    assert record(auto)["plan"] == plan


def test_another_policy_may_be_chosen_on_resume(run, tmp_path):
    assert run(tmp_path / "whole", *RANDOM) == 0
    run.at_step(8, crash)
    with pytest.raises(CrashError):
        run(tmp_path / "crashed", *RANDOM)
    selective = ("--activation-checkpointing", "selective")
    assert run(tmp_path / "crashed", *RANDOM, "--resume", *selective) == 0
    assert state(tmp_path / "crashed", without={"plan"}) == state(
        tmp_path / "whole", without={"plan"}
    )


def test_a_plan_is_shown_before_anything_is_made(run, home, tmp_path):
    before = sorted(home.rglob("*"))
    flags = ("--plan", "--micro-batch-size", "3", "--memory-gib", "0.001")
    assert run(tmp_path / "run", *flags) == 0
    out = run.output()
    assert "Asked for: --activation-checkpointing none --micro-batch-size 3, 2 per step" in out
    assert "does not fit the 0.00 GiB" in out
    assert not (tmp_path / "run").exists()
    assert sorted(home.rglob("*")) == before


def test_a_plan_counts_the_vocabulary_of_the_tokenizer(run, tmp_path):
    def parameters():
        line = next(x for x in run.output().splitlines() if x.startswith(" parameters"))
        return float(line.split()[1])

    assert run(tmp_path / "run", "--max-steps", "2") == 0
    run.output()
    assert run(tmp_path / "plan", "--plan", "--model.vocab-size", "4096") == 0
    asked = parameters()
    tokenizer = ("--tokenizer", str(tmp_path / "run" / "tokenizer.json"))
    assert run(tmp_path / "plan", "--plan", "--model.vocab-size", "4096", *tokenizer) == 0
    assert asked - parameters() == pytest.approx((4096 - 512) * 64 * 4 / 2**20, abs=0.02)
