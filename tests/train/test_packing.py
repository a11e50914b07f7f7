"""Prove that a run reads the data asked for, and says how far through the data it is."""

import pytest
from train_runs import CrashError, crash, log

from tritium.data import LOADERS, prepare
from tritium.model import Transformer

STEPS = ("--max-steps", "6", "--save-every", "2", "--eval-every", "3")


def test_documents_reach_the_model_by_themselves(run, tmp_path, monkeypatch):
    seen, forward = [], Transformer.forward

    def recording(self, *inputs):
        seen.append((self.training, *inputs))
        return forward(self, *inputs)

    monkeypatch.setattr(Transformer, "forward", recording)
    assert run(tmp_path / "run", *STEPS, "--packing", "documents") == 0
    folder = prepare(run.corpus, vocab_size=512)
    loader = LOADERS["documents"](folder, "train", batch_size=4, length=64, seed=1)
    trained = [inputs for training, *inputs in seen if training]
    assert len(trained) == 6
    for inputs in trained:
        for got, expected in zip(inputs, loader.next_batch(), strict=True):
            assert got.equal(expected)
    assert all(len(inputs) == 4 for inputs in seen)  # validation has its positions too


def test_the_position_is_told_in_epochs(run, tmp_path):
    run.at_step(5, crash)
    with pytest.raises(CrashError):
        run(tmp_path / "run", *STEPS, "--batch-size", "64", "--keep-last", "1")
    assert run(tmp_path / "run", *STEPS, "--batch-size", "64", "--resume") == 0
    folder = prepare(run.corpus, vocab_size=512)
    loader = LOADERS["contiguous"](folder, "train", batch_size=64, length=64)
    per_step = 64 / loader.n_windows
    assert [x["epoch"] for x in log(tmp_path / "run")] == [
        pytest.approx(step * per_step, abs=1e-4) for step in range(1, 7)
    ]
    out = run.output()
    assert f"resumed from step 4, epoch {4 * per_step:.2f}" in out
    assert f"6 steps of 4,096 tokens, {6 * per_step:.2f} epochs" in out


def test_a_run_does_not_change_its_packing(run, tmp_path):
    assert run(tmp_path / "run", *STEPS) == 0
    assert run(tmp_path / "run", *STEPS, "--resume", "--packing", "documents") == 2
    assert "config.packing: contiguous, now documents" in run.output()
