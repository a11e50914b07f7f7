"""Sampling from a model, one token at a time, with keys and values kept."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from operator import index
from typing import Protocol

import torch
from torch import Tensor, nn

from tritium.kernels import softmax
from tritium.model.config import ModelConfig
from tritium.model.kv_cache import Cache


class LanguageModel(Protocol):
    """A model to sample from."""

    config: ModelConfig

    def new_cache(self) -> Cache:
        """Return an empty cache of keys and values."""
        ...

    def hidden(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """Return the output of the last block for tokens behind those of the cache."""
        ...

    def logits(self, h_BLD: Tensor, /) -> Tensor:
        """Return the logits of hidden states."""
        ...


def stream(
    model: LanguageModel,
    tokens: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_tokens: Sequence[int] = (),
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Yield the next token of every row, `[B, 1]`, as soon as it is drawn.

    The arguments are those of `generate`, and checked at once.
    """
    _check(tokens, max_new_tokens, temperature, top_k, top_p)
    V = model.config.vocab_size
    for stop in stop_tokens:
        if not 0 <= index(stop) < V:
            raise ValueError(f"generate: stop_tokens must be in [0, {V}), got {stop}")
    draw = (temperature, top_k, top_p, generator)
    return _drawn(model, tokens, max_new_tokens, draw, list(stop_tokens))


@torch.no_grad()
def _drawn(
    model: LanguageModel, tokens: Tensor, max_new_tokens: int, draw: tuple, stop_tokens: list[int]
) -> Iterator[Tensor]:
    limit = model.config.max_seq_len
    cache, unread, stops = None, tokens[:, -limit:], tokens.new_tensor(stop_tokens)
    stopped_B1 = torch.zeros_like(tokens[:, :1], dtype=torch.bool)
    for _ in range(max_new_tokens):
        if cache is None or cache.length + unread.shape[1] > limit:
            if cache is not None:
                unread = tokens[:, -max(1, limit // 2) :]
            cache = model.new_cache()
        logits_BV = model.logits(model.hidden(unread, cache)[:, -1])
        unread = torch.where(stopped_B1, tokens[:, -1:], sample(logits_BV, *draw))
        tokens = torch.cat((tokens, unread), dim=1)
        yield unread
        if stop_tokens:
            stopped_B1 = torch.isin(unread, stops)
            if stopped_B1.all():
                return


def generate(
    model: LanguageModel,
    tokens: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_tokens: Sequence[int] = (),
    generator: torch.Generator | None = None,
) -> Tensor:
    """Continue `tokens` by sampling from the model.

    When the context is full, its older half is dropped and the rest read again.

    Args:
        model: the model to sample from.
        tokens: `[B, L]` ids on the model's device, L >= 1.
        max_new_tokens: how many tokens to add to each row, at most.
        temperature: divides the logits; 0 takes the most probable token.
        top_k: sample among the k most probable tokens only.
        top_p: sample among the fewest tokens whose probabilities sum to at least p.
        stop_tokens: ids, such as a tokenizer's `eot`, with which a row ends. The first one drawn
            is repeated while other rows last, and sampling ends with the last row.
        generator: source of randomness on the model's device; None for PyTorch's global one.

    Returns:
        `[B, L + max_new_tokens]` ids, or fewer where all rows have ended.

    Raises:
        ValueError: an argument is out of its range.
    """
    drawn = stream(
        model, tokens, max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
        stop_tokens=stop_tokens, generator=generator,
    )  # fmt: skip
    return torch.cat((tokens, *drawn), dim=1)


def sample(
    logits_BV: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one id per row, `[B, 1]`; the arguments are those of `generate`."""
    if temperature == 0:
        return logits_BV.argmax(-1, keepdim=True)
    p_BV, ids_BV = softmax(logits_BV.float(), scale=1 / temperature).sort(-1, descending=True)
    if top_k is not None:
        p_BV = p_BV[:, :top_k]
    if top_p is not None:
        before_BV = p_BV.cumsum(-1) - p_BV
        p_BV = torch.where(before_BV < top_p, p_BV, 0)  # the most probable token always stays
    return ids_BV.gather(-1, torch.multinomial(p_BV, 1, generator=generator))


def _check(tokens, max_new_tokens, temperature, top_k, top_p) -> None:
    if tokens.dim() != 2 or tokens.shape[1] == 0:
        raise ValueError(f"generate: tokens must be [B, L] with L >= 1, got {list(tokens.shape)}")
    if max_new_tokens < 0:
        raise ValueError(f"generate: max_new_tokens must be at least 0, got {max_new_tokens}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"generate: temperature must be at least 0, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"generate: top_k must be at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"generate: top_p must be in (0, 1], got {top_p}")


class Tokenizer(Protocol):
    """An encoder of text into ids and back."""

    @property
    def eot(self) -> int:
        """The id that ends a document."""
        ...

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text."""
        ...

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids."""
        ...


def spoken(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """Yield the text of ids piece by piece, as they come, without the end-of-text token.

    A character of which the last bytes are still to come waits for them. All pieces together are
    what `decode` makes of all ids.
    """
    seen: list[int] = []
    begin = end = 0  # of the ids that came with the last piece: some decoders look at these
    for i in ids:
        if i == tokenizer.eot:
            continue
        seen.append(i)
        text = tokenizer.decode(seen[begin:])
        if not text.endswith("\ufffd"):
            yield text[len(tokenizer.decode(seen[begin:end])) :]
            begin, end = end, len(seen)
    if rest := tokenizer.decode(seen[begin:])[len(tokenizer.decode(seen[begin:end])) :]:
        yield rest


def write_stream(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int,
    *,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = 0.95,
    seed: int = 1,
) -> Iterator[str]:
    """Yield a prompt and the text that the model continues it with, up to the end of text.

    The prompt is encoded as the training data were. An empty one is the beginning of a
    document. The global random number generators are not used.
    """
    assert isinstance(model, nn.Module)
    device = next(model.parameters()).device
    ids = tokenizer.encode(prompt) or [tokenizer.eot]
    drawn = stream(
        model, torch.tensor([ids], device=device), max_new_tokens, temperature=temperature,
        top_k=top_k, top_p=top_p, stop_tokens=[tokenizer.eot],
        generator=torch.Generator(device).manual_seed(seed),
    )  # fmt: skip
    return spoken(tokenizer, _followed(ids, drawn))


def _followed(ids: list[int], drawn: Iterator[Tensor]) -> Iterator[int]:
    yield from ids
    for token_11 in drawn:
        yield int(token_11)


def write_on(
    model: LanguageModel, tokenizer: Tokenizer, prompt: str, max_new_tokens: int, seed: int
) -> str:
    """Return `prompt` and what the model continues it with, at temperature 0.8 and top-p 0.95.

    The model is put back to training or evaluation, as it was; the global random number generators
    are not used.
    """
    assert isinstance(model, nn.Module)
    training = model.training
    model.eval()
    try:
        return "".join(write_stream(model, tokenizer, prompt, max_new_tokens, seed=seed))
    finally:
        model.train(training)
