"""A decoder-only transformer: pre-norm residual blocks, rotary positions, SwiGLU, grouped queries.

Axes: B batch, L sequence, D model width, H query heads, G key/value heads, K head width,
F feed-forward width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
from einops import rearrange
from torch import Tensor, nn

from tritium.kernels import (
    add_rms_norm,
    dropout_add,
    linear_cross_entropy,
    qk_norm_rope,
    rms_norm,
    swiglu,
)
from tritium.model import activation_checkpointing as checkpointing
from tritium.model import sampling
from tritium.model.attention import (
    as_multiplied,
    attend,
    document_mask,
    document_numbers,
    float32_on_cpu,
)
from tritium.model.config import ModelConfig, check_share
from tritium.model.cpu_linear import Linear
from tritium.model.kv_cache import Cache
from tritium.model.saved import newest, read_model


class Transformer(nn.Module):
    """A language model over token ids.

    Args:
        config: its shape.
        activation_checkpointing: "none", "selective", "every-N" or "full": what of each block is
            kept for the backward pass; the rest is recomputed. See
            `tritium.model.activation_checkpointing`.
        dropout: probability with which an element of what a block adds to the residual stream is
            left out, in training mode.
        label_smoothing: share of the target's probability that is spread over the vocabulary, in
            the loss of training mode.
        z_loss: weight of the squared logarithm of the softmax's denominator in that loss.
        residual_dtype: of the residual stream. None: that of the matrix products on a GPU, where
            each norm moves half the bytes in bfloat16; that of the weights on a CPU.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        activation_checkpointing: str = "none",
        dropout: float = 0.0,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        residual_dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.config = config
        self.activation_checkpointing = activation_checkpointing
        check_share("label_smoothing", label_smoothing)
        if not 0 <= z_loss < math.inf:
            raise ValueError(f"z_loss must be at least 0, got {z_loss}")
        self.label_smoothing, self.z_loss = label_smoothing, z_loss
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.residual_dtype = residual_dtype
        self.blocks = nn.ModuleList(Block(config, residual_dtype) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        self.dropout = dropout
        self._cos_LK, self._sin_LK = self._make_tables(self.device)
        self.register_load_state_dict_post_hook(_keep_tables)
        self.register_load_state_dict_pre_hook(_pack_projections)
        self.initialise()

    @classmethod
    def load(cls, run: str | Path, device: str | torch.device = "cpu") -> Self:
        """Read a trained model, ready to be evaluated and sampled from.

        Args:
            run: folder of a run, whose newest checkpoint is taken, or of a checkpoint in it.
            device: where the model goes.

        Raises:
            ValueError: the folder holds no checkpoint, or one that is damaged.
        """
        return read_model(newest(Path(run)), cls).to(device).eval()

    @property
    def activation_checkpointing(self) -> str:
        """Policy of `tritium.model.activation_checkpointing`."""
        return self._activation_checkpointing

    @activation_checkpointing.setter
    def activation_checkpointing(self, policy: str) -> None:
        checkpointing.check_policy(policy, self.config.n_layers)
        self._activation_checkpointing = policy

    @property
    def dropout(self) -> float:
        """Probability with which an element of a block's output is left out in training."""
        return self.norm.dropout

    @dropout.setter
    def dropout(self, p: float) -> None:
        check_share("dropout", p)
        for module in self.modules():  # queries and keys, whose norms add nothing, lose nothing
            if isinstance(module, RMSNorm):
                module.dropout = p

    @property
    def device(self) -> torch.device:
        """The device of the embedding, where tokens are expected."""
        return self.embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the embedding."""
        return self.embedding.weight.dtype

    def num_parameters(self) -> int:
        """Return the number of weights; those that embedding and head share count once."""
        return sum(p.numel() for p in self.parameters())

    # The rotary tables follow from the config and are float32 in a model of any dtype. So they are
    # no buffers, which a cast would round and `to_empty` leave unwritten: they are made again
    # wherever the weights may have moved to another device.

    @property
    def cos_LK(self) -> Tensor:  # noqa: N802 (an axis)
        """Cosines of every position's angles, `[max_seq_len, K / 2]` float32."""
        return self._tables(self.device)[0]

    @property
    def sin_LK(self) -> Tensor:  # noqa: N802 (an axis)
        """Sines of every position's angles, as `cos_LK`."""
        return self._tables(self.device)[1]

    def _tables(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if self._cos_LK.device == device:
            return self._cos_LK, self._sin_LK
        return self._make_tables(device)  # of weights that functional_call or a hook has brought

    def _make_tables(self, device: torch.device) -> tuple[Tensor, Tensor]:
        config = self.config
        return rotary_tables(config.max_seq_len, config.head_width, config.rope_theta, device)

    def _keep_tables(self) -> None:
        if self._cos_LK.device != self.device:
            self._cos_LK, self._sin_LK = self._make_tables(self.device)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self._keep_tables()
        return self

    @torch.no_grad()
    def initialise(self) -> None:
        """Draw the weights afresh: normal, and far smaller where a block adds its output.

        Output projections are scaled by 1 / (10 √(2·n_layers)), so each block starts close to the
        identity. Zeros instead of the depth rule alone gave 2.11 against 2.16 bits per byte in 45 s
        of training on two cores (4 layers, one seed); a tenth was chosen to keep the rule, not
        compared by itself.
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
        self, tokens: Tensor, cache: Cache | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """Return the normalised output of the last block, `[B, L, D]`.

        Args:
            tokens: `[B, L]`, behind those that the cache holds.
            cache: of `new_cache`, or None; takes the keys and values of these tokens too.
            positions: as `forward` takes them.
        """
        start = 0 if cache is None else cache.length
        end = start + tokens.shape[1]
        if end > self.config.max_seq_len:
            raise ValueError(
                f"tokens reach position {end}, but max_seq_len is {self.config.max_seq_len}; "
                "pass fewer tokens or a model with a longer context"
            )
        if cache is not None:
            if cache.n_layers != self.config.n_layers:
                raise ValueError(
                    f"the cache is of {cache.n_layers} layers, the model has "
                    f"{self.config.n_layers}; take one of its new_cache()"
                )
            mask = cache.mask(tokens, positions)
        elif positions is not None:
            mask = document_mask(document_numbers(positions), tokens.shape[1])
        else:
            mask = None
        # Angles run on through a row's documents: attention sees their differences alone.
        x_BLD, residual_BLD = self.embedding(tokens), None
        if self.residual_dtype is None:
            x_BLD = as_multiplied(x_BLD)
        cos_LK, sin_LK = self._tables(x_BLD.device)
        places = cos_LK[start:end], sin_LK[start:end], mask
        for i, block in enumerate(self.blocks):
            layer = None if cache is None else cache.layer(i)
            x_BLD, residual_BLD = checkpointing.run_block(
                self.activation_checkpointing, i, block, (x_BLD, residual_BLD, places, layer),
                draws=self.dropout > 0,
            )  # fmt: skip
        if cache is not None:
            cache.length = end
        return self.norm.add(x_BLD, residual_BLD)[0]

    def new_cache(self) -> Cache:
        """Return an empty cache of keys and values, for as many tokens as the context holds."""
        return Cache(self.config.n_layers, self.config.max_seq_len)

    def logits(self, h_BLD: Tensor) -> Tensor:
        """Return the logits `[..., V]` of hidden states `[..., D]`."""
        logits = self.head(h_BLD)
        softcap = self.config.softcap
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)

    def generate(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        stop_tokens: Sequence[int] = (),
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continue `tokens` by sampling; see `generate` and `stream` in `model.sampling`."""
        return sampling.generate(
            self, tokens, max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
            stop_tokens=stop_tokens, generator=generator,
        )  # fmt: skip


class Block(nn.Module):
    """One residual block; the addition of its input is fused with its normalisation."""

    def __init__(self, config: ModelConfig, residual_dtype: torch.dtype | None = None):
        super().__init__()
        self.residual_dtype = residual_dtype
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = Attention(config)
        self.feed_forward_norm = RMSNorm(config.d_model, config.norm_eps)
        self.feed_forward = FeedForward(config.d_model, config.feed_forward_width)

    def forward(self, x_BLD, residual_BLD, places, cache=None):
        """Add `x` to the residual stream; return what is to be added next, and the stream."""
        begins = residual_BLD is None
        h_BLD, residual_BLD = self.attention_norm.add(x_BLD, residual_BLD)
        if begins and self.residual_dtype is not None:
            residual_BLD = residual_BLD.to(self.residual_dtype)
        h_BLD = self.attention(h_BLD, places, cache)
        h_BLD, residual_BLD = self.feed_forward_norm.add(h_BLD, residual_BLD)
        return self.feed_forward(h_BLD), residual_BLD


class Attention(nn.Module):
    """Causal self-attention with rotary positions and grouped key/value heads."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        D, H, G, K = config.d_model, config.n_heads, config.kv_heads, config.head_width
        self.query_key_value = Linear(D, (H + 2 * G) * K)
        self.query_key_value.splits = (H * K, G * K, G * K)
        self.output = Linear(H * K, D)
        self.query_norm = RMSNorm(K, config.norm_eps) if config.qk_norm else None
        self.key_norm = RMSNorm(K, config.norm_eps) if config.qk_norm else None
        self.head_width, self.kv_heads, self.norm_eps = K, G, config.norm_eps

    def forward(self, x_BLD, places, cache=None):
        """Return the attention's output `[B, L, D]`; `places` are cos, sin and `attend`'s mask."""
        cos_LK, sin_LK, mask = places
        packed_BLNK = rearrange(
            float32_on_cpu(self.query_key_value(x_BLD)), "B L (N K) -> B L N K", K=self.head_width
        )
        q_weight, k_weight = (
            None if norm is None else norm.weight for norm in (self.query_norm, self.key_norm)
        )
        q_BLHK, k_BLGK, v_BLGK = qk_norm_rope(
            packed_BLNK, cos_LK, sin_LK, q_weight, k_weight, self.norm_eps,
            kv_heads=self.kv_heads,
        )  # fmt: skip
        if cache is not None:
            k_BLGK, v_BLGK = cache.append(k_BLGK, v_BLGK)
        q, k, v = (rearrange(x, "B L N K -> B N L K") for x in (q_BLHK, k_BLGK, v_BLGK))
        y_BLD = rearrange(attend(q, k, v, mask), "B H L K -> B L (H K)")
        return self.output(y_BLD.to(x_BLD.dtype))


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x))."""

    def __init__(self, width: int, hidden_width: int):
        super().__init__()
        self.gate_up = Linear(width, 2 * hidden_width)
        self.gate_up.splits = (hidden_width, hidden_width)
        self.down = Linear(hidden_width, width)

    def forward(self, x_BLD):
        """Return the layer's output, `[B, L, D]`."""
        return self.down(swiglu(self.gate_up(x_BLD)))


class RMSNorm(nn.Module):
    """RMS normalisation with a learned weight, alone or fused with the residual addition.

    With dropout, which in training leaves elements of what is added out, the two are not fused.
    """

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps, self.dropout = eps, 0.0

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


def rotary_tables(
    length: int, head_width: int, theta: float, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Return cos and sin, `[length, head_width / 2]` float32, of every position's angles."""
    # On the host for every device, which gives each the same bits; none of them may be of
    # inference mode, as autograd refuses to keep such tensors.
    with torch.inference_mode(False):
        exponent_K = torch.arange(0, head_width, 2, dtype=torch.float64, device="cpu") / head_width
        place_L = torch.arange(length, dtype=torch.float64, device="cpu")
        angle_LK = torch.outer(place_L, theta**-exponent_K)
        tables = angle_LK.cos().float().to(device), angle_LK.sin().float().to(device)
    for table in tables:
        # What torch._dynamo.mark_static does, without a second of importing it: else a compiler
        # takes a batch of K / 2 rows, or a full context, to be that size for ever.
        vars(table).update(_dynamo_static_indices={0, 1}, _has_dynamo_dim_marking=True)
    return tables


def _keep_tables(model: Transformer, *_) -> None:
    model._keep_tables()


PACKED = {
    "attention.query_key_value": ("attention.query", "attention.key", "attention.value"),
    "feed_forward.gate_up": ("feed_forward.gate", "feed_forward.up"),
}
"""Projections that one product makes, by the names they had when each had its own."""


def _pack_projections(model: Transformer, state: dict[str, Tensor], *_) -> None:
    """Join weights saved before the projections were packed: `load_state_dict` takes both."""
    for i in range(model.config.n_layers):
        for packed, parts in PACKED.items():
            names = [f"blocks.{i}.{part}.weight" for part in parts]
            if all(name in state for name in names):
                state[f"blocks.{i}.{packed}.weight"] = torch.cat([state.pop(n) for n in names])
