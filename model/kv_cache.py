"""The keys and values of the tokens read so far, which those read later attend to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tritium.model.token_shift import preceding


class _Held(NamedTuple):
    """Keys and values of one layer, `[B, S, G, K]`, of the tokens from number `first` on."""

    first: int
    keys: Tensor
    values: Tensor


class Cache:
    """Keys and values of every layer, `[B, S, G, K]`, for the tokens that a model has read.

    `Transformer.hidden` with a cache gives the same for the parts of a sequence, however divided,
    as for all of it. The first tokens allocate the memory, and decide its number of rows and
    dtype. A layer with a window forgets what no token sees any more: it holds at most two windows,
    or what one call has read. Where gradients are enabled each call copies what it sees, so that
    they flow through all parts; read under `torch.no_grad` what none is asked of.

    Args:
        n_layers: layers of the model.
        max_length: the most tokens of a row.
        windows: the window of each layer, None for those that have none. None: no layer has one.
        fixed: keep all `max_length` tokens of every layer, windows or not, in memory that stays
            where it is until the cache is dropped, as a CUDA graph needs it: 2 · n_layers · B ·
            max_length · G · K elements, zeros at first. No gradient flows from part to part.
        token_shift: keep for each layer what `token_shift` needs too, keys and values as they are
            projected: of the last token and those of the last call, or where `fixed` of all, as
            many elements again.

    Attributes:
        length: tokens of each row so far.
    """

    def __init__(
        self, n_layers: int, max_length: int, windows: Sequence[int | None] | None = None,
        *, fixed: bool = False, token_shift: bool = False,
    ):  # fmt: skip
        self.n_layers, self.max_length, self.length = n_layers, max_length, 0
        self._fixed, self.token_shift = fixed, token_shift
        self._windows = [None] * n_layers if windows is None else [*windows]
        # Behind the layers what each has projected, of which the next token sees the last: as in a
        # layer with a window of two.
        self._windows += [2] * (n_layers if token_shift else 0)
        self._layers: list[_Held | None] = [None] * len(self._windows)
        self._position_BS: Tensor | None = None

    def layer(self, i: int) -> LayerCache:
        """Return the part of layer `i`."""
        return LayerCache(self, i)

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens of each row.

        The tokens of the last call can always be forgotten, and all of them; with a window not
        always others, as what was before them may be gone.

        Raises:
            ValueError: there are not so many, or a window reaches to what is gone.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"truncate: length must be in [0, {self.length}], got {length}")
        for i, held in enumerate(self._layers):
            if held is not None and length == 0:
                self._layers[i] = held._replace(first=0)
            elif held is not None and self._oldest(i, length) < held.first:
                least = held.first + (self._windows[i] or 1) - 1
                raise ValueError(
                    f"truncate: length must be 0, or at least {least}, as a layer with a window or "
                    f"a token shift has forgotten the tokens before {held.first}, got {length}; "
                    "read the row anew"
                )
        self.length = length

    def _oldest(self, i: int, length: int) -> int:
        """Number of the first token that one behind `length` others sees in layer `i`."""
        window = self._windows[i]
        return 0 if window is None else max(0, length - window + 1)

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
        # A copy: a backward pass may read it when others have followed.
        return position_BS[:, : start + L].clone()

    def append(self, i: int, k_BLGK: Tensor, v_BLGK: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values of layer `i` behind its others; return all that the first sees."""
        held, begin, end = self._layers[i], self.length, self.length + k_BLGK.shape[1]
        oldest = self._oldest(i, begin)
        if not self._fixed and _gets_gradients(k_BLGK, v_BLGK, *(() if held is None else held[1:])):
            held = self._layers[i] = self._joined(held, oldest, k_BLGK, v_BLGK)
            return held.keys, held.values
        if held is None or end - held.first > held.keys.shape[1]:
            held = self._layers[i] = self._with_room(i, held, k_BLGK, v_BLGK)
        first, *kept = held
        for x_BSGK, x_BLGK in zip(kept, (k_BLGK, v_BLGK), strict=True):
            x_BSGK[:, begin - first : end - first] = x_BLGK
        k_BSGK, v_BSGK = (x_BSGK[:, oldest - first : end - first] for x_BSGK in kept)
        return k_BSGK, v_BSGK

    def preceding(self, i: int, u_BLMK: Tensor) -> Tensor:
        """Store what layer `i` projects for new tokens; return that of the token before each.

        Before the first token of a row there are zeros.
        """
        u_BSMK, _ = self.append(self.n_layers + i, u_BLMK, u_BLMK[:, :, :0])
        return u_BSMK[:, :-1] if self.length else preceding(u_BSMK)

    def _with_room(self, i: int, held: _Held | None, k_BLGK: Tensor, v_BLGK: Tensor) -> _Held:
        """Return new memory of layer `i`, with what the next tokens see."""
        oldest, window = self._oldest(i, self.length), self._windows[i]
        room = self.max_length
        if window is not None and not self._fixed:
            room = min(room, max(2 * window, self.length + k_BLGK.shape[1] - oldest))
        k_BSGK, v_BSGK = (x.new_empty(x.shape[0], room, *x.shape[2:]) for x in (k_BLGK, v_BLGK))
        if self._fixed:  # what no token has written meets weights of 0, and must be no NaN
            k_BSGK.zero_()
            v_BSGK.zero_()
        if held is not None:
            seen, n = slice(oldest - held.first, self.length - held.first), self.length - oldest
            k_BSGK[:, :n], v_BSGK[:, :n] = held.keys[:, seen], held.values[:, seen]
        return _Held(oldest, k_BSGK, v_BSGK)

    def _joined(self, held: _Held | None, oldest: int, k_BLGK: Tensor, v_BLGK: Tensor) -> _Held:
        """Return what the next tokens see and themselves, in memory that nothing overwrites.

        A backward pass reads the keys and values of every call.
        """
        if held is None:
            return _Held(oldest, k_BLGK, v_BLGK)
        seen = slice(oldest - held.first, self.length - held.first)
        pairs = (held.keys, k_BLGK), (held.values, v_BLGK)
        return _Held(oldest, *(torch.cat((x[:, seen], new.to(x.dtype)), 1) for x, new in pairs))

    @property
    def _rows(self) -> int | None:
        return None if self._layers[0] is None else self._layers[0].keys.shape[0]


def _gets_gradients(*xs: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in xs)


class Cursor:
    """The place behind the tokens of a fixed `Cache`, as a number on the device.

    `Transformer.next_hidden` reads one token of each row there. Everything it does has the same
    shapes at every place, and none of it is known to the host: it can be captured in a CUDA graph.

    Args:
        cache: fixed, in which tokens have been read.
        rows: of which each begins in its own column; False: all of them in column 0.

    Attributes:
        cache: the same.
        place_1: the column of the next token, `[1]` int64.
    """

    def __init__(self, cache: Cache, rows: bool):
        held = cache._layers[0]
        assert held is not None
        assert cache._fixed
        self.cache, device = cache, held.keys.device
        B, S = held.keys.shape[:2] if rows else (1, held.keys.shape[1])
        self._slot_S = torch.arange(S, device=device)
        self._begin_B1 = torch.zeros(B, 1, dtype=torch.long, device=device)
        self.place_1 = torch.zeros(1, dtype=torch.long, device=device)

    def seek(self, begin_B1: Tensor | None) -> None:
        """Go behind the tokens that the cache holds now, of which each row's begin in a column."""
        self.place_1.fill_(self.cache.length)
        if begin_B1 is not None:
            self._begin_B1.copy_(begin_B1)

    def advance(self) -> None:
        """Go to the next place, on the device."""
        self.place_1 += 1

    def position(self) -> Tensor:
        """Return the place of the next token in its own row, `[B, 1]`, or `[1, 1]` for all rows."""
        return (self.place_1 - self._begin_B1).clamp(min=0)

    def masks(self, window: int | None) -> tuple[Tensor, Tensor | None]:
        """Return what the next token sees, `[B, 1, 1, S]`, in layers without and with a window."""
        seen_BS = (self._slot_S <= self.place_1) & (self._slot_S >= self._begin_B1)
        full_B11S = seen_BS[:, None, None]
        if window is None:
            return full_B11S, None
        return full_B11S, full_B11S & (self._slot_S > self.place_1 - window)

    def layer(self, i: int) -> LayerCache:
        """Return the part of layer `i`."""
        return LayerCache(self, i)

    def append(self, i: int, k_B1GK: Tensor, v_B1GK: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values of layer `i` at the place; return the memory of all, `[B, S]`."""
        held = self.cache._layers[i]
        assert held is not None
        for x_BSGK, x_B1GK in ((held.keys, k_B1GK), (held.values, v_B1GK)):
            x_BSGK.index_copy_(1, self.place_1, x_B1GK.to(x_BSGK.dtype))
        return held.keys, held.values

    def preceding(self, i: int, u_B1MK: Tensor) -> Tensor:
        """Store what layer `i` projects for the token at the place; return that of the one before.

        There must be one: a prompt has a token.
        """
        held = self.cache._layers[self.cache.n_layers + i]
        assert held is not None
        before_B1MK = held.keys.index_select(1, self.place_1 - 1)
        held.keys.index_copy_(1, self.place_1, u_B1MK.to(held.keys.dtype))
        return before_B1MK


class LayerCache:
    """One layer's part of a `Cache`."""

    def __init__(self, cache: Cache | Cursor, i: int):
        self._cache, self._i = cache, i

    def append(self, k_BLGK: Tensor, v_BLGK: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values of new tokens; return those that the first of them sees."""
        return self._cache.append(self._i, k_BLGK, v_BLGK)

    def preceding(self, u_BLMK: Tensor) -> Tensor:
        """Store what is projected for new tokens; return that of the token before each."""
        return self._cache.preceding(self._i, u_BLMK)
