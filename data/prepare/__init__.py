"""Text to shards: learn a tokenizer, encode every document, publish the result in one rename.

The result is kept in a cache under a digest of the source and the settings, and found again there
for as long as the source stays as it is.
"""

import hashlib
import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from rich.console import Console

from ..cache import cache_root, lock, publication
from ..corpus import DataError, describe, documents, source_fingerprint
from ..shards import (
    SPLITS,
    VERSION,
    Manifest,
    Shard,
    ShardWriter,
    open_prepared,
    token_dtype,
    write_manifest,
)
from ..tokenizer import Tokenizer

VOCAB_SIZE = 4096
VAL_FRACTION = 0.05

SAMPLE_CHARS = 64_000_000  # the tokenizer learns from the first documents, up to this length
BATCH_CHARS = 4_000_000  # text encoded at a time


def prepare(
    source: str | Path | None = None,
    *,
    vocab_size: int = VOCAB_SIZE,
    tokenizer: str | Path | None = None,
    field: str = "text",
    val_fraction: float = VAL_FRACTION,
    cache: str | Path | None = None,
    progress: bool = True,
) -> Path:
    """Tokenize a corpus into shards for `TokenLoader`, once, and return the folder that holds them.

    A document is in validation when the hash of its text says so: copies of it are on one side,
    wherever they stand. When that leaves validation empty, the document of lowest hash goes there.
    Processes that prepare the same data at the same time wait for the first and take its result.

    Args:
        source: as for `documents`; None is the standard library of the interpreter.
        vocab_size: ids to learn, end-of-text included; not used when `tokenizer` is given.
        tokenizer: a tokenizer.json, or a folder with one, to use instead of learning.
        field: the column of `.jsonl` and `.parquet` files that holds the text.
        val_fraction: share of the documents, between 0 and 1, kept for validation.
        cache: where to keep the result; None is $TRITIUM_HOME, else $XDG_CACHE_HOME/tritium, else
            ~/.cache/tritium.
        progress: whether to report on stderr.

    Returns:
        The folder: manifest.json, tokenizer.json, and the shards of `train` and `val`.

    Raises:
        DataError: the source, the tokenizer or a setting cannot be used, validation takes every
            document, or the cache cannot be written. No partial folder stays.
    """
    if not 0 < val_fraction < 1:
        raise DataError(f"val_fraction must lie between 0 and 1, got {val_fraction}")
    given = None if tokenizer is None else Tokenizer.load(tokenizer)
    settings = {
        "field": field,
        "val_fraction": val_fraction,
        "tokenizer": given.fingerprint if given else f"learned, vocab_size {vocab_size}",
    }
    origin = source_fingerprint(source)
    key = hashlib.sha256(json.dumps([VERSION, origin, settings]).encode()).hexdigest()[:24]
    folder = (Path(cache).expanduser() if cache else cache_root()) / "prepared" / key
    if _is_prepared(folder):
        return folder
    console = Console(
        stderr=True, quiet=not progress, highlight=False, markup=False, soft_wrap=True
    )
    try:
        with lock(folder):
            if _is_prepared(folder):  # by another process, meanwhile
                return folder
            with publication(folder) as temporary:
                texts = documents(source, field=field)
                used = given or _learn(texts, vocab_size, console)
                texts = documents(source, field=field)
                splits = _encode(texts, used, val_fraction, temporary, console)
                _check(source, origin, splits)
                _describe(temporary, source, settings, used, splits)
    except OSError as error:
        raise DataError(f"cannot write {folder}: {error}; set TRITIUM_HOME elsewhere") from error
    return folder


def assign_splits(texts: Iterable[str], val_fraction: float) -> Iterator[tuple[str, str]]:
    """Yield `(split, text)` for every text, nearly in order; see `prepare` for the rule."""
    validated, lowest, held = False, 1.0, []
    for text in texts:
        share = _share(text)
        if share < val_fraction:
            validated = True
            yield "val", text
        elif validated or share > lowest:
            yield "train", text
        else:  # the lowest hash so far: validation may need it, with all its copies
            if share < lowest:
                yield from (("train", other) for other in held)
                lowest, held = share, []
            held.append(text)
    yield from (("train" if validated else "val", text) for text in held)


def _share(text: str) -> float:
    digest = hashlib.blake2b(text.encode(), digest_size=6).digest()  # 48 bits: exact as a float
    return int.from_bytes(digest, "big") / (1 << 48)


def _is_prepared(folder: Path) -> bool:
    try:
        open_prepared(folder)
    except DataError:
        return False
    return True


def _learn(texts: Iterable[str], vocab_size: int, console: Console) -> Tokenizer:
    begin = time.perf_counter()
    with console.status("learning a tokenizer"):
        tokenizer = Tokenizer.train(_sample(texts), vocab_size)
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
    texts: Iterable[str], tokenizer: Tokenizer, val_fraction: float, folder: Path, console: Console
) -> dict[str, list[Shard]]:
    begin, n_bytes = time.perf_counter(), 0
    dtype = token_dtype(tokenizer.vocab_size)
    writers = {split: ShardWriter(folder, split, dtype) for split in SPLITS}
    with console.status("encoding") as status:
        for batch in _batches(assign_splits(texts, val_fraction)):
            encoded = tokenizer.encode_batch([text for _, text in batch])
            for (split, text), ids in zip(batch, encoded, strict=True):
                size = len(text.encode())
                writers[split].add([*ids, tokenizer.eot], size)
                n_bytes += size
            status.update(f"encoding: {n_bytes / 1e6:,.0f} MB")
        for writer in writers.values():
            writer.flush()
    console.print(f"encoded {n_bytes / 1e6:,.1f} MB in {time.perf_counter() - begin:.1f} s")
    return {split: writer.shards for split, writer in writers.items()}


def _batches(items: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    batch, length = [], 0
    for item in items:
        batch.append(item)
        length += len(item[1])
        if length >= BATCH_CHARS:
            yield batch
            batch, length = [], 0
    yield batch


def _check(source: str | Path | None, origin: str, splits: dict[str, list[Shard]]) -> None:
    if not splits["train"]:
        n = sum(shard.documents for shard in splits["val"])
        raise DataError(
            f"{describe(source)} leaves nothing to train on: validation takes all of its {n} "
            "document(s); add different documents, or lower val_fraction"
        )
    if source_fingerprint(source) != origin:
        raise DataError(f"{describe(source)} changed while it was read; run again")


def _describe(
    folder: Path, source: str | Path | None, settings: dict, tokenizer: Tokenizer, splits: dict
) -> None:
    tokenizer.save(folder)
    write_manifest(
        folder,
        Manifest(
            version=VERSION,
            dtype=token_dtype(tokenizer.vocab_size),
            vocab_size=tokenizer.vocab_size,
            tokenizer=tokenizer.fingerprint,
            source=describe(source),
            settings=settings,
            splits=splits,
        ),
    )
