"""The keys and values of the tokens read so far, which those read later attend to."""

from __future__ import annotations

import torch
from torch import Tensor


class Cache:
    """Keys and values of every layer, `[B, S, G, K]`, for the tokens that a model has read.

    `Transformer.hidden` with a cache gives the same for the parts of a sequence, however divided,
    as for all of it. The first tokens allocate the memory, and decide its number of rows and
    dtype.

    Args:
        n_layers: layers of the model.
        max_length: the most tokens of a row.

    Attributes:
        length: tokens of each row so far.
    """

    def __init__(self, n_layers: int, max_length: int):
        self.n_layers, self.max_length, self.length = n_layers, max_length, 0
        self._layers: list[tuple[Tensor, Tensor] | None] = [None] * n_layers
        self._position_BS: Tensor | None = None

    def layer(self, i: int) -> LayerCache:
        """Return the part of layer `i`."""
        return LayerCache(self, i)

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens of each row.

        Raises:
            ValueError: there are not so many.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"truncate: length must be in [0, {self.length}], got {length}")
        self.length = length

    def positions(self, tokens_BL: Tensor, positions_BL: Tensor | None) -> Tensor | None:
        """Return the positions of all tokens, `[B, S]`, those about to be read at the end.

        Without positions these continue the last document of their row. None: every row is one
        document.

        Raises:
            ValueError: they have another number of rows than those before them, or do not fit.
        """
        (B, L), start = tokens_BL.shape, self.length
        if start + L > self.max_length:
            raise ValueError(
                f"the cache has room for {self.max_length} tokens, got {L} after {start}; "
                "truncate it, or make a longer one"
            )
        if self._rows not in (None, B):
            raise ValueError(
                f"tokens must have the cache's number of rows, {self._rows}, got {B}; "
                "use another cache for other rows"
            )
        if positions_BL is None and self._position_BS is None:
            return None
        if self._position_BS is None:
            place_S = torch.arange(self.max_length, device=tokens_BL.device)
            self._position_BS = place_S.repeat(B, 1)
        position_BS = self._position_BS
        if positions_BL is None:
            last_B1 = position_BS[:, start - 1 : start] if start else -1
            positions_BL = last_B1 + torch.arange(1, L + 1, device=tokens_BL.device)
        position_BS[:, start : start + L] = positions_BL
        return position_BS[:, : start + L]

    def append(self, i: int, k_BLGK: Tensor, v_BLGK: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values of layer `i` behind its others; return them all."""
        kept = self._layers[i]
        if kept is None:
            shape = (k_BLGK.shape[0], self.max_length, *k_BLGK.shape[2:])
            kept = self._layers[i] = k_BLGK.new_empty(shape), v_BLGK.new_empty(shape)
        k_BSGK, v_BSGK = kept
        end = self.length + k_BLGK.shape[1]
        k_BSGK[:, self.length : end] = k_BLGK
        v_BSGK[:, self.length : end] = v_BLGK
        return k_BSGK[:, :end], v_BSGK[:, :end]

    @property
    def _rows(self) -> int | None:
        return None if self._layers[0] is None else self._layers[0][0].shape[0]


class LayerCache:
    """One layer's part of a `Cache`."""

    def __init__(self, cache: Cache, i: int):
        self._cache, self._i = cache, i

    def append(self, k_BLGK: Tensor, v_BLGK: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values of new tokens; return those of all tokens."""
        return self._cache.append(self._i, k_BLGK, v_BLGK)
