"""The residual block: attention, feed-forward layer, and the norms before them.

Axes: B batch, L sequence, D model width, N all heads, H query heads, G key/value heads, K head
width, F feed-forward width.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from tritium.kernels import geglu, qk_norm_rope, relu_squared, swiglu
from tritium.model.attention import attend, float32_on_cpu
from tritium.model.config import ModelConfig
from tritium.model.cpu_linear import Linear
from tritium.model.modules import LayerNorm, RMSNorm, is_hooked
from tritium.model.token_shift import TokenShift


class Block(nn.Module):
    """One residual block; the addition of its input is fused with its normalisation.

    With `parallel_blocks` attention and feed-forward layer read the same norm, and are added at
    once (Wang & Komatsuzaki, GPT-J-6B, 2021).
    """

    def __init__(
        self, config: ModelConfig, residual_dtype: torch.dtype | None = None, layer: int = 0
    ):
        super().__init__()
        self.residual_dtype = residual_dtype
        self.attention_norm = make_norm(config)
        self.attention = Attention(config, layer)
        self.feed_forward_norm = None if config.parallel_blocks else make_norm(config)
        self.feed_forward = FeedForward(config)

    def forward(self, x_BLD, residual_BLD, places, cache=None):
        """Add `x` to the residual stream; return what is to be added next, and the stream."""
        begins = residual_BLD is None
        h_BLD, residual_BLD = self.attention_norm.add(x_BLD, residual_BLD)
        if begins and self.residual_dtype is not None:
            residual_BLD = residual_BLD.to(self.residual_dtype)
        if self.feed_forward_norm is None:
            return self.attention(h_BLD, places, cache) + self.feed_forward(h_BLD), residual_BLD
        h_BLD = self.attention(h_BLD, places, cache)
        h_BLD, residual_BLD = self.feed_forward_norm.add(h_BLD, residual_BLD)
        return self.feed_forward(h_BLD), residual_BLD


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads, and rotary positions if wanted."""

    def __init__(self, config: ModelConfig, layer: int = 0):
        super().__init__()
        D, H, G, K = config.d_model, config.n_heads, config.kv_heads, config.head_width
        self.query_key_value = Linear(D, (H + 2 * G) * K, config.bias)
        self.query_key_value.splits = (H * K, G * K, G * K)
        self.token_shift = TokenShift(G, K) if config.token_shift else None
        self.output = Linear(H * K, D, config.bias)
        self.query_norm = RMSNorm(K, config.norm_eps) if config.qk_norm else None
        self.key_norm = RMSNorm(K, config.norm_eps) if config.qk_norm else None
        self.head_width, self.kv_heads, self.norm_eps = K, G, config.norm_eps
        self.rotates = config.positions == "rope"
        self.windowed = config.window_of(layer) is not None
        self.softcap, self.by = config.attention_softcap, config.attention

    def forward(self, x_BLD, places, cache=None):
        """Return the attention's output `[B, L, D]`; `places` are cos, sin and `Masks`."""
        q, k, v = self.heads(x_BLD, places, cache)
        y = attend(q, k, v, self.mask(places), softcap=self.softcap, by=self.by)
        return self.output(y.transpose(1, 2).flatten(2).to(x_BLD.dtype))

    def mask(self, places):
        """Return the mask of this layer, out of the `places` of `forward`."""
        return places[2].windowed if self.windowed else places[2].full

    def heads(self, x_BLD, places, cache=None):
        """Return queries `[B, H, L, K]`, keys and values `[B, G, S, K]`, the cache's included."""
        cos_LK, sin_LK, masks = places
        packed_BLNK = float32_on_cpu(self.query_key_value(x_BLD)).unflatten(
            -1, (-1, self.head_width)
        )
        if self.token_shift is not None:
            packed_BLNK = self.token_shift(packed_BLNK, masks.follows, cache)
        G, query_norm, key_norm = self.kv_heads, self.query_norm, self.key_norm
        if self.rotates and self._is_plain(query_norm) and self._is_plain(key_norm):
            q_weight, k_weight = (
                None if norm is None else norm.weight for norm in (query_norm, key_norm)
            )
            q_BLHK, k_BLGK, v_BLGK = qk_norm_rope(
                packed_BLNK, cos_LK, sin_LK, q_weight, k_weight, self.norm_eps, kv_heads=G
            )
        else:
            q_BLHK, k_BLGK, v_BLGK = packed_BLNK.split([packed_BLNK.shape[2] - 2 * G, G, G], 2)
            if query_norm is not None and key_norm is not None:
                q_BLHK, k_BLGK = query_norm(q_BLHK), key_norm(k_BLGK)
            if self.rotates:
                packed_BLNK = torch.cat((q_BLHK, k_BLGK, v_BLGK), 2)
                q_BLHK, k_BLGK, v_BLGK = qk_norm_rope(packed_BLNK, cos_LK, sin_LK, kv_heads=G)
        if cache is not None:
            k_BLGK, v_BLGK = cache.append(k_BLGK, v_BLGK)
        return q_BLHK.transpose(1, 2), k_BLGK.transpose(1, 2), v_BLGK.transpose(1, 2)

    def _is_plain(self, norm):
        """Whether a norm may be computed as queries and keys are turned: RMSNorm and no more."""
        usual = type(norm) is RMSNorm and norm.eps == self.norm_eps and norm.weight is not None
        return norm is None or (usual and not is_hooked(norm))


class FeedForward(nn.Module):
    """down(silu(gate(x)) · up(x)), with another activation, or without a gate."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        D, F, bias = config.d_model, config.feed_forward_width, config.bias
        self.activation = ACTIVATIONS[config.activation]
        self.into = "gate_up" if config.gated else "up"
        into = Linear(D, (2 if config.gated else 1) * F, bias)
        into.splits = (F, F) if config.gated else None
        setattr(self, self.into, into)
        self.down = Linear(F, D, bias)

    def forward(self, x_BLD):
        """Return the layer's output, `[B, L, D]`."""
        return self.down(self.activation(getattr(self, self.into)(x_BLD)))


ACTIVATIONS = {
    "swiglu": swiglu,
    "geglu": partial(geglu, approximate="tanh"),
    "gelu": partial(F.gelu, approximate="tanh"),
    "relu_squared": relu_squared,
}
"""Activations by their names in a config; a gated one takes gate and up as one product."""


def make_norm(config: ModelConfig) -> RMSNorm | LayerNorm:
    """Make a norm of the residual stream."""
    if config.norm == "rms":
        return RMSNorm(config.d_model, config.norm_eps)
    return LayerNorm(config.d_model, config.norm_eps, bias=config.bias)
