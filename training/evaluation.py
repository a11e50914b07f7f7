"""Validation loss, in nats per token and bits per byte."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from tritium.model.transformer import Transformer
from tritium.training.run import random_state


@torch.no_grad()
def evaluate(
    model: Transformer,
    batches: Iterable[tuple[Tensor, ...]],
    byte_lengths: Tensor,
    cast: AbstractContextManager,
    total: Callable[[Tensor], Tensor] = lambda x: x,
) -> dict[str, float]:
    """Measure the mean loss over all targets, without label smoothing, z-loss and dropout.

    The model is put back to training, and the random number generators to where they were. The
    host only launches: batches are copied from pinned memory while the device computes, and their
    losses are read once, at the end.

    Args:
        model: on any device.
        batches: what the model takes: ids, targets of which -100 does not count, and perhaps
            positions, each `[B, L]` on the host.
        byte_lengths: `[V]`, bytes of each token id, on the host.
        cast: around every forward pass.
        total: adds a tensor over the ranks that share the batches.

    Returns:
        val_loss in nats per token, and val_bits_per_byte.
    """
    device = model.embedding.weight.device
    nats = torch.zeros((), dtype=torch.float64, device=device)
    n_tokens = n_bytes = 0
    model.eval()
    with random_state.preserved(device):
        for batch in batches:
            counted = batch[1][batch[1] >= 0]
            with cast:
                loss = model(*(_copied(x, device) for x in batch))
            nats += loss.double() * counted.numel()
            n_tokens += counted.numel()
            n_bytes += int(byte_lengths[counted].sum())
    model.train()
    n_tokens, n_bytes = total(torch.tensor([n_tokens, n_bytes])).tolist()
    loss = total(nats).item() / n_tokens
    return {"val_loss": loss, "val_bits_per_byte": loss * n_tokens / n_bytes / math.log(2)}


def _copied(x: Tensor, device: torch.device) -> Tensor:
    """Return `x` on the device; from memory that is not pinned the host would wait for a copy."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)
