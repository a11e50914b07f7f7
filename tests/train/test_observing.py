"""Prove that looking at a run changes nothing of it, and continues as the run does."""

import json

import pytest
from train_runs import RANDOM, CrashError, crash, weights

from tritium.model.transformer import Block

LOOK = ("--layer-stats-every", "2", "--sample-every", "3", "--sample-tokens", "5")


def lines(run, name):
    return [json.loads(line) for line in (run / f"{name}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("optimizer", ["adamw", "lion", "muon", "sgd"])
def test_looking_changes_nothing(run, tmp_path, optimizer):
    chosen = (*RANDOM, "--optimizer", optimizer)
    assert run(tmp_path / "looked", *chosen, *LOOK) == 0
    assert "Warning" not in run.output()
    assert run(tmp_path / "not", *chosen, "--layer-stats-every", "0") == 0
    assert weights(tmp_path / "looked") == weights(tmp_path / "not")
    looked = lines(tmp_path / "looked", "layers")
    assert [entry["step"] for entry in looked] == [1, 2, 4, 6, 8, 10, 12]
    assert [entry["step"] for entry in lines(tmp_path / "looked", "samples")] == [3, 6, 9, 12]
    assert lines(tmp_path / "not", "layers") == lines(tmp_path / "not", "samples") == []
    assert (tmp_path / "looked" / "layers.png").exists()
    assert not (tmp_path / "not" / "layers.png").exists()


def test_a_killed_run_keeps_what_an_uninterrupted_one_keeps(run, tmp_path):
    assert run(tmp_path / "whole", *RANDOM, *LOOK) == 0
    run.at_step(9, crash)
    with pytest.raises(CrashError):
        run(tmp_path / "killed", *RANDOM, *LOOK)
    assert run(tmp_path / "killed", *RANDOM, *LOOK, "--resume") == 0
    assert run(tmp_path / "killed", *RANDOM, *LOOK, "--resume") == 0  # with nothing left to do
    for name in ("layers", "samples"):
        assert lines(tmp_path / "killed", name) == lines(tmp_path / "whole", name)
    assert lines(tmp_path / "whole", "events") == []
    events = [(event["step"], event["kind"]) for event in lines(tmp_path / "killed", "events")]
    assert events == [(6, "resume"), (12, "resume")]


def test_samples_continue_documents_or_what_was_asked_for(run, tmp_path):
    assert run(tmp_path / "run", *RANDOM, "--sample-tokens", "4") == 0
    (entry,) = lines(tmp_path / "run", "samples")
    assert 1 <= len(entry["prompts"]) <= 3
    assert all(prompt in entry["text"] for prompt in entry["prompts"])
    asked = ("--sample-tokens", "4", "--sample-prompt", "def ", "Dear ")
    assert run(tmp_path / "asked", *RANDOM, *asked) == 0
    (entry,) = lines(tmp_path / "asked", "samples")
    assert entry["prompts"] == ["def ", "Dear "]
    first, second = entry["text"].split("\n---\n")
    assert (first[:4], second[:5]) == ("def ", "Dear ")
    assert first in run.output()


def test_a_broken_block_is_reported_and_kept(run, tmp_path, monkeypatch):
    whole = Block.forward

    def forward(self, *arguments):
        x_BLD, residual_BLD = whole(self, *arguments)
        return x_BLD * 1e-6, residual_BLD

    monkeypatch.setattr(Block, "forward", forward)
    assert run(tmp_path / "run", *RANDOM, *LOOK) == 0
    warning = "the gradient vanishes in blocks.0.feed_forward"
    assert f"Warning: Step 4: {warning}" in run.output()
    events = lines(tmp_path / "run", "events")
    assert [event["kind"] for event in events] == ["warning"]
    assert warning in events[0]["text"]


def test_wrong_wishes_are_refused_before_anything_is_made(run, tmp_path, monkeypatch):
    monkeypatch.setattr("tritium.training.monitor.trackers.find_spec", lambda _: None)
    for wish, answer in (
        (("--layer-stats-every", "-1"), "layer_stats_every must be at least 0, got -1"),
        (("--track", "wandb"), "pip install wandb"),
    ):
        assert run(tmp_path / "run", *wish) == 2
        assert answer in run.output()
        assert not (tmp_path / "run").exists()
