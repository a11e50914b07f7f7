"""Validation loss, in nats per token and bits per byte; early stopping; the figure of the end.

The validation documents have two halves. A run chooses by one: its best checkpoint, when to stop,
and whoever compares runs. The other is read once, at the end, and its loss is what a run reports.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, suppress
from pathlib import Path

import torch
from torch import Tensor

from tritium.model.saved import CheckpointError, checkpoints, read_model, step_of
from tritium.model.transformer import Transformer
from tritium.training.run import random_state


@torch.no_grad()
def evaluate(
    model: Transformer,
    batches: Iterable[tuple[Tensor, ...]],
    byte_lengths: Tensor,
    cast: AbstractContextManager,
    total: Callable[[Tensor], Tensor] = lambda x: x,
    name: str = "val",
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
        name: of what is measured.

    Returns:
        val_loss in nats per token, and val_bits_per_byte, or with another name than val.
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
    bits_per_byte = loss * n_tokens / n_bytes / math.log(2)
    return {f"{name}_loss": loss, f"{name}_bits_per_byte": bits_per_byte}


def stalled(entries: list[dict], best_step: int) -> int:
    """Return how many validations in the log came after the best one."""
    return sum("val_loss" in entry and entry["step"] > best_step for entry in entries)


def kept_model(model: Transformer, run: Path, step: int, best_step: int) -> tuple[Transformer, int]:
    """Return the weights that a run is loaded with, and their step.

    Those of its best checkpoint, if that is of an earlier step and can be read; else the last ones.
    """
    for checkpoint in checkpoints(run / "checkpoints"):
        if step_of(checkpoint) == best_step < step:
            with suppress(CheckpointError, torch.OutOfMemoryError):
                return read_model(checkpoint, Transformer).to(model.device), best_step
    return model, step


def _copied(x: Tensor, device: torch.device) -> Tensor:
    """Return `x` on the device; from memory that is not pinned the host would wait for a copy."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)
