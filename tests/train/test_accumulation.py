"""Prove that a batch has one loss and one gradient, however it is cut."""

from contextlib import nullcontext

import pytest
import torch
from train_runs import losses

import train
from tritium.model import ModelConfig, Transformer


def test_however_a_batch_is_cut_its_gradient_is_the_same(run, device):
    config = ModelConfig(vocab_size=50, n_layers=2, d_model=32, n_heads=2, max_seq_len=16)
    model = Transformer(config, label_smoothing=0.1, z_loss=1e-3).to(device)
    exact = Transformer(config, label_smoothing=0.1, z_loss=1e-3).to(device).double()
    exact.load_state_dict(model.state_dict())
    tokens, targets = torch.randint(50, (2, 32, 16))
    targets[torch.rand(32, 16) < torch.linspace(0, 0.9, 32)[:, None]] = -100
    loss = exact(tokens.to(device), targets.to(device))
    loss.backward()
    for size in (32, 8, 5, 1):  # 5: the last one has two
        model.zero_grad()
        got = train.accumulate_gradients(model, (tokens, targets), size, nullcontext())
        assert got.item() == pytest.approx(loss.item(), rel=1e-6)
        for x, y in zip(model.parameters(), exact.parameters(), strict=True):
            assert (x.grad - y.grad).norm() <= 2e-6 * y.grad.norm()


def test_micro_batches_change_nothing_but_rounding(run, tmp_path):
    for size in ("4", "3", "1"):
        assert run(tmp_path / size, "--max-steps", "12", "--micro-batch-size", size) == 0
        assert losses(tmp_path / size) == pytest.approx(losses(tmp_path / "4"), abs=2e-5)
