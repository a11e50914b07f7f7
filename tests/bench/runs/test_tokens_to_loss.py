"""Prove that tokens to a given loss are those of the runs, and that each optimizer counts by the
best of its swept rates."""

import re
from math import isnan, nan

import pytest

from tritium.bench import tables
from tritium.bench.ends import WrongInputError
from tritium.bench.runs import tokens_to_loss
from tritium.bench.runs._trials import Outcome, TrialError
from tritium.bench.runs.scaling import COMMON, shape
from tritium.bench.runs.tokens_to_loss import Pair, choose, reach, verdict
from tritium.training.command_line import parse


def outcome(loss, tokens=1000, seconds=10.0):
    return Outcome("", (), 0, loss, loss, tokens, seconds)


@pytest.mark.parametrize("fewer", [1.0, 1.3, 2.0, 3.1, 4.0])
def test_powers_of_the_tokens_are_followed_exactly(fewer):
    # Muon's loss over its tokens is AdamW's over `fewer` times as many.
    parts = {s: outcome((fewer * s) ** -0.1, round(8000 * s), 40 * s) for s in (1.0, 0.25, 0.5)}
    found = reach(outcome(1.0, 8000, 30.0), parts)
    assert found.tokens == (8000, pytest.approx(8000 / fewer))
    assert found.seconds == (30.0, pytest.approx(40 / fewer))


def test_a_loss_below_all_runs_is_not_reached_and_one_above_them_is_not_exaggerated():
    parts = {0.25: outcome(1.4, 2000), 0.5: outcome(1.3, 4000), 1.0: outcome(1.2, 8000)}
    assert isnan(reach(outcome(1.1, 8000), parts).tokens[1])
    assert reach(outcome(9.0, 8000), parts).tokens == (8000, 2000)


def test_the_best_rate_is_of_the_mean_and_none_that_diverges():
    swept = {0.1: [outcome(2.0), outcome(2.0)], 0.2: [outcome(1.5), outcome(2.4)],
             0.4: [outcome(1.0), outcome(nan)]}  # fmt: skip
    assert choose(swept) == 0.2
    with pytest.raises(TrialError, match="at every learning rate; give lower --rates"):
        choose({0.4: swept[0.4]})


def test_the_verdict_has_the_mean_ratio_and_what_limits_it():
    pairs = [Pair(1.0, (8.0, 4.0), (8.0, 8.0)), Pair(1.0, (8.0, 1.0), (8.0, 8.0))]
    best = {"AdamW": 0.2, "Muon": 0.4}
    edge, tokens, seconds = verdict(pairs, best, (0.1, 0.2, 0.4))
    assert "Muon was best at 0.4, an end of the sweep" in edge
    assert "AdamW took 4.00 times the tokens of Muon" in tokens
    assert "95 % interval" in tokens
    assert "1.00 times the seconds" in seconds
    assert "interval" not in verdict(pairs[:1], best, (0.1, 0.2, 0.4, 0.8))[0]
    missed = [*pairs, Pair(1.0, (8.0, nan), (8.0, nan))]
    assert verdict(missed, best, (0.1, 0.2, 0.4, 0.8)) == [
        "Muon did not come to AdamW's loss with every seed."
    ]


@pytest.mark.parametrize("name", tokens_to_loss.RULES)
def test_train_py_takes_the_rules(name):
    config, *_ = parse([*COMMON, *tokens_to_loss._rule(name, 4e-3)])
    assert config.schedule.learning_rate == 4e-3
    optimizer = config.optimizer
    own = (optimizer.name, optimizer.muon_learning_rate, optimizer.row_beta2)
    assert own == (("adamw", None, None) if name == "AdamW" else ("muon", 8e-3, 0.95))


def test_the_verb_sweeps_then_shortens_the_best(tmp_path, monkeypatch, capsys):
    made = []

    def run_all(trials, folder, common):
        made.extend(trials)
        found = []
        for x in trials:
            given = dict(zip(x.arguments[::2], x.arguments[1::2], strict=True))  # the last counts
            steps, lr = int(given["--max-steps"]), float(given["--learning-rate"])
            best, fewer = (8e-3, 1.0) if "adamw" in x.arguments else (4e-3, 2.5)
            loss = (steps * fewer) ** -0.1 * (1 if lr == best else 1.1) * (1 + 0.001 * x.seed)
            found.append(Outcome(x.name, x.arguments, x.seed, loss, loss, 512 * steps, steps / 10))
        return found

    monkeypatch.setattr(tokens_to_loss, "run_all", run_all)
    monkeypatch.setattr(tables, "results", lambda: tmp_path)
    tokens_to_loss.main(steps=400, rates=(2e-3, 4e-3, 8e-3, 16e-3), seeds=2, write=True)
    assert len(made) == 2 * 2 * 4 + 2 * 2
    model = shape(48e3)
    assert all(f"--model.d-model {model.d_model}" in " ".join(x.arguments) for x in made)
    said = capsys.readouterr().out
    assert (
        "AdamW took 2.50 times the tokens of Muon to its loss (95 % interval 2.50 to 2.50)" in said
    )
    assert "end of the sweep" not in said
    page = (tmp_path / "tokens_to_loss.md").read_text()
    assert re.search(r"0\.008 .* yes", page)
    assert re.search(r"204,800 +\| 81,920 +\| 2\.50", page)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (
            {"rates": (1e-3, 2e-3)},
            "--rates must be 3 or more numbers, growing from above 0, got 0.001 0.002",
        ),
        ({"rates": (1e-3, 4e-3, 2e-3)}, "--rates must be 3 or more numbers, growing from above 0"),
        ({"rates": (0.0, 4e-3, 8e-3)}, "--rates must be 3 or more numbers, growing from above 0"),
        ({"steps": 39}, "--steps must be at least 40, got 39"),
        ({"seeds": 0}, "--seeds must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_asked_is_refused(asked, words, tmp_path, monkeypatch):
    monkeypatch.setattr(tokens_to_loss, "run_all", lambda *_: pytest.fail("it was run"))
    with pytest.raises(WrongInputError, match=re.escape(words)):
        tokens_to_loss.main(**asked, out=tmp_path)
