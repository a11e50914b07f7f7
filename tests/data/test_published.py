"""Published rank files and other people's tokenizer.json: their own ids, and no special ones."""

import base64
import hashlib
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import tiktoken
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from tritium.data import DataError, Tokenizer, prepare, tiktoken_files

TEXT = " ".join(f"the quick brown fox {i} jumps\nOVER don't café {i * i}  " for i in range(300))
SPECIAL = "<|endoftext|>", "</s>", "[SEP]", "<unk>", "[UNK]", "<pad>", "[CLS]"
texts = st.lists(
    st.sampled_from([*SPECIAL, "the", " quick", "é", " ", "\n", "'s", "42", "\0", "Ω"])
)


@pytest.fixture(scope="module")
def rank_file(tmp_path_factory) -> bytes:
    """Ranks learned here, in the format of the published ones."""
    engine = Tokenizer.train([TEXT], 400)._engine
    tokens = engine._encoding.token_byte_values()
    order = sorted(tokens, key=engine._encoding.encode_single_token)
    return b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(order))


@pytest.fixture
def published(rank_file, monkeypatch):
    """The three encodings, as if those ranks were what is published of each."""
    digest = hashlib.sha256(rank_file).hexdigest()
    for name, encoding in tiktoken_files.ENCODINGS.items():
        monkeypatch.setitem(tiktoken_files.ENCODINGS, name, replace(encoding, sha256=digest))


@pytest.fixture
def fetched(rank_file, published, monkeypatch) -> list[str]:
    asked = []
    monkeypatch.setattr("tiktoken.load.read_file", lambda url: (asked.append(url), rank_file)[1])
    return asked


@pytest.mark.parametrize("name", tiktoken_files.ENCODINGS)
def test_published_encoding(name, rank_file, fetched, capfd):
    tokenizer = Tokenizer.load(name)
    expected = tiktoken.Encoding(
        name,
        pat_str=tiktoken_files.ENCODINGS[name].pattern,
        mergeable_ranks=tiktoken_ranks(rank_file),
        special_tokens={"<|endoftext|>": tiktoken_files.ENCODINGS[name].eot},
    )
    text = TEXT + "".join(SPECIAL) + "  \r\n\tΩ ſ 中文 I'LL 12345"
    assert tokenizer.encode(text) == expected.encode_ordinary(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.vocab_size == expected.n_vocab == tokenizer.eot + 1
    assert "once; it is kept as" in capfd.readouterr().err


def tiktoken_ranks(content: bytes) -> dict[bytes, int]:
    lines = (line.split() for line in content.splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in lines}


def test_patterns_are_those_of_tiktoken(monkeypatch):
    from tiktoken_ext import openai_public

    monkeypatch.setattr(
        openai_public, "load_tiktoken_bpe", lambda url, expected_hash: expected_hash
    )
    monkeypatch.setattr(openai_public, "data_gym_to_mergeable_bpe_ranks", lambda **_: None)
    for name, encoding in tiktoken_files.ENCODINGS.items():
        torch_result = getattr(openai_public, "r50k_base" if name == "gpt2" else name)()
        assert encoding.pattern == torch_result["pat_str"].replace("{1,3}+", "{1,3}")
        assert encoding.sha256 == torch_result["mergeable_ranks"]
        assert encoding.eot == torch_result["special_tokens"]["<|endoftext|>"]
    assert openai_public.gpt2()["pat_str"] == openai_public.r50k_base()["pat_str"]


def test_fetched_once_and_kept(fetched, home):
    first = Tokenizer.load("cl100k_base")
    assert Tokenizer.load("cl100k_base").fingerprint == first.fingerprint
    assert len(fetched) == 1
    assert (home / "ranks" / "cl100k_base.tiktoken").exists()


def test_ids_that_the_vocabulary_leaves_out(fetched):
    tokenizer = Tokenizer.load("gpt2")
    assert tokenizer.byte_lengths[1000] == 0
    assert tokenizer.decode([*tokenizer.encode("a"), 1000, *tokenizer.encode("b")]) == "ab"


def test_local_rank_file(tmp_path, rank_file, published):
    path = tmp_path / "cl100k_base.tiktoken"
    path.write_bytes(rank_file)
    tokenizer = Tokenizer.load(path)
    tokenizer.save(tmp_path)
    assert Tokenizer.load(tmp_path).fingerprint == tokenizer.fingerprint
    assert Tokenizer.load(tmp_path).encode(TEXT) == tokenizer.encode(TEXT)
    torch_result = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert torch_result.encode(TEXT).ids == tokenizer.encode(TEXT)
    assert torch_result.token_to_id("<|endoftext|>") == tokenizer.eot == 100257


BAD_RANKS = [
    (
        "cl100k_base.tiktoken",
        b"IQ== 0\n",
        "is not the published cl100k_base.tiktoken: its sha256 is",
    ),
    ("mine.tiktoken", b"IQ== 0\n", "must be named one of r50k_base.tiktoken"),
    ("gpt2.tiktoken", None, "cannot read the rank file .*No such file"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_RANKS, ids=[n for n, *_ in BAD_RANKS])
def test_refuses_a_rank_file(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        Tokenizer.load(tmp_path / name)


def test_network_out_of_reach(home, monkeypatch, capfd):
    def fail(url):
        raise ConnectionError("no route to host")

    monkeypatch.setattr("tiktoken.load.read_file", fail)
    message = r"cannot fetch https://\S+/r50k_base.tiktoken: ConnectionError; .* put it at"
    with pytest.raises(DataError, match=message):
        Tokenizer.load("gpt2")
    assert not list(home.rglob("*.tiktoken"))


def test_download_that_is_damaged(home, monkeypatch):
    monkeypatch.setattr("tiktoken.load.read_file", lambda url: b"<html>")
    with pytest.raises(DataError, match=r"o200k_base.tiktoken is not the published"):
        Tokenizer.load("o200k_base")
    assert not list(home.rglob("*.tiktoken"))


def unigram() -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.Unigram())
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["<unk>", "</s>", "<pad>"]
    made.train_from_iterator(
        [TEXT], trainers.UnigramTrainer(vocab_size=300, special_tokens=special, unk_token="<unk>")
    )
    return made


def wordpiece() -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer, made.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    special = ["[UNK]", "[SEP]", "[CLS]"]
    made.train_from_iterator(
        [TEXT], trainers.WordPieceTrainer(vocab_size=300, special_tokens=special)
    )
    return made


def gpt2_like() -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    made.add_special_tokens(["<|endoftext|>", "<pad>"])
    return made


MADE = {
    "unigram": (unigram, "</s>", "HuggingFace"),
    "wordpiece": (wordpiece, "[SEP]", "HuggingFace"),
    "gpt2_like": (gpt2_like, "<|endoftext|>", "BytePairs"),
}


@pytest.fixture(scope="module", params=MADE)
def torch_result(request):
    make, end, engine = MADE[request.param]
    made = make()
    actual = Tokenizer(json.loads(made.to_str()))
    assert actual.eot == made.token_to_id(end)
    assert type(actual._engine).__name__ == engine
    assert actual.vocab_size == made.get_vocab_size()
    return made, actual


@settings(max_examples=150)
@given(pieces=texts)
def test_no_text_becomes_a_special_token(torch_result, pieces):
    made, actual = torch_result
    special = {made.token_to_id(name) for name in SPECIAL} - {None}
    unknown = {made.token_to_id("<unk>"), made.token_to_id("[UNK]")}
    text = "".join(pieces)
    assert not {*actual.encode(text)} & (special - unknown)
    if not any(name in text for name in SPECIAL):
        assert actual.encode(text) == made.encode(text, add_special_tokens=False).ids
    expected = [*actual.encode(text), actual.eot, *actual.encode("a"), actual.eot]
    assert actual.encode_documents([text, "a"]).tolist() == expected


def test_byte_lengths_are_those_of_the_text(torch_result):
    _, actual = torch_result
    text = "the quick brown fox jumps"
    assert actual.byte_lengths[actual.encode(text)].sum() - len(text) in (0, 1)  # a space in front
    assert actual.byte_lengths[actual.eot] == 0


def test_save_and_prepare(torch_result, tmp_path, text_file):
    _, actual = torch_result
    actual.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.fingerprint == actual.fingerprint
    folder = prepare(text_file, tokenizer=tmp_path, progress=False)
    ids = np.fromfile(folder / "val-00000.bin", "<u2")
    assert ids.max() < actual.vocab_size
    assert re.search(r"brown\s*fox", loaded.decode(ids[:200].tolist()))


@pytest.mark.parametrize("unit", [" ", "\n"], ids=repr)
def test_a_megabyte_that_overflows_the_split_is_kept_whole(rank_file, published, home, unit):
    (home / "ranks").mkdir()
    (home / "ranks" / "r50k_base.tiktoken").write_bytes(rank_file)
    tokenizer = Tokenizer.load("gpt2")
    text = unit * 1_000_000 + "x"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    ids = tokenizer.encode_documents(["a", text, "b"])
    assert np.count_nonzero(ids == tokenizer.eot) == 3
    assert tokenizer.decode(ids.tolist()).replace("<|endoftext|>", "") == f"a{text}b"
