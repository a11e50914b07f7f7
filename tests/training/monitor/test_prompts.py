"""Prove that prompts are the first words of documents, whatever the text is."""

import torch

from tritium.data import Tokenizer
from tritium.training.monitor.prompts import COUNT, beginnings

DOCUMENTS = [
    '"""Read a file.\n\nMore of it follows here, and more, and more, and more."""\n',
    "Dear reader, it was the best of times, it was the worst of times, it was, it was so.",
    "\n\nimport os\nimport sys\n\nprint(os, sys, 1, 2, 3, 4, 5, 6, 7, 8, 9)\n",
    "Dear reader, it was another one that begins alike, and is as long as the others are.",
    "a fourth document, which is one more than is asked for, and so is left where it is.",
]


def batches(documents, width=400):
    tokenizer = Tokenizer.train(DOCUMENTS, 300)
    ids = tokenizer.encode_documents(documents)
    rows = torch.full((2, width), tokenizer.eot)
    rows[1, 1 : 1 + len(ids)] = torch.as_tensor(ids.astype("int64"))
    return [(rows[:1], rows[:1]), (rows[1:], rows[1:])], tokenizer


def test_prompts_begin_documents():
    assert beginnings(*batches(DOCUMENTS)) == ('"""Read a file.', "Dear reader, it", "import os")
    assert len(beginnings(*batches(DOCUMENTS))) == COUNT


def test_without_documents_the_prompt_is_empty():
    assert beginnings(*batches([])) == ("",)
    assert beginnings(*batches(["short"])) == ("",)
