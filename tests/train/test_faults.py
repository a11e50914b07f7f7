"""Prove that a run gets over losses that go wrong, and that this too survives a resume."""

import json
import math
import shutil
from functools import partial

import pytest
import torch
from train_runs import CrashError, crash, log

import train
from tritium.bench.runs import resume
from tritium.bench.runs._injected import disturbed, garbage, nan_in_a_gradient, no_gradient
from tritium.data import prepare
from tritium.data.verification import Verification
from tritium.training.recovery import UnrecoverableError, check_end
from tritium.training.run import checkpoint, run_state

SPIKES = ("--max-steps", "36", "--save-every", "5", "--eval-every", "9", "--dropout", "0.1",
          "--learning-rate", "3e-3", "--spike-window", "10", "--max-skips", "3",
          "--layer-stats-every", "4", "--no-keep-best")  # fmt: skip
BAD = 4 * 22  # the first window of step 23
ENDLESS = range(BAD, 10**6)


def lines(run, name):
    return [json.loads(line) for line in (run / f"{name}.jsonl").read_text().splitlines()]


def files(run):
    return checkpoint.read_record(checkpoint.checkpoints(run / "checkpoints")[-1])["files"]


def state(run):
    """As text, because NaN is not NaN."""
    return json.dumps(resume.final_state(run, set()))


def usual(run):
    """The losses by which a spike was to be known five steps after step 20."""
    at_25 = checkpoint.read_record(run / "checkpoints" / "step-00000025")
    return at_25["state"]["recovery"]["losses"]


def curve(run, first=1):
    return [(x["step"], x["loss"], x["lr"]) for x in log(run) if x["step"] >= first]


FAULTS = [
    ({"model": nan_in_a_gradient}, "gradient not finite", "4"), ({"batch": garbage}, "loss ", "1"),
]  # fmt: skip


@pytest.mark.parametrize(("fault", "why", "every"), FAULTS, ids=["NaN", "garbage"])
def test_a_bad_step_is_as_if_it_had_not_been(fault, why, every, run, tmp_path):
    whole, skipped = tmp_path / "whole", tmp_path / "skipped"
    with disturbed(range(BAD, BAD + 1), model=no_gradient, batch=fault.get("batch")):
        assert run(whole, *SPIKES, "--no-recovery") == 0
    with disturbed(range(BAD, BAD + 1), **fault):
        assert run(skipped, *SPIKES, "--log-every", every) == 0
    assert f"Skipped step 23 (windows 88 to 91): {why}" in run.output()
    assert files(skipped) == files(whole)
    assert [x["step"] for x in log(skipped) if "skipped" in x] == [23]
    assert curve(skipped) == curve(whole)


@pytest.mark.parametrize("crash_at", [None, 24, 27])
def test_goes_back_and_past_the_data(crash_at, run, tmp_path, monkeypatch):
    # Steps 23 to 25 are bad: back to step 20, and on with the data after step 25's.
    back, other = tmp_path / "back", tmp_path / "other"
    bad = range(BAD, BAD + 12)
    more = ("--keep-every", "5", *(("--save-async",) if crash_at == 27 else ()))
    if crash_at is not None:
        run.at_step(crash_at, crash)
        with disturbed(bad, batch=garbage), pytest.raises(CrashError):
            run(back, *SPIKES, *more)
    with disturbed(bad, batch=garbage):
        assert run(back, *SPIKES, *more, "--resume") == 0
    assert "3 bad steps in a row. Going back to step 20, past windows 80 to 99" in run.output()
    event = {"from_step": 25, "to_step": 20, "windows": [80, 100], "lr_factor": 1.0}
    assert [(x["step"], x["recovery"]) for x in log(back) if "recovery" in x] == [(21, event)]
    assert [x["step"] for x in log(back)] == list(range(1, 37))
    given_up = lines(back, "abandoned-log")
    assert [(x["step"], x["abandoned"]) for x in given_up] == [(s, 1) for s in range(21, 26)]
    assert "skipped" in given_up[-1]
    layers = [x["step"] for x in lines(back, "layers")]
    assert layers == [1, 4, 8, 12, 16, 20, 24, 28, 32, 36]

    run.at_step(22, crash)
    with pytest.raises(CrashError):
        run(other, *SPIKES, *more)

    def further(loader, position, *, anyway, log):
        loader.load_state(position | {"windows": 100})

    monkeypatch.setattr(run_state, "seek", further)
    assert run(other, *SPIKES, *more, "--resume") == 0
    assert files(back) == files(other)
    assert curve(back) == curve(other)
    assert usual(back) == usual(other)


def test_lowers_the_rate_then_stops_with_a_report(run, tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert run(whole, *SPIKES, "--keep-every", "5") == 0
    run.output()
    with disturbed(ENDLESS, model=nan_in_a_gradient):
        assert run(stopped, *SPIKES) == 70
    out = run.output()
    assert "Going back to step 20, past windows 80 to 99\n" in out
    assert "Going back to step 15, past windows 60 to 111, at 0.5 of the learning rate\n" in out
    report = out[out.index("train.py: the losses do not recover, stopped after step 18") :]
    assert "3 bad steps in a row, first step 16 (windows 112 to 115): gradient not" in report
    assert "after step 25: going back to step 20, past windows 80 to 99\n" in report
    assert "after step 23: going back to step 15, past windows 60 to 111, at 0.5 of" in report
    assert "Last healthy checkpoint: step 15\n" in report
    assert "a lower --learning-rate" in report
    last = log(stopped)[-1]
    assert last["recovery"] == {"stopped": True}
    assert last["lr"] == pytest.approx(0.5 * log(whole)[17]["lr"])
    healthy = checkpoint.read_record(whole / "checkpoints" / "step-00000015")
    assert files(stopped) == healthy["files"]
    assert run(stopped, *SPIKES, "--resume") == 0  # the gradients are in order again
    assert state(stopped).replace(str(stopped), "") == state(whole).replace(str(whole), "")


def test_a_lowered_rate_survives_a_resume(run, tmp_path):
    whole, crashed = tmp_path / "whole", tmp_path / "crashed"
    eight = range(BAD, BAD + 4 * 8)  # the streak, going back, and the next streak
    with disturbed(eight, batch=garbage):
        assert run(whole, *SPIKES) == 0
    run.at_step(36, crash)  # in the last attempt
    with disturbed(eight, batch=garbage), pytest.raises(CrashError):
        run(crashed, *SPIKES)
    with disturbed(eight, batch=garbage):
        assert run(crashed, *SPIKES, "--resume") == 0
    assert "at 0.5 of the learning rate" in run.output()
    assert state(crashed) == state(whole)
    saved = checkpoint.read_record(checkpoint.checkpoints(whole / "checkpoints")[-1])["state"]
    assert saved["recovery"]["lr_factor"] == 0.5
    assert len(saved["recovery"]["went_back"]) == 2


@pytest.mark.parametrize("last", [3, 5, 36])
def test_before_the_first_checkpoint_a_run_continues_where_it_is(last, run, tmp_path):
    # Also where the run ends with the streak, and the last step is saved all the same.
    with disturbed(range(8, 20), model=nan_in_a_gradient):
        assert run(tmp_path / "run", *SPIKES, "--max-steps", str(last), "--save-every", "40") == 0
    expected = "3 bad steps in a row. Continuing from step 5, past windows 8 to 19"
    assert (expected in run.output()) == (last >= 5)
    assert [x["step"] for x in log(tmp_path / "run")] == list(range(1, last + 1))
    (kept,) = checkpoint.checkpoints(tmp_path / "run" / "checkpoints")
    assert (checkpoint.step_of(kept), checkpoint.is_healthy(kept)) == (last, last == 36)


def test_healthy_steps_are_replayed_after_an_unrecoverable_end(run, tmp_path):
    with disturbed(range(4 * 33, 4 * 36), model=nan_in_a_gradient):
        assert run(tmp_path / "run", *SPIKES) == 0
    assert "Going back to step 30, past windows 120 to 143" in run.output()
    assert [x["step"] for x in log(tmp_path / "run")] == list(range(1, 37))
    assert checkpoint.step_of(checkpoint.checkpoints(tmp_path / "run" / "checkpoints")[-1]) == 36


def test_a_checkpoint_made_in_trouble_is_not_resumed(run, tmp_path):
    folder = tmp_path / "run"
    run.at_step(27, crash)  # the checkpoint of step 25 is within a streak
    with disturbed(range(4 * 24, 10**6), model=nan_in_a_gradient), pytest.raises(CrashError):
        run(folder, *SPIKES, "--max-skips", "20", "--keep-last", "1")
    kept = checkpoint.checkpoints(folder / "checkpoints")
    assert [(checkpoint.step_of(p), checkpoint.is_healthy(p)) for p in kept] == [
        (20, True), (25, False),
    ]  # fmt: skip
    assert run(folder, *SPIKES, "--max-skips", "20", "--keep-last", "1", "--resume") == 0
    assert "resuming from step 20" in run.output()
    assert run(tmp_path / "whole", *SPIKES, "--max-skips", "20", "--keep-last", "1") == 0
    assert state(folder) == state(tmp_path / "whole")


@pytest.mark.parametrize("where", ["weight", "moment"])
def test_what_is_not_finite_is_never_gone_back_to(where, run, tmp_path, monkeypatch):
    # As if a bit had flipped in the memory of the device after step 20.
    folder, healthy = tmp_path / "run", train.Recovery.healthy

    def flipped(self, model, optimizer):
        p = model.embedding.weight
        if self.state()["losses"][19:]:
            (p if where == "weight" else optimizer.state[p]["exp_avg"]).data[0, 0] = torch.nan
        return healthy(self, model, optimizer)

    monkeypatch.setattr(train.Recovery, "healthy", flipped)
    more = ("--spike-window", "99", "--keep-last", "1")
    assert run(folder, *SPIKES, *more, "--max-steps", "20") == 0
    kept = checkpoint.checkpoints(folder / "checkpoints")
    assert [(checkpoint.step_of(p), checkpoint.is_healthy(p)) for p in kept] == [
        (15, True), (20, False),
    ]  # fmt: skip


@pytest.mark.parametrize("much", [False, True])
def test_a_damaged_shard_is_not_trained_on(much, run, corpus, tmp_path, monkeypatch):
    folder, shards = tmp_path / "run", tmp_path / "shards"
    shutil.copytree(prepare(corpus, vocab_size=512), shards)
    content = bytearray((shards / "train-00000.bin").read_bytes())
    content[1000] ^= 1
    (shards / "train-00000.bin").write_bytes(content)
    if much:  # too much to be read before the run
        monkeypatch.setattr(train, "Verification", partial(Verification, at_once=0))
    assert run(folder, *SPIKES, "--data", str(shards), "--max-steps", "100000") == 2
    assert "train-00000.bin is damaged: its bytes are not those" in run.output()
    assert folder.exists() == much


def test_a_run_that_ends_with_a_loss_that_is_no_number_says_so(run, tmp_path):
    """Its few steps are over before the ladder can act."""
    diverged = "--max-steps", "3", "--learning-rate", "1e10", "--eval-every", "1"
    assert run(tmp_path / "run", *diverged) == 70
    assert "train.py: the model diverged: after step 3 its validation loss is nan" in run.output()
    healthy = {"step": 4, "val_loss": 2.0}
    check_end([{"step": 2, "val_loss": math.nan}, healthy, {"step": 5, "loss": math.nan}])
    check_end([])
    with pytest.raises(UnrecoverableError, match="after step 6 its validation loss is inf"):
        check_end([healthy, {"step": 6, "val_loss": math.inf}])
