"""The published encodings of tiktoken, from their rank files.

A rank file comes over the network once, is compared with its published sha256, and is kept in the
cache; a local one is read in place.
"""

import base64
import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path

import tiktoken.load

from tritium.data.atomic import write
from tritium.data.bpe import GPT2_PATTERN, byte_characters
from tritium.data.cache import cache_root
from tritium.data.error import DataError
from tritium.data.special import EOT

SUFFIX = ".tiktoken"


@dataclass(frozen=True)
class Encoding:
    """A published encoding."""

    file: str
    """Its rank file."""
    sha256: str
    """Hex digest of that file."""
    eot: int
    """Id of the end-of-text token."""
    pattern: str
    """Regular expression that cuts text into words."""


# As in tiktoken, except for \p{N}{1,3}+: there the + is possessive, which changes nothing, and to
# `tokenizers` it means "one or more times".
_CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
_O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

ENCODINGS = {
    "gpt2": Encoding(
        "r50k_base.tiktoken",
        "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930",
        50256,
        GPT2_PATTERN,
    ),
    "cl100k_base": Encoding(
        "cl100k_base.tiktoken",
        "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
        100257,
        _CL100K,
    ),
    "o200k_base": Encoding(
        "o200k_base.tiktoken",
        "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d",
        199999,
        _O200K,
    ),
}
_URL = "https://openaipublic.blob.core.windows.net/encodings/"


def published(name: str) -> dict:
    """Return the encoding `name` as the content of a tokenizer.json, fetched if need be.

    Raises:
        DataError: its ranks are not in the cache, and the network does not give them.
    """
    encoding = ENCODINGS[name]
    path = cache_root() / "ranks" / encoding.file
    if not path.exists():
        _fetch(encoding, path)
    return local(path)


def local(path: Path) -> dict:
    """Return the encoding of the rank file `path`, which must have its published name.

    Raises:
        DataError: the name is not that of a rank file, or its content not the published one.
    """
    by_file = {each.file: each for each in (*ENCODINGS.values(),)}
    encoding = by_file.get(path.name) or ENCODINGS.get(path.name.removesuffix(SUFFIX))
    if encoding is None:
        raise DataError(f"{path}: a rank file must be named one of {' '.join(by_file)}")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read the rank file {path}: {error.strerror}") from error
    _check(content, encoding, str(path))
    lines = (line.split() for line in content.splitlines() if line)
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    return _as_tokenizer_json(ranks, encoding)


def _fetch(encoding: Encoding, path: Path) -> None:
    url = _URL + encoding.file
    print(f"fetching {url}, once; it is kept as {path}", file=sys.stderr)
    try:
        content = tiktoken.load.read_file(url)
    except Exception as error:  # of whatever HTTP library tiktoken uses
        raise DataError(
            f"cannot fetch {url}: {type(error).__name__}; fetch it on a machine with a network, "
            f"then put it at {path} or give its path as the tokenizer"
        ) from error
    _check(content, encoding, url)
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, content)


def _check(content: bytes, encoding: Encoding, where: str) -> None:
    digest = hashlib.sha256(content).hexdigest()
    if digest != encoding.sha256:
        raise DataError(
            f"{where} is not the published {encoding.file}: its sha256 is {digest[:16]}..., not "
            f"{encoding.sha256[:16]}...; fetch it again"
        )


def _as_tokenizer_json(ranks: dict[bytes, int], encoding: Encoding) -> dict:
    character = byte_characters()
    written = {token: "".join(character[b] for b in token) for token in ranks}
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):  # every pair that makes it
        cuts = ((token[:i], token[i:]) for i in range(1, len(token)))
        pairs = [pair for pair in cuts if pair[0] in ranks and pair[1] in ranks]
        pairs.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges += [[written[left], written[right]] for left, right in pairs]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    split = {"type": "Split", "pattern": {"Regex": encoding.pattern}, "behavior": "Isolated"}
    end = {"id": encoding.eot, "content": EOT, "special": True, "normalized": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [end | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [split | {"invert": False}, byte_level | {"use_regex": False}],
        },
        "post_processor": None,
        "decoder": byte_level | {"use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": {text: ranks[token] for token, text in written.items()} | {EOT: encoding.eot},
            "merges": merges,
        },
    }
