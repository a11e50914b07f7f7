"""Tokens drawn one after another behind prompts, kernel by kernel or as a CUDA graph for each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from operator import index
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tritium.kernels import runtime
from tritium.kernels.runtime import fallen_back
from tritium.model.kv_cache import Cursor
from tritium.model.replay import CaptureError, Replay

if TYPE_CHECKING:
    from tritium.model.kv_cache import Cache
    from tritium.model.sampling import LanguageModel

GRAPH_FROM = 64  # tokens: to capture a graph takes the time of some tens of them
CHECK_EVERY = 16  # tokens of a GPU between two looks at whether all rows have ended
MULTIPLE = 64  # tokens, of a fixed cache's length: fused attention copies masks of odd ones

Draw = Callable[[Tensor, Tensor | None], Tensor]


class Decoding:
    """Draws the next token of every row, again and again.

    When the context is full, its older half is dropped and the rest read again.

    Args:
        model: of which tokens are drawn.
        tokens_BL: the prompts.
        begin_B1: the column where each begins, or None where all begin in the first.
        max_new_tokens: the most that are drawn.
        draw: from logits `[B, V]` and what each row has seen, `[B, V]` bool or None, to ids
            `[B, 1]`.
        stops: `[N]`, ids with which a row ends; that id is then repeated.
        penalises: whether `draw` is called with what each row has seen.
    """

    def __init__(
        self, model: LanguageModel, tokens_BL: Tensor, begin_B1: Tensor | None,
        max_new_tokens: int, draw: Draw, stops: Tensor, penalises: bool,
    ):  # fmt: skip
        self._model, self._draw, self._stops = model, draw, stops
        self._limit = model.config.max_seq_len
        self._room = min(self._limit, tokens_BL.shape[1] + max_new_tokens)
        self._begin_B1, self._length = begin_B1, tokens_BL.shape[1]
        self._text = [tokens_BL[:, -self._limit :]]  # what may be read again, in parts
        self._cache: Cache | None = None
        # Written in place, so that a graph finds them where they were.
        self._token_B1 = tokens_BL[:, -1:].to(torch.long, copy=True)
        self._stopped_B1 = torch.zeros_like(self._token_B1, dtype=torch.bool)
        self._count, self._is_odd = stops.new_zeros(()), stops.new_zeros((), dtype=torch.bool)
        self._seen_BV = None
        if penalises:
            shape = len(tokens_BL), model.config.vocab_size
            seen_BV = torch.zeros(shape, dtype=torch.bool, device=tokens_BL.device)
            self._seen_BV = seen_BV.scatter_(1, tokens_BL.long(), True)

    def next(self) -> Tensor:
        """Draw and return the next token of every row, `[B, 1]`."""
        if self._cache is None or self._cache.length + 1 > self._limit:
            self._read()
        else:
            self._step(self._cache)
        token_B1 = self._token_B1.clone()
        self._text.append(token_B1)
        self._length += 1
        return token_B1

    def check(self) -> tuple[int, bool]:
        """Wait for the device; return how many tokens count, and whether all rows have ended.

        Raises:
            RuntimeError: logits were not finite.
        """
        flags = self._count, self._stopped_B1.all(), self._is_odd
        count, ended, is_odd = (int(x) for x in torch.stack(flags).tolist())
        if is_odd:
            raise RuntimeError(
                "generate: logits must be finite, got NaN or infinities; look at the weights"
            )
        return count, bool(ended)

    def _read(self) -> None:
        """Read the prompt, or what is kept of a text that has filled the context."""
        kept = self._limit if self._cache is None else max(1, self._limit // 2)
        unread_BL = torch.cat(self._text, dim=1)[:, -kept:]
        self._text = [unread_BL]
        first = self._length - unread_BL.shape[1]
        cache = self._cache = self._emptied()
        positions_BL = _positions(unread_BL, first, self._begin_B1)
        self._choose(self._model.hidden(unread_BL, cache, positions_BL))
        self._has_read(first)

    def _emptied(self) -> Cache:
        return self._model.new_cache(self._room)

    def _has_read(self, first: int) -> None:
        """Note that the cache holds the tokens from column `first` on."""

    def _step(self, cache: Cache) -> None:
        """Read the token that was drawn last, and draw the next."""
        self._choose(self._model.hidden(self._token_B1, cache))

    def _choose(self, h_BLD: Tensor) -> None:
        """Draw from what the model makes of the last token; nothing here waits for the device."""
        logits_BV = self._model.logits(h_BLD[:, -1])
        self._is_odd |= ~logits_BV.amax(-1).isfinite().all()
        self._count += ~self._stopped_B1.all()
        token_B1 = self._draw(logits_BV, self._seen_BV)
        if len(self._stops):
            token_B1 = torch.where(self._stopped_B1, self._token_B1, token_B1)
            self._stopped_B1 |= (token_B1.unsqueeze(-1) == self._stops).any(-1)
        if self._seen_BV is not None:
            self._seen_BV.scatter_(1, token_B1, True)
        self._token_B1.copy_(token_B1)


class GraphedDecoding(Decoding):
    """The same, where each token behind the prompt is one launch: the replay of a CUDA graph.

    A prompt is read as without a graph, into memory of the cache that stays where it is; the first
    few steps behind it are taken kernel by kernel, the next one is captured, and all that follow
    replay it, also those behind a context that was full and has been read again. Place, token,
    random numbers and ends of rows are on the device. Each step attends over all of the cache's
    memory, its length rounded up to a multiple of 64, in layers with a window too.

    Until it is dropped it holds: keys and values, 2 · n_layers · B · length · G · K elements;
    with a repetition penalty `[B, V]` booleans; and the graph's own pool, what one step needs at
    once, mostly a few times `[B, V]` logits in float32. No graph is kept for another call.

    Args:
        generator: source of randomness that `draw` uses; None for PyTorch's global one.
        on_failure: called with the reason if no graph can be captured. Then every step is taken
            kernel by kernel, to the same result.
        others: arguments of `Decoding`.
    """

    def __init__(
        self, *others, generator: torch.Generator | None, on_failure: Callable[[str], object]
    ):
        super().__init__(*others)
        self._on_failure = on_failure
        self._cursor: Cursor | None = None
        self._replay: Replay | None = Replay(self._token_B1.device, generator)

    def _emptied(self) -> Cache:
        if self._cache is None:
            return self._model.new_cache(-(-self._room // MULTIPLE) * MULTIPLE, fixed=True)
        self._cache.truncate(0)
        return self._cache

    def _has_read(self, first: int) -> None:
        assert self._cache is not None
        begin_B1 = self._begin_B1
        cursor = self._cursor = self._cursor or Cursor(self._cache, rows=begin_B1 is not None)
        cursor.seek(None if begin_B1 is None else (begin_B1 - first).clamp(min=0))

    def _step(self, cache: Cache) -> None:
        try:
            self._one_token() if self._replay is None else self._replay(self._one_token)
        except CaptureError as error:
            self._on_failure(str(error))
            self._replay = None
            self._one_token()
        cache.length += 1

    def _one_token(self) -> None:
        """Do all that one more token takes; see `Transformer.next_hidden`."""
        assert self._cursor is not None
        self._choose(self._model.next_hidden(self._token_B1, self._cursor))
        self._cursor.advance()


def obstacle(model: LanguageModel, max_new_tokens: int) -> str | None:
    """Return why tokens are drawn without a CUDA graph, None if with one.

    "": none is called for.
    """
    if model.device.type != "cuda" or max_new_tokens < GRAPH_FROM:
        return ""
    if torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
        return ""
    fallen = "every operation" if runtime.REFERENCE else ", ".join(sorted(fallen_back()))
    if fallen:
        return f"{fallen} runs on the reference"
    if getattr(model, "training", False) and getattr(model, "dropout", 0):
        return "the model drops activations out; call its eval()"
    return None


@torch.no_grad()
def decoded(decoding: Decoding, max_new_tokens: int, stops: bool, on_cpu: bool) -> Iterator[Tensor]:
    """Yield tokens `[B, 1]` as they are drawn, until all rows have ended.

    On a GPU the host looks whether they have every `CHECK_EVERY` tokens, and gets as many at once.
    """
    every = 1 if on_cpu else CHECK_EVERY if stops else max_new_tokens
    held: list[Tensor] = []
    given = 0
    for n in range(1, max_new_tokens + 1):
        held.append(decoding.next())
        ended = False
        if n % every == 0 or n == max_new_tokens:
            count, ended = decoding.check()
            held = held[: count - given]
        elif stops:
            continue
        yield from held
        given += len(held)
        held = []
        if ended:
            return


def _positions(unread_BL: Tensor, first: int, begin_B1: Tensor | None) -> Tensor | None:
    """Return the positions of tokens from column `first` on, 0 for what is only padding."""
    if begin_B1 is None or begin_B1.max() <= first:
        return None
    place_L = torch.arange(first, first + unread_BL.shape[1], device=unread_BL.device)
    return (place_L - begin_B1.clamp(min=first)).clamp(min=0)


def stop_ids(stop_tokens: Iterable[int] | Tensor) -> list[int]:
    """Return the ids that any iterable gives, which may give them but once."""
    try:
        return [*map(index, stop_tokens)]
    except TypeError as error:
        raise ValueError(
            f"generate: stop_tokens must be ids, as [{stop_tokens!r}] if it is one, got a "
            f"{type(stop_tokens).__name__}"
        ) from error
