"""Prove that signals, a full disk, a second process and the clock cost nothing."""

import itertools
import os
import re
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from train_runs import RANDOM, CrashError, crash, log

import train
from tritium.bench.runs import resume
from tritium.model import Transformer
from tritium.training.run import checkpoint
from tritium.training.run.run_folder import lock_folder, read_lines


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_finishes_the_step_and_saves(number, run, tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert run(whole, *RANDOM) == 0
    before = signal.getsignal(number)
    run.at_step(5, lambda: os.kill(os.getpid(), number))
    assert run(stopped, *RANDOM) == 75
    out = run.output()
    assert f"Stopped by {number.name} after step 5, which is saved" in out
    assert f"python train.py --resume {stopped}" in out
    events = (stopped / "events.jsonl").read_text()
    assert f"Stopped by {number.name} after step 5." in events
    assert signal.getsignal(number) == before
    assert checkpoint.checkpoints(stopped / "checkpoints")[-1].name == "step-00000005"
    assert run(stopped, *RANDOM, "--resume") == 0
    assert resume.final_state(stopped, set()) == resume.final_state(whole, set())


def test_a_signal_during_validation_stops_after_the_next_step(run, tmp_path, monkeypatch):
    evaluate = train.evaluate

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*arguments)

    monkeypatch.setattr(train, "evaluate", interrupted)
    assert run(tmp_path / "run", *RANDOM) == 75
    assert "Stopped by SIGTERM after step 6, which is saved" in run.output()


# Train, but take a minute for the checkpoint of any step after the third.
SLOW_SAVE = """
import sys, time, train
from tritium.training.run import checkpoint
sync = checkpoint.sync
def slow(path):
    if "step-00000003" not in str(path):
        print("saving", flush=True)
        time.sleep(60)
    sync(path)
checkpoint.sync = slow
train.main()
"""


def test_a_second_signal_stops_a_save_and_leaves_the_last_checkpoint(start, run, tmp_path):
    stopped = tmp_path / "stopped"
    process = start(*RANDOM, "--out", str(stopped), "--sample-tokens", "0", script=SLOW_SAVE)
    while process.stdout.readline() != "saving\n":
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=10)
    assert process.returncode == -signal.SIGTERM
    assert "SIGTERM: finishing the step and saving; once more stops at once" in errors
    (last,) = checkpoint.checkpoints(stopped / "checkpoints")
    assert last.name == "step-00000003"
    assert run(stopped, *RANDOM, "--resume") == 0
    assert run(tmp_path / "whole", *RANDOM) == 0
    assert resume.final_state(stopped, set()) == resume.final_state(tmp_path / "whole", set())


@pytest.mark.parametrize("more", [(), ("--save-async",)], ids=["sync", "async"])
def test_a_full_disk_stops_no_training_and_costs_no_checkpoint(more, run, tmp_path, monkeypatch):
    full, whole = tmp_path / "full", tmp_path / "whole"

    def full_disk(tensors, path):
        if "step-00000003" in str(path):
            return save_file(tensors, path)
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    assert run(full, *RANDOM, *more) == 74
    out = run.output()
    assert "Could not save step 6: " in out
    events = [x for x in read_lines(full / "events.jsonl") if x["kind"] == "save failed"]
    assert 6 in [x["step"] for x in events]
    assert len(events) == out.count("Could not save step")
    assert "No space left on device (os error 28). The last checkpoint is that of step 3" in out
    assert "train.py: step 12 could not be saved; the last checkpoint is that of step 3" in out
    assert [x["step"] for x in log(full)] == list(range(1, 13))
    monkeypatch.setattr(checkpoint, "save_file", save_file)
    assert run(full, *RANDOM, *more, "--resume") == 0
    assert run(whole, *RANDOM) == 0
    assert resume.final_state(full, set()) == resume.final_state(whole, set())


def test_two_processes_do_not_share_a_run(run, tmp_path):
    assert run(tmp_path / "run", *RANDOM) == 0
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    with lock_folder(tmp_path / "run", resume=True):
        before[tmp_path / "run" / ".lock"] = (tmp_path / "run" / ".lock").read_bytes()
        assert run(tmp_path / "run", *RANDOM, "--resume") == 2
    assert f"is in use by process {os.getpid()} on" in run.output()
    after = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert after == before


def test_the_clock_ends_a_run_and_goes_on_after_a_resume(run, tmp_path, monkeypatch):
    seconds = itertools.count(0.0, 0.25)  # each look at the clock takes a quarter of a second
    clock = SimpleNamespace(perf_counter=lambda: next(seconds), strftime=time.strftime)
    monkeypatch.setattr(train, "time", clock)
    minute = ("--max-minutes", "1", "--schedule", "linear", "--save-every", "10")
    run.at_step(25, crash)
    with pytest.raises(CrashError):
        run(tmp_path / "run", *minute)
    assert run(tmp_path / "run", *minute, "--resume") == 0
    assert re.search(r"bits per byte, after 1 min 0\d s", run.output())  # both starts together
    entries = log(tmp_path / "run")
    state = checkpoint.read_record(checkpoint.checkpoints(tmp_path / "run" / "checkpoints")[-1])
    assert 60 <= state["state"]["seconds"] < 63
    rates = [x["lr"] for x in entries[5:]]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] > 0.8e-3
    assert rates[-1] < 0.05e-3
    assert run(tmp_path / "run", *minute, "--resume") == 0  # nothing is left to do
    assert log(tmp_path / "run") == entries


def test_a_run_ends_when_validation_stalls_and_reports_its_best_weights(run, tmp_path, monkeypatch):
    """Losses rise from the second validation on: the third without a lower one is the last."""
    made, evaluate = iter([3.0, 2.0, 2.5, 2.4, 2.0, 1.0]), train.evaluate
    seen = {}

    def rising(model, batches, byte_lengths, cast, total, name="val"):
        if name == "report":
            seen["weights"] = {k: x.clone() for k, x in model.state_dict().items()}
            return evaluate(model, batches, byte_lengths, cast, total, name)
        return {"val_loss": next(made), "val_bits_per_byte": 1.0}

    monkeypatch.setattr(train, "evaluate", rising)
    assert run(tmp_path / "run", "--eval-every", "2", "--stop-after", "3") == 0
    last = log(tmp_path / "run")[-1]
    assert last["step"] == 10
    assert last["report_step"] == 4
    best = Transformer.load(tmp_path / "run")
    assert all(torch.equal(x, best.state_dict()[k]) for k, x in seen["weights"].items())
    assert "after step 4, on the validation documents" in run.output()


def test_the_report_is_of_other_documents_and_the_last_weights_when_they_are_best(run, tmp_path):
    """A text of many documents has two halves, whose losses differ."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(400):
        (texts / f"{i}.txt").write_text(f"{i} " + "word " * (i % 17) + "z" * (i % 5 * 20))
    assert run(tmp_path / "run", "--data", str(texts), "--max-steps", "4") == 0
    last = log(tmp_path / "run")[-1]
    assert last["report_step"] == last["step"] == 4
    assert last["report_loss"] != last["val_loss"]
    assert last["report_loss"] == pytest.approx(last["val_loss"], rel=0.3)


def test_the_gap_is_measured_once_text_is_read_again(run, tmp_path, monkeypatch):
    """By one function for both, in evaluation mode, whatever dropout adds to a step's own loss."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(80):
        (texts / f"{i}.txt").write_text(f"{i} " + "some words of it " * 8)
    asked, evaluate = [], train.evaluate

    def noted(*arguments):
        asked.append(arguments[5:])
        return evaluate(*arguments)

    monkeypatch.setattr(train, "evaluate", noted)
    flags = "--max-epochs", "3", "--eval-every", "2", "--dropout", "0.3"
    assert run(tmp_path / "run", "--data", str(texts), *flags) == 0
    measured = [entry for entry in log(tmp_path / "run") if "val_loss" in entry]
    assert [*{"gap" in x for x in measured}] == [False, True] or measured[0]["epoch"] > 1
    for entry in measured:
        assert ("gap" in entry) == (entry["epoch"] > 1)
        if "gap" in entry:
            assert entry["gap"] == pytest.approx(entry["val_loss"] - entry["train_loss"])
    assert ("train",) in asked
