"""Text to token ids and back: learned here, published, or anybody's tokenizer.json.

`tokenizers` learns the merges and `tiktoken` encodes with them. The file format is Hugging Face's
tokenizer.json whatever the origin, so `tokenizers` and `transformers` read it too and give the same
ids. A special token ends each document; text that spells it is encoded as text.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING, SupportsIndex, cast

import numpy as np

from tritium.data.atomic import write
from tritium.data.bpe import BytePairs
from tritium.data.error import DataError
from tritium.data.hf_tokenizer import HuggingFace
from tritium.data.special import EOT
from tritium.data.tiktoken_files import ENCODINGS, SUFFIX, local, published

if TYPE_CHECKING:
    from torch import Tensor

FILE = "tokenizer.json"

# Words with one character before them, numbers in groups of three, punctuation, and white space,
# where a line break takes the indentation of the next line with it: of Python's standard library a
# token is 6 % more text than without. Every repeat is bounded: without that a megabyte of spaces
# overflows tiktoken's stack, and training takes the square of the longest word.
PATTERN = (
    r"[^\r\n\p{L}\p{N}]?\p{L}{1,64}|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]{1,64}(?:[\r\n]{1,64}[ \t]{0,64})?"
    r"|\s{0,64}[\r\n]{1,64}[ \t]{0,64}|\s{1,64}(?!\S)|\s{1,64}"
)
CHARACTER = r"[\s\S]"
NAMED = f"a tokenizer.json, a folder with one, or one of {' '.join(ENCODINGS)}"
CHARACTERS = "characters"
"""The name of a tokenizer whose tokens are characters, in place of a path."""


class Tokenizer:
    """Text to token ids and back. Made by `Tokenizer.train` or `Tokenizer.load`.

    Attributes:
        vocab_size: V, the number of ids: one more than the highest.
        eot: the id of the end-of-text token, which no text is encoded to.
        byte_lengths: `[V]`, int64; bytes of text that each id represents, 0 for special ones.
            Nominal where a tokenizer changes the text, as by a normalizer.
        fingerprint: hex digest of what decides the ids and their text; not of the file's layout.
        variant: hex digest of what else the file says: template, truncation, padding, options. They
            change nothing here, where text is encoded as it is, and much for other readers.
    """

    def __init__(self, spec: dict):
        """Take the content of a tokenizer.json.

        Raises:
            DataError: `tokenizers` cannot read it, or it has no end-of-text token.
        """
        self._spec = spec
        self._engine = _engine(spec)
        self.vocab_size, self.eot = self._engine.vocab_size, self._engine.eot
        self.byte_lengths = self._engine.byte_lengths
        self.fingerprint = self._engine.fingerprint
        model = {k: v for k, v in spec["model"].items() if k not in ("vocab", "merges")}
        others = json.dumps(spec | {"model": model}, sort_keys=True)
        self.variant = hashlib.sha256(others.encode()).hexdigest()[:16]

    @classmethod
    def train(
        cls, texts: Iterable[str], vocab_size: int = 4096, *, characters: bool = False
    ) -> "Tokenizer":
        """Learn a vocabulary of `vocab_size` tokens from `texts`.

        The same texts give the same tokenizer. Texts with too little to merge give a smaller
        vocabulary; `vocab_size` of the result tells.

        Args:
            texts: what is learned from.
            vocab_size: ids to learn at most, the end-of-text token included.
            characters: let no token be longer than a character. One that is not in the texts, or
                is too rare for the vocabulary, becomes the tokens of its bytes in UTF-8, so that
                every text decodes to itself.

        Raises:
            DataError: `vocab_size` is below 257, the 256 bytes and the end-of-text token; or
                `texts` is one string, of which every character would be a text.
        """
        _refuse_one(texts, "train")
        if vocab_size < 257:
            raise DataError(
                f"vocab_size must be at least 257 (256 bytes and the end-of-text token), "
                f"got {vocab_size}"
            )
        from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
        from tokenizers import Tokenizer as Trainable

        # Else every later fork of this process prints a warning; none of Tritium's tokenizes there.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        bpe = Trainable(models.BPE())
        pattern = Regex(CHARACTER if characters else PATTERN)
        bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        split = pre_tokenizers.Split(pattern, behavior="isolated")
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
    def load(cls, name_or_path: "str | os.PathLike[str] | Tokenizer") -> "Tokenizer":
        """Read a tokenizer.json, the one in a folder, or a published encoding.

        Args:
            name_or_path: a file; a folder with one, as that of a run and that which `prepare`
                returned; a `Tokenizer`, which is returned; or `gpt2`, `cl100k_base`, `o200k_base`,
                whose ranks come over the network once and are kept in the cache; or a rank file
                of these.

        Raises:
            DataError: there is no such file, it cannot be used, or the network is out of reach.
        """
        held = getattr(name_or_path, "tokenizer", name_or_path)  # of what `prepare` returned
        if isinstance(held, Tokenizer):
            return held
        name_or_path = cast("str | os.PathLike[str]", name_or_path)
        if str(name_or_path) in ENCODINGS and not Path(name_or_path).exists():
            return cls(published(str(name_or_path)))
        path = _file(name_or_path)
        if path.suffix == SUFFIX:
            return cls(local(path))
        try:
            return cls(json.loads(path.read_text(encoding="utf-8")))
        except OSError as error:
            raise DataError(
                f"cannot read the tokenizer {path}: {error.strerror}; name {NAMED}"
            ) from error
        except DataError as error:
            raise DataError(f"{path}: {error}") from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path} is no tokenizer ({error}); name {NAMED}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `path`, or tokenizer.json in the folder `path`, atomically."""
        write(_file(path), json.dumps(self._spec, ensure_ascii=False))

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, as in training: no template, no truncation, no end of text."""
        return self._engine.encode(_checked([text], "encode")[0])

    def encode_batch(self, texts: Sequence[str], threads: int | None = None) -> list[list[int]]:
        """Return the ids of each text, computed on `threads` threads (None: one per core)."""
        return self._engine.encode_batch(_checked(texts, "encode_batch"), threads)

    def encode_documents(self, texts: Sequence[str]) -> np.ndarray:
        """Return the ids of all `texts`, each followed by `eot`, as one array.

        Computed on one thread; other threads continue meanwhile.
        """
        return self._engine.encode_documents(_checked(texts, "encode_documents"))

    def decode(self, ids: "Iterable[int] | np.ndarray | Tensor") -> str:
        """Return the text of `ids`; bytes that are not UTF-8 become U+FFFD.

        Args:
            ids: integers of any type in one dimension: a tensor on any device, an array, a list.

        Raises:
            DataError: there is another number of dimensions, a value is not an integer, or an id
                is outside the vocabulary.
        """
        listed = _as_list(ids)
        for i in listed:
            if not 0 <= i < self.vocab_size:
                raise DataError(f"decode: ids must be in [0, {self.vocab_size}), got {i}")
        return self._engine.decode(listed)


def _as_list(ids: "Iterable[int] | np.ndarray | Tensor") -> list[int]:
    if getattr(ids, "ndim", 1) != 1:
        raise DataError(
            f"decode: ids must have one dimension, got shape {[*getattr(ids, 'shape', ())]}; "
            "decode each row, or reshape(-1) them"
        )
    to_list = getattr(ids, "tolist", None)  # an array's or a tensor's, on whatever device
    listed = to_list() if to_list else ids
    if isinstance(listed, str | bytes) or not isinstance(listed, Iterable):
        raise DataError(f"decode: ids must be a sequence of integers, got {ids!r:.40}")
    return [i if type(i) is int else _as_int(i) for i in listed]


def _as_int(value: object) -> int:
    kind = getattr(value, "dtype", type(value))
    try:
        if "bool" in str(kind):
            raise TypeError
        return index(cast(SupportsIndex, value))
    except TypeError as error:
        raise DataError(
            f"decode: ids must be integers in one dimension, got {value!r:.40} of type {kind}"
        ) from error


def _checked(texts: Sequence[str], operation: str) -> list[str]:
    _refuse_one(texts, operation)
    for text in (texts := [*texts]):
        if not isinstance(text, str):
            raise DataError(f"{operation}: a text must be a str, got {type(text).__name__}")
    return texts


def _refuse_one(texts: object, operation: str) -> None:
    if isinstance(texts, str | bytes):
        raise DataError(
            f"{operation}: texts must be a sequence of strings, got one, {texts!r:.40}; "
            "give [text], or its characters would be the texts"
        )


def _engine(spec: dict) -> BytePairs | HuggingFace:
    try:
        return BytePairs(spec)
    except (KeyError, TypeError, ValueError):
        pass  # of another kind
    try:
        return HuggingFace(spec)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"not a tokenizer.json with an end-of-text token ({error!r}); train one with "
            "Tokenizer.train"
        ) from error


def _file(path: str | os.PathLike[str]) -> Path:
    path = Path(os.path.expanduser(path))
    return path / FILE if path.is_dir() else path
