"""Byte-level BPE: `tokenizers` learns the merges, `tiktoken` encodes with them.

The file format is Hugging Face's tokenizer.json, so `tokenizers` and `transformers` read it too and
give the same ids. A special token ends each document; text that spells it is encoded as text.

Sennrich et al., "Neural Machine Translation of Rare Words with Subword Units", 2016.
https://arxiv.org/abs/1508.07909
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tiktoken

from .corpus import DataError

EOT = "<|endoftext|>"
FILE = "tokenizer.json"

# Words with one character before them, numbers in groups of three, punctuation, white space. Every
# repeat is bounded: without that a megabyte of spaces overflows tiktoken's stack, and training
# takes the square of the longest word.
PATTERN = (
    r"[^\r\n\p{L}\p{N}]?\p{L}{1,64}|\p{N}{1,3}| ?[^\s\p{L}\p{N}]{1,64}[\r\n]{0,64}"
    r"|\s{0,64}[\r\n]{1,64}|\s{1,64}(?!\S)|\s{1,64}"
)


class Tokenizer:
    """Text to token ids and back. Made by `Tokenizer.train` or `Tokenizer.load`.

    Attributes:
        vocab_size: V, the number of ids: merges, the 256 bytes, and the end-of-text token.
        eot: the id of the end-of-text token.
        byte_lengths: `[V]`, int64; how many bytes of text each id stands for, 0 for `eot`.
        fingerprint: hex digest of the split pattern and of every token; not of the file's layout.
    """

    def __init__(self, spec: dict):
        """Take the content of a tokenizer.json; DataError if it is not byte-level BPE."""
        try:
            pattern, tokens, self.eot = _parse(spec)
            ranks = {token: i for i, token in enumerate(tokens) if i != self.eot}
            self._encoding = tiktoken.Encoding(
                "tritium",
                pat_str=pattern,
                mergeable_ranks=ranks,
                special_tokens={EOT: self.eot},
            )
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"not a byte-level BPE tokenizer with {EOT} and a split pattern ({error!r}); "
                "train one with Tokenizer.train"
            ) from error
        self._spec = spec
        self.vocab_size = len(tokens)
        self.byte_lengths = np.array([len(token) for token in tokens], dtype=np.int64)
        content = json.dumps([pattern, self.eot, [token.hex() for token in tokens]])
        self.fingerprint = hashlib.sha256(content.encode()).hexdigest()[:16]

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int = 4096) -> "Tokenizer":
        """Learn a vocabulary of `vocab_size` tokens from `texts`.

        The same texts give the same tokenizer. Texts with too little to merge give a smaller
        vocabulary; `vocab_size` of the result tells.

        Raises:
            DataError: `vocab_size` is below 257, the 256 bytes and the end-of-text token.
        """
        if vocab_size < 257:
            raise DataError(
                f"vocab_size must be at least 257 (256 bytes and the end-of-text token), "
                f"got {vocab_size}"
            )
        from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
        from tokenizers import Tokenizer as Trainable

        # Else every later fork of this process prints a warning; none of ours tokenizes there.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        bpe = Trainable(models.BPE())
        bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        split = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
        bpe.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_only])
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - 1,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        bpe.train_from_iterator(texts, trainer)
        bpe.add_special_tokens([AddedToken(EOT, special=True, normalized=False)])
        return cls(json.loads(bpe.to_str()))

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Read a tokenizer.json, or the one in the folder `path`.

        Raises:
            DataError: there is no such file, or it is not byte-level BPE with a split pattern.
        """
        path = _file(path)
        try:
            return cls(json.loads(path.read_text(encoding="utf-8")))
        except OSError as error:
            raise DataError(f"cannot read the tokenizer {path}: {error.strerror}") from error
        except ValueError as error:
            raise DataError(f"{path}: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write `path`, or tokenizer.json in the folder `path`, whole or not at all."""
        path = _file(path)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        with temporary.open("w", encoding="utf-8") as f:
            json.dump(self._spec, f, ensure_ascii=False)
            f.flush()
            os.fsync(f.fileno())
        temporary.replace(path)

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, without an end-of-text token."""
        return self._encoding.encode_ordinary(text)

    def encode_batch(self, texts: Sequence[str], threads: int | None = None) -> list[list[int]]:
        """Return the ids of each text, computed on `threads` threads (None: one per core)."""
        threads = threads or len(os.sched_getaffinity(0))
        return self._encoding.encode_ordinary_batch([*texts], num_threads=threads)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`; bytes that are not UTF-8 become U+FFFD.

        Raises:
            DataError: an id is outside the vocabulary.
        """
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise DataError(f"decode: ids must lie in [0, {self.vocab_size}), got {i}")
        return self._encoding.decode([*ids], errors="replace")


def _file(path: str | Path) -> Path:
    path = Path(path).expanduser()
    return path / FILE if path.is_dir() else path


def _parse(spec: dict) -> tuple[str, list[bytes], int]:
    split, byte_level = spec["pre_tokenizer"]["pretokenizers"]
    model = spec["model"]
    (special,) = spec["added_tokens"]
    kind = (
        model["type"],
        special["content"],
        spec["normalizer"],
        byte_level["type"],
        byte_level["use_regex"],
        byte_level["add_prefix_space"],
    )
    if kind != ("BPE", EOT, None, "ByteLevel", False, False):
        raise ValueError(f"another kind: {kind}")
    vocab = {token: i for token, i in model["vocab"].items() if token != EOT}
    merged = [vocab[left + right] for left, right in model["merges"]]
    if merged != sorted(merged):  # tiktoken merges in the order of ids
        raise ValueError("ids are not in the order of the merges")
    byte_of = _byte_of_character()
    by_id = {i: bytes(byte_of[c] for c in token) for token, i in vocab.items()}
    by_id[special["id"]] = b""
    tokens = [by_id[i] for i in range(len(vocab) + 1)]
    if not {bytes([b]) for b in range(256)} <= set(tokens):
        raise ValueError("some of the 256 bytes have no id")
    return split["pattern"]["Regex"], tokens, special["id"]


def _byte_of_character() -> dict[str, int]:
    # The ByteLevel convention: printable Latin-1 stands for itself, the others follow from U+0100.
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
