"""Sources of text: a file, a folder, the hub, or the interpreter's standard library.

The standard library is the default because it is on every machine: about 10 MB of real text, no
download; `python://installed` adds the packages beside torch. Only a source that begins with
`hf://` touches the network.
"""

import hashlib
import json
import os
import platform
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from urllib.parse import unquote

from tritium.data import hf_datasets
from tritium.data.error import DataError, printable
from tritium.data.files import (
    JSONL,
    PARQUET,
    installed_files,
    kind,
    library_files,
    local_files,
    resolve,
    stamp,
)
from tritium.data.records import Tally, only_code, read_files, read_modules

INSTALLED = "python://installed"
"""The source that is the standard library and every package installed beside torch."""

MOST_BAD = 0.25
"""Share of unreadable records above which on a source is refused, unless it says otherwise."""


@dataclass(frozen=True)
class Source:
    """One source of text, and the selection of its documents.

    As a string: `PATH?key=value&key=value`, the keys being the fields below. A dataset of the hub
    is `hf://OWNER/NAME@REVISION?...`, one that `datasets` reads from disk `hf:///FOLDER?...`.
    """

    path: str | Path | None = None
    """Text file, `.jsonl` or `.parquet` file, folder of these (text and JSONL also as `.gz` and
    `.zst`), or `hf://` name. None: the interpreter's standard library; `python://installed`: that
    and the packages installed beside torch, without copies, tables and generated code."""
    weight: float | None = None
    """Share of this source in the characters of the mixture, against the others' weights."""
    epochs: int = 1
    """Most passes over its documents."""
    field: str = "text"
    """Column of tables that holds the text."""
    min_chars: int = 0
    """Shorter documents are left out."""
    max_chars: int | None = None
    """Longer documents are left out."""
    match: str | None = None
    """Regular expression; documents in which it is not found are left out."""
    limit: int | None = None
    """Documents to take, at most."""
    config: str | None = None
    """Configuration of a hub dataset that has several."""
    split: str = "train"
    """Split of a hub dataset."""
    max_bad: float = MOST_BAD
    """Share of its records that may be unreadable; for a single text file, of its lines."""
    stream: bool = False
    """Stream a hub dataset over the network every time instead of downloading it once."""

    def __post_init__(self):
        if self.weight is not None and not 0 < self.weight < float("inf"):
            raise DataError(f"{self}: weight must be above 0, got {self.weight}")
        if not 0 <= self.max_bad <= 1:
            raise DataError(f"{self}: max_bad must be between 0 and 1, got {self.max_bad}")
        least = {"epochs": self.epochs, "limit": self.limit, "max_chars": self.max_chars}
        for name, value in least.items():
            if value is not None and value < 1:
                raise DataError(f"{self}: {name} must be at least 1, got {value}")
        try:
            re.compile(self.match or "")
        except re.error as error:
            raise DataError(f"{self}: match is no regular expression: {error}") from error

    def __str__(self) -> str:
        library = f"the standard library of Python {platform.python_version()}"
        if self.path is None:
            return library
        if self.path == INSTALLED:
            return f"{library} and the packages installed beside torch"
        try:
            return printable(self.path if hf_datasets.is_hub(self.path) else resolve(self.path))
        except (OSError, RuntimeError, ValueError):  # a name that no file can have
            return printable(self.path)


def parse_source(text: str | Path | None, field: str = "text") -> Source:
    """Read the string form of a source; `field` is used where it names none.

    Raises:
        DataError: a key is unknown, or its value is not of its type.
    """
    if text is not None and not isinstance(text, str | Path):
        raise DataError(
            f"a source is a path, a string or a Source, got {type(text).__name__}; see data.Source"
        )
    if text is None or isinstance(text, Path) or os.path.exists(os.path.expanduser(text)):
        return Source(text, field=field)
    path, _, query = text.partition("?")
    if path.startswith("python:") and path != INSTALLED:
        raise DataError(f"{text}: the only source of this kind is {INSTALLED}")
    options: dict = {"field": field}
    for pair in filter(None, query.split("&")):
        key, _, value = pair.partition("=")
        if key not in _PARSERS:
            raise DataError(f"{text}: unknown key '{key}'; the keys are {', '.join(_PARSERS)}")
        try:
            options[key] = _PARSERS[key](unquote(value))
        except ValueError as error:
            raise DataError(f"{text}: {key}: {error}") from error
    return Source(path, **options)


def documents(source: Source | str | Path | None = None, tally: Tally | None = None) -> Iterator:
    """Yield the documents of `source`, one string each, in the same order every time.

    Each row of a table is a document, each text file of a folder, each module of the standard
    library. A single text file, named or alone in its folder, is cut at blank lines into pieces of
    a hundredth of its length, 1 to 64 K characters, so that some can be kept for validation. Nulls
    and documents of white space alone are left out, UTF-16 and UTF-32 are decoded (see `decoding`),
    and every line end of a text file becomes a line feed. Records that cannot be read, or are
    mostly control characters, are counted and passed over; at the end they may be a share of
    `max_bad` at most.

    Args:
        source: where to read, and what.
        tally: filled with counts of what was kept and what left out.

    Raises:
        DataError: there is no such file, folder or dataset, nothing in it is of use, or too much of
            it is bad.
    """
    source = source if isinstance(source, Source) else parse_source(source)
    tally = Tally() if tally is None else tally
    for text in _wanted(_texts(source, tally), source, tally):
        tally.kept += 1
        yield text
        if tally.kept == source.limit:
            break
    if not tally.kept:
        why = tally.summary() or "it is empty"
        raise DataError(f"{source} holds no text to use: {why}; name another, or repair it")
    if (share := tally.share_bad()) > source.max_bad:
        raise DataError(
            f"{source}: {100 * share:.0f} % of its records cannot be read, {100 * source.max_bad:g}"
            f" % may be: {tally.summary()}; repair it (iconv converts other encodings), or take the"
            f" rest with '?max_bad={min(1, share + 0.01):.2f}' behind its name"
        )


def fingerprint(source: Source) -> str:
    """Digest the settings, and the names, sizes and modification times of the files, unread.

    For a dataset of the hub, its revision replaces the files.
    """
    digest = hashlib.sha256(json.dumps(settings(source)).encode())
    if hf_datasets.is_hub(source.path):
        digest.update(hf_datasets.revision(str(source.path)).encode())
        return digest.hexdigest()
    if source.path in (None, INSTALLED):
        digest.update(platform.python_version().encode())
    for file in source_files(source):
        size, written = stamp(file)
        digest.update(os.fsencode(f"{file}\0{size}\0{written}\n"))
    return digest.hexdigest()


def settings(source: Source) -> dict:
    """Return what was set, as JSON can hold it."""
    default = Source()
    changed = {k: v for k, v in asdict(source).items() if v != getattr(default, k)}
    return changed | {"path": str(source)}


def source_files(source: Source) -> list[Path]:
    """List the files that `documents` reads, in its order, or raise its DataError."""
    if source.path is None:
        return library_files()
    if source.path == INSTALLED:
        return [*library_files(), *installed_files()]
    return (
        hf_datasets.files(str(source.path))
        if hf_datasets.is_hub(source.path)
        else local_files(source.path)
    )


def _texts(source: Source, tally: Tally) -> Iterator[str]:
    if hf_datasets.is_hub(source.path):
        options = {"config": source.config, "split": source.split, "stream": source.stream}
        return hf_datasets.read(str(source.path), source.field, tally, **options)
    files = source_files(source)
    if source.path is None:
        return read_modules(files, tally)
    if source.path == INSTALLED:
        return only_code(read_modules(files, tally), tally)
    alone = len(files) == 1 and kind(files[0]) not in (JSONL, PARQUET)
    return read_files(files, source.field, tally, cut=alone)


def _wanted(texts: Iterator[str], source: Source, tally: Tally) -> Iterator[str]:
    search = re.compile(source.match).search if source.match else None
    most = source.max_chars or float("inf")
    for text in texts:
        if not text or text.isspace():
            tally.left_out["empty"] += 1
        elif len(text) < source.min_chars:
            tally.left_out[f"under {source.min_chars} characters"] += 1
        elif len(text) > most:
            tally.left_out[f"over {source.max_chars} characters"] += 1
        elif search and not search(text):
            tally.left_out["without a match"] += 1
        else:
            yield text


def _yes_or_no(value: str) -> bool:
    if value not in ("0", "1"):
        raise ValueError(f"must be 0 or 1, got {value}")
    return value == "1"


_PARSERS = {
    item.name: {"weight": float, "max_bad": float, "stream": _yes_or_no}.get(item.name, str)
    for item in fields(Source)
    if item.name != "path"
} | dict.fromkeys(("epochs", "min_chars", "max_chars", "limit"), int)
