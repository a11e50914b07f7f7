"""A decoder-only transformer: pre-norm residual blocks, rotary positions, SwiGLU, grouped queries.

Axes: B batch, L sequence, D model width, H query heads, G key/value heads, K head width,
F feed-forward width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from kernels import add_rms_norm, dropout_add, linear_cross_entropy, rms_norm, rope, swiglu

from . import activations, sampling
from .attention import attend, document_mask, widen
from .linear import Linear


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a model. Raises ValueError where the sizes do not fit each other."""

    vocab_size: int = 4096
    """Number of token ids."""
    n_layers: int = 4
    """Number of residual blocks."""
    d_model: int = 256
    """Width of the residual stream."""
    n_heads: int = 4
    """Number of query heads; must divide d_model."""
    n_kv_heads: int | None = None
    """Number of key and value heads, a divisor of n_heads. None: as many as n_heads."""
    d_ff: int | None = None
    """Width of the feed-forward layer. None: 8/3 of d_model, rounded up to a multiple of 64."""
    max_seq_len: int = 256
    """Context length in tokens."""
    rope_theta: float = 10000.0
    """Base of the rotary wavelengths."""
    norm_eps: float = 1e-6
    """Added to the mean square in every RMSNorm."""
    qk_norm: bool = True
    """Normalise queries and keys head by head."""
    tie_embeddings: bool = True
    """Use the embedding as output layer too."""
    softcap: float | None = None
    """Bound of the logits, softcap · tanh(logits / softcap). None: unbounded."""

    def __post_init__(self):
        for name in ("vocab_size", "n_layers", "d_model", "n_heads", "max_seq_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.d_model % self.n_heads:
            raise ValueError(
                f"n_heads must divide d_model, got {self.n_heads} heads for width {self.d_model}; "
                f"try n_heads={_nearest_divisor(self.d_model, self.n_heads)}"
            )
        if self.head_width % 2:
            raise ValueError(
                f"d_model / n_heads must be even for rotary positions, got {self.head_width}"
            )
        if self.kv_heads < 1 or self.n_heads % self.kv_heads:
            raise ValueError(
                f"n_kv_heads must divide n_heads, got {self.kv_heads} for {self.n_heads} heads"
            )
        if self.feed_forward_width < 1:
            raise ValueError(f"d_ff must be at least 1, got {self.d_ff}")
        if self.softcap is not None and self.softcap <= 0:
            raise ValueError(f"softcap must be above 0, or None for no cap, got {self.softcap}")

    @property
    def head_width(self) -> int:
        """K, the width of one head."""
        return self.d_model // self.n_heads

    @property
    def kv_heads(self) -> int:
        """G, the number of key and value heads."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def feed_forward_width(self) -> int:
        """F, the width of the feed-forward layer."""
        return -(-8 * self.d_model // 3 // 64) * 64 if self.d_ff is None else self.d_ff


class Transformer(nn.Module):
    """A language model over token ids.

    Args:
        config: its shape.
        activation_checkpointing: "none", "selective", "every-N" or "full": what of each block is
            kept for the backward pass; the rest is computed again. See `model.activations`.
        dropout: probability with which an element of what a block adds to the residual stream is
            left out, in training mode.
        label_smoothing: share of the target's probability that is spread over the vocabulary, in
            the loss of training mode.
        z_loss: weight of the squared logarithm of the softmax's denominator in that loss.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        activation_checkpointing: str = "none",
        dropout: float = 0.0,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
    ):
        super().__init__()
        activations.check_policy(activation_checkpointing, config.n_layers)
        self.config = config
        self.activation_checkpointing = activation_checkpointing
        self.dropout, self.label_smoothing, self.z_loss = dropout, label_smoothing, z_loss
        self.cos_LK: Tensor
        self.sin_LK: Tensor
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config, dropout) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps, dropout)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        cos_LK, sin_LK = rotary_tables(config.max_seq_len, config.head_width, config.rope_theta)
        self.register_buffer("cos_LK", cos_LK, persistent=False)
        self.register_buffer("sin_LK", sin_LK, persistent=False)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Draw the weights afresh: normal, and far smaller where a block adds its output.

        There by depth, and by ten besides, so that the stream begins nearly as the embedding. Zeros
        instead of the depth rule alone gave 2.11 against 2.16 bits per byte in 45 s of training on
        two cores (4 layers, one seed); a tenth was chosen to keep the rule, not compared by itself.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5 * 0.5)
            elif isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)
        for module in self.modules():
            if isinstance(module, Block):
                for layer in (module.attention.output, module.feed_forward.down):
                    layer.weight.div_(10 * (2 * self.config.n_layers) ** 0.5)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(
        self, tokens: Tensor, targets: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """Compute logits, or the loss where `targets` are given.

        Args:
            tokens: `[B, L]` ids below vocab_size; L at most max_seq_len.
            targets: `[B, L]` ids, or -100 where a token does not count; None for logits.
            positions: `[B, L]`, of each token in its document, 0 where one begins: a token attends
                to those before it in its own document, and the result is that of each document by
                itself. None: each row is one document.

        Returns:
            Without targets: logits `[B, L, V]`. With targets: their mean cross-entropy in nats, a
            float32 scalar; the logits are never stored whole. In training mode it is the loss with
            label smoothing and z-loss.

        Raises:
            ValueError: L exceeds max_seq_len.
        """
        h_BLD = self.hidden(tokens, positions=positions)
        if targets is None:
            return self.logits(h_BLD)
        return linear_cross_entropy(
            h_BLD, self.head.weight, targets, softcap=self.config.softcap,
            label_smoothing=self.label_smoothing if self.training else 0.0,
            z_loss=self.z_loss if self.training else 0.0,
        )  # fmt: skip

    def hidden(
        self, tokens: Tensor, cache: sampling.Cache | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """Return the normalised output of the last block, `[B, L, D]`, extending `cache`."""
        start = 0 if cache is None else cache.length
        end = start + tokens.shape[1]
        if end > self.config.max_seq_len:
            raise ValueError(
                f"tokens reach position {end}, but max_seq_len is {self.config.max_seq_len}; "
                "pass fewer tokens or a model with a longer context"
            )
        mask_B1LL = None if positions is None else document_mask(positions)
        # Angles run on through a row's documents: attention sees their differences alone.
        places = self.cos_LK[start:end], self.sin_LK[start:end], mask_B1LL
        x_BLD, residual_BLD = self.embedding(tokens), None
        for i, block in enumerate(self.blocks):
            layer = None if cache is None else cache.layer(i)
            x_BLD, residual_BLD = activations.run_block(
                self.activation_checkpointing, i, block, (x_BLD, residual_BLD, places, layer),
                draws=self.dropout > 0,
            )  # fmt: skip
        if cache is not None:
            cache.length = end
        return self.norm.add(x_BLD, residual_BLD)[0]

    def logits(self, h_BLD: Tensor) -> Tensor:
        """Return the logits `[..., V]` of hidden states `[..., D]`."""
        logits = self.head(h_BLD)
        softcap = self.config.softcap
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continue `tokens` by sampling; see `model.sampling.generate`."""
        return sampling.generate(
            self, tokens, max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
            generator=generator,
        )  # fmt: skip


class Block(nn.Module):
    """One residual block; the addition of its input is fused with its normalisation."""

    def __init__(self, config: ModelConfig, dropout: float):
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps, dropout)
        self.attention = Attention(config)
        self.feed_forward_norm = RMSNorm(config.d_model, config.norm_eps, dropout)
        self.feed_forward = FeedForward(config.d_model, config.feed_forward_width)

    def forward(self, x_BLD, residual_BLD, places, cache=None):
        """Add `x` to the residual stream; return what is to be added next, and the stream."""
        h_BLD, residual_BLD = self.attention_norm.add(x_BLD, residual_BLD)
        h_BLD = self.attention(h_BLD, places, cache)
        h_BLD, residual_BLD = self.feed_forward_norm.add(h_BLD, residual_BLD)
        return self.feed_forward(h_BLD), residual_BLD


class Attention(nn.Module):
    """Causal self-attention with rotary positions and grouped key/value heads."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        D, H, G, K = config.d_model, config.n_heads, config.kv_heads, config.head_width
        self.query = Linear(D, H * K)
        self.key = Linear(D, G * K)
        self.value = Linear(D, G * K)
        self.output = Linear(H * K, D)
        self.query_norm = RMSNorm(K, config.norm_eps) if config.qk_norm else None
        self.key_norm = RMSNorm(K, config.norm_eps) if config.qk_norm else None
        self.head_width = K

    def forward(self, x_BLD, places, cache=None):
        """Return the attention's output `[B, L, D]`; `places` are cos, sin and `attend`'s mask."""
        cos_LK, sin_LK, mask_B1LL = places
        q_BLHK, k_BLGK, v_BLGK = (
            rearrange(widen(layer(x_BLD)), "B L (N K) -> B L N K", K=self.head_width)
            for layer in (self.query, self.key, self.value)
        )
        if self.query_norm is not None and self.key_norm is not None:
            q_BLHK, k_BLGK = self.query_norm(q_BLHK), self.key_norm(k_BLGK)
        q_BLHK, k_BLGK = rope(q_BLHK, cos_LK, sin_LK), rope(k_BLGK, cos_LK, sin_LK)
        if cache is not None:
            k_BLGK, v_BLGK = cache.append(k_BLGK, v_BLGK)
        q, k, v = (rearrange(x, "B L N K -> B N L K") for x in (q_BLHK, k_BLGK, v_BLGK))
        y_BLD = rearrange(attend(q, k, v, mask_B1LL), "B H L K -> B L (H K)")
        return self.output(y_BLD.to(x_BLD.dtype))


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x))."""

    def __init__(self, width: int, hidden_width: int):
        super().__init__()
        self.gate = Linear(width, hidden_width)
        self.up = Linear(width, hidden_width)
        self.down = Linear(hidden_width, width)

    def forward(self, x_BLD):
        """Return the layer's output, `[B, L, D]`."""
        return self.down(swiglu(self.gate(x_BLD), self.up(x_BLD)))


class RMSNorm(nn.Module):
    """RMS normalisation with a learned weight, alone or fused with the residual addition.

    With dropout, which in training leaves elements of what is added out, the two are not fused.
    """

    def __init__(self, width: int, eps: float, dropout: float = 0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps, self.dropout = eps, dropout

    def forward(self, x):
        """Normalise the last axis of `x`."""
        return rms_norm(x, self.weight.shape, self.weight, self.eps)

    def add(self, x, residual):
        """Return the normalised sum of `x` and `residual` (None for zeros), and the sum."""
        if residual is None:
            return self(x), x
        if self.dropout and self.training:
            residual = dropout_add(x, residual, self.dropout)
            return self(residual), residual
        return add_rms_norm(x, residual, self.weight, self.eps)


def to_dtype(model: Transformer, dtype: torch.dtype) -> None:
    """Convert the parameters of a model, but not its rotary tables, which stay float32."""
    for p in model.parameters():
        p.data = p.data.to(dtype)


def rotary_tables(length: int, head_width: int, theta: float) -> tuple[Tensor, Tensor]:
    """Return cos and sin, `[length, head_width / 2]` float32, of every position's angles."""
    exponent_K = torch.arange(0, head_width, 2, dtype=torch.float64) / head_width
    angle_LK = torch.outer(torch.arange(length, dtype=torch.float64), theta**-exponent_K)
    return angle_LK.cos().float(), angle_LK.sin().float()


def _nearest_divisor(n: int, near: int) -> int:
    divisors = [d for d in range(1, n + 1) if n % d == 0 and n // d % 2 == 0]
    return min(divisors, key=lambda d: abs(d - near), default=1)
