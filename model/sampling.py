"""Sampling from a model, one token at a time, with keys and values kept."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol, overload

import torch
from torch import Tensor, nn

from tritium.kernels import softmax
from tritium.model.config import ModelConfig
from tritium.model.decoding import Decoding, GraphedDecoding, decoded, obstacle, stop_ids
from tritium.model.kv_cache import Cache, Cursor


class LanguageModel(Protocol):
    """A model to sample from."""

    config: ModelConfig

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        ...

    def new_cache(self, max_length: int | None = None, /, *, fixed: bool = False) -> Cache:
        """Return an empty cache of keys and values, `fixed` for `next_hidden`."""
        ...

    def hidden(
        self, tokens: Tensor, cache: Cache | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """Return the output of the last block for tokens behind those of the cache."""
        ...

    def next_hidden(self, token: Tensor, cursor: Cursor) -> Tensor:
        """Return the output of the last block for one token more, without asking the host."""
        ...

    def logits(self, h_BLD: Tensor, /) -> Tensor:
        """Return the logits of hidden states."""
        ...


Prompts = Tensor | Sequence[Sequence[int] | Tensor]

COLDEST = 1e-30  # of colder ones the logits, divided, are too large for float32


class _Draw(NamedTuple):
    """Options of drawing the next token; the fields are arguments of `generate`."""

    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    generator: torch.Generator | None
    repetition_penalty: float

    def __call__(self, logits_BV: Tensor, seen_BV: Tensor | None) -> Tensor:
        if seen_BV is not None:
            logits_BV = _penalised(logits_BV, seen_BV, self.repetition_penalty)
        return sample(logits_BV, *self[:-1])


def stream(
    model: LanguageModel,
    tokens: Prompts,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop_tokens: Iterable[int] = (),
    generator: torch.Generator | None = None,
    cuda_graph: bool = True,
    log: Callable[[str], object] | None = None,
) -> Iterator[Tensor]:
    """Yield the next token of every row, `[B, 1]`, as soon as it is drawn.

    With stop tokens on a GPU they come in groups of 16, after which the host looks for them. The
    arguments are those of `generate`, and checked at once.

    Args:
        log: called with a line that says whether a CUDA graph is used, or why not, where one is
            called for. None: why not is a warning.
    """
    tokens_BL, begin_B1 = _padded(model, tokens)
    draw = _Draw(temperature, top_k, top_p, min_p, generator, repetition_penalty)
    _check(max_new_tokens, draw)
    V = model.config.vocab_size
    stop_tokens = stop_ids(stop_tokens)
    for stop in stop_tokens:
        if not 0 <= stop < V:
            raise ValueError(f"generate: stop_tokens must be in [0, {V}), got {stop}")
    if not len(tokens_BL):
        return iter(())
    stops = torch.tensor(stop_tokens, dtype=torch.long, device=tokens_BL.device)
    what = model, tokens_BL, begin_B1, max_new_tokens, draw, stops, repetition_penalty != 1
    decoding = _decoding(what, generator, cuda_graph, log)
    on_cpu = tokens_BL.device.type == "cpu"
    return decoded(decoding, max_new_tokens, bool(stop_tokens), on_cpu)


def _decoding(
    what: tuple, generator: torch.Generator | None, cuda_graph: bool,
    log: Callable[[str], object] | None,
) -> Decoding:  # fmt: skip
    """Return what draws: by a CUDA graph where one is asked and called for, and possible."""

    def without(reason: str) -> None:
        line = f"No CUDA graph is captured: {reason}"
        warnings.warn(f"generate: {line}", stacklevel=2) if log is None else log(line)

    model, _, _, max_new_tokens, *_ = what
    reason = obstacle(model, max_new_tokens) if cuda_graph else ""
    if reason is None:
        if log is not None:
            log("Each token is the replay of a CUDA graph")
        return GraphedDecoding(*what, generator=generator, on_failure=without)
    if reason:
        without(reason)
    return Decoding(*what)


def _padded(model: LanguageModel, prompts: Prompts) -> tuple[Tensor, Tensor | None]:
    """Return prompts as `[B, L]`, and the column where each begins, `[B, 1]`, where they differ."""
    V = model.config.vocab_size
    begin_B1 = None
    if isinstance(prompts, Tensor):
        tokens_BL = prompts
        if tokens_BL.dim() != 2 or tokens_BL.shape[1] == 0:
            shape = list(tokens_BL.shape)
            raise ValueError(f"generate: tokens must be [B, L] with L >= 1, got {shape}")
    else:
        rows = [torch.as_tensor(row, device=model.device) for row in prompts]
        for i, row in enumerate(rows):
            if row.dim() != 1 or not len(row):
                raise ValueError(
                    f"generate: a prompt must be one row of at least one id, got "
                    f"{list(row.shape)} for number {i}; an empty text begins with the end of text"
                )
        longest = max(map(len, rows), default=1)
        # Padded in front, by a token that the row has: nothing attends to it, and it counts as
        # seen already.
        rows = [torch.cat((row[:1].expand(longest - len(row)), row)) for row in rows]
        tokens_BL = torch.stack(rows) if rows else torch.zeros(0, 1, dtype=torch.long)
        begins = [longest - len(row) for row in prompts]
        if any(begins):
            begin_B1 = torch.tensor(begins, device=model.device).unsqueeze(1)
    if tokens_BL.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"generate: tokens must be int64 or int32, got {tokens_BL.dtype}")
    if tokens_BL.numel():
        low, high = (int(x) for x in tokens_BL.aminmax())
        if low < 0 or high >= V:
            odd = low if low < 0 else high
            raise ValueError(
                f"generate: tokens must be in [0, {V}), the model's vocabulary, got {odd}"
            )
    return tokens_BL, begin_B1


@overload
def generate(
    model: LanguageModel, tokens: Tensor, max_new_tokens: int, *,
    temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
    min_p: float | None = None, repetition_penalty: float = 1.0, stop_tokens: Iterable[int] = (),
    generator: torch.Generator | None = None, cuda_graph: bool = True,
) -> Tensor: ...  # fmt: skip


@overload
def generate(
    model: LanguageModel, tokens: Sequence[Sequence[int] | Tensor], max_new_tokens: int, *,
    temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
    min_p: float | None = None, repetition_penalty: float = 1.0, stop_tokens: Iterable[int] = (),
    generator: torch.Generator | None = None, cuda_graph: bool = True,
) -> list[Tensor]: ...  # fmt: skip


def generate(
    model: LanguageModel,
    tokens: Prompts,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop_tokens: Iterable[int] = (),
    generator: torch.Generator | None = None,
    cuda_graph: bool = True,
) -> Tensor | list[Tensor]:
    """Continue prompts by sampling from the model.

    When the context is full, its older half is dropped and the rest read again. Of a prompt longer
    than the context the end is read.

    Args:
        model: the model to sample from.
        tokens: `[B, L]` ids on the model's device, L >= 1; or a list of prompts of any lengths,
            each a list or `[L]` tensor of ids. A row gives what it gives alone, if the longest
            and what is added to it fit the context.
        max_new_tokens: how many tokens to add to each row, at most.
        temperature: divides the logits; 0, or less than 1e-30, takes the most probable token.
        top_k: sample among the k most probable tokens only.
        top_p: sample among the fewest tokens whose probabilities sum to at least p.
        min_p: sample among the tokens of at least p times the greatest probability.
        repetition_penalty: divides the logits of the tokens in a row if they are positive, and
            multiplies them if not (Keskar et al., 2019, CTRL). 1: none.
        stop_tokens: ids, such as a tokenizer's `eot`, with which a row ends. The first one drawn
            is repeated while other rows last, and sampling ends with the last row.
        generator: source of randomness on the model's device; None for PyTorch's global one.
        cuda_graph: on a GPU, for 64 new tokens or more, make each token behind the prompt one
            launch, the replay of a CUDA graph; a warning says why where that cannot be. The tokens
            are the same, to rounding, and up to 16 more may be drawn behind the last row's end.
            `tritium.model.decoding.GraphedDecoding` says what memory it holds meanwhile.

    Returns:
        `[B, L + max_new_tokens]` ids, or fewer where all rows have ended; a batch of no rows as it
        is. For a list, a list: each prompt and what follows it, up to its first stop token.

    Raises:
        ValueError: an argument is out of its range, a prompt is empty, or an id is unknown.
        RuntimeError: logits are not finite.
    """
    stop_tokens = stop_ids(stop_tokens)
    drawn = stream(
        model, tokens, max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
        min_p=min_p, repetition_penalty=repetition_penalty, stop_tokens=stop_tokens,
        generator=generator, cuda_graph=cuda_graph,
    )  # fmt: skip
    if isinstance(tokens, Tensor):
        return torch.cat((tokens, *drawn), dim=1)
    prompts = [torch.as_tensor(row, device=model.device) for row in tokens]
    following = [*drawn]
    if not following:
        return prompts
    added_BL = torch.cat(following, dim=1)
    ends_BL = torch.isin(added_BL, added_BL.new_tensor(stop_tokens))
    # Behind its first stop token a row has that token again and again.
    lengths = (added_BL.shape[1] - ends_BL.sum(1) + 1).clamp(max=added_BL.shape[1]).tolist()
    rows = zip(prompts, added_BL, lengths, strict=True)
    return [torch.cat((prompt, added[:n])) for prompt, added, n in rows]


def sample(
    logits_BV: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one id per row, `[B, 1]`; the arguments are those of `generate`.

    It draws as `torch.multinomial` does, but does not wait for the device to look at the
    probabilities: where logits are NaN, so may be what it draws.
    """
    if temperature < COLDEST:
        return logits_BV.argmax(-1, keepdim=True)
    p_BV, ids_BV = softmax(logits_BV.float(), scale=1 / temperature).sort(-1, descending=True)
    if top_k is not None:
        p_BV = p_BV[:, :top_k]
    if top_p is not None:
        before_BV = p_BV.cumsum(-1) - p_BV
        p_BV = torch.where(before_BV < top_p, p_BV, 0)  # the most probable token always stays
    if min_p is not None:
        p_BV = torch.where(p_BV >= min_p * p_BV[:, :1], p_BV, 0)
    time_BV = torch.empty_like(p_BV).exponential_(generator=generator)  # the first to arrive wins
    return ids_BV.gather(-1, (p_BV / time_BV).argmax(-1, keepdim=True))


def _penalised(logits_BV: Tensor, seen_BV: Tensor, penalty: float) -> Tensor:
    less_BV = torch.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return torch.where(seen_BV, less_BV, logits_BV)


def _check(max_new_tokens: int, draw: _Draw) -> None:
    if max_new_tokens < 0:
        raise ValueError(f"generate: max_new_tokens must be at least 0, got {max_new_tokens}")
    if not 0 <= draw.temperature < math.inf:
        raise ValueError(f"generate: temperature must be at least 0, got {draw.temperature}")
    if draw.top_k is not None and draw.top_k < 1:
        raise ValueError(f"generate: top_k must be at least 1, got {draw.top_k}")
    if draw.top_p is not None and not 0 < draw.top_p <= 1:
        raise ValueError(f"generate: top_p must be in (0, 1], got {draw.top_p}")
    if draw.min_p is not None and not 0 <= draw.min_p <= 1:
        raise ValueError(f"generate: min_p must be in [0, 1], got {draw.min_p}")
    if not 0 < draw.repetition_penalty < math.inf:
        raise ValueError(
            f"generate: repetition_penalty must be above 0, got {draw.repetition_penalty}"
        )


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
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    seed: int = 1,
    on_token: Callable[[], object] = bool,
    cuda_graph: bool = True,
    log: Callable[[str], object] | None = None,
) -> Iterator[str]:
    """Yield a prompt and the text that the model continues it with, up to the end of text.

    The prompt is encoded as the training data were. An empty one is the beginning of a
    document. The global random number generators are not used. `on_token` is called after each
    token that was drawn; `cuda_graph` and `log` are those of `stream`.
    """
    ids = tokenizer.encode(prompt) or [tokenizer.eot]
    drawn = stream(
        model, [ids], max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
        min_p=min_p, repetition_penalty=repetition_penalty, stop_tokens=[tokenizer.eot],
        generator=torch.Generator(model.device).manual_seed(seed), cuda_graph=cuda_graph, log=log,
    )  # fmt: skip
    return spoken(tokenizer, _followed(ids, drawn, on_token))


def _followed(
    ids: list[int], drawn: Iterator[Tensor], on_token: Callable[[], object]
) -> Iterator[int]:
    yield from ids
    for token_11 in drawn:
        on_token()
        yield int(token_11)


def write_on(
    model: LanguageModel, tokenizer: Tokenizer, prompt: str, max_new_tokens: int, seed: int
) -> str:
    """Return `prompt` and what the model continues it with, at temperature 0.8 and top-p 0.95.

    The model is put back to training or evaluation, as it was; the global random number generators
    are not used. No CUDA graph is captured: a capture that fails may leave PyTorch's generators
    unusable, and with them the training around it.
    """
    assert isinstance(model, nn.Module)
    training = model.training
    model.eval()
    try:
        pieces = write_stream(model, tokenizer, prompt, max_new_tokens, seed=seed, cuda_graph=False)
        return "".join(pieces)
    finally:
        model.train(training)
