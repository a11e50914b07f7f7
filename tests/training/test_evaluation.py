"""Prove that an evaluation only launches: the host reads what was computed once, at the end."""

import math
from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tritium.model import ModelConfig, Transformer
from tritium.training.evaluation import evaluate

CONFIG = ModelConfig(vocab_size=23, n_layers=2, d_model=16, n_heads=2, max_seq_len=8)


class Recorder(TorchDispatchMode):
    """Records operators; of the device's are all numbers that are not whole."""

    def __init__(self):
        super().__init__()
        self.of_device: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        x = args[0] if args else None
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            self.of_device.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def test_losses_are_read_once_behind_the_last_batch():
    torch.manual_seed(1)
    model = Transformer(CONFIG).double()
    batches, sums = [], torch.zeros(3, dtype=torch.float64)
    for rows in (2, 2, 1, 2):
        tokens, targets = torch.randint(23, (2, rows, 8))
        targets[torch.rand(rows, 8) < 0.3] = -100
        batches.append((tokens, targets))
        counted = targets >= 0
        logits = model(tokens).detach()[counted].log_softmax(-1)
        sums += torch.tensor([
            -logits.gather(-1, targets[counted][:, None]).sum().item(), counted.sum(),
            (targets[counted] + 1).sum(),
        ])  # fmt: skip
    with Recorder() as recorder:
        found = evaluate(model, batches, torch.arange(1, 24), nullcontext())
    nats, tokens, n_bytes = sums.tolist()
    assert found["val_loss"] == pytest.approx(nats / tokens, rel=1e-6)
    assert found["val_bits_per_byte"] == pytest.approx(nats / n_bytes / math.log(2), rel=1e-6)
    reads = [name for name in recorder.of_device if "_local_scalar_dense" in name]
    assert reads == ["aten::_local_scalar_dense"]
    assert recorder.of_device[-1] == "aten::_local_scalar_dense"
    assert model.training


def test_each_batch_is_the_same_launches():
    model, counts = Transformer(CONFIG), []
    for n in (1, 2, 3):
        batches = [tuple(torch.ones(2, 2, 8, dtype=torch.long))] * n
        with Recorder() as recorder:
            evaluate(model, batches, torch.ones(23, dtype=torch.long), nullcontext())
        counts.append(len(recorder.of_device))
    assert counts[2] - counts[1] == counts[1] - counts[0] > 20
