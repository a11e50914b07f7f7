"""Visibility of tokens to each other: causality, documents, sliding windows; dense or in blocks.

A token at place i of a row sees those at places j <= i of its own document, and in a layer with a
window w (Beltagy et al., "Longformer", 2020. https://arxiv.org/abs/2004.05150) only j > i - w.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from tritium.model.config import ModelConfig
from tritium.model.cpu_linear import sees_through

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

    Mask = Tensor | BlockMask | None

BLOCK = 128  # tokens of a block, FlexAttention's own choice
LEAST_WIDTH = 16  # of a head that FlexAttention takes


class Masks(NamedTuple):
    """Masks of the two kinds of layers, as `attention.attend` takes them."""

    full: Mask
    """The mask of layers that see every earlier token."""
    windowed: Mask
    """The mask of layers with the window of the config."""
    follows: Tensor | None = None
    """Whether the token before is of the same document, `[B, L]`; None where each row is one
    document, or no layer asks."""


def make_masks(
    config: ModelConfig, L: int, S: int, positions_BS: Tensor | None, like: Tensor
) -> Masks:
    """Return the masks of the last L of S tokens.

    Args:
        config: the model's shape.
        L: tokens of each row that attend; fewer than S behind a cache.
        S: tokens of each row that are attended to.
        positions_BS: position of each token in its document, 0 where one begins; None where each
            row is one document.
        like: a tensor of the device and dtype of the residual stream.
    """
    device = like.device
    document_BS = None if positions_BS is None else document_numbers(positions_BS)
    make = block_mask if _in_blocks(config, L, S, document_BS, like) else dense_mask
    if make is block_mask and document_BS is None and config.attention_softcap is None:
        full = None  # its layers are only causal
    else:
        full = make(L, S, device, document_BS)
    follows_BL = None
    if config.token_shift and positions_BS is not None:
        follows_BL = positions_BS[:, positions_BS.shape[1] - L :] != 0
    if config.window is None:
        return Masks(full, None, follows_BL)
    # A cache returns no key that the first of the new tokens cannot see.
    S = S if L == S else min(S, L + config.window - 1)
    document_BS = None if document_BS is None else document_BS[:, document_BS.shape[1] - S :]
    return Masks(full, make(L, S, device, document_BS, config.window), follows_BL)


def _in_blocks(
    config: ModelConfig, L: int, S: int, document_BS: Tensor | None, like: Tensor
) -> bool:
    """Whether FlexAttention is to attend.

    The choice is made here alone. PyTorch's fused operators know causality, but neither documents,
    windows nor a softcap: with a dense mask they read L · L elements of it, and what is masked is
    multiplied all the same. FlexAttention, compiled for a GPU, skips blocks in which nothing is
    seen. What it does not take is attended with a dense mask: few tokens, as those behind a cache,
    narrow heads, float64, and what torch.func transforms. On a GPU it is unmeasured.
    """
    others = document_BS, config.window, config.attention_softcap
    return (
        like.device.type == "cuda"
        and any(x is not None for x in others)
        and config.attention == "sdpa"
        and config.head_width >= LEAST_WIDTH
        and like.dtype != torch.float64
        and L == S
        and L >= BLOCK
        and not sees_through()
    )


def document_numbers(positions_BL: Tensor) -> Tensor:
    """Return the number of each token's document in its row.

    Args:
        positions_BL: position of each token in its document, 0 where one begins.
    """
    return (positions_BL == 0).cumsum(-1)


def dense_mask(
    L: int, S: int, device: torch.device, document_BS: Tensor | None = None,
    window: int | None = None,
) -> Tensor | None:  # fmt: skip
    """Return the mask of the last L of S tokens, `[L, S]` or `[B, 1, L, S]`, True where one sees.

    None where it would only be causal, or one token sees all: what `attend` takes None for.

    Args:
        L: at most S.
        S: tokens that are attended to; with a window and L < S at most L + window - 1.
        device: where the mask goes.
        document_BS: number of each token's document, as of `document_numbers`.
        window: tokens that one sees, itself included.
    """
    if document_BS is None and (window is None or L == 1):
        return None
    mask_LS = torch.ones(L, S, dtype=torch.bool, device=device).tril(S - L)
    if window is not None:
        mask_LS = mask_LS.triu(S - L - window + 1)
    if document_BS is None:
        return mask_LS
    same_BLS = document_BS[:, S - L :].unsqueeze(-1) == document_BS.unsqueeze(-2)
    return (same_BLS & mask_LS).unsqueeze(1)


def block_mask(
    L: int, S: int, device: torch.device, document_BS: Tensor | None = None,
    window: int | None = None,
) -> BlockMask:  # fmt: skip
    """Return the mask of `dense_mask` as FlexAttention takes it, from the ends of its blocks alone.

    Places and documents grow along a row. So a block of queries sees something of a block of keys
    if its first query sees the last key, and all of an earlier block if its last query sees the
    first key; nothing of the size L · S is made.

    Args:
        L: as S; the others are those of `dense_mask`.
    """
    from torch.nn.attention.flex_attention import BlockMask

    assert L == S
    first_N = torch.arange(0, L, BLOCK, device=device)
    last_N = (first_N + BLOCK - 1).clamp(max=L - 1)
    some_NM = last_N[:, None] >= first_N
    whole = last_N - first_N == BLOCK - 1  # what is cut off by the end is looked at one by one
    all_NM = (first_N[:, None] >= last_N) & whole & whole[:, None]
    if window is not None:
        some_NM = some_NM & (first_N[:, None] - last_N < window)
        all_NM = all_NM & (last_N[:, None] - first_N < window)
    some_BNM, all_BNM = some_NM[None], all_NM[None]
    if document_BS is not None:
        first_BN, last_BN = document_BS[:, first_N], document_BS[:, last_N]
        some_BNM = some_BNM & (first_BN[:, :, None] <= last_BN[:, None])
        all_BNM = all_BNM & (last_BN[:, :, None] == first_BN[:, None])

    def sees(b, _h, i, j):
        seen = i >= j
        if window is not None:
            seen = seen & (i - j < window)
        if document_BS is not None:
            seen = seen & (document_BS[b, i] == document_BS[b, j])
        return seen

    return BlockMask.from_kv_blocks(
        *_listed(some_BNM & ~all_BNM), *_listed(all_BNM), BLOCK, sees, (L, S)
    )


def _listed(blocks_BNM: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many key blocks each query block has, and their numbers, first of all others."""
    order_BNM = blocks_BNM.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    count_BN = blocks_BNM.sum(-1, dtype=torch.int32)
    return count_BN.unsqueeze(1), order_BNM.to(torch.int32).unsqueeze(1)
