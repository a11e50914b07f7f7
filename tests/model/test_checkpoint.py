"""Prove that a checkpoint comes back bit for bit, and that a damaged one is refused untouched."""

import json
from dataclasses import replace

import pytest
import torch

from kernels import AdamW
from model import ModelConfig, Transformer, checkpoint
from model.checkpoint import CheckpointError
from model.optim import parameter_groups

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


@pytest.fixture
def saved(device, tmp_path):
    model, optimizer = build(device)
    advance(model, optimizer, 0)
    return checkpoint.save(tmp_path, 7, model, optimizer, {"note": [1]}, keep=2)


def test_restores_model_and_optimizer_bit_for_bit(device, tmp_path):
    model, optimizer = build(device)
    advance(model, optimizer, 0)
    path = checkpoint.save(tmp_path, 1, model, optimizer, {"a": 1}, keep=1)
    expected = [advance(model, optimizer, seed) for seed in (1, 2)]
    other, other_optimizer = build(device)
    assert checkpoint.load(path, other, other_optimizer) == (1, {"a": 1})
    assert [advance(other, other_optimizer, seed) for seed in (1, 2)] == expected
    for x, y in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(x, y)


def test_makes_the_model_that_was_saved(device, saved):
    model, _ = build(device)
    checkpoint.load(saved, model)
    for x, y in zip(checkpoint.load_model(saved).parameters(), model.parameters(), strict=True):
        assert torch.equal(x, y.cpu())


def test_keeps_the_newest(device, tmp_path):
    model, optimizer = build(device)
    for step in (1, 2, 10):
        checkpoint.save(tmp_path, step, model, optimizer, {}, keep=2)
    names = [path.name for path in checkpoint.checkpoints(tmp_path)]
    assert names == ["step-00000002", "step-00000010"]


def test_a_save_that_fails_leaves_the_last_one(device, tmp_path, saved, monkeypatch):
    model, optimizer = build(device)

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_sync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(tmp_path, 8, model, optimizer, {}, keep=1)
    monkeypatch.undo()
    assert checkpoint.checkpoints(tmp_path) == [saved]
    checkpoint.load(saved, model, optimizer)
    checkpoint.save(tmp_path, 8, model, optimizer, {}, keep=1)  # over the leftover
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000008"]


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
    [("{", "is not JSON"), ("[]", "is not of format 1"), ('{"format": 9}', "is not of format 1")],
)
def test_refuses_a_damaged_record(content, message, device, saved):
    (saved / "state.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(saved, *build(device))


def test_refuses_the_checkpoint_of_another_model(device, saved):
    with pytest.raises(CheckpointError, match=r"another model: d_model 16 \(here 32\)"):
        checkpoint.load(saved, *build(device, replace(CONFIG, d_model=32)))


def test_refuses_tensors_of_another_model(device, saved, tmp_path):
    # The record says the one, the files hold the other, checksums and all.
    model, optimizer = build(device, replace(CONFIG, d_model=32))
    advance(model, optimizer, 0)
    other = checkpoint.save(tmp_path / "other", 7, model, optimizer, {}, keep=1)
    record = json.loads((other / "state.json").read_text())
    record["model"] = json.loads((saved / "state.json").read_text())["model"]
    (other / "state.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match="of shape"):
        checkpoint.load(other, *build(device))


def test_refuses_a_folder_that_is_none(device, tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        checkpoint.load(tmp_path, *build(device))
