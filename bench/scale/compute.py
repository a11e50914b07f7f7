"""Time of a step's arithmetic on one GPU, from the rooflines of its operations.

Products run at the reachable rate of `kernels.roofline`, causal attention at the same rate with
half of its products: 2 · B · H · L² · K operations forward, 2.5 times as many backward, which
recomputes the scores (Dao, "FlashAttention-2", 2023, section 4.1. https://arxiv.org/abs/2307.08691).
Everything else moves its bytes at the copy rate.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from tritium.kernels.roofline import Bound, Device, explain, find_device
from tritium.model import ModelConfig
from tritium.model.shapes import num_parameters

MEASURED = 0.1208
"""Seconds of a training step of GPT-2 124M's shape on an H100, batch 64 x 1024, two micro-batches,
one CUDA graph: the first row of bench/results/h100_step.md."""


@dataclass(frozen=True)
class BlockTime:
    """Seconds of a block, for one micro-batch."""

    forward: float
    backward: float
    elementwise: float
    """Part of the forward pass outside products and attention: what `selective` recomputes."""


def block_time(
    config: ModelConfig, sequences: int, device: Device, dtype: torch.dtype, width: int
) -> BlockTime:
    """Return the least time of a block.

    Args:
        config: the part of the model that one rank has.
        sequences: of a micro-batch.
        device: its rates.
        dtype: of the products and activations.
        width: features of the residual stream.
    """
    L, H, G, K = config.max_seq_len, config.n_heads, config.kv_heads, config.head_width
    T, F = sequences * L, config.feed_forward_width
    rate = device.matrix_16 if dtype.itemsize == 2 else device.matrix_32
    weights = width * K * (2 * H + 2 * G) + (3 if config.gated else 2) * width * F
    products = 2 * T * weights / rate
    attention = 2 * sequences * H * L * L * K / rate
    norm = explain(
        f"add_{config.norm}_norm", T=T, D=width,
        dtype=dtype, device=device,
    )  # fmt: skip
    name = {"gelu": "relu_squared"}.get(config.activation, config.activation)
    activation = explain(name, T=T, F=F, dtype=dtype, device=device)
    parts = [norm, norm, activation]
    if config.qk_norm and config.positions == "rope":
        parts.append(explain("qk_norm_rope", T=T, H=H, G=G, K=K, dtype=dtype, device=device))
    elif config.positions == "rope":
        parts.append(explain("rope", T=T, H=H + G, K=K, dtype=dtype, device=device))
    forward = sum(_seconds(x.forward) for x in parts)
    backward = sum(_seconds(x.backward) for x in parts)
    return BlockTime(
        products + attention + forward, 2 * products + 2.5 * attention + backward, forward
    )


def ends_time(
    config: ModelConfig, sequences: int, device: Device, dtype: torch.dtype, width: int
) -> float:
    """Return the least time of embedding and loss, forward and backward, for one micro-batch."""
    T, V = sequences * config.max_seq_len, config.vocab_size
    parts = [
        explain("embedding", T=T, D=width, V=V, dtype=dtype, device=device),
        explain("linear_cross_entropy", T=T, D=width, V=V, dtype=dtype, device=device),
    ]
    return sum(_seconds(x.both) for x in parts)


def optimizer_time(elements: int, device: Device) -> float:
    """Return the least time of AdamW with clipping on so many float32 weights."""
    return _seconds(explain("adamw_clipped", N=elements, dtype=torch.float32, device=device).both)


def _seconds(bound: Bound | None) -> float:
    return 0.0 if bound is None else bound.microseconds / 1e6


@cache
def reached() -> float:
    """Return the share of the rooflines' speed that the measured step reached."""
    config = ModelConfig(vocab_size=50304, n_layers=12, d_model=768, n_heads=12, max_seq_len=1024)
    device, narrow, width = find_device("H100"), torch.bfloat16, config.d_model
    block = block_time(config, 32, device, narrow, width)
    ends = ends_time(config, 32, device, narrow, width)
    step = optimizer_time(num_parameters(config), device)
    bound = 2 * (config.n_layers * (block.forward + block.backward) + ends) + step
    return bound / MEASURED
