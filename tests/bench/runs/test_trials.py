"""Prove that the end of a run is kept whatever a loss of power leaves behind it."""

import json
from math import isnan, nan

import pytest

from tritium.bench.runs import _trials
from tritium.bench.runs._trials import Outcome, Trial, once, run_all

RESTS = [b'{"name": "b", "argum', b'{"key": "b"}', b"\0" * 9, b"\xff\xfe\n", b"12\n", b"\n"]


@pytest.mark.parametrize("rest", RESTS)
def test_a_run_that_ended_is_not_made_again(rest, tmp_path, monkeypatch):
    """One that diverged included, whose loss is NaN."""
    made = []

    def run(trial, folder):
        made.append(trial.name)
        return Outcome(trial.name, trial.arguments, trial.seed, nan if trial.name == "a" else 1.0)

    monkeypatch.setattr(_trials, "_run", run)
    trials, kept = [Trial(name, (name,), 0) for name in "abc"], tmp_path / "trials.jsonl"
    run_all(trials[:1], tmp_path, [])
    kept.write_bytes(kept.read_bytes() + rest)
    before = kept.read_bytes()
    assert [x.name for x in run_all(trials, tmp_path, [], only_ended=True)] == ["a"]
    assert kept.read_bytes() == before  # which only looked
    for _ in range(2):
        found = run_all(trials, tmp_path, [])
        assert [x.name for x in found] == made == ["a", "b", "c"]
        assert isnan(found[0].val_loss)
        assert found[1].val_loss == found[2].val_loss == 1.0
    assert [json.loads(line)["name"] for line in kept.read_bytes().splitlines()] == made


@pytest.mark.parametrize("rest", RESTS)
def test_what_was_kept_is_not_made_again(rest, tmp_path):
    made = []

    def keep(key, value):
        def make():
            made.append(key)
            return Trial(key, (), value)

        return once(tmp_path, key, make, Trial)

    assert isnan(keep("a", nan).seed)
    kept = tmp_path / "ended.jsonl"
    kept.write_bytes(kept.read_bytes() + rest)
    for _ in range(2):
        assert isnan(keep("a", nan).seed)
        assert keep("b", 1).seed == keep("c", 1).seed == 1
    assert made == ["a", "b", "c"]
