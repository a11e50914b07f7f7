"""PyTorch's attention, and the masks of causality and documents."""

from __future__ import annotations

from contextlib import ExitStack

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tritium.model.cpu_linear import sees_through


def float32_on_cpu(x: Tensor) -> Tensor:
    """Return `x`, in float32 if it is bfloat16 on a CPU, for everything between two projections.

    Attention's gradient takes up to eight times as long in bfloat16 there: for `[8, 4, 64, 16]`
    3.0 ms, not 0.36 ms, on one core of an AMD EPYC (Zen 5).
    """
    return x.float() if x.device.type == "cpu" and x.dtype == torch.bfloat16 else x


def as_multiplied(x: Tensor) -> Tensor:
    """Return `x` on a GPU in the dtype that autocast multiplies in, elsewhere as it is."""
    if x.device.type in ("cpu", "meta") or not torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))


def attend(q_BHLK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, mask_BHLS: Tensor | None) -> Tensor:
    """Return softmax(q · kᵀ / √K) · v, `[B, H, L, K]`, over the keys where the mask is True.

    Without a mask it is causal, the L queries being those of the last L keys. It is computed in the
    dtype of `q_BHLK`, also under autocast.
    """
    L, S = q_BHLK.shape[2], k_BGSK.shape[2]
    if L == S:
        causal = mask_BHLS is None
    else:  # PyTorch's own causal mask puts the first query at the first key
        causal = False
        if mask_BHLS is None and L > 1:
            mask_BHLS = _not_later(L, S, q_BHLK.device)
    device = q_BHLK.device.type
    with ExitStack() as stack:
        if device != "meta" and torch.is_autocast_enabled(device):
            stack.enter_context(torch.autocast(device, enabled=False))
        if sees_through():  # fused attention is batched in a loop, and has one derivative
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        return F.scaled_dot_product_attention(
            q_BHLK, k_BGSK.to(q_BHLK.dtype), v_BGSK.to(q_BHLK.dtype), mask_BHLS, is_causal=causal,
            enable_gqa=q_BHLK.shape[1] != k_BGSK.shape[1],
        )  # fmt: skip


def document_numbers(positions_BL: Tensor) -> Tensor:
    """Return the number of each token's document in its row.

    Args:
        positions_BL: position of each token in its document, 0 where one begins.
    """
    return (positions_BL == 0).cumsum(-1)


def document_mask(document_BS: Tensor, L: int) -> Tensor:
    """Return the earlier tokens of its document for each of the last L tokens, `[B, 1, L, S]`.

    Args:
        document_BS: number of each token's document.
        L: at most S.
    """
    S = document_BS.shape[-1]
    same_BLS = document_BS[:, S - L :].unsqueeze(-1) == document_BS.unsqueeze(-2)
    return (same_BLS & _not_later(L, S, document_BS.device)).unsqueeze(1)


def _not_later(L: int, S: int, device: torch.device) -> Tensor:
    """Causal mask of the last L of S tokens, `[L, S]`."""
    return torch.ones(L, S, dtype=torch.bool, device=device).tril(S - L)
