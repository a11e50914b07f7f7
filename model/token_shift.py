"""Keys and values that know the token before.

    z_t = u_t + w · u_{t-1}     u the projected keys or values, w a weight for each column

The first token of a document has none before it. Then a head can look for what followed a token
like the present one, and so copy, in its first layer: without a shift that takes a layer before it
which has learned to look one place back. Keys are normalised and turned afterwards.

Peng et al., "RWKV", 2023. https://arxiv.org/abs/2305.13048 (the name, there of the layer's input)
So et al., "Primer", 2021. https://arxiv.org/abs/2109.08668 (queries, keys, values; three taps)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from tritium.model.kv_cache import LayerCache


class TokenShift(nn.Module):
    """Adds to each token's keys and values, column by column, a share of the token's before.

    Args:
        kv_heads: G, heads of keys, and of values.
        head_width: K.

    Attributes:
        weight: `[2 · G · K]`: the shares, of the keys' columns, then of the values'.
        splits: how many of them are of keys, and of values.
    """

    def __init__(self, kv_heads: int, head_width: int):
        super().__init__()
        self.splits = (kv_heads * head_width,) * 2
        self.weight = nn.Parameter(torch.empty(sum(self.splits)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Take nothing of the token before, at first."""
        nn.init.zeros_(self.weight)

    def forward(
        self, packed_BLNK: Tensor, follows_BL: Tensor | None, cache: LayerCache | None = None
    ) -> Tensor:
        """Return the projected heads with keys and values shifted.

        Args:
            packed_BLNK: heads of queries, then of keys, then of values.
            follows_BL: True where the token before, in the row or the cache, is of the same
                document, `[B, L]`; None where all are, except for the first of a row.
            cache: takes the keys and values as they are projected.

        Returns:
            `[B, L, N, K]` in the same dtype; computed in the wider of it and the weight's.
        """
        n_shifted = self.weight.numel() // packed_BLNK.shape[-1]
        q_BLHK, u_BLMK = packed_BLNK.tensor_split([packed_BLNK.shape[2] - n_shifted], 2)
        before_BLMK = preceding(u_BLMK) if cache is None else cache.preceding(u_BLMK)
        if follows_BL is not None:
            before_BLMK = before_BLMK.masked_fill(~follows_BL[..., None, None], 0)
        weight_MK = self.weight.view(n_shifted, -1)
        shifted_BLMK = (u_BLMK + weight_MK * before_BLMK).to(u_BLMK.dtype)
        return torch.cat((q_BLHK, shifted_BLMK), 2)


def preceding(x_BLMK: Tensor) -> Tensor:
    """Return what comes one place before each in a row, zeros before the first."""
    # Padded before it is cut: torch.export would take a length of L - 1 for another one than 1.
    return F.pad(x_BLMK, (0, 0, 0, 0, 1, 0))[:, :-1]
