"""Multiple choice as in HellaSwag: which ending of a text does a model find the most probable?

A file of questions has one JSON object a line, with the fields of HellaSwag's own files:

    {"ctx": "A man is sitting on a roof. He", "endings": ["starts ...", "is ...", ...], "label": 3}

The loss of an ending is the sum of its tokens' losses behind the context. "Plain" accuracy takes
the ending of the smallest loss, "normalised" that of the smallest loss per byte of UTF-8, as short
endings are more probable than long ones.

Zellers et al., "HellaSwag: Can a Machine Really Finish Your Sentence?", 2019.
https://arxiv.org/abs/1905.07830; both accuracies: Gao et al., "Language Model Evaluation Harness"
(`acc` and `acc_norm`, which counts characters).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from tritium.data import Tokenizer
from tritium.data.files import open_bytes
from tritium.kernels import linear_cross_entropy
from tritium.model.heads import pad_sequences
from tritium.model.transformer import Transformer

IGNORED = -100


class Question(NamedTuple):
    """A text and its possible endings, of which one is right."""

    context: str
    endings: list[str]
    label: int
    """Index of the right one."""
    line: int
    """Number of its line in the file, from 1 on."""


class Accuracy(NamedTuple):
    """Shares of questions whose right ending a model finds the most probable."""

    plain: float
    normalised: float
    chance: float
    """The share that choosing at random reaches."""
    questions: int

    @staticmethod
    def error(share: float, questions: int) -> float:
        """Return the standard error of a share."""
        return math.sqrt(share * (1 - share) / questions)


def read_questions(file: Path) -> list[Question]:
    """Return the questions of a file, in UTF-8, also as .gz or .zst; empty lines are left out.

    Raises:
        ValueError: it cannot be read, has no question, or a line is none; the message has its
            number.
    """
    try:
        with open_bytes(file) as (_, plain):
            lines = plain.read().split(b"\n")
    except OSError as error:
        raise ValueError(f"cannot read {file}: {error.strerror or error}") from error
    questions = [
        _question(f"{file}:{number}", line, number)
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not questions:
        raise ValueError(f"{file} holds no question; write one JSON object a line")
    return questions


def _question(place: str, line: bytes, number: int) -> Question:
    try:
        fields = json.loads(line)
    except ValueError as error:  # of UnicodeDecodeError too
        raise ValueError(f"{place}: a question must be a JSON object in UTF-8: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{place}: a question must be a JSON object, got {type(fields).__name__}")
    absent = [name for name in ("ctx", "endings", "label") if name not in fields]
    if absent:
        raise ValueError(
            f"{place}: a question must have ctx, endings and label; {absent[0]} is missing"
        )
    context, endings, label = fields["ctx"], fields["endings"], fields["label"]
    if not isinstance(context, str):
        raise ValueError(f"{place}: ctx must be text, got {context!r}")
    if not isinstance(endings, list) or len(endings) < 2:
        raise ValueError(f"{place}: endings must be a list of two or more, got {endings!r}")
    for ending in endings:
        if not isinstance(ending, str) or not ending.strip():
            raise ValueError(f"{place}: an ending must be text and not empty, got {ending!r}")
    if isinstance(label, str) and label.isdecimal():  # as in the copy of the datasets library
        label = int(label)
    if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < len(endings):
        raise ValueError(
            f"{place}: label must be the index of an ending, from 0 to {len(endings) - 1}, "
            f"got {label!r}; a test set without labels cannot be scored"
        )
    return Question(context, endings, label, number)


def accuracy(
    model: Transformer, tokenizer: Tokenizer, questions: list[Question], batch_size: int = 8
) -> Accuracy:
    """Return the accuracies of a model on questions, at least one.

    A context begins with the end of text, as documents do, and a space parts it from an ending.
    Of a context that does not fit the model's the end is read.

    Args:
        model: in evaluation mode.
        tokenizer: the model's.
        questions: such as `read_questions` returns.
        batch_size: endings that are computed at once.

    Raises:
        ValueError: an ending has more tokens than the model's context; the message names its line.
    """
    nats = endings_nats(model, tokenizer, questions, batch_size)
    plain = normalised = 0
    chance = 0.0
    for question, losses in zip(questions, nats, strict=True):
        sizes = [len(_spaced(ending).encode()) for ending in question.endings]
        per_byte = [x / size for x, size in zip(losses, sizes, strict=True)]
        plain += losses.index(min(losses)) == question.label
        normalised += per_byte.index(min(per_byte)) == question.label
        chance += 1 / len(question.endings)
    n = len(questions)
    return Accuracy(plain / n, normalised / n, chance / n, n)


@torch.no_grad()
def endings_nats(
    model: Transformer, tokenizer: Tokenizer, questions: list[Question], batch_size: int = 8
) -> list[list[float]]:
    """Return the loss of every ending of every question, in nats; as `accuracy`."""
    rows = [
        (ids, n) for question in questions
        for ids, n in _rows(tokenizer, question, model.config.max_seq_len)
    ]  # fmt: skip
    nats: list[float] = []
    for i in range(0, len(rows), batch_size):
        ids_BL, lengths_B = pad_sequences([ids for ids, _ in rows[i : i + batch_size]])
        counted_B = torch.tensor([n for _, n in rows[i : i + batch_size]])
        place_L = torch.arange(ids_BL.shape[1])
        is_ending_BL = (place_L >= (lengths_B - counted_B)[:, None]) & (
            place_L < lengths_B[:, None]
        )
        targets_BL = ids_BL.masked_fill(~is_ending_BL, IGNORED)[:, 1:].to(model.device)
        loss_BL = linear_cross_entropy(
            model.hidden(ids_BL[:, :-1].to(model.device)), model.head.weight, targets_BL,
            softcap=model.config.softcap, reduction="none",
        )  # fmt: skip
        nats += loss_BL.sum(1, dtype=torch.float64).tolist()
    found = iter(nats)
    return [[next(found) for _ in question.endings] for question in questions]


def _rows(tokenizer: Tokenizer, question: Question, room: int) -> Iterator[tuple[list[int], int]]:
    """Yield context and ending as ids, and how many at the end are the ending's."""
    context = [tokenizer.eot, *tokenizer.encode(question.context)]
    for ending in question.endings:
        ids = tokenizer.encode(_spaced(ending))
        if len(ids) > room:
            raise ValueError(
                f"line {question.line}: an ending must have at most {room} tokens, the model's "
                f"context, got {len(ids)}; leave the question out"
            )
        yield [*context[-(room + 1 - len(ids)) :], *ids], len(ids)


def _spaced(ending: str) -> str:
    return " " + ending.lstrip()
