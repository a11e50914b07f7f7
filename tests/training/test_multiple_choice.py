"""Prove that endings are scored one by one, and that malformed lines are named."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tritium.model import ModelConfig, Transformer
from tritium.training.multiple_choice import (
    Accuracy,
    Question,
    accuracy,
    endings_nats,
    read_questions,
)

CONTEXT = 12
WORDS = st.text("abc é", min_size=1, max_size=14).filter(str.strip)


@pytest.fixture(autouse=True)
def references(monkeypatch):
    monkeypatch.setattr("tritium.kernels.runtime.CPU_KERNELS", False)


class Bytes:
    """A tokenizer of bytes; 256 ends a document."""

    eot = 256

    def encode(self, text):
        return list(text.encode())


def build(softcap=None):
    torch.manual_seed(1)
    config = ModelConfig(257, n_layers=1, d_model=16, n_heads=2, max_seq_len=CONTEXT)
    model = Transformer(ModelConfig(**vars(config) | dict(softcap=softcap))).eval()
    with torch.no_grad():  # as after training: a block and an embedding that matter
        model.blocks[0].attention.output.weight.mul_(30)
        model.embedding.weight.mul_(30)
    return model.double()


@torch.no_grad()
def one_by_one(model, question):
    """The loss of each ending, token by token from logits, in a batch of its own."""
    found = []
    for ending in question.endings:
        ids = [256, *question.context.encode()]
        behind = list((" " + ending.lstrip()).encode())
        ids = [*ids, *behind][-CONTEXT - 1 :]
        log_p = model(torch.tensor([ids[:-1]]))[0].log_softmax(-1)
        nats = [-log_p[i - 1, ids[i]].item() for i in range(len(ids) - len(behind), len(ids))]
        found.append(sum(nats))
    return found


@st.composite
def questions(draw):
    short = WORDS.filter(lambda text: len(text.lstrip().encode()) < CONTEXT)
    # Two of one text have one loss: which of them is first, its rounding decides.
    endings = draw(st.lists(short, min_size=2, max_size=4, unique_by=str.lstrip))
    context = draw(st.text("abc é", max_size=20))
    return Question(context, endings, draw(st.integers(0, len(endings) - 1)), 1)


@given(st.lists(questions(), min_size=1, max_size=5), st.integers(1, 7), st.sampled_from([None, 2]))
@settings(max_examples=40)
def test_losses_and_accuracies_are_those_of_endings_alone(asked, batch_size, softcap):
    model = build(softcap)
    expected = [one_by_one(model, question) for question in asked]
    for x, y in zip(endings_nats(model, Bytes(), asked, batch_size), expected, strict=True):
        assert x == pytest.approx(y, rel=1e-6)
    plain, normalised = 0, 0
    for question, nats in zip(asked, expected, strict=True):
        sizes = [1 + len(ending.lstrip().encode()) for ending in question.endings]
        ranked = sorted(range(len(nats)), key=nats.__getitem__)
        plain += ranked[0] == question.label
        ranked = sorted(range(len(nats)), key=lambda i: nats[i] / sizes[i])
        normalised += ranked[0] == question.label
    found = accuracy(model, Bytes(), asked, batch_size)
    chance = sum(1 / len(question.endings) for question in asked) / len(asked)
    assert found == pytest.approx((plain / len(asked), normalised / len(asked), chance, len(asked)))


def test_a_model_that_knows_the_endings_is_right():
    """The label picks the ending of the least loss, and no other."""
    model = build()
    texts = Question("ab", ["cab", "bca", "aac"], 0, 1)
    (nats,) = endings_nats(model, Bytes(), [texts])
    best = nats.index(min(nats))
    for label in range(3):
        found = accuracy(model, Bytes(), [texts._replace(label=label)])
        assert (found.plain, found.normalised) == (float(label == best),) * 2
    assert Accuracy.error(0.25, 48) == pytest.approx(0.0625)


def test_an_ending_longer_than_the_context_is_named():
    asked = [Question("a", ["b", "c"], 0, 1), Question("a", ["b", "b" * CONTEXT], 0, 7)]
    with pytest.raises(ValueError, match=r"line 7: an ending must have at most 12 tokens.* got 13"):
        accuracy(build(), Bytes(), asked)
    fits = Question("a" * 99, ["b", "b" * (CONTEXT - 1)], 0, 1)
    assert endings_nats(build(), Bytes(), [fits])[0] == pytest.approx(one_by_one(build(), fits))


def test_reads_what_hellaswag_writes(tmp_path):
    file = tmp_path / "questions.jsonl"
    line = dict(ind=24, ctx="A man. He", endings=["a", "é", "c", "d"], label=3, split="val")
    again = line | dict(label="1")  # as the datasets library has it
    file.write_bytes(b"\n".join([json.dumps(line).encode(), b" ", json.dumps(again).encode(), b""]))
    first, second = read_questions(file)
    assert first == Question("A man. He", ["a", "é", "c", "d"], 3, 1)
    assert (second.label, second.line) == (1, 3)


GOOD = dict(ctx="a", endings=["b", "c"], label=0)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "a question must be a JSON object in UTF-8: Expecting"),
        (b'{"ctx": "\xff"}', "a question must be a JSON object in UTF-8: 'utf-8' codec"),
        ([1], "a question must be a JSON object, got list"),
        (dict(ctx="a", label=0), "must have ctx, endings and label; endings is missing"),
        (GOOD | dict(ctx=3), "ctx must be text, got 3"),
        (GOOD | dict(endings="bc"), "endings must be a list of two or more, got 'bc'"),
        (GOOD | dict(endings=["b"]), "endings must be a list of two or more"),
        (GOOD | dict(endings=["b", " "]), "an ending must be text and not empty, got ' '"),
        (GOOD | dict(endings=["b", None]), "an ending must be text and not empty, got None"),
        (GOOD | dict(label=2), "label must be the index of an ending, from 0 to 1, got 2"),
        (GOOD | dict(label=-1), "from 0 to 1, got -1"),
        (GOOD | dict(label=True), "from 0 to 1, got True"),
        (GOOD | dict(label=""), "got ''; a test set without labels cannot be scored"),
        (GOOD | dict(label=0.0), "got 0.0"),
    ],
)
def test_names_the_line_that_is_malformed(line, message, tmp_path):
    file = tmp_path / "questions.jsonl"
    bad = line if isinstance(line, str | bytes) else json.dumps(line)
    bad = bad.encode() if isinstance(bad, str) else bad
    file.write_bytes(json.dumps(GOOD).encode() + b"\n\n" + bad + b"\n")
    with pytest.raises(ValueError, match=f"questions.jsonl:3: .*{message}"):
        read_questions(file)


def test_names_a_file_without_questions(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match=r"empty\.jsonl holds no question"):
        read_questions(tmp_path / "empty.jsonl")
    with pytest.raises(ValueError, match=r"cannot read .*nowhere\.jsonl: No such file"):
        read_questions(tmp_path / "nowhere.jsonl")
