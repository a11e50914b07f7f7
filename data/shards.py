"""Prepared data on disk: token shards, the manifest that lists them, and their tokenizer.

    manifest.json   tokenizer.json   train-00000.bin ...   val-00000.bin ...

A shard is token ids and nothing else: little-endian uint16, or uint32 for more than 65,536 ids.
Every document ends with the end-of-text token, which text never encodes to, so the places of that
token are an index of the documents already.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path

import numpy as np

from tritium.data import journal
from tritium.data.atomic import write
from tritium.data.error import DataError
from tritium.data.records import summary
from tritium.data.tokenizer import FILE as TOKENIZER_FILE
from tritium.data.tokenizer import Tokenizer

VERSION = 4  # raise it whenever the same source and settings would give other files
MANIFEST_FILE = "manifest.json"
SPLITS = ("train", "val")
SHARD_TOKENS = 1 << 25  # held in memory until a shard is written: 64 or 128 MiB per split


@dataclass(frozen=True)
class Shard:
    """One file of tokens."""

    file: str
    """Name inside the prepared folder."""
    tokens: int
    """Ids in it, end-of-text tokens included."""
    documents: int
    """Documents in it, none of them cut."""
    bytes: int
    """Bytes of UTF-8 text that were encoded."""
    sha256: str
    """Hex digest of the file."""


@dataclass(frozen=True)
class Manifest:
    """Content of a prepared folder."""

    version: int
    """Version of the format."""
    dtype: str
    """Dtype of the shards, in numpy's notation: `<u2` or `<u4`."""
    vocab_size: int
    """Ids of the tokenizer."""
    tokenizer: str
    """Fingerprint of the tokenizer."""
    source: str
    """Source of the text, for people."""
    settings: dict
    """Other settings that affect the shards."""
    read: list[dict]
    """By source: documents given, records left out and why, files in other encodings."""
    splits: dict[str, list[Shard]]
    """The shards of `train` and of `val`, in order."""
    key: str = ""
    """Digest of the sources, as they were, and of the settings."""

    def left_out(self) -> list[str]:
        """Say for each source in a line what of it was left out; none where nothing was."""
        parts = [
            (read["source"], summary(read["bad"], read["first_bad"], read["left_out"]))
            for read in self.read
        ]
        return [f"{source}: left out {what}" for source, what in parts if what]


class Prepared(os.PathLike[str]):
    """A folder that `prepare` made, and what was read of it, so that nobody reads it again.

    Usable wherever its path is: `open(prepared / "manifest.json")`, `TokenLoader(prepared, ...)`.

    Attributes:
        folder: where it is.
        manifest: what is in it.
        tokenizer: what its ids were made with.
        left_out: for each source a line that says what of it was left out, if anything was.
    """

    def __init__(self, folder: Path, manifest: Manifest, tokenizer: Tokenizer):
        self.folder, self.manifest, self.tokenizer = folder, manifest, tokenizer
        self.left_out = manifest.left_out()

    def __fspath__(self) -> str:
        return str(self.folder)

    def __str__(self) -> str:
        return str(self.folder)

    def __repr__(self) -> str:
        return f"Prepared({str(self.folder)!r})"

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    def __eq__(self, other: object) -> bool:
        return isinstance(other, os.PathLike) and self.folder == Path(other)

    def __hash__(self) -> int:
        return hash(self.folder)


def token_dtype(vocab_size: int) -> str:
    """Return the dtype, in numpy's notation, of shards with this many different ids."""
    return "<u2" if vocab_size <= 1 << 16 else "<u4"


class ShardWriter:
    """Collect the documents of one split into shards of about SHARD_TOKENS tokens.

    Attributes:
        shards: those that are on disk, in order; more are numbered after them.
    """

    def __init__(self, folder: Path, split: str, dtype: str, shards: Sequence[Shard] = ()):
        self.shards = [*shards]
        self._folder, self._split, self._dtype = folder, split, dtype
        self._pieces: list[np.ndarray] = []
        self._documents = self._tokens = self._bytes = 0

    def add(self, ids: np.ndarray, ends: np.ndarray, sizes: np.ndarray) -> None:
        """Append documents, and write the shards that they fill.

        Args:
            ids: those of all the documents, one after another.
            ends: where in `ids` each document ends.
            sizes: bytes of text of each.
        """
        first = start = 0
        while first < len(ends):
            fills = np.searchsorted(ends, SHARD_TOKENS - self._tokens + start)
            last = min(int(fills), len(ends) - 1)  # the document that fills the shard, or the last
            end = int(ends[last])
            self._pieces.append(ids[start:end].astype(self._dtype))
            self._tokens += end - start
            self._documents += last + 1 - first
            self._bytes += int(sizes[first : last + 1].sum())
            first, start = last + 1, end
            if self._tokens >= SHARD_TOKENS:
                self.flush()

    def flush(self) -> None:
        """Write what is held as a shard, and note in the journal that it is complete."""
        if not self._documents:
            return
        data = np.concatenate(self._pieces).tobytes()
        name = f"{self._split}-{len(self.shards):05}.bin"
        write(self._folder / name, data)
        digest = hashlib.sha256(data).hexdigest()
        shard = Shard(name, self._tokens, self._documents, self._bytes, digest)
        journal.append(self._folder, {"split": self._split, **asdict(shard)})
        self.shards.append(shard)
        self._pieces, self._documents, self._tokens, self._bytes = [], 0, 0, 0


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest, last of all files."""
    write(folder / MANIFEST_FILE, json.dumps(asdict(manifest), indent=1))


def finished_shards(folder: Path, tokenizer: str) -> dict[str, list[Shard]]:
    """Return the complete shards that an interrupted run left, and delete everything else.

    Those of another tokenizer are dropped too. What the journal notes is read and compared with
    its sha256.
    """
    header, *entries = journal.read(folder) or [{}]
    finished: dict[str, list[Shard]] = {split: [] for split in SPLITS}
    if header == _header(tokenizer):
        for entry in entries:
            split = entry.pop("split")
            finished[split].append(Shard(**entry))
    finished = {
        split: [*takewhile(partial(_is_whole, folder), shards)]
        for split, shards in finished.items()
    }
    entries = [
        {"split": split, **asdict(shard)} for split, shards in finished.items() for shard in shards
    ]
    journal.replace(folder, [_header(tokenizer), *entries])
    keep = {entry["file"] for entry in entries} | {TOKENIZER_FILE, journal.FILE}
    for file in folder.iterdir():
        if file.name not in keep:
            file.unlink()
    return finished


def verify(folder: str | os.PathLike[str], shards: Sequence[Shard]) -> None:
    """Read shards and compare each with its sha256.

    Raises:
        DataError: the bytes of one are not those that `prepare` wrote.
    """
    for shard in shards:
        if not _is_whole(Path(folder), shard):
            raise DataError(
                f"the shard {Path(folder) / shard.file} is damaged: its bytes are not those that "
                "were written (sha256); remove the folder, then run prepare again"
            )


def open_prepared(folder: str | os.PathLike[str]) -> Prepared:
    """Open a prepared folder, and check that it is complete: every file, its size, the tokenizer.

    A `Prepared` is not parsed again, but its shards are checked.

    Raises:
        DataError: the manifest, a shard or the tokenizer is missing, damaged, or of another origin.
    """
    if isinstance(folder, Prepared):
        _check_sizes(folder.folder, folder.manifest)
        return folder
    folder = Path(folder)
    manifest = _read_manifest(folder / MANIFEST_FILE)
    _check_sizes(folder, manifest)
    tokenizer = Tokenizer.load(folder / TOKENIZER_FILE)
    if tokenizer.fingerprint != manifest.tokenizer:
        raise DataError(
            f"{folder}: shards were made with tokenizer {manifest.tokenizer}, the folder has "
            f"{tokenizer.fingerprint}; run prepare again"
        )
    return Prepared(folder, manifest, tokenizer)


def _check_sizes(folder: Path, manifest: Manifest) -> None:
    for shard in (shard for split in SPLITS for shard in manifest.splits[split]):
        _check_size(folder / shard.file, shard.tokens, np.dtype(manifest.dtype))


def _read_manifest(path: Path) -> Manifest:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["version"] != VERSION:
            raise DataError(
                f"{path} has version {content['version']}, this is {VERSION}; run prepare again"
            )
        splits = {split: [Shard(**shard) for shard in content["splits"][split]] for split in SPLITS}
        if not all(splits.values()):
            raise ValueError("a split has no shard")
        if any(shard.file != Path(shard.file).name for split in SPLITS for shard in splits[split]):
            raise ValueError("a shard is outside the folder")
        return Manifest(**{**content, "splits": splits})
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; run prepare first") from error
    except DataError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is damaged: {error!r}; run prepare again") from error


def _header(tokenizer: str) -> dict:
    return {"version": VERSION, "tokenizer": tokenizer}


def _is_whole(folder: Path, shard: Shard) -> bool:
    try:
        with (folder / shard.file).open("rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest() == shard.sha256
    except FileNotFoundError:
        return False


def _check_size(path: Path, tokens: int, dtype: np.dtype) -> None:
    if not path.is_file():
        raise DataError(f"the shard {path} is missing; run prepare again")
    size, expected = path.stat().st_size, tokens * dtype.itemsize
    if size != expected:
        raise DataError(
            f"the shard {path} has {size} bytes, its {tokens} tokens take {expected}; "
            "run prepare again"
        )
