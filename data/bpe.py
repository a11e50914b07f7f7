"""Byte-level BPE read from a tokenizer.json and encoded by `tiktoken`, with the same ids.

`tiktoken` merges the pair whose result has the lowest id and takes a complete word that is a token.
A tokenizer.json says the same when its merges are in the order of ids and make every token; any
other is left to `tokenizers`.

Sennrich et al., "Neural Machine Translation of Rare Words with Subword Units", 2016.
https://arxiv.org/abs/1508.07909
"""

import hashlib
import json
import os
from collections.abc import Sequence

import numpy as np
import tiktoken

from tritium.data.special import end_of_text

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
PIECE = 65_536  # characters; the split of more white space than this overflows tiktoken's stack


class BytePairs:
    """The engine of a `Tokenizer` whose file `tiktoken` can follow; see there."""

    def __init__(self, spec: dict):
        """Take the content of a tokenizer.json; ValueError and its like if of another kind."""
        pattern = _pattern(spec)
        self.eot_text, self.eot = end_of_text(spec)
        tokens, special = _tokens(spec), {t["content"]: t["id"] for t in spec["added_tokens"]}
        self._tokens = {i for i, token in enumerate(tokens) if token} | {*special.values()}
        self._encoding = tiktoken.Encoding(
            "tritium",
            pat_str=pattern,
            mergeable_ranks={token: i for i, token in enumerate(tokens) if token},
            special_tokens=special,
        )
        self.vocab_size = len(tokens)
        self.byte_lengths = np.array([len(token) for token in tokens], dtype=np.int64)
        content = json.dumps([pattern, self.eot, [token.hex() for token in tokens], special])
        self.fingerprint = hashlib.sha256(content.encode()).hexdigest()[:16]

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`."""
        return self._ids(text).tolist()

    def encode_batch(self, texts: Sequence[str], threads: int | None) -> list[list[int]]:
        """Return the ids of each text."""
        threads = threads or len(os.sched_getaffinity(0))
        return self._encoding.encode_ordinary_batch([*texts], num_threads=threads)

    def encode_documents(self, texts: Sequence[str]) -> np.ndarray:
        """Return the ids of all texts, each ended by `eot`."""
        # tiktoken splits at the special token first, so one call gives what many would.
        if not any(self.eot_text in text for text in texts):
            ids = self._attempt(self.eot_text.join([*texts, ""]), {self.eot_text})
            if ids is not None:
                return ids
        return np.concatenate([np.append(self._ids(text), self.eot) for text in texts])

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`, nothing for an id that the vocabulary leaves out."""
        return self._encoding.decode([i for i in ids if i in self._tokens], errors="replace")

    def _ids(self, text: str) -> np.ndarray:
        ids = self._attempt(text, set())
        if ids is not None:
            return ids
        pieces = (text[i : i + PIECE] for i in range(0, len(text), PIECE))
        return np.concatenate([self._encoding.encode_ordinary(piece) for piece in pieces])

    def _attempt(self, text: str, special: set[str]) -> np.ndarray | None:
        try:
            return self._encoding.encode_to_numpy(
                text, allowed_special=special, disallowed_special=()
            )
        except BaseException as error:  # the stack of the regular expression overflows
            if not isinstance(error, ValueError) and type(error).__name__ != "PanicException":
                raise  # older releases of tiktoken panic, which is no Exception
            return None


def _pattern(spec: dict) -> str:
    before, model = spec["pre_tokenizer"], spec["model"]
    if before["type"] == "ByteLevel":
        split, byte_level = None, before
    else:
        split, byte_level = before["pretokenizers"]
        if (split["type"], split["behavior"], split["invert"]) != ("Split", "Isolated", False):
            raise ValueError(f"another split: {split}")
    kind = (
        model["type"],
        spec["normalizer"],
        byte_level["type"],
        byte_level["use_regex"],
        byte_level["add_prefix_space"],
        all(token["special"] for token in spec["added_tokens"]),
    )
    if kind != ("BPE", None, "ByteLevel", split is None, False, True):
        raise ValueError(f"another kind: {kind}")
    options = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    if any(model.get(option) for option in options):
        raise ValueError(f"one of {options} is set")
    return GPT2_PATTERN if split is None else split["pattern"]["Regex"]


def _tokens(spec: dict) -> list[bytes]:
    model, special = spec["model"], {token["content"] for token in spec["added_tokens"]}
    _check_added(model["vocab"], spec["added_tokens"])
    vocab = {token: i for token, i in model["vocab"].items() if token not in special}
    pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
    merged = [vocab[left + right] for left, right in pairs]
    if merged != sorted(merged):
        raise ValueError("ids are not in the order of the merges")
    byte_of = _byte_of_character()
    by_id = {i: bytes(byte_of[c] for c in token) for token, i in vocab.items()}
    if len({*by_id} - {*merged}) > 256 and not model.get("ignore_merges"):
        raise ValueError("some tokens come from no merge")
    if not {bytes([b]) for b in range(256)} <= {*by_id.values()}:
        raise ValueError("some of the 256 bytes have no id")
    size = 1 + max([*by_id, *(token["id"] for token in spec["added_tokens"])])
    return [by_id.get(i, b"") for i in range(size)]


def _check_added(vocab: dict[str, int], added: list[dict]) -> None:
    # `tokenizers` numbers a token that the vocabulary lacks after all others, as files should.
    ids = {**vocab}
    for token in added:
        if ids.setdefault(token["content"], len(ids)) != token["id"]:
            raise ValueError(f"{token['content']} has two ids")


def byte_characters() -> dict[int, str]:
    """Return the character that represents each byte in a byte-level vocabulary."""
    # Printable Latin-1 represents itself, the others follow from U+0100.
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def _byte_of_character() -> dict[str, int]:
    return {character: b for b, character in byte_characters().items()}
