"""Prove that a run that ended anywhere continues bit for bit, or is refused with the difference."""

import random

import pytest
from train_runs import RANDOM, CrashError, crash, log, losses, weights

import train
from tritium.bench.runs import resume
from tritium.data import TokenLoader, prepare
from tritium.training.run import checkpoint
from tritium.training.run.fingerprint import code_version


def test_a_killed_run_ends_in_the_same_state(tmp_path):
    # A short `python -m tritium.bench resume`.
    trial = resume.Trial(tmp_path, steps=60)
    outcome = trial.kill_at_random("killed", random.randrange(1 << 30), asynchronous=True)
    assert outcome.identical, outcome
    assert not outcome.unreadable, outcome


@pytest.mark.parametrize(
    "more",
    [
        (), ("--save-async",), ("--optimizer", "lion", "--micro-batch-size", "3"),
        ("--optimizer", "muon", "--row-beta2", "0.9"),
        ("--optimizer", "sgd", "--momentum", "0.9", "--schedule", "cosine"),
        ("--activation-checkpointing", "full", "--schedule", "trapezoid"),
        ("--optimizer", "rmsprop", "--schedule", "inverse-sqrt", "--max-tokens", "3000"),
        ("--packing", "documents", "--micro-batch-size", "3"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_a_crashed_run_ends_in_the_same_state(more, run, tmp_path):
    whole, crashed = tmp_path / "whole", tmp_path / "crashed"
    assert run(whole, *RANDOM, *more) == 0
    run.at_step(random.randint(4, 12), crash)
    with pytest.raises(CrashError):
        run(crashed, *RANDOM, *more)
    assert run(crashed, *RANDOM, *more, "--resume") == 0
    assert resume.final_state(crashed, set()) == resume.final_state(whole, set())


def test_crashes_in_the_second_epoch_change_nothing(run, corpus, tmp_path):
    whole, crashed = tmp_path / "whole", tmp_path / "crashed"
    epochs = ("--max-steps", "12", "--batch-size", "64", "--save-every", "1")
    assert run(whole, *epochs) == 0
    for step in (11, 2):
        run.at_step(step, crash)
        with pytest.raises(CrashError):
            run(crashed, *epochs, "--resume")
    state = checkpoint.read_record(checkpoint.checkpoints(crashed / "checkpoints")[-1])["state"]
    folder = prepare(corpus, vocab_size=512)
    one_epoch = TokenLoader(folder, "train", batch_size=1, length=64).n_tokens // 64
    assert state["loader"]["windows"] > one_epoch
    assert run(crashed, *epochs, "--resume") == 0
    assert resume.final_state(crashed, set()) == resume.final_state(whole, set())


@pytest.mark.parametrize("changed", ["--eval-every", "--log-every", "--save-every"])
def test_other_intervals_change_no_weight(changed, run, tmp_path):
    whole, crashed = tmp_path / "whole", tmp_path / "crashed"
    assert run(whole, *RANDOM) == 0
    run.at_step(8, crash)
    with pytest.raises(CrashError):
        run(crashed, *RANDOM)
    assert run(crashed, *RANDOM, "--resume", changed, "2") == 0
    assert resume.final_state(crashed, {"best"}) == resume.final_state(whole, {"best"})


def test_the_best_so_far_survives_a_resume(run, tmp_path):
    at_end, best = tmp_path / "run", None
    rising = ("--max-steps", "12", "--eval-every", "2", "--save-every", "4", "--keep-best",
              "--schedule", "constant", "--learning-rate", "0.3", "--keep-last", "1")  # fmt: skip
    run.at_step(10, crash)
    with pytest.raises(CrashError):
        run(at_end, *rising)
    assert run(at_end, *rising, "--resume") == 0
    measured = {x["step"]: x["val_loss"] for x in log(at_end) if "val_loss" in x}
    best = min(measured, key=measured.__getitem__)
    kept = checkpoint.checkpoints(at_end / "checkpoints")
    assert [checkpoint.step_of(path) for path in kept] == sorted({best, 12})
    state = checkpoint.read_record(kept[-1])["state"]
    assert state["best"] == {"step": best, "val_loss": measured[best]}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (("--learning-rate", "0.5"), "config.schedule.learning_rate: 0.001, now 0.5"),
        (("--beta1", "0.5"), "config.optimizer.beta1: None, now 0.5"),
        (("--batch-size", "2"), "config.batch_size: 4, now 2"),
        (("--seed", "5"), "config.seed: 1, now 5"),
        (("--model.norm-eps", "1e-5"), "config.model.norm_eps: 1e-06, now 1e-05"),
        ((), "code.training/optim.py: "),
    ],
)
def test_resumes_with_other_settings_only_if_told_to(changed, message, run, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    run.at_step(8, crash)
    with pytest.raises(CrashError):
        run(folder, *RANDOM)
    if not changed:
        other = code_version() | {"training/optim.py": "0123456789ab"}
        monkeypatch.setattr(train, "code_version", lambda: other)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}
    assert run(folder, *RANDOM, "--resume", *changed) == 2
    out = run.output()
    assert message in out
    assert "--resume-anyway" in out
    now = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}
    assert now == before
    assert run(folder, *RANDOM, "--resume", "--resume-anyway", *changed) == 0
    assert message in run.output()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (("--optimizer", "lion"), "is of another optimizer (Lion: the state of a parameter must"),
        (("--model.n-layers", "3"), "is of another model: n_layers: 2, now 3"),
        (("--model.d-model", "32"), "is of another model: d_model: 64, now 32"),
    ],
)
def test_refuses_what_cannot_go_on_even_if_told_to(changed, message, run, tmp_path):
    assert run(tmp_path / "run", "--max-steps", "2") == 0
    before = weights(tmp_path / "run")
    assert run(tmp_path / "run", "--max-steps", "4", "--resume", "--resume-anyway", *changed) == 2
    assert message in run.output()
    assert weights(tmp_path / "run") == before


def test_other_data_is_read_from_its_beginning(run, tmp_path):
    assert run(tmp_path / "run", "--max-steps", "2") == 0
    arguments = ("--max-steps", "4", "--seed", "2", "--resume", "--resume-anyway")
    assert run(tmp_path / "run", *arguments) == 0
    assert "The data is read from its beginning" in run.output()
    last = checkpoint.checkpoints(tmp_path / "run" / "checkpoints")[-1]
    assert checkpoint.read_record(last)["state"]["loader"]["windows"] == 2 * 4


def test_a_run_without_an_end_may_be_made_longer(run, tmp_path):
    for steps in ("4", "8"):
        arguments = ("--schedule", "constant", "--max-steps", steps)
        assert run(tmp_path / "long", *arguments, "--resume") == 0
    assert run(tmp_path / "whole", "--schedule", "constant", "--max-steps", "8") == 0
    assert weights(tmp_path / "long") == weights(tmp_path / "whole")


def test_resume_without_a_checkpoint_says_so_and_starts(run, tmp_path):
    early = tmp_path / "early"
    early.mkdir()
    (early / "log.jsonl").write_text('{"step": 1, "loss": 0.0}\n{"st')  # killed at its second line
    assert run(early, "--max-steps", "6", "--resume") == 0
    assert "starting from the beginning" in run.output()
    assert run(tmp_path / "whole", "--max-steps", "6") == 0
    assert losses(early) == losses(tmp_path / "whole")
