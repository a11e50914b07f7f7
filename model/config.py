"""The shape of a model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from operator import index


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
    """Epsilon, added to the mean square in every RMSNorm."""
    qk_norm: bool = True
    """Normalise queries and keys head by head."""
    tie_embeddings: bool = True
    """Use the embedding as output layer too."""
    softcap: float | None = None
    """Bound of the logits, softcap · tanh(logits / softcap). None: unbounded."""

    def __post_init__(self):
        for name in ("vocab_size", "n_layers", "d_model", "n_heads", "max_seq_len"):
            self._set_whole(name)
        for name in ("n_kv_heads", "d_ff"):
            if getattr(self, name) is not None:
                self._set_whole(name, ", or None")
        for name in ("qk_norm", "tie_embeddings"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        self._set_number("rope_theta", "above 0; 10000 is usual")
        self._set_number("norm_eps", "at least 0; 1e-6 is usual", zero=True)
        if self.softcap is not None:
            self._set_number("softcap", "above 0, or None for no cap")
        self._check_heads()

    def _check_heads(self):
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

    def _set_whole(self, name: str, otherwise: str = "") -> None:
        value = getattr(self, name)
        try:
            whole = None if isinstance(value, bool) else index(value)
        except TypeError:
            whole = None
        if whole is None:
            raise ValueError(
                f"{name} must be a whole number of at least 1{otherwise}, got {value!r}"
            )
        if whole < 1 and name != "n_kv_heads":  # of which more is asked below
            raise ValueError(f"{name} must be at least 1, got {whole}")
        object.__setattr__(self, name, whole)

    def _set_number(self, name: str, range_: str, *, zero: bool = False) -> None:
        value = getattr(self, name)
        is_number = isinstance(value, Real) and not isinstance(value, bool)
        number = float(value) if is_number else math.nan
        if not (0 <= number < math.inf if zero else 0 < number < math.inf):
            raise ValueError(f"{name} must be {range_}, got {value!r}")
        object.__setattr__(self, name, number)

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


def check_share(name: str, share: float) -> None:
    """Raise ValueError unless `share` is at least 0 and below 1."""
    if not isinstance(share, Real) or isinstance(share, bool) or not 0 <= share < 1:
        raise ValueError(f"{name} must be in [0, 1), got {share!r}")


def _nearest_divisor(n: int, near: int) -> int:
    divisors = [d for d in range(1, n + 1) if n % d == 0 and n // d % 2 == 0]
    return min(divisors, key=lambda d: abs(d - near), default=1)
