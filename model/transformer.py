"""A decoder-only transformer of pre-norm residual blocks; a config says what they are made of.

RMSNorm or LayerNorm; rotary or learned positions; SwiGLU, GEGLU, GELU or ReLU²; grouped queries,
normalised or not; biases or none. `ModelConfig()` has rotary positions, SwiGLU, normalised queries
and keys, and no biases.

Axes: B batch, L sequence, D model width, H query heads, G key/value heads, K head width,
F feed-forward width, V vocabulary.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from tritium.model import activation_checkpointing as checkpointing
from tritium.model import inspect, output, pretrained, sampling
from tritium.model.attention import as_multiplied, multiplied_dtype
from tritium.model.block import Block, make_norm
from tritium.model.config import ModelConfig, check_share
from tritium.model.cpu_linear import OutputLinear
from tritium.model.initialisation import initialise
from tritium.model.inputs import check_positions, check_tokens
from tritium.model.kv_cache import Cache, Cursor
from tritium.model.masks import Masks, make_masks
from tritium.model.modules import AddedNorm, Embedding
from tritium.model.old_weights import pack_projections
from tritium.model.reversible import residual_stack
from tritium.model.rotary import rotary_tables
from tritium.model.saved import best, newest, read_chosen


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
            each norm moves half the bytes in bfloat16; that of the weights on a CPU, and of the two
            streams of a reversible model, which would reconstruct them from rounded ones.
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
        self.embedding = Embedding(config.vocab_size, config.d_model)
        self.position_embedding = None
        if config.positions == "learned":
            self.position_embedding = nn.Embedding(config.max_seq_len, config.d_model)
        self.residual_dtype = residual_dtype
        self.blocks = nn.ModuleList(
            Block(config, residual_dtype, i) for i in range(config.n_layers)
        )
        self.norm = make_norm(config)
        self.head = OutputLinear(config.d_model, config.vocab_size)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        self.dropout = dropout
        self._cos_LK, self._sin_LK = self._make_tables(self.device)
        self._loads_tied = False
        self.register_load_state_dict_post_hook(_after_loading)
        self.register_load_state_dict_pre_hook(pack_projections)
        self.register_load_state_dict_pre_hook(_before_loading)
        self.initialise()

    @classmethod
    def load(
        cls, run: str | Path, device: str | torch.device = "cpu", *, checkpoint: str = "best"
    ) -> Self:
        """Read a trained model, ready to be evaluated and sampled from.

        Args:
            run: folder of a run, or of a checkpoint in it.
            device: where the model goes.
            checkpoint: which one of a run: "best", of the lowest validation loss if it was kept,
                else the newest; or "newest".

        Raises:
            ValueError: the folder holds no checkpoint, or one that is damaged.
        """
        if checkpoint not in ("best", "newest"):
            raise ValueError(f'checkpoint must be "best" or "newest", got {checkpoint!r}')
        choose = best if checkpoint == "best" else newest
        return read_chosen(Path(run), choose, cls).to(device).eval()

    @classmethod
    def from_pretrained(
        cls, dir_or_name: str | os.PathLike[str], *, device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None, **options: Any,
    ) -> Self:  # fmt: skip
        """Read a model in Hugging Face's layout, of `tritium.model.native`, to be evaluated.

        Args:
            dir_or_name: a folder with config.json and safetensors, in one file or several; or a
                name, which huggingface_hub downloads.
            device: where the model goes.
            dtype: of its weights. None: that of the stored embedding.
            options: those of the constructor. The dropout that config.json states is not taken.

        Raises:
            ValueError: a file is missing, damaged or does not fit; the message names it. Or it
                describes what this model does not have.
        """
        return pretrained.load(cls, dir_or_name, device, dtype, **options)

    def save_pretrained(
        self, folder: str | os.PathLike[str], tokenizer: pretrained.SavedTokenizer | None = None,
        *, max_shard_bytes: int = pretrained.SHARD_BYTES,
    ) -> None:  # fmt: skip
        """Write a new folder in Hugging Face's layout, all of it or nothing.

        It is that of GPT-2, Llama, Mistral, Qwen3, Arcee or Apertus in transformers, whose logits
        are the same. GEGLU, biases and an Apertus without xIELU are read by transformers, perhaps
        not by others.

        Args:
            folder: does not exist yet, or is empty.
            tokenizer: written too, such as a `tritium.data.Tokenizer`; its end of text ends what
                is generated.
            max_shard_bytes: of one file of weights; more of them go into several.

        Raises:
            ValueError: none of these architectures holds the config, or the folder is not empty.
        """
        pretrained.save(self, self.config, folder, tokenizer, max_shard_bytes)

    @property
    def activation_checkpointing(self) -> str:
        """Policy of `tritium.model.activation_checkpointing`."""
        return self._activation_checkpointing

    @activation_checkpointing.setter
    def activation_checkpointing(self, policy: str) -> None:
        checkpointing.check_policy(policy, self.config.n_layers, self.config.reversible)
        self._activation_checkpointing = policy

    @property
    def dropout(self) -> float:
        """Probability with which an element of a block's output is left out in training."""
        return self.norm.dropout

    @dropout.setter
    def dropout(self, p: float) -> None:
        check_share("dropout", p)
        for module in self.modules():  # queries and keys, whose norms add nothing, lose nothing
            if isinstance(module, AddedNorm):
                module.dropout = p

    @property
    def device(self) -> torch.device:
        """The device of the embedding, where tokens are expected."""
        return self.embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the embedding."""
        return self.embedding.weight.dtype

    @property
    def _is_tied(self) -> bool:
        return getattr(self.head, "weight", None) is self.embedding.weight

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
        length = config.max_seq_len if config.positions == "rope" else 0
        return rotary_tables(
            length, config.head_width, config.rope_theta, device, config.rope_scaling
        )

    def _keep_tables(self) -> None:
        if self._cos_LK.device != self.device:
            self._cos_LK, self._sin_LK = self._make_tables(self.device)

    def _apply(self, fn, recurse=True):
        tied = self._is_tied
        super()._apply(fn, recurse)
        if tied:  # `to_empty`, and all else that makes new parameters, makes two
            self.head.weight = self.embedding.weight
        self._keep_tables()
        return self

    def initialise(self) -> None:
        """Draw the weights afresh, as the config's `initialisation` says."""
        initialise(self, self.config)

    def forward(
        self, tokens: Tensor, targets: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """Compute logits, or the loss where `targets` are given.

        Args:
            tokens: `[B, L]` ids below vocab_size; L at most max_seq_len.
            targets: `[B, L]` ids, or -100 where a token does not count; None for logits.
            positions: `[B, L]` int64 or int32, of each token in its document, 0 where one begins: a
                token attends to those before it in its own document, and the result is that of each
                document alone. None: each row is one document.

        Returns:
            Without targets: logits `[B, L, V]`. With targets: their mean cross-entropy in nats, a
            float32 scalar, in training mode with label smoothing and z-loss; the logits are stored
            whole only if `head` was made more than a linear layer.

        Raises:
            ValueError: L exceeds max_seq_len, the tokens are no ids of such a shape, or positions
                no such integers; on a CPU also positions neither 0 nor one more than the one
                before. What they hold on a GPU is not looked at.
            IndexError: an id is not below vocab_size, by PyTorch's embedding on a CPU. On a GPU its
                embedding is nan, and so is what follows; `generate` looks at the ids first.
        """
        h_BLD = self.hidden(tokens, positions=positions)
        if targets is None:
            return self.logits(h_BLD)
        return output.loss(
            self.head, h_BLD, targets, self.config.softcap,
            label_smoothing=self.label_smoothing if self.training else 0.0,
            z_loss=self.z_loss if self.training else 0.0,
        )  # fmt: skip

    def hidden(
        self, tokens: Tensor, cache: Cache | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """Return the normalised output of the last block, `[B, L, D]`.

        Args:
            tokens: `[B, L]`, behind those that the cache holds.
            cache: of `new_cache`, or None; takes the keys and values of these tokens too. With one
                no activation is recomputed.
            positions: as `forward` takes them.
        """
        check_tokens(tokens)
        if positions is not None:
            learned = self.config.positions == "learned"
            check_positions(positions, tokens, self.config.max_seq_len if learned else None)
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
            if self.config.token_shift and not cache.token_shift:
                raise ValueError(
                    "the cache is of a model without token_shift; take one of this model's "
                    "new_cache()"
                )
            positions = cache.positions(tokens, positions)
        x_BLD = self._embedded(tokens)
        masks = make_masks(self.config, tokens.shape[1], end, positions, x_BLD)
        if self.position_embedding is not None:
            if positions is None:
                positions = torch.arange(start, end, device=tokens.device)
            x_BLD = x_BLD + self.position_embedding(positions[..., -tokens.shape[1] :])
        # Angles run on through a row's documents: attention sees their differences alone.
        cos_LK, sin_LK = self._tables(x_BLD.device)
        h_BLD = self._through_blocks(x_BLD, (cos_LK[start:end], sin_LK[start:end], masks), cache)
        if cache is not None:
            cache.length = end
        return h_BLD

    def next_hidden(self, token: Tensor, cursor: Cursor) -> Tensor:
        """Return the output of the last block for one more token of each row, `[B, 1, D]`.

        It is that of `hidden`, to rounding: attention goes over all of the cache's memory. Nothing
        in it depends on the host, so that a CUDA graph of it serves every place.

        Args:
            token: `[B, 1]` ids.
            cursor: at a fixed cache that has room; takes the keys and values of the token. It does
                not advance, nor does the cache's `length`.
        """
        x_B1D = self._embedded(token)
        if self.position_embedding is not None:
            x_B1D = x_B1D + self.position_embedding(cursor.position())
        tables = self._tables(x_B1D.device)  # empty where positions are learned
        if self.config.positions == "rope":
            tables = tuple(x_LK.index_select(0, cursor.place_1) for x_LK in tables)
        follows_B1 = cursor.position() > 0 if self.config.token_shift else None
        masks = Masks(*cursor.masks(self.config.window), follows_B1)
        return self._through_blocks(x_B1D, (*tables, masks), cursor)

    def _embedded(self, tokens: Tensor) -> Tensor:
        """Return the tokens' embeddings, at once in the dtype of the residual stream if known."""
        weight, usual = self.embedding.weight, isinstance(self.embedding, Embedding)
        known = usual and self.residual_dtype is None and self.position_embedding is None
        if not known or self.config.reversible or multiplied_dtype(weight) == weight.dtype:
            return self.embedding(tokens)
        return self.embedding(tokens, multiplied_dtype(weight))

    def _through_blocks(self, x_BLD: Tensor, places: tuple, cache: Any) -> Tensor:
        if self.config.reversible:  # in the dtype of the weights, unless another is asked for
            x_BLD = x_BLD.to(self.residual_dtype or x_BLD.dtype)
            dropout = self.dropout if self.training else 0.0
            return self.norm(residual_stack(self.blocks, x_BLD, places, cache, dropout))
        if self.residual_dtype is None:
            x_BLD = as_multiplied(x_BLD)
        residual_BLD = None
        # Recomputed, a block would read its tokens into the cache again.
        policy = self.activation_checkpointing if cache is None else "none"
        for i, block in enumerate(self.blocks):
            layer = None if cache is None else cache.layer(i)
            x_BLD, residual_BLD = checkpointing.run_block(
                policy, i, block, (x_BLD, residual_BLD, places, layer),
                draws=self.dropout > 0,
            )  # fmt: skip
        return self.norm.add(x_BLD, residual_BLD)[0]

    def new_cache(self, max_length: int | None = None, *, fixed: bool = False) -> Cache:
        """Return an empty cache of keys and values, for `max_length` tokens of each row.

        None: for as many as the context holds. `fixed` is `Cache`'s.
        """
        windows = [self.config.window_of(i) for i in range(self.config.n_layers)]
        return Cache(
            len(windows), max_length or self.config.max_seq_len, windows, fixed=fixed,
            token_shift=self.config.token_shift,
        )  # fmt: skip

    def logits(self, h_BLD: Tensor) -> Tensor:
        """Return the logits `[..., V]` of hidden states `[..., D]`."""
        return output.logits(self.head, h_BLD, self.config.softcap)

    generate = sampling.generate
    attention_weights = inspect.attention_weights


def _before_loading(model: Transformer, state: dict[str, Tensor], prefix: str, *others) -> None:
    """Note whether embedding and head are one weight, of which a state must have one value."""
    model._loads_tied = model._is_tied
    pair = [state.get(f"{prefix}{name}.weight") for name in ("embedding", "head")]
    if not model._loads_tied or any(type(x) not in (Tensor, nn.Parameter) for x in pair):
        return
    one, other = cast("list[Tensor]", pair)
    apart = one.data_ptr() != other.data_ptr() and one.device == other.device
    if apart and one.shape == other.shape and not torch.equal(one, other):
        others[-1].append(
            f"{prefix}embedding.weight and {prefix}head.weight differ, and are one weight here; "
            "load into a model with tie_embeddings=False"
        )


def _after_loading(model: Transformer, *_) -> None:
    if model._loads_tied:  # with assign=True each gets a parameter of its own
        model.head.weight = model.embedding.weight
    model._keep_tables()
