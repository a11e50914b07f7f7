"""Which tokens attend to which, and PyTorch's attention for it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attend(q_BHLK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, mask_B1LS: Tensor | None) -> Tensor:
    """Return softmax(q · kᵀ / √K) · v, `[B, H, L, K]`, over the keys where the mask is True.

    Without a mask it is causal.
    """
    dtype = q_BHLK.dtype
    if q_BHLK.device.type == "cpu" and dtype == torch.bfloat16:
        # Its gradient would take up to eight times as long: [8, 4, 64, 16] 3.0 ms, not 0.36 ms, on
        # one core of an AMD EPYC (Zen 5).
        q_BHLK, k_BGSK, v_BGSK = q_BHLK.float(), k_BGSK.float(), v_BGSK.float()
    with torch.autocast(q_BHLK.device.type, enabled=False):
        y_BHLK = F.scaled_dot_product_attention(
            q_BHLK, k_BGSK, v_BGSK, mask_B1LS,
            is_causal=mask_B1LS is None and q_BHLK.shape[2] > 1,
            enable_gqa=q_BHLK.shape[1] != k_BGSK.shape[1],
        )  # fmt: skip
    return y_BHLK.to(dtype)


def document_mask(positions_BL: Tensor) -> Tensor:
    """Return which tokens each token attends to, `[B, 1, L, L]`: the earlier ones of its document.

    Args:
        positions_BL: of each token in its document, 0 where one begins.
    """
    document_BL = (positions_BL == 0).cumsum(-1)
    return (document_BL.unsqueeze(-1) == document_BL.unsqueeze(-2)).tril().unsqueeze(1)
