"""Encoding loses nothing, agrees with Hugging Face's reading of the same file, and is stable."""

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tritium.data import DataError, Tokenizer

CASES = [
    "",
    "<|endoftext|>",
    "the quick <|endoftext|> fox",
    "    indented\n\t\tcode()\r\n\n\n   # end  ",
    "1234567890 3.14159",
    "I'll don't 'quoted'",
    "naïve café ﬁ İstanbul ſ",
    "👩‍👩‍👧 🇫🇷 e\u0301 \u200b\ufeff\u2028\x85",
    "中文没有空格 日本語 한국어 العربية",
    "\0\x01\x7f",
    " " * 100 + "x",
    "f():\n    a\n\n\tb = [\n        1,\r\n  2]\n" + " " * 70 + "c",
    "\n" * 200,
    "a" * 200,
    "=" * 200 + "\n" * 70,
]


@pytest.fixture(scope="module")
def rich(tmp_path_factory) -> tuple[Tokenizer, tokenizers.Tokenizer]:
    """A tokenizer with many merges, and Hugging Face's reading of its file."""
    path = tmp_path_factory.mktemp("rich") / "tokenizer.json"
    tokenizer = Tokenizer.train([*CASES * 3, __doc__ * 2, Path(__file__).read_text()], 900)
    tokenizer.save(path)
    return tokenizer, tokenizers.Tokenizer.from_file(str(path))


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=300))
@example("<|endoftext|>")
def test_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.byte_lengths[ids].sum() == len(text.encode())
    assert tokenizer.eot not in ids


@pytest.mark.parametrize("text", [text for text in CASES if "<|" not in text], ids=repr)
def test_same_ids_as_hugging_face(rich, text):
    actual, expected = rich
    assert actual.encode(text) == expected.encode(text).ids
    assert expected.decode(actual.encode(text)) == text


@settings(max_examples=300, deadline=None)
@given(
    st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from(" \n'aeé中1="), max_size=99)
)
def test_same_ids_as_hugging_face_on_random_text(rich, text):
    actual, expected = rich
    assert actual.encode(text) == expected.encode(text).ids


@pytest.mark.parametrize("width", [4, 8, 60])
@pytest.mark.parametrize("before", [":", ")", "", "\r"])
def test_a_line_break_and_the_indentation_behind_it_are_a_token(before, width):
    line = f"{before}\n{' ' * width}"
    tokenizer = Tokenizer.train([f"x{line}x\n" * 50], 400)
    assert tokenizer.decode(tokenizer.encode(f"x{line}x")[1:-1]) == line
    assert len(tokenizer.encode(f"x{line}x")) == 3


def test_same_ids_as_hugging_face_on_ambiguous_merges():
    """Two letters only: nearly every pair of neighbours is a possible merge."""
    rng = random.Random(0)
    words = ["".join(rng.choices("ab", k=rng.randint(2, 30))) for _ in range(2000)]
    actual = Tokenizer.train([" ".join(words[:1000])], 350)
    expected = tokenizers.Tokenizer.from_str(json.dumps(actual._spec))
    assert [actual.encode(word) for word in words] == [expected.encode(word).ids for word in words]


def test_special_token_is_special_to_hugging_face(rich):
    actual, expected = rich
    assert expected.token_to_id("<|endoftext|>") == actual.eot == actual.vocab_size - 1


@pytest.mark.parametrize("text", ["a", " ", "\n", "!", "中", "1", "\u0301"], ids=repr)
def test_a_megabyte_without_a_break(text):
    """Unbounded, the split pattern overflows tiktoken's stack here and training never ends."""
    tokenizer = Tokenizer.train([text * 1_000_000], 259)
    assert tokenizer.decode(tokenizer.encode(text * 1_000_000)) == text * 1_000_000


def test_batch_is_the_same_as_one_by_one(tokenizer):
    assert tokenizer.encode_batch(CASES, threads=3) == [tokenizer.encode(text) for text in CASES]


def test_training_is_deterministic():
    texts = [f"{i % 7} {i % 11} word{i % 13}" for i in range(500)]
    first, second = (Tokenizer.train(order, 320) for order in (texts, texts[::-1]))
    assert first.fingerprint == second.fingerprint


def test_small_text_gives_a_smaller_vocabulary():
    assert Tokenizer.train(["aab aab"], 5000).vocab_size == 260  # aa, aab, " aab"


def test_byte_lengths(tokenizer):
    assert tokenizer.byte_lengths.dtype == np.int64
    assert tokenizer.byte_lengths.shape == (tokenizer.vocab_size,) == (300,)
    assert tokenizer.byte_lengths[tokenizer.eot] == 0
    assert (np.delete(tokenizer.byte_lengths, tokenizer.eot) > 0).all()


def test_broken_utf8_decodes_to_the_replacement_character(tokenizer):
    assert tokenizer.decode(tokenizer.encode("é")[:1]) == "\ufffd"


@pytest.mark.parametrize("ids", [[-1], [0, 300]])
def test_decode_refuses_unknown_ids(tokenizer, ids):
    with pytest.raises(DataError, match=rf"\[0, 300\), got {ids[-1]}"):
        tokenizer.decode(ids)


@pytest.mark.parametrize("size", [256, 0, -1])
def test_refuses_a_vocabulary_below_the_bytes(size):
    with pytest.raises(DataError, match=f"vocab_size must be at least 257 .* got {size}"):
        Tokenizer.train(["text"], size)


def test_saves_and_loads(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    tokenizer.save(tmp_path / "other.json")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["other.json", "tokenizer.json"]
    for path in (tmp_path, tmp_path / "other.json"):
        loaded = Tokenizer.load(path)
        assert loaded.fingerprint == tokenizer.fingerprint
        assert loaded.encode("the quick brown") == tokenizer.encode("the quick brown")


def test_fingerprint_is_of_the_content(tokenizer, tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer._spec, indent=4))
    assert Tokenizer.load(tmp_path).fingerprint == tokenizer.fingerprint
    one, other = (Tokenizer.train([text], 258) for text in ("ab ab", "cd cd"))
    assert one.fingerprint != other.fingerprint


def no_vocabulary(spec):
    del spec["model"]["vocab"]


def other_model(spec):
    spec["model"]["type"] = "Unigram"


def normalizer(spec):
    spec["normalizer"] = {"type": "NFC"}


def broken_pattern(spec):
    spec["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = "("


def split_twice(spec):
    spec["pre_tokenizer"]["pretokenizers"][1]["use_regex"] = True


def space_in_front(spec):
    spec["pre_tokenizer"]["pretokenizers"][1]["add_prefix_space"] = True


def no_end_of_text(spec):
    spec["added_tokens"] = []


def other_special_token(spec):
    spec["added_tokens"][0]["content"] = "<pad>"


def id_left_out(spec):
    spec["added_tokens"][0]["id"] += 1


def merges_out_of_order(spec):
    spec["model"]["merges"].reverse()


FAULTS = {
    no_vocabulary: "Missing vocab",
    other_model: "invalid type",
    broken_pattern: "Oniguruma error",
    no_end_of_text: "no special token is one of <|endoftext|>",
    other_special_token: "no special token is one of",
    id_left_out: "has two ids",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_refuses_a_broken_tokenizer(tokenizer, tmp_path, fault):
    spec = json.loads(json.dumps(tokenizer._spec))
    fault(spec)
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    message = rf"tokenizer\.json: not a tokenizer\.json with an end.*{re.escape(FAULTS[fault])}"
    with pytest.raises(DataError, match=message):
        Tokenizer.load(tmp_path)


OTHERS = [normalizer, split_twice, space_in_front, merges_out_of_order]


@pytest.mark.parametrize("change", OTHERS, ids=lambda change: change.__name__)
def test_what_tiktoken_cannot_follow_is_left_to_tokenizers(rich, change):
    spec = json.loads(json.dumps(rich[0]._spec))
    change(spec)
    actual, expected = Tokenizer(spec), tokenizers.Tokenizer.from_str(json.dumps(spec))
    expected.encode_special_tokens = True
    for text in [*CASES, "e\u0301 one  two\nthree"]:
        assert actual.encode(text) == expected.encode(text, add_special_tokens=False).ids
        assert actual.eot not in actual.encode(text)


NO_JSON = [b"", b"{", b"\xff", b"plain text", b"[" * 99_999]


@pytest.mark.parametrize("content", [*NO_JSON, b"[]"], ids=len)
def test_refuses_a_damaged_file_and_one_that_is_no_tokenizer(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    says = (
        r" is no tokenizer \(.*; name a tokenizer\.json, a fo" if content in NO_JSON else ": not a "
    )
    with pytest.raises(DataError, match=rf"tokenizer\.json{says}"):
        Tokenizer.load(tmp_path)


def test_refuses_a_missing_file(tmp_path):
    with pytest.raises(DataError, match=r"cannot read the tokenizer .*No such file"):
        Tokenizer.load(tmp_path / "nothing.json")


@settings(max_examples=100, deadline=None)
@given(
    st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("ab\r\n é中🇫"), max_size=60)
)
def test_characters_are_one_token_each_if_known_and_their_bytes_if_not(text):
    """Also where neighbours would make a word, and of several bytes."""
    known = "ab\r\n é中🇫"
    tokenizer = Tokenizer.train([known * 3], characters=True)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    spelled = [c for c in text if c not in known and ord(c) > 127]
    least = len(text) - len(spelled)
    assert len(ids) >= len(text)
    assert len(ids) <= least + sum(len(c.encode()) for c in spelled)
    inside = "".join(c for c in text if c in known)
    assert len(tokenizer.encode(inside)) == len(inside)
