"""Prompts of text samples, taken from the data where nobody chose any."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from tritium.data import Tokenizer

COUNT = 3
WORDS = 3
LONGEST = 16  # tokens that are looked at for the words


def beginnings(batches: Iterable[Sequence[Tensor]], tokenizer: Tokenizer) -> tuple[str, ...]:
    """Return the first words of documents, which a sample may continue.

    Args:
        batches: batches that begin with token ids `[B, L]`, of text that is not trained on.
        tokenizer: tokenizer of the ids.

    Returns:
        Up to three different prompts of three words each; an empty one, which begins a document,
        if no document begins in the batches.
    """
    found: dict[str, None] = {}
    for tokens, *_ in batches:
        for row in tokens:
            for place in (row == tokenizer.eot).nonzero()[:, 0].tolist():
                following = row[place + 1 : place + 1 + LONGEST]
                if len(following) == LONGEST and not (following == tokenizer.eot).any():
                    found |= {_words(tokenizer.decode(following)): None}
                if len(found) == COUNT:
                    return tuple(found)
    return tuple(found) or ("",)


def _words(text: str) -> str:
    """Return the first words of a text with the space between them, on one line."""
    line = text.lstrip().partition("\n")[0]
    return " ".join(line.split()[:WORDS])
