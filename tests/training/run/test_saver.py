"""Prove which checkpoints are kept, that a full disk costs none, and that training may continue."""

import errno
import os
import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tritium.model import ModelConfig, Transformer
from tritium.model.saved import read_model
from tritium.training.optim import OptimizerConfig
from tritium.training.run import checkpoint
from tritium.training.run.saver import SaveConfig, SaveError, Saver

CONFIG = ModelConfig(vocab_size=40, n_layers=1, d_model=16, n_heads=2, max_seq_len=8)


@pytest.fixture(scope="module")
def trained():
    model = Transformer(CONFIG)
    return model, OptimizerConfig().make(model)


def steps(folder):
    return [checkpoint.step_of(path) for path in checkpoint.checkpoints(folder)]


@settings(max_examples=25)
@given(
    saves=st.lists(
        st.tuples(st.integers(1, 3), st.floats(0, 9), st.booleans()), min_size=1, max_size=9
    ),
    keep_last=st.integers(1, 3),
    keep_best=st.booleans(),
    keep_every=st.none() | st.integers(2, 5),
    asynchronous=st.booleans(),
)
def test_keeps_the_newest_the_best_every_nth_and_the_last_healthy(
    saves, keep_last, keep_best, keep_every, asynchronous, trained, tmp_path_factory
):
    folder = tmp_path_factory.mktemp("run")
    config = SaveConfig(
        keep_last=keep_last, keep_best=keep_best, keep_every=keep_every, save_async=asynchronous
    )
    saver = Saver(folder, config, log=pytest.fail)
    step, saved, losses, last_healthy = 0, [], {}, None
    for distance, loss, healthy in saves:
        step += distance
        losses[step] = loss
        saved.append(step)
        best = min(losses, key=losses.__getitem__)
        last_healthy = step if healthy else last_healthy
        saver.save(step, *trained, {"loss": loss}, healthy=healthy, best_step=best)
    saver.finish(step)
    expected = {*saved[-keep_last:]}
    expected |= {best} if keep_best else set()
    expected |= {last_healthy} if last_healthy else set()
    expected |= {s for s in saved if keep_every and s % keep_every == 0}
    assert steps(folder) == sorted(expected)
    assert not list(folder.glob(".*"))


def test_a_full_disk_is_reported_and_the_next_save_succeeds(trained, tmp_path, monkeypatch):
    told = []
    saver = Saver(tmp_path, SaveConfig(keep_last=1), log=told.append)
    saver.save(1, *trained, {})

    def full_disk(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    saver.save(2, *trained, {})
    monkeypatch.undo()
    assert len(told) == 1
    assert "Could not save step 2: [Errno 28] No space left on device" in told[0]
    assert "The last checkpoint is that of step 1" in told[0]
    assert steps(tmp_path) == [1]
    with pytest.raises(SaveError, match="step 2 could not be saved; the last checkpoint is that"):
        saver.finish(2)
    saver.save(3, *trained, {})
    saver.finish(3)
    assert steps(tmp_path) == [3]


def test_training_goes_on_while_it_writes(trained, tmp_path, monkeypatch):
    # The save is held until training has changed the weights.
    model, optimizer = trained
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    changed, write = threading.Event(), checkpoint.write

    def slow_write(*arguments):
        assert changed.wait(10)
        return write(*arguments)

    monkeypatch.setattr(checkpoint, "write", slow_write)
    saver = Saver(tmp_path, SaveConfig(keep_last=1, save_async=True), log=pytest.fail)
    saver.save(1, model, optimizer, {})
    assert saver.last_step is None
    with torch.no_grad():
        for p in model.parameters():
            p += 1
    changed.set()
    saver.finish(1)
    restored = read_model(tmp_path / "step-00000001", Transformer)
    for name, p in restored.named_parameters():
        assert torch.equal(p, before[name])


def test_an_error_of_training_lets_go_of_the_folder_only_when_it_is_written(
    trained, tmp_path, monkeypatch
):
    write = checkpoint.write

    def slow_write(*arguments):
        time.sleep(0.5)  # training has failed long before
        return write(*arguments)

    monkeypatch.setattr(checkpoint, "write", slow_write)
    saver = Saver(tmp_path, SaveConfig(save_async=True), log=pytest.fail)

    def fail():
        with saver:
            saver.save(1, *trained, {})
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert steps(tmp_path) == [1]
    assert saver.last_step == 1


def test_an_error_of_the_program_is_not_swallowed(trained, tmp_path, monkeypatch):
    def broken(*_):
        raise KeyError("x")

    monkeypatch.setattr(checkpoint, "write", broken)
    saver = Saver(tmp_path, SaveConfig(keep_last=1, save_async=True), log=print)
    saver.save(1, *trained, {})
    with pytest.raises(KeyError):
        saver.wait()


def test_goes_on_from_what_is_there(trained, tmp_path):
    Saver(tmp_path, SaveConfig(keep_last=1), log=pytest.fail).save(4, *trained, {})
    (tmp_path / ".step-00000005.tmp").mkdir()
    saver = Saver(tmp_path, SaveConfig(keep_last=1), log=pytest.fail)
    assert saver.last_step == 4
    assert saver.newest() == tmp_path / "step-00000004"
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]


def test_goes_on_from_the_last_healthy_one(trained, tmp_path):
    told = []
    saver = Saver(tmp_path, SaveConfig(keep_last=9), log=told.append)
    assert saver.to_resume() is None
    saver.save(1, *trained, {}, healthy=False)
    assert saver.to_resume() == tmp_path / "step-00000001"
    for step, healthy in ((2, True), (3, True), (4, False)):
        saver.save(step, *trained, {}, healthy=healthy)
    assert saver.to_resume() == tmp_path / "step-00000003"
    assert told[-1] == "The checkpoint of step 4 is not healthy: resuming from step 3."
    assert saver.last_healthy() == saver.last_healthy(before=2) == tmp_path / "step-00000003"
    assert saver.last_healthy(before=3) == tmp_path / "step-00000002"
    (tmp_path / "step-00000003" / "state.json").write_text("{")
    assert saver.last_healthy() == tmp_path / "step-00000002"
    (tmp_path / "step-00000004" / "state.json").write_text("{")
    with pytest.raises(checkpoint.CheckpointError, match="damaged"):
        saver.to_resume()


def test_a_run_that_went_back_forgets_what_came_after(trained, tmp_path):
    saver = Saver(tmp_path, SaveConfig(keep_last=9), log=pytest.fail)
    for step in (1, 4, 6, 8):
        saver.save(step, *trained, {})
    saver.forget_after(6)
    assert steps(tmp_path) == [1, 4, 6]
    saver.save(5, *trained, {})
    assert steps(tmp_path) == [1, 4, 5]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_every_save_that_fails_is_handed_on(asynchronous, trained, tmp_path, monkeypatch):
    told, failed = [], []
    saver = Saver(tmp_path, SaveConfig(save_async=asynchronous), log=told.append)
    saver.on_failure = lambda step, text: failed.append((step, text))
    saver.save(1, *trained, {})
    saver.wait()

    def full_disk(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    for step in (2, 3):
        saver.save(step, *trained, {})
    saver.wait()
    assert [step for step, _ in failed] == [2, 3]
    assert [text for _, text in failed] == told
    assert all("No space left" in line for line in told)
