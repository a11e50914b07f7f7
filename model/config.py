"""The shape of a model."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from numbers import Real
from operator import index
from typing import Literal, Self, get_args

Scaling = Literal["none", "linear", "ntk", "llama3", "yarn"]
Positions = Literal["rope", "learned"]
Norm = Literal["rms", "layer"]
Activation = Literal["swiglu", "geglu", "gelu", "relu_squared"]
AttentionBy = Literal["sdpa", "softmax"]
Initialisation = Literal["near_identity", "gpt2", "small", "zero"]
GATED = "swiglu", "geglu"
CHOICES = {
    "positions": Positions, "norm": Norm, "activation": Activation, "attention": AttentionBy,
    "initialisation": Initialisation,
}  # fmt: skip
"""Fields of a model's shape that are one of several words."""


@dataclass(frozen=True)
class RopeScaling:
    """The way in which rotary positions are stretched to a longer context; see `model.rotary`."""

    kind: Scaling = "none"
    """Rule by which the frequencies are lowered: none, linear, ntk, llama3 or yarn."""
    factor: float = 1.0
    """Factor by which the context becomes longer."""
    original_length: int | None = None
    """Context length before that, in tokens; llama3 and yarn need it."""
    slow: float = 1.0
    """Frequencies of fewer turns in that length are divided by the factor (llama3, yarn)."""
    fast: float = 32.0
    """Frequencies of more turns in that length stay (yarn; Llama 3 has 4)."""
    attention_factor: float | None = None
    """Factor of queries and keys (yarn). None: 1 + ln(factor) / 10."""

    def __post_init__(self):
        _set_choice(self, "kind", Scaling)
        _set_number(self, "factor", "at least 1", least=1)
        if self.original_length is not None:
            _set_whole(self, "original_length", ", or None")
        elif self.kind in ("llama3", "yarn"):
            raise ValueError(f"original_length must be given for {self.kind}; 8192 in Llama 3")
        for name in ("slow", "fast"):
            _set_number(self, name, "above 0")
        if self.slow >= self.fast:
            raise ValueError(f"slow must be below fast, got {self.slow} and {self.fast}")
        if self.attention_factor is not None:
            _set_number(self, "attention_factor", "above 0, or None")


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
    """Number of query heads; must divide d_model, unless d_head is given."""
    n_kv_heads: int | None = None
    """Number of key and value heads, a divisor of n_heads. None: as many as n_heads."""
    d_head: int | None = None
    """Width of one head. None: d_model / n_heads."""
    d_ff: int | None = None
    """Width of the feed-forward layer. None: 8/3 of d_model, rounded up to a multiple of 64, or
    without a gate 4 times d_model."""
    max_seq_len: int = 256
    """Context length in tokens."""
    positions: Positions = "rope"
    """Positions: rope, turning queries and keys, or learned, added to the embedding."""
    rope_theta: float = 10000.0
    """Base of the rotary wavelengths."""
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    """Stretching of the rotary wavelengths."""
    norm: Norm = "rms"
    """Normalisation of the residual stream: rms or layer."""
    norm_eps: float = 1e-6
    """Epsilon, added to the mean square or the variance in every norm."""
    activation: Activation = "swiglu"
    """Feed-forward layer: swiglu and geglu are gated; gelu (as in geglu by the tanh approximation)
    and relu_squared are not."""
    bias: bool = False
    """Add biases in every projection and in the LayerNorms; the output layer has none."""
    qk_norm: bool = True
    """Normalise queries and keys head by head."""
    qk_gain: float = 1.0
    """First weight of the norms of queries and keys, which training changes. Scores of a head of
    width K are at most qk_gain² · √K at first: 1 makes narrow heads blunt."""
    token_shift: bool = False
    """Add to keys and values a learned share of those of the token before; see
    `model.token_shift`. Small models learn to copy far sooner."""
    tie_embeddings: bool = True
    """Use the embedding as output layer too."""
    softcap: float | None = None
    """Bound of the logits, softcap · tanh(logits / softcap). None: unbounded."""
    window: int | None = None
    """Tokens that a token attends to, itself and those just before it. None: all before it."""
    full_every: int | None = None
    """With a window: every so many layers one attends without it, as the second, fourth, ... for
    2. None: no layer does."""
    attention_softcap: float | None = None
    """Bound of attention's scores, in the form of softcap. None: unbounded."""
    parallel_blocks: bool = False
    """Add attention and feed-forward layer of one norm, not one after the other of two."""
    attention: AttentionBy = "sdpa"
    """Attention by PyTorch's fused operators (sdpa), or by the softmax kernel of Tritium, with all
    weights in memory (softmax)."""
    initialisation: Initialisation = "near_identity"
    """First weights: near_identity, gpt2, small or zero; see `model.initialisation`."""
    reversible: bool = False
    """Two residual streams, from which the backward pass recomputes every activation: memory does
    not grow with depth; see `model.reversible`."""

    @classmethod
    def named(cls, name: str) -> Self:
        """Return a shape by name, such as "gpt2" or "llama-3.2-1b": `model.shapes` has them all.

        Raises:
            ValueError: there is none of that name.
        """
        from tritium.model.shapes import shape

        return cls(**shape(name))

    def __post_init__(self):
        if isinstance(self.rope_scaling, dict):  # out of a file
            object.__setattr__(self, "rope_scaling", RopeScaling(**self.rope_scaling))
        if not isinstance(self.rope_scaling, RopeScaling):
            raise ValueError(f"rope_scaling must be a RopeScaling, got {self.rope_scaling!r}")
        for name in ("vocab_size", "n_layers", "d_model", "n_heads", "max_seq_len"):
            _set_whole(self, name)
        for name in ("n_kv_heads", "d_head", "d_ff", "window", "full_every"):
            if getattr(self, name) is not None:
                _set_whole(self, name, ", or None")
        for name, choices in CHOICES.items():
            _set_choice(self, name, choices)
        for name in (
            "bias", "qk_norm", "token_shift", "tie_embeddings", "parallel_blocks", "reversible",
        ):  # fmt: skip
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        _set_number(self, "rope_theta", "above 0; 10000 is usual")
        _set_number(self, "qk_gain", "above 0; 1 is usual")
        _set_number(self, "norm_eps", "at least 0; 1e-6 is usual", least=0)
        for name in ("softcap", "attention_softcap"):
            if getattr(self, name) is not None:
                _set_number(self, name, "above 0, or None for no cap")
        if self.full_every is not None and self.window is None:
            raise ValueError(
                f"full_every must be None without a window, got {self.full_every}; set window too"
            )
        if self.reversible and self.parallel_blocks:
            raise ValueError(
                "reversible needs a stream for each of attention and feed-forward layer, which "
                "parallel_blocks adds at once; set one of them to False"
            )
        self._check_heads()

    def _check_heads(self):
        if self.d_head is None and self.d_model % self.n_heads:
            raise ValueError(
                f"n_heads must divide d_model, got {self.n_heads} heads for width {self.d_model}; "
                f"try n_heads={_nearest_divisor(self.d_model, self.n_heads)}"
            )
        if self.head_width % 2 and self.positions == "rope":
            width = "d_model / n_heads" if self.d_head is None else "d_head"
            raise ValueError(f"{width} must be even for rotary positions, got {self.head_width}")
        if self.kv_heads < 1 or self.n_heads % self.kv_heads:
            raise ValueError(
                f"n_kv_heads must divide n_heads, got {self.kv_heads} for {self.n_heads} heads"
            )

    def window_of(self, layer: int) -> int | None:
        """Return the window of a layer, counted from 0; None if it attends to all before."""
        full = self.full_every is not None and (layer + 1) % self.full_every == 0
        return None if full else self.window

    @property
    def head_width(self) -> int:
        """K, the width of one head."""
        return self.d_model // self.n_heads if self.d_head is None else self.d_head

    @property
    def kv_heads(self) -> int:
        """G, the number of key and value heads."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def feed_forward_width(self) -> int:
        """F, the width of the feed-forward layer."""
        if self.d_ff is not None:
            return self.d_ff
        return -(-8 * self.d_model // 3 // 64) * 64 if self.gated else 4 * self.d_model

    @property
    def gated(self) -> bool:
        """Whether the feed-forward layer has a gate."""
        return self.activation in GATED


def check_share(name: str, share: float) -> None:
    """Raise ValueError unless `share` is at least 0 and below 1."""
    if not isinstance(share, Real) or isinstance(share, bool) or not 0 <= share < 1:
        raise ValueError(f"{name} must be in [0, 1), got {share!r}")


def _nearest_divisor(n: int, near: int) -> int:
    divisors = [d for d in range(1, n + 1) if n % d == 0 and n // d % 2 == 0]
    return min(divisors, key=lambda d: abs(d - near), default=1)


def _set_whole(config: object, name: str, otherwise: str = "") -> None:
    value = getattr(config, name)
    try:
        whole = None if isinstance(value, bool) else index(value)
    except TypeError:
        whole = None
    if whole is None:
        raise ValueError(f"{name} must be a whole number of at least 1{otherwise}, got {value!r}")
    if whole < 1 and name != "n_kv_heads":  # of which more is asked
        raise ValueError(f"{name} must be at least 1, got {whole}")
    object.__setattr__(config, name, whole)


def _set_number(config: object, name: str, range_: str, *, least: float | None = None) -> None:
    """Check a number: at least `least`, or above 0 without it."""
    value = getattr(config, name)
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    number = float(value) if is_number else math.nan
    if not (0 < number < math.inf if least is None else least <= number < math.inf):
        raise ValueError(f"{name} must be {range_}, got {value!r}")
    object.__setattr__(config, name, number)


def _set_choice(config: object, name: str, choices: object) -> None:
    value = getattr(config, name)
    if not isinstance(value, str) or value not in get_args(choices):
        raise ValueError(f"{name} must be one of {', '.join(get_args(choices))}, got {value!r}")
