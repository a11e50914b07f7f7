"""Prove that no loss of other text is compared: as best validation, for a stop, or as a spike."""

import copy
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from train_runs import log

import train
from tritium.bench.runs import report
from tritium.model import Transformer
from tritium.model.saved import read_model
from tritium.training import recovery
from tritium.training.recovery import Recovery, RecoveryConfig
from tritium.training.run import checkpoint
from tritium.training.run.fingerprint import best_of

NOW = {
    "data": "a", "validation": "b", "tokenizer": "c", "code": {"torch": "1"},
    "config": {"seed": 1, "eval_tokens": 64, "model": {"max_seq_len": 8, "n_layers": 2}},
}  # fmt: skip
DECIDE = [("data",), ("validation",), ("tokenizer",), ("config", "eval_tokens"),
          ("config", "model", "max_seq_len")]  # fmt: skip
OTHERS = [("code", "torch"), ("config", "seed"), ("config", "model", "n_layers")]
BEST = {"step": 3, "val_loss": 1.0}


@pytest.mark.parametrize("changed", DECIDE + OTHERS, ids=".".join)
def test_a_best_loss_is_kept_if_nothing_that_decides_its_text_differs(changed):
    before = copy.deepcopy(NOW)
    entry = before
    for name in changed[:-1]:
        entry = entry[name]
    entry[changed[-1]] = "other"
    found = best_of({"best": BEST, "fingerprint": before}, NOW)
    assert found == (BEST if changed in OTHERS else None)


def test_an_older_checkpoint_does_not_name_its_validation_split():
    before = {name: x for name, x in NOW.items() if name != "validation"}
    assert best_of({"best": BEST, "fingerprint": before}, NOW) == BEST
    assert best_of({"best": BEST}, NOW) is None


def test_the_best_of_other_data_is_forgotten_and_the_stop_counts_anew(run, tmp_path, monkeypatch):
    """The old data's losses are lower; of the new ones the second is the lowest."""
    made = iter([1.0, 2.0, 5.0, 4.0, 4.5, 4.6, 4.7])
    evaluate = train.evaluate

    def given(model, batches, byte_lengths, cast, total, name="val"):
        if name == "report":
            return evaluate(model, batches, byte_lengths, cast, total, name)
        return {"val_loss": next(made), "val_bits_per_byte": 1.0}

    monkeypatch.setattr(train, "evaluate", given)
    folder, other = tmp_path / "run", tmp_path / "other.txt"
    other.write_text("\n\n".join(f"{i} and {i + 1} are numbers." for i in range(3000)))
    assert run(folder, "--max-steps", "4", "--eval-every", "2") == 0
    run.output()
    flags = "--data", str(other), "--max-steps", "20", "--eval-every", "2", "--stop-after", "2"
    assert run(folder, *flags, "--resume", "--resume-anyway") == 0
    line = "The lowest validation loss so far, 1.0000 nats per token after step 2, is of other"
    assert run.output().count(line) == 1
    last = log(folder)[-1]
    assert (last["step"], last["report_step"]) == (12, 8)
    newest = checkpoint.newest(folder)
    best = checkpoint.read_record(newest)["state"]["best"]
    assert best == {"step": 8, "val_loss": 4.0}
    kept = read_model(newest.with_name("step-00000008"), Transformer).state_dict()
    assert all(torch.equal(x, kept[k]) for k, x in Transformer.load(folder).state_dict().items())
    facts = report.describe(folder, "run")["facts"]
    assert (facts["best validation"][:6], facts["at step"]) == ("4.0000", "8")


@pytest.mark.parametrize("data", ["a", "other"])
def test_a_rollback_to_a_checkpoint_of_other_data_takes_none_of_its_losses(data, monkeypatch):
    saved = {
        "best": BEST, "fingerprint": {**NOW, "data": data}, "loader": {"windows": 0},
        "recovery": {"losses": [1.0, 1.0]},
    }  # fmt: skip
    monkeypatch.setattr(recovery, "restore", lambda *_: (3, saved))
    config = RecoveryConfig(spike_window=2, max_skips=1)
    made = Recovery(config, torch.nn.Linear(1, 1), 4, lambda _: None)
    made.detect_bad_steps([{"step": 5, "loss": math.nan, "grad_norm": 1.0}], 20)
    saver = SimpleNamespace(
        wait=lambda: None, last_healthy=lambda before: Path("x"), forget_after=lambda step: None
    )
    to = SimpleNamespace(rewind=lambda step, n: None)
    same = data == NOW["data"]
    assert made.roll_back_if_due(saver, to, made, None, NOW) == (3, BEST if same else None)
    entry = {"step": 4, "loss": 9.0, "grad_norm": 1.0}
    made.detect_bad_steps([entry], 24)
    assert ("skipped" in entry) == same
