"""Any other tokenizer.json, encoded by `tokenizers` itself: sentencepiece, WordPiece, normalizers.

By default `tokenizers` turns the text of a special token into that token, and a Unigram vocabulary
may also hold such texts as ordinary pieces. Both are prevented.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

from tritium.data.bpe import byte_characters
from tritium.data.error import DataError
from tritium.data.special import end_of_text

_UNUSED = {"version", "truncation", "padding", "post_processor"}  # by `_encode` and `decode`


class HuggingFace:
    """The engine of a `Tokenizer` whose file `tiktoken` cannot follow; see there."""

    def __init__(self, spec: dict):
        """Take the content of a tokenizer.json; ValueError and its like if it cannot be used."""
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        from tokenizers import Tokenizer as Reader

        self.eot_text, self.eot = end_of_text(spec)
        try:
            self._reader = Reader.from_str(json.dumps(spec))
        except Exception as error:  # the only class that it raises
            raise ValueError(str(error)) from error
        if self._reader.token_to_id(self.eot_text) != self.eot:
            raise ValueError(f"{self.eot_text} has two ids")
        self._reader.no_truncation()
        self._reader.no_padding()
        self._reader.encode_special_tokens = True
        unknown = spec["model"].get("unk_token"), spec["model"].get("unk_id")
        special = [token for token in spec["added_tokens"] if token["special"]]
        self._special = np.array(
            [t["id"] for t in special if t["content"] != unknown[0] and t["id"] != unknown[1]]
        )
        self._special_text = re.compile("|".join(re.escape(t["content"]) for t in special))
        vocab = self._reader.get_vocab(with_added_tokens=True)
        self.vocab_size = 1 + max(vocab.values())
        self.byte_lengths = np.zeros(self.vocab_size, dtype=np.int64)
        length = _length_of(spec)
        for token, i in vocab.items():
            self.byte_lengths[i] = length(token)
        self.byte_lengths[[token["id"] for token in special]] = 0
        content = json.dumps({k: v for k, v in spec.items() if k not in _UNUSED}, sort_keys=True)
        self.fingerprint = hashlib.sha256(content.encode()).hexdigest()[:16]

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`."""
        return self._without_special(text, self._encode([text])[0])

    def encode_batch(self, texts: Sequence[str], threads: int | None) -> list[list[int]]:
        """Return the ids of each text; `tokenizers` chooses the threads."""
        pairs = zip(texts, self._encode(texts), strict=True)
        return [self._without_special(text, ids) for text, ids in pairs]

    def encode_documents(self, texts: Sequence[str]) -> np.ndarray:
        """Return the ids of all texts, each ended by `eot`."""
        encoded = self.encode_batch(texts, None)
        return np.array([i for ids in encoded for i in (*ids, self.eot)], dtype=np.uint32)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`."""
        return self._reader.decode([*ids], skip_special_tokens=False)

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        batch = self._reader.encode_batch_fast([*texts], add_special_tokens=False)
        return [encoding.ids for encoding in batch]

    def _without_special(self, text: str, ids: list[int]) -> list[int]:
        if not np.isin(ids, self._special).any():
            return ids
        cuts = [0, *(match.start() + 1 for match in self._special_text.finditer(text)), len(text)]
        parts = [text[i:j] for i, j in pairwise(cuts)]
        ids = [i for part in self._encode(parts) for i in part]
        if np.isin(ids, self._special).any():
            raise DataError(f"this tokenizer makes a special token of ordinary text: {text[:80]!r}")
        return ids


def _length_of(spec: dict) -> Callable[[str], int]:
    if '"ByteLevel"' in json.dumps(spec["decoder"]):
        characters = {*byte_characters().values()}
        return lambda token: sum(len(c.encode()) if c not in characters else 1 for c in token)
    if spec["model"]["type"] == "WordPiece":
        return lambda token: (
            len(token.encode()) - 2 if token[:2] == "##" else len(token.encode()) + 1
        )
    byte = re.compile("<0x[0-9A-F]{2}>")
    return lambda token: 1 if byte.fullmatch(token) else len(token.replace("▁", " ").encode())
