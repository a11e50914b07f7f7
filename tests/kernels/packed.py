"""Packed projections, with the tables and weights that qk_norm_rope takes."""

from contextlib import nullcontext
from functools import partial

import torch

from tritium.kernels.runtime import references

PATHS = {"kernel": nullcontext, "hand-written": partial(references, "qk_norm_rope")}


def tables(S, J, device, dtype=torch.float32):
    """Cosines and sines as a model makes them."""
    frequency_J = 10000.0 ** (-torch.arange(J, device=device, dtype=dtype) / J)
    angle_SJ = torch.arange(S, device=device)[:, None] * frequency_J
    return angle_SJ.cos(), angle_SJ.sin()


def drawn(device, L=5, H=4, G=2, K=8, J=4, norm=True, batch=(2,), dtype=torch.float32):
    """A projection, its tables and its weights."""
    qkv = torch.randn(*batch, L, H + 2 * G, K, device=device, dtype=dtype)
    weights = [torch.randn(K, device=device, dtype=dtype) for _ in range(2 * norm)]
    wide = torch.promote_types(dtype, torch.float32)
    return qkv, *tables(L, J, device, wide), *weights
