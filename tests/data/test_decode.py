"""Ids in any form give the same text, or an error; a file's template never reaches a prompt."""

import json
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Trainable
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from tritium.data import DataError, DocumentLoader, Tokenizer, TokenLoader, prepare

TEXT = [f"the quick brown fox number {i} jumps over {i * 7 % 11} lazy dogs" for i in range(200)]
INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16]
FORMS = [
    list, tuple, iter, np.array, torch.tensor,
    lambda ids: [np.int64(i) for i in ids],
    lambda ids: [torch.tensor(i) for i in ids],
    lambda ids: torch.tensor([ids, ids]).T[:, 0],
    *(lambda ids, dtype=dtype: torch.tensor(ids, dtype=dtype) for dtype in INTEGERS),
    *(lambda ids, t=t: np.array(ids, t) for t in ("u1", "i2", ">u2", "<u4", "u8")),
]  # fmt: skip


@given(st.lists(st.integers(0, 127), max_size=20), st.sampled_from(FORMS))
def test_ids_in_every_form(tokenizer, ids, form):
    assert tokenizer.decode(form(ids)) == tokenizer.decode(ids)
    assert len(tokenizer.decode(ids)) >= len(ids) / 2


NO_IDS = [
    (torch.tensor(3), r"one dimension, got shape \[\]"),
    (np.int64(3), "one dimension"),
    (3, "a sequence of integers, got 3"),
    (torch.tensor([[1, 2]]), r"one dimension, got shape \[1, 2\]; decode each row"),
    (np.zeros((0, 2), int), r"got shape \[0, 2\]"),
    ([[1, 2]], "integers in one dimension, got"),
    ([torch.tensor([1, 2])], "integers in one dimension, got"),
    (torch.tensor([1.0]), "integers in one dimension, got 1.0 of type"),
    (torch.tensor([1.0]).bfloat16(), "integers"),
    ([1, 2.0], "integers"),
    ([True], "integers in one dimension, got True"),
    (torch.tensor([True]), "integers"),
    (["a"], "integers"),
    ("abc", "a sequence of integers, got 'abc'"),
    (None, "a sequence of integers, got None"),
    (torch.tensor([0, 300]), r"\[0, 300\), got 300"),
    (np.array([-1]), r"\[0, 300\), got -1"),
    (np.array([2**63], np.uint64), r"\[0, 300\)"),
]


@pytest.mark.parametrize(("ids", "message"), NO_IDS, ids=[repr(ids) for ids, _ in NO_IDS])
def test_what_is_no_ids(tokenizer, ids, message):
    with pytest.raises(DataError, match=f"decode: .*{message}"):
        tokenizer.decode(ids)


@pytest.mark.parametrize("texts", ["text", b"text", [b"text"], [None], [1]], ids=repr)
def test_what_is_no_texts(tokenizer, texts):
    for operation in (tokenizer.encode_batch, tokenizer.encode_documents):
        with pytest.raises(DataError, match=r"encode_(batch|documents): "):
            operation(texts)
    if not isinstance(texts, str):
        with pytest.raises(DataError, match="encode: a text must be a str"):
            tokenizer.encode(texts)
    else:
        with pytest.raises(DataError, match=r"give \[text\]"):
            Tokenizer.train(texts)


def foreign(kind: str) -> dict:
    """A tokenizer.json of somebody else: byte-level, or with a normalizer, or WordPiece."""
    special = ["<s>", "</s>", "[UNK]"]
    if kind == "WordPiece":
        made = Trainable(models.WordPiece(unk_token="[UNK]"))
        made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        made.normalizer = normalizers.Lowercase()
        trainer = trainers.WordPieceTrainer(
            vocab_size=300, special_tokens=special, show_progress=False
        )
    else:
        made = Trainable(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        if kind == "normalized":
            made.normalizer = normalizers.NFC()
        trainer = trainers.BpeTrainer(
            vocab_size=300,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=special,
            show_progress=False,
        )
    made.train_from_iterator(TEXT, trainer)
    return json.loads(made.to_str())


def changed(spec: dict, template: bool, truncate: bool, pad: bool) -> dict:
    made = Trainable.from_str(json.dumps(spec))
    if template:
        special = [(token, made.token_to_id(token)) for token in ("<s>", "</s>")]
        made.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=special
        )
    if truncate:
        made.enable_truncation(3)
    if pad:
        made.enable_padding(length=40)
    return json.loads(made.to_str())


@pytest.mark.parametrize("kind", ["byte-level", "normalized", "WordPiece"])
def test_template_truncation_and_padding_never_reach_the_ids(kind):
    spec = foreign(kind)
    plain, variants = Tokenizer(spec), set()
    for options in product([False, True], repeat=3):
        tokenizer = Tokenizer(changed(spec, *options))
        for text in ("", TEXT[0], " ".join(TEXT[:9])):
            assert tokenizer.encode(text) == plain.encode(text)
            assert tokenizer.encode_batch([text]) == [plain.encode(text)]
            assert tokenizer.encode_documents([text]).tolist() == [*plain.encode(text), plain.eot]
        assert tokenizer.fingerprint == plain.fingerprint
        variants.add(tokenizer.variant)
    assert len(variants) == 8


def other_normalizer(spec):
    spec["normalizer"] = {"type": "NFKC"}


def other_split(spec):
    spec["pre_tokenizer"]["add_prefix_space"] = True


def other_merges(spec):
    spec["model"]["merges"] = spec["model"]["merges"][:-1]


def other_special(spec):
    spec["added_tokens"][0]["content"] = "<begin>"
    spec["model"]["vocab"]["<begin>"] = spec["model"]["vocab"].pop("<s>")


def more_added(spec):
    last = 1 + max(spec["model"]["vocab"].values())
    spec["added_tokens"].append(spec["added_tokens"][0] | {"content": "<x>", "id": last})


@pytest.mark.parametrize("kind", ["byte-level", "normalized"])
@pytest.mark.parametrize(
    "change", [other_normalizer, other_split, other_merges, other_special, more_added]
)
def test_the_fingerprint_is_of_all_that_decides_the_ids(kind, change):
    spec = foreign(kind)
    other = json.loads(json.dumps(spec))
    change(other)
    assert Tokenizer(other).fingerprint != Tokenizer(spec).fingerprint


def test_data_of_another_template_is_prepared_apart(tmp_path):
    spec = foreign("byte-level")
    (tmp_path / "notes.txt").write_text("\n\n".join(TEXT))
    folders = set()
    for options in product([False, True], repeat=3):
        given = tmp_path / "given.json"
        given.write_text(json.dumps(changed(spec, *options)))
        prepared = prepare(tmp_path / "notes.txt", tokenizer=given, progress=False)
        kept = json.loads((prepared / "tokenizer.json").read_text())
        assert kept == json.loads(given.read_text())
        folders.add(prepared)
    assert len(folders) == 8


@pytest.mark.parametrize("loader_class", [TokenLoader, DocumentLoader])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_loop_over_a_loader_is_an_epoch(text_file, loader_class, world_size):
    prepared = prepare(text_file, vocab_size=300, progress=False)

    def loader():
        return loader_class(
            prepared, "train", batch_size=3, length=16, rank=0, world_size=world_size
        )

    looped, called = loader(), loader()
    assert len(looped) == looped.n_windows // (3 * world_size) > 2
    for _ in range(2):  # the next loop begins where the last one ended
        n = 0
        for tokens, targets, *_ in looped:
            expected = called.next_batch()
            assert torch.equal(tokens, expected[0])
            assert torch.equal(targets, expected[1])
            n += 1
        assert n == len(looped)
    assert looped.state() == called.state()
    assert len(loader_class(prepared, "val", batch_size=999, length=16)) == 1
