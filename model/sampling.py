"""Sampling from a model, one token at a time, with keys and values kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from kernels import softmax

if TYPE_CHECKING:
    from .transformer import Transformer


@torch.no_grad()
def generate(
    model: Transformer,
    tokens: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Continue `tokens` by sampling from the model.

    When the context is full, its older half is dropped and the rest read again.

    Args:
        model: the model to sample from.
        tokens: `[B, L]` ids on the model's device, L >= 1.
        max_new_tokens: how many tokens to add to each row.
        temperature: divides the logits; 0 takes the most probable token.
        top_k: sample among the k most probable tokens only.
        top_p: sample among the fewest tokens whose probabilities sum to at least p.
        generator: source of randomness on the model's device; None for PyTorch's global one.

    Returns:
        `[B, L + max_new_tokens]` ids.

    Raises:
        ValueError: an argument is out of its range.
    """
    _check(tokens, max_new_tokens, temperature, top_k, top_p)
    limit = model.config.max_seq_len
    cache, unread = None, tokens[:, -limit:]
    for _ in range(max_new_tokens):
        if cache is None or cache.length + unread.shape[1] > limit:
            if cache is not None:
                unread = tokens[:, -max(1, limit // 2) :]
            cache = model.new_cache()
        logits_BV = model.logits(model.hidden(unread, cache)[:, -1])
        unread = sample(logits_BV, temperature, top_k, top_p, generator)
        tokens = torch.cat((tokens, unread), dim=1)
    return tokens


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
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"generate: temperature must be at least 0, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"generate: top_k must be at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"generate: top_p must lie in (0, 1], got {top_p}")


class Tokenizer(Protocol):
    """What turns text into ids and back."""

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


def write_on(
    model: Transformer, tokenizer: Tokenizer, prompt: str, max_new_tokens: int, seed: int
) -> str:
    """Return `prompt` and what the model goes on with, at temperature 0.8 and top-p 0.95.

    The model is put back to training or evaluation, as it was; the global random number generators
    are not used.
    """
    device, training = model.embedding.weight.device, model.training
    ids = tokenizer.encode(prompt) or [tokenizer.eot]
    model.eval()
    tokens = model.generate(
        torch.tensor([ids], device=device), max_new_tokens, temperature=0.8, top_p=0.95,
        generator=torch.Generator(device).manual_seed(seed),
    )  # fmt: skip
    model.train(training)
    return tokenizer.decode(tokens[0].tolist())
