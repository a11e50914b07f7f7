"""Text to shards: learn a tokenizer, encode every document, publish the result in one rename.

The result is kept in a cache under a digest of the sources and the settings, and found again there
for as long as the sources stay as they are.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from rich.console import Console

from tritium.data import journal
from tritium.data.cache import cache_root, lock, publication
from tritium.data.corpus import Source, fingerprint, parse_source, settings, source_files
from tritium.data.error import DataError
from tritium.data.mixture import Mixture
from tritium.data.prepare.encoding import encode
from tritium.data.records import SURE_TO_BE_CUT
from tritium.data.shards import (
    MANIFEST_FILE,
    VERSION,
    Manifest,
    Prepared,
    Shard,
    open_prepared,
    token_dtype,
    write_manifest,
)
from tritium.data.tokenizer import CHARACTERS, Tokenizer
from tritium.data.tokenizer import FILE as TOKENIZER_FILE

VOCAB_SIZE = 4096
VAL_FRACTION = 0.05

SAMPLE_CHARS = 64_000_000  # the tokenizer learns from the first documents, up to this length

SourceLike = Source | str | os.PathLike[str]


def prepare(
    source: SourceLike | Sequence[SourceLike] | None = None,
    *,
    vocab_size: int = VOCAB_SIZE,
    tokenizer: str | os.PathLike[str] | Tokenizer | None = None,
    field: str = "text",
    val_fraction: float = VAL_FRACTION,
    deduplicate: bool = False,
    threads: int | None = None,
    cache: str | os.PathLike[str] | None = None,
    out: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Prepared:
    """Tokenize a corpus into shards for `TokenLoader`, once, and return the folder that holds them.

    A document is in validation when the hash of its text says so: copies of it are on one side,
    wherever they are. When that leaves validation empty, the document of lowest hash goes there.
    Processes that prepare the same data at the same time wait for the first and take its result.
    A run that was killed is resumed by the next call, which keeps its finished shards and ends in
    the same bytes. Records that cannot be read are counted and left out, which every call reports.

    Args:
        source: one or several of these: a path or string as in `Source`, or a `Source`. None is the
            standard library of the interpreter. A folder that `prepare` made is returned as it is.
        vocab_size: ids to learn, end-of-text included; not used when `tokenizer` is given.
        tokenizer: a `Tokenizer`, or what `Tokenizer.load` takes, to use instead of learning; or
            "characters", to learn one whose tokens are characters, `vocab_size` at most.
        field: the column of tables that holds the text, for the sources that name none.
        val_fraction: share of the documents, between 0 and 1, kept for validation.
        deduplicate: whether to leave out documents whose text came before, in any source.
        threads: how many encode; None is one per core. The result does not depend on it.
        cache: where to keep the result; None is $TRITIUM_HOME, else $XDG_CACHE_HOME/tritium, else
            ~/.cache/tritium.
        out: the folder to make, instead of one in the cache; it is new, empty, or holds the same
            data already.
        progress: whether to report on stderr.

    Returns:
        The folder, usable as a path, with its manifest and tokenizer: manifest.json,
        tokenizer.json, and the shards of `train` and `val`.

    Raises:
        DataError: a source, the tokenizer or a setting cannot be used, validation takes every
            document, or the cache cannot be written. A partial folder is never used as complete.
    """
    if not 0 < val_fraction < 1:
        raise DataError(f"val_fraction must be between 0 and 1, got {val_fraction}")
    if threads is not None and threads < 1:
        raise DataError(f"threads must be at least 1, got {threads}")
    console = Console(
        stderr=True, quiet=not progress, highlight=False, markup=False, soft_wrap=True
    )
    sources = _sources(source, field)
    if (folder := _prepared_already(sources)) is not None:
        return _report(open_prepared(folder), console)
    characters = tokenizer == CHARACTERS
    given = None if tokenizer is None or characters else Tokenizer.load(tokenizer)
    chosen = {
        "sources": [settings(each) for each in sources],
        "val_fraction": val_fraction,
        "deduplicate": deduplicate,
        "tokenizer": f"{given.fingerprint} {given.variant}"
        if given
        else f"learned, vocab_size {vocab_size}" + (", characters" if characters else ""),
    }
    origin = [fingerprint(each) for each in sources]
    key = hashlib.sha256(json.dumps([VERSION, origin, chosen]).encode()).hexdigest()[:24]
    folder = _place(key, cache, out)
    if (found := _find(folder, key)) is not None:
        return _report(found, console)
    texts = Mixture(sources, deduplicate)
    try:
        with lock(folder):
            if (found := _find(folder, key)) is not None:  # made by another process, meanwhile
                return _report(found, console)
            with publication(folder) as work:
                used = given or _learn(texts, vocab_size, work, console, characters)
                used.save(work)
                splits = _encode(texts, used, val_fraction, work, threads, console)
                _check(texts, origin, splits, val_fraction)
                manifest = _describe(texts, key, chosen, used, splits)
                write_manifest(work, manifest)
            journal.remove(folder)
    except OSError as error:
        raise DataError(
            f"cannot write {folder}: {error}; make room there or set TRITIUM_HOME elsewhere; "
            "finished shards are kept"
        ) from error
    return _report(Prepared(folder, manifest, used), console)


def _sources(source: SourceLike | Sequence[SourceLike] | None, field: str) -> list[Source]:
    single = isinstance(source, str | os.PathLike | Source) or not isinstance(source, Iterable)
    several: list[Any] = [source] if single else [*cast(Iterable, source)]
    several = [Path(each) if isinstance(each, os.PathLike) else each for each in several]
    return [each if isinstance(each, Source) else parse_source(each, field) for each in several]


def _prepared_already(sources: list[Source]) -> Path | None:
    if len(sources) != 1 or sources[0].path is None:
        return None
    if not {*settings(sources[0])} <= {"path", "field"}:
        return None
    try:
        folder = Path(os.path.expanduser(sources[0].path))
        whole = all((folder / name).is_file() for name in (MANIFEST_FILE, TOKENIZER_FILE))
    except (OSError, RuntimeError, ValueError):  # a name that no file can have
        return None
    return folder if whole else None


def _place(
    key: str, cache: str | os.PathLike[str] | None, out: str | os.PathLike[str] | None
) -> Path:
    if out is None:
        return (Path(os.path.expanduser(cache)) if cache else cache_root()) / "prepared" / key
    folder = Path(os.path.expanduser(out)).absolute()
    if folder.exists() and not folder.is_dir():
        raise DataError(f"out must be a folder, {folder} is a file; name another")
    if folder.is_dir() and any(folder.iterdir()):
        try:
            same = open_prepared(folder).manifest.key == key
        except DataError:
            same = False
        if not same:
            raise DataError(
                f"out must be a new or empty folder, {folder} holds something else; name another"
            )
    return folder


def _find(folder: Path, key: str) -> Prepared | None:
    try:
        found = open_prepared(folder)
    except DataError:
        return None
    return found if found.manifest.key == key else None


def _report(prepared: Prepared, console: Console) -> Prepared:
    for line in prepared.left_out:
        console.print(line)
    return prepared


def _learn(
    texts: Iterable[str], vocab_size: int, work: Path, console: Console, characters: bool = False
) -> Tokenizer:
    if journal.read(work) and (work / TOKENIZER_FILE).exists():
        return Tokenizer.load(work)  # of a run that was killed after this
    begin = time.perf_counter()
    with console.status("learning a tokenizer"):
        tokenizer = Tokenizer.train(_sample(texts), vocab_size, characters=characters)
    seconds = time.perf_counter() - begin
    console.print(f"learned a tokenizer of {tokenizer.vocab_size:,} tokens in {seconds:.1f} s")
    return tokenizer


def _sample(texts: Iterable[str]) -> Iterator[str]:
    length = 0
    for text in texts:
        yield text
        length += len(text)
        if length >= SAMPLE_CHARS:
            return


def _encode(
    texts: Mixture,
    tokenizer: Tokenizer,
    val_fraction: float,
    work: Path,
    threads: int | None,
    console: Console,
) -> dict[str, list[Shard]]:
    files = [source_files(source) for source in texts.sources]
    total = sum(file.stat().st_size for each in files for file in each) if all(files) else 0
    threads = threads or len(os.sched_getaffinity(0))
    return encode(texts, tokenizer, val_fraction, work, threads, console, total)


def _check(
    texts: Mixture, origin: list[str], splits: dict[str, list[Shard]], val_fraction: float
) -> None:
    for source, before in zip(texts.sources, origin, strict=True):
        if fingerprint(source) != before:
            raise DataError(f"{source} changed while it was read; run again")
    if splits["train"]:
        return
    n = sum(shard.documents for shard in splits["val"])
    size = sum(shard.bytes for shard in splits["val"])
    if n == 1:
        why = (
            f"is too short to hold some back for validation: {size:,} bytes are one document; give "
            f"at least {SURE_TO_BE_CUT:,} characters, or several documents"
        )
    else:
        advice = "" if val_fraction == VAL_FRACTION else f" or lower val_fraction ({val_fraction})"
        why = (
            f"leaves nothing to train on: validation takes all of its {n} documents, as copies of "
            f"one text stay together; add different documents{advice}"
        )
    raise DataError(f"{_names(texts)} {why}")


def _describe(
    texts: Mixture, key: str, chosen: dict, tokenizer: Tokenizer, splits: dict[str, list[Shard]]
) -> Manifest:
    read = [
        {
            "source": str(source),
            "documents": given,
            "bad": dict(tally.bad),
            "first_bad": tally.first_bad,
            "left_out": dict(tally.left_out),
            "encodings": dict(tally.encodings),
        }
        for source, given, tally in zip(texts.sources, texts.given, texts.tallies, strict=True)
    ]
    return Manifest(
        version=VERSION,
        dtype=token_dtype(tokenizer.vocab_size),
        vocab_size=tokenizer.vocab_size,
        tokenizer=tokenizer.fingerprint,
        source=_names(texts),
        key=key,
        settings=chosen,
        read=read,
        splits=splits,
    )


def _names(texts: Mixture) -> str:
    return ", ".join(map(str, texts.sources))
