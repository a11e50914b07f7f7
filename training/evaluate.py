"""Measure a trained model: python -m tritium.training.evaluate RUN FILE.

FILE is a text, or with --multiple-choice one of questions; see `tritium.training.multiple_choice`.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import torch
import tyro

import tritium
from tritium.data import DataError
from tritium.data.records import read_text
from tritium.model.transformer import Transformer
from tritium.training.device import choose_device
from tritium.training.monitor.terminal import tolerant_output
from tritium.training.multiple_choice import accuracy, read_questions
from tritium.training.trained import read

IGNORED = -100


class Score(NamedTuple):
    """Losses of a model on a text."""

    nats: float
    """Sum over all tokens."""
    tokens: int
    bytes: int

    @property
    def perplexity(self) -> float:
        """exp of the mean loss of a token."""
        return math.exp(self.nats / self.tokens)

    @property
    def bits_per_byte(self) -> float:
        """Bits that an arithmetic coder would write, per byte of the text."""
        return self.nats / math.log(2) / self.bytes


@torch.no_grad()
def nats_of(model: Transformer, ids: list[int], stride: int, batch_size: int = 8) -> float:
    """Return the sum of the losses of all ids but the first, in nats.

    The text is read in windows of the model's context, each `stride` tokens behind the one before.
    Every token counts once, in the first window that holds it: with at least context - stride
    tokens before it, except for those of the first window.

    Args:
        model: in evaluation mode.
        ids: at least two.
        stride: from 1 to the context. The smaller, the more each token sees, and the longer it
            takes: context / stride passes over the text.
        batch_size: windows that are computed at once.
    """
    length, last = model.config.max_seq_len, len(ids) - 1
    windows, counted = [], 0
    for begin in range(0, last, stride):
        end = min(begin + length, last)
        targets = [IGNORED] * (counted - begin) + ids[counted + 1 : end + 1]
        padding = length - (end - begin) if begin else 0  # of the last, to fill a batch
        windows.append((ids[begin:end] + [0] * padding, targets + [IGNORED] * padding))
        counted = end
        if end == last:
            break
    nats = 0.0
    for i in range(0, len(windows), batch_size):
        tokens, targets = (
            torch.tensor(x, device=model.device)
            for x in zip(*windows[i : i + batch_size], strict=True)
        )
        nats += model(tokens, targets).item() * int((targets != IGNORED).sum())
    return nats


def main(
    run: Annotated[Path, tyro.conf.Positional],
    file: Annotated[Path, tyro.conf.Positional],
    /,
    stride: int | None = None,
    batch_size: int = 8,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    checkpoint: Literal["best", "newest"] = "best",
    multiple_choice: bool = False,
) -> None:
    """Print the perplexity of a text, and its bits per byte, which tokenizers have in common.

    Args:
        run: folder of a run, of one checkpoint, or in Hugging Face's layout.
        file: the text, one document, also as .gz or .zst; read as train.py reads one.
        stride: tokens from one window of the context to the next. None: half the context.
        batch_size: windows, or endings, that are computed at once.
        device: device to compute on. auto: a GPU if there is one.
        checkpoint: the one of a run with the lowest validation loss, if it was kept, or the newest.
        multiple_choice: the file is of questions, one JSON object a line with ctx, endings and
            label, as HellaSwag's; print the accuracy.
    """
    if multiple_choice and stride is not None:
        raise ValueError("stride is of a text, and --multiple-choice of questions; leave one out")
    questions = read_questions(file) if multiple_choice else []
    model, tokenizer = read(run, choose_device(device), checkpoint=checkpoint)
    context = model.config.max_seq_len
    stride = max(1, context // 2) if stride is None else stride
    if not 1 <= stride <= context:
        raise ValueError(f"stride must be in [1, {context}], the model's context, got {stride}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if multiple_choice:
        try:
            found = accuracy(model, tokenizer, questions, batch_size)
        except ValueError as error:
            raise ValueError(f"{file}, {error}") from error
        plain, normalised = (
            f"{share:.1%} ± {found.error(share, found.questions):.1%}" for share in found[:2]
        )
        print(
            f"{file}: {found.questions:,} questions, by chance {found.chance:.1%}\n"
            f"accuracy {plain}, normalised by the bytes of an ending {normalised} (standard error)"
        )
        return
    text = read_text(file)
    ids = tokenizer.encode(text)
    if not ids:
        raise ValueError(f"{file} is empty; name a text")
    nats = nats_of(model, [tokenizer.eot, *ids], stride, batch_size)  # a document begins with it
    score = Score(nats, len(ids), len(text.encode()))
    print(
        f"{file}: {score.tokens:,} tokens, {score.bytes:,} bytes, in windows of {context:,} with "
        f"stride {stride:,}\nperplexity {score.perplexity:,.3f} per token, "
        f"{score.bits_per_byte:.4f} bits per byte"
    )


if __name__ == "__main__":
    try:
        with tritium.interruptible(), tolerant_output():
            tyro.cli(main, prog="python -m tritium.training.evaluate")
    except (ValueError, DataError) as error:
        print(f"tritium.training.evaluate: {error}", file=sys.stderr)
        sys.exit(2)
