"""Prove that a checkpoint comes back bit for bit, and that a damaged one is refused untouched."""

import errno
import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tritium.kernels import AdamW
from tritium.model import ModelConfig, Transformer
from tritium.model.saved import read_model
from tritium.training.optim import OPTIMIZERS, OptimizerConfig, parameter_groups
from tritium.training.run import checkpoint
from tritium.training.run.checkpoint import CheckpointError

CONFIG = ModelConfig(vocab_size=40, n_layers=1, d_model=16, n_heads=2, max_seq_len=8)


def build(device, config=CONFIG):
    model = Transformer(config).to(device)
    return model, AdamW(parameter_groups(model, 0.1), lr=0.01, max_grad_norm=1.0)


def advance(model, optimizer, seed):
    device = model.embedding.weight.device
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(40, (2, 8), generator=generator).to(device)
    loss = model(tokens, tokens)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def save(folder, step, model, optimizer, state):
    return checkpoint.write(folder, checkpoint.snapshot(step, model, optimizer, state, copy=False))


@pytest.fixture
def saved(device, tmp_path):
    model, optimizer = build(device)
    advance(model, optimizer, 0)
    return save(tmp_path, 7, model, optimizer, {"note": [1]})


def test_restores_model_and_optimizer_bit_for_bit(device, tmp_path):
    model, optimizer = build(device)
    advance(model, optimizer, 0)
    path = save(tmp_path, 1, model, optimizer, {"a": 1})
    expected = [advance(model, optimizer, seed) for seed in (1, 2)]
    other, other_optimizer = build(device)
    assert checkpoint.load(path, other, other_optimizer) == (1, {"a": 1})
    assert [advance(other, other_optimizer, seed) for seed in (1, 2)] == expected
    for x, y in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(x, y)


def test_makes_the_model_that_was_saved(device, saved):
    model, _ = build(device)
    checkpoint.load(saved, model)
    for x, y in zip(read_model(saved, Transformer).parameters(), model.parameters(), strict=True):
        assert torch.equal(x, y.cpu())


WITH_MOMENTUM = [OptimizerConfig(name=name, momentum=0.9) for name in ("sgd", "rmsprop")]


@pytest.mark.parametrize(
    "config", [*map(OptimizerConfig, OPTIMIZERS), *WITH_MOMENTUM], ids=lambda x: x.name
)
def test_every_optimizer_goes_on_bit_for_bit(config, device, tmp_path):
    (model, _), (other, _) = build(device), build(device)
    optimizer, other_optimizer = config.make(model), config.make(other)
    for seed in range(3):
        advance(model, optimizer, seed)
    path = save(tmp_path, 3, model, optimizer, {})
    checkpoint.load(path, other, other_optimizer)
    for seed in range(3, 6):
        assert advance(model, optimizer, seed) == advance(other, other_optimizer, seed)
    for x, y in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(x, y)


def test_a_copy_does_not_follow_training(device, tmp_path):
    model, optimizer = build(device)
    advance(model, optimizer, 0)
    state = {"steps": [1]}
    kept = checkpoint.snapshot(1, model, optimizer, state, copy=True)
    expected = checkpoint.write(tmp_path / "now", kept)
    advance(model, optimizer, 1)
    state["steps"].append(2)
    later = checkpoint.write(tmp_path / "later", kept)
    for name in (*checkpoint.FILES, "state.json"):
        assert (later / name).read_bytes() == (expected / name).read_bytes()


@pytest.mark.parametrize("call", range(5))
def test_a_save_that_fails_leaves_the_last_one(call, device, tmp_path, saved, monkeypatch):
    # Every wait for the disk in turn: two files of tensors, the record, and two folders.
    model, optimizer = build(device)
    before = {p: p.read_bytes() for p in saved.iterdir()}
    calls = iter(range(100))
    sync = os.fsync

    def full_disk(descriptor):
        if next(calls) == call:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 8, model, optimizer, {})
    monkeypatch.undo()
    assert {p: p.read_bytes() for p in saved.iterdir()} == before
    for path in checkpoint.checkpoints(tmp_path):  # the last call comes after the rename
        assert path == saved or call == 4
        checkpoint.load(path, *build(device))
    assert not list(tmp_path.glob(".*"))


def test_says_so_when_the_disk_has_no_room_for_tensors(device, tmp_path, saved, monkeypatch):
    def full_disk(*_):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left on device"):
        save(tmp_path, 8, *build(device), {})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000007"]


def test_a_step_saved_again_replaces_the_first(device, tmp_path, saved):
    model, optimizer = build(device)
    save(tmp_path, 7, model, optimizer, {"note": [2]})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000007"]
    assert checkpoint.load(saved, model, optimizer) == (7, {"note": [2]})


def test_tidies_what_a_kill_may_leave(device, tmp_path, saved):
    save(tmp_path, 9, *build(device), {})
    (tmp_path / "step-00000009").rename(tmp_path / ".step-00000009.replaced")
    save(tmp_path, 8, *build(device), {})
    (tmp_path / "step-00000008").rename(tmp_path / ".step-00000008.old")
    (tmp_path / ".step-00000010.tmp").mkdir()
    checkpoint.tidy(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["step-00000007", "step-00000009"]


def test_no_pickle_is_ever_read_or_written():
    root = Path(__file__).parents[3]
    for file in [
        root / "train.py",
        *root.glob("model/**/*.py"),
        *root.glob("training/**/*.py"),
        *root.glob("data/**/*.py"),
    ]:
        text = file.read_text()
        for word in ("import pickle", "torch.load(", "torch.save(", "allow_pickle=True"):
            assert word not in text, f"{file.name} has {word}"


def truncate(path):
    path.write_bytes(path.read_bytes()[:-10])


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def unlink(path):
    path.unlink()


@pytest.mark.parametrize("name", checkpoint.FILES)
@pytest.mark.parametrize(
    ("damage", "message"),
    [(truncate, "bytes instead of"), (flip_a_byte, "another checksum"), (unlink, "is missing")],
)
def test_refuses_damaged_files_and_changes_nothing(name, damage, message, device, saved):
    damage(saved / name)
    model, optimizer = build(device)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(saved, model, optimizer)
    assert all(torch.equal(x, y) for x, y in zip(before, model.parameters(), strict=True))
    assert not optimizer.state


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "is not the record"),
        ('{"format": 9}', "is of format 9, this version reads format 2"),
        ('{"format": 2, "step": 1}', "another checksum"),
    ],
)
def test_refuses_a_damaged_record(content, message, device, saved):
    (saved / "state.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(saved, *build(device))


def test_refuses_a_record_with_one_other_digit(device, saved):
    path = saved / "state.json"
    path.write_text(path.read_text().replace('"step": 7', '"step": 8'))
    with pytest.raises(CheckpointError, match="another checksum"):
        checkpoint.load(saved, *build(device))


def test_refuses_the_checkpoint_of_another_model(device, saved):
    with pytest.raises(CheckpointError, match="another model: d_model: 16, now 32"):
        checkpoint.load(saved, *build(device, replace(CONFIG, d_model=32)))


def test_refuses_another_model_of_the_same_shapes(device, saved):
    with pytest.raises(CheckpointError, match="another model: rope_theta: 10000"):
        checkpoint.load(saved, *build(device, replace(CONFIG, rope_theta=500.0)))


def exchange(saved, change):
    """Replace the weights, with all checksums right."""
    path = saved / checkpoint.FILES[0]
    save_file(change(load_file(path)), path)
    record = json.loads((saved / "state.json").read_text())
    del record["sha256"]
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    record["files"][path.name] = {"bytes": len(content), "sha256": digest}
    record["sha256"] = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    (saved / "state.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x | {"norm.weight": torch.ones(3)}, r"norm.weight has shape \[3\], now \[16\]"),
        (
            lambda x: x | {"norm.weight": torch.ones(16).half()},
            "weights in float16, now in float32",
        ),
        (lambda x: x | {"more": torch.ones(3)}, "differ in more"),
        (lambda x: x | {"../../../up": torch.ones(3)}, "differ in ../../../up"),
        (lambda x: {k: v for k, v in x.items() if k != "norm.weight"}, "differ in norm.weight"),
    ],
    ids=["shape", "dtype", "one more", "a path", "one less"],
)
def test_refuses_other_tensors(change, message, device, saved):
    exchange(saved, change)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(saved, *build(device))


def test_refuses_a_folder_that_is_none(device, tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        checkpoint.load(tmp_path, *build(device))


def test_a_whole_checkpoint_of_another_precision_is_not_called_damaged(device, saved):
    model = Transformer(CONFIG).to(device)
    model.bfloat16()
    with pytest.raises(CheckpointError, match="another precision: weights in float32, now in bfl"):
        checkpoint.load(saved, model)
