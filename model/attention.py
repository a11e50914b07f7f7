"""Softmax attention: by PyTorch's fused operators, by FlexAttention, or with all weights made."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tritium.kernels import softmax
from tritium.model.cpu_linear import sees_through

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

    from tritium.model.masks import Mask


def float32_on_cpu(x: Tensor) -> Tensor:
    """Return `x`, in float32 if it is bfloat16 on a CPU, for everything between two projections.

    Attention's gradient takes up to eight times as long in bfloat16 there: for `[8, 4, 64, 16]`
    3.0 ms, not 0.36 ms, on one core of an AMD EPYC (Zen 5).
    """
    return x.float() if x.device.type == "cpu" and x.dtype == torch.bfloat16 else x


def as_multiplied(x: Tensor) -> Tensor:
    """Return `x` on a GPU in the dtype that autocast multiplies in, elsewhere as it is."""
    return x.to(multiplied_dtype(x))


def multiplied_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of `as_multiplied(x)`."""
    if x.device.type in ("cpu", "meta") or not torch.is_autocast_enabled(x.device.type):
        return x.dtype
    return torch.get_autocast_dtype(x.device.type)


def attend(
    q_BHLK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, mask: Mask, *,
    softcap: float | None = None, by: str = "sdpa",
) -> Tensor:  # fmt: skip
    """Return softmax(q · kᵀ / √K) · v, `[B, H, L, K]`, over the keys that the mask shows.

    It is computed in the dtype of `q_BHLK`, also under autocast.

    Args:
        q_BHLK: queries, those of the last L of S tokens.
        k_BGSK: keys; each of the G heads serves H / G heads of queries.
        v_BGSK: values.
        mask: of `masks.make_masks`; a Tensor is True where a query sees a key, and broadcasts to
            `[B, H, L, S]`. None: causal, each query sees the keys up to its own.
        softcap: bounds the scores, softcap · tanh(q · kᵀ / √K / softcap), before the softmax.
        by: "sdpa", or "softmax" for all weights made by `tritium.kernels.softmax`.
    """
    device = q_BHLK.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return attend(q_BHLK, k_BGSK, v_BGSK, mask, softcap=softcap, by=by)
    k_BGSK, v_BGSK = k_BGSK.to(q_BHLK.dtype), v_BGSK.to(q_BHLK.dtype)
    if mask is not None and not isinstance(mask, Tensor):
        return _blockwise(q_BHLK, k_BGSK, v_BGSK, mask, softcap)
    if softcap is None and by == "sdpa":
        return _fused(q_BHLK, k_BGSK, v_BGSK, mask)
    p_BHLS = attention_weights(q_BHLK, k_BGSK, mask, softcap)
    return _product(p_BHLS, v_BGSK)


def attention_weights(
    q_BHLK: Tensor, k_BGSK: Tensor, mask_BHLS: Tensor | None, softcap: float | None = None
) -> Tensor:
    """Return the weights with which `attend` sums values, `[B, H, L, S]`; each row's sum is 1."""
    scores_BHLS, scale = _product(q_BHLK, k_BGSK.mT), int(q_BHLK.shape[-1]) ** -0.5
    if softcap is not None:
        scores_BHLS, scale = softcap * (scores_BHLS * (scale / softcap)).tanh(), 1.0
    if mask_BHLS is not None:
        scores_BHLS = scores_BHLS.masked_fill(~mask_BHLS, -torch.inf)
    return softmax(scores_BHLS, -1, scale=scale, causal=True)


def _product(x_BHLS: Tensor, y_BGSK: Tensor) -> Tensor:
    """Return x · y, `[B, H, L, K]`: each of the G heads of y serves H / G heads of x."""
    # Not as one product of H / G · L rows: torch.export would take L for a constant.
    return (x_BHLS.unflatten(1, (y_BGSK.shape[1], -1)) @ y_BGSK.unsqueeze(2)).flatten(1, 2)


def _fused(q_BHLK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, mask_BHLS: Tensor | None) -> Tensor:
    L, S = q_BHLK.shape[2], k_BGSK.shape[2]
    if L == S:
        causal = mask_BHLS is None
    else:  # PyTorch's own causal mask puts the first query at the first key
        causal = False
        if mask_BHLS is None and L > 1:
            mask_BHLS = torch.ones(L, S, dtype=torch.bool, device=q_BHLK.device).tril(S - L)
    # In a transform fused attention is batched in a loop, and has one derivative.
    with sdpa_kernel(SDPBackend.MATH) if sees_through() else nullcontext():
        return F.scaled_dot_product_attention(
            q_BHLK, k_BGSK, v_BGSK, mask_BHLS, is_causal=causal,
            enable_gqa=bool(q_BHLK.shape[1] != k_BGSK.shape[1]),  # no tensor in torch.jit.trace
        )  # fmt: skip


def _blockwise(
    q_BHLK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, mask: BlockMask, softcap: float | None
) -> Tensor:
    run = _flex_attention(torch.compiler.is_compiling())
    return run(
        q_BHLK, k_BGSK, v_BGSK, score_mod=None if softcap is None else _capped(softcap),
        block_mask=mask, enable_gqa=q_BHLK.shape[1] != k_BGSK.shape[1],
    )  # fmt: skip


@functools.cache
def _flex_attention(is_compiling: bool) -> Callable:
    """Return FlexAttention; alone it makes all scores, so it is compiled where nothing else is."""
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention if is_compiling else torch.compile(flex_attention)


@functools.cache
def _capped(softcap: float) -> Callable:
    def capped(score: Tensor, _b, _h, _i, _j) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return capped
