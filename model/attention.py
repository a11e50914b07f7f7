"""Which tokens attend to which, and PyTorch's attention for it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def widen(x: Tensor) -> Tensor:
    """Return `x`, in float32 if it is bfloat16 on a CPU, for everything between two projections.

    Attention's gradient takes up to eight times as long in bfloat16 there: for `[8, 4, 64, 16]`
    3.0 ms, not 0.36 ms, on one core of an AMD EPYC (Zen 5).
    """
    return x.float() if x.device.type == "cpu" and x.dtype == torch.bfloat16 else x


def attend(q_BHLK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, mask_B1LS: Tensor | None) -> Tensor:
    """Return softmax(q · kᵀ / √K) · v, `[B, H, L, K]`, over the keys where the mask is True.

    Without a mask it is causal. It is computed in the dtype of `q_BHLK`, also under autocast.
    """
    with torch.autocast(q_BHLK.device.type, enabled=False):
        return F.scaled_dot_product_attention(
            q_BHLK, k_BGSK.to(q_BHLK.dtype), v_BGSK.to(q_BHLK.dtype), mask_B1LS,
            is_causal=mask_B1LS is None and q_BHLK.shape[2] > 1,
            enable_gqa=q_BHLK.shape[1] != k_BGSK.shape[1],
        )  # fmt: skip


def document_mask(positions_BL: Tensor) -> Tensor:
    """Return which tokens each token attends to, `[B, 1, L, L]`: the earlier ones of its document.

    Args:
        positions_BL: of each token in its document, 0 where one begins.
    """
    document_BL = (positions_BL == 0).cumsum(-1)
    return (document_BL.unsqueeze(-1) == document_BL.unsqueeze(-2)).tril().unsqueeze(1)
