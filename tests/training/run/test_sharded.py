"""Prove that a sharded checkpoint is read wherever a whole one is, and that damage is refused.

The process group has one rank; tests/train/test_parallel.py has two.
"""

import errno
import os

import pytest
import torch
import torch.distributed as dist

from tritium.model import ModelConfig, Transformer
from tritium.model.saved import FILES, SHARDS, read_model, read_record, read_tensors
from tritium.training.consolidate import consolidate
from tritium.training.optim import OptimizerConfig
from tritium.training.parallel import shard
from tritium.training.recovery import Recovery, RecoveryConfig, all_finite
from tritium.training.run import checkpoint, sharded
from tritium.training.run.checkpoint import CheckpointError
from tritium.training.run.ranks import Ranks
from tritium.training.run.run_folder import RunFolderError, lock_folder

CONFIG = ModelConfig(vocab_size=40, n_layers=1, d_model=16, n_heads=2, max_seq_len=8)
OPTIMIZERS = {
    "adamw": OptimizerConfig(),
    "sgd": OptimizerConfig(name="sgd", momentum=0.9),
    "lion in bfloat16": OptimizerConfig(name="lion", state_dtype="bfloat16"),
    "split": OptimizerConfig(master_weights="split"),
    "master": OptimizerConfig(master_weights="float32"),
}


@pytest.fixture
def ranks():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield Ranks()
    dist.destroy_process_group()


def build(config, *, parts):
    """Make a model, sharded if it is to be, and its optimizer."""
    dtype = torch.bfloat16 if config.master_weights else torch.float32
    model = Transformer(CONFIG).to(dtype)
    if parts:
        shard(model, dtype)
    return model, config.make(model, learning_rate=0.01)


def advance(model, optimizer, seed=0):
    tokens = torch.randint(40, (2, 8), generator=torch.Generator().manual_seed(seed))
    model(tokens, tokens).backward()
    optimizer.step()
    optimizer.zero_grad()


def save(folder, model, optimizer, *, copy=False):
    taken = checkpoint.snapshot(7, model, optimizer, {"note": [1]}, copy=copy)
    return checkpoint.write(folder / "checkpoints", taken, Ranks())


def content(model, optimizer):
    """Weights and states by name, whole."""
    whole = {}
    for name, p in model.named_parameters():
        for key, x in {"": p.detach(), **optimizer.state[p]}.items():
            whole[f"{name} {key}"] = (x.full_tensor() if sharded.is_distributed(x) else x).clone()
    return whole


def assert_same(got, wanted):
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], x) for name, x in wanted.items())


@pytest.mark.parametrize("before", [True, False], ids=["sharded", "whole"])
@pytest.mark.parametrize("after", [True, False], ids=["to sharded", "to whole"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_either_form_is_loaded_as_either(name, before, after, ranks, tmp_path):
    model, optimizer = build(OPTIMIZERS[name], parts=before)
    advance(model, optimizer)
    path = save(tmp_path, model, optimizer, copy=True)
    assert (path / SHARDS).is_dir() == before
    expected = content(model, optimizer)
    advance(model, optimizer, 1)
    other, other_optimizer = build(OPTIMIZERS[name], parts=after)
    assert checkpoint.load(path, other, other_optimizer) == (7, {"note": [1]})
    assert_same(content(other, other_optimizer), expected)
    advance(other, other_optimizer, 1)
    assert_same(content(other, other_optimizer), content(model, optimizer))


def test_a_copy_does_not_follow_training(ranks, tmp_path):
    model, optimizer = build(OptimizerConfig(), parts=True)
    advance(model, optimizer)
    expected = content(model, optimizer)
    taken = checkpoint.snapshot(7, model, optimizer, {}, copy=True)
    advance(model, optimizer, 1)
    path = checkpoint.write(tmp_path, taken, ranks)
    checkpoint.load(path, model, optimizer)
    assert_same(content(model, optimizer), expected)


def test_one_command_makes_it_whole(ranks, tmp_path):
    model, optimizer = build(OptimizerConfig(), parts=True)
    advance(model, optimizer)
    path = save(tmp_path, model, optimizer)
    record = read_record(path)
    before = [read_tensors(path, file, record) for file in FILES]
    in_parts = read_model(path, Transformer).state_dict()
    with lock_folder(tmp_path, resume=True), pytest.raises(RunFolderError, match="is in use"):
        consolidate(tmp_path)
    written = []
    for _ in range(2):  # the second time there is nothing to do
        assert consolidate(tmp_path) == path
        written.append({x.name: (x.stat().st_ino, x.stat().st_mtime_ns) for x in path.iterdir()})
        after = read_record(path)
        assert sorted(x.name for x in path.iterdir()) == [*FILES, "state.json"]
        for file, tensors in zip(FILES, before, strict=True):
            assert_same(read_tensors(path, file, after), tensors)
        assert after | {"files": {}} == record | {"files": {}}
    assert written[0] == written[1]
    assert_same(read_model(path, Transformer).state_dict(), in_parts)
    assert [x.name for x in (tmp_path / "checkpoints").iterdir()] == [path.name]


@pytest.mark.parametrize("parts", [True, False], ids=["by ranks", "by one process"])
@pytest.mark.parametrize("file", [".metadata", "__0_0.distcp"])
@pytest.mark.parametrize("damage", ["missing", "short", "flipped"])
def test_a_damaged_part_is_refused_and_named(damage, file, parts, ranks, tmp_path):
    model, optimizer = build(OptimizerConfig(), parts=True)
    advance(model, optimizer)
    path = save(tmp_path, model, optimizer) / SHARDS / file
    content_of = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "short":
        path.write_bytes(content_of[:-1])
    else:
        content_of[len(content_of) // 2] ^= 1
        path.write_bytes(content_of)
    model, optimizer = build(OptimizerConfig(), parts=parts)
    words = {"missing": "is missing", "short": "bytes instead of", "flipped": "another checksum"}
    with pytest.raises(CheckpointError) as refused:
        checkpoint.load(path.parents[1], model, optimizer)
    assert f"{path} " in str(refused.value)
    assert words[damage] in str(refused.value)
    assert "move the folder step-00000007 elsewhere" in str(refused.value)


def test_a_full_disk_leaves_nothing(ranks, tmp_path, monkeypatch):
    model, optimizer = build(OptimizerConfig(), parts=True)
    advance(model, optimizer)
    path = save(tmp_path, model, optimizer)

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("torch.distributed.checkpoint.filesystem.os.fsync", full)
    taken = checkpoint.snapshot(8, model, optimizer, {}, copy=False)
    with pytest.raises(OSError, match=r"rank 0: .*No space left on device"):
        checkpoint.write(path.parent, taken, ranks)
    assert [x.name for x in path.parent.iterdir()] == [path.name]


def test_recovery_marks_and_checks_sharded_tensors(ranks):
    model, optimizer = build(OptimizerConfig(max_grad_norm=1.0), parts=True)
    recovery = Recovery(RecoveryConfig(), model, 2, print)
    tokens = torch.randint(40, (2, 8))
    model(tokens, tokens).backward()
    before = content(model, optimizer)
    recovery.mark_spike(torch.tensor(torch.inf))
    optimizer.step()
    assert optimizer.skipped == 1
    weights = {name: x for name, x in content(model, optimizer).items() if name in before}
    assert_same(weights, before)
    assert all_finite(model, optimizer)
    sharded.local(model.norm.weight.detach())[0] = torch.inf
    assert not all_finite(model, optimizer)
