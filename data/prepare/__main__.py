"""The command `python -m data.prepare [SOURCE] [--vocab-size N] ...`."""

import sys
import time
from pathlib import Path

import tyro

from ..corpus import DataError
from ..shards import Shard, open_prepared
from . import VAL_FRACTION, VOCAB_SIZE, prepare


def main(
    source: tyro.conf.Positional[Path | None] = None,
    *,
    vocab_size: int = VOCAB_SIZE,
    tokenizer: Path | None = None,
    field: str = "text",
    val_fraction: float = VAL_FRACTION,
    cache: Path | None = None,
) -> None:
    """Tokenize text into shards to train on, and print the folder that holds them.

    Args:
        source: text file, .jsonl, .parquet, or folder of these; none: Python's standard library.
        vocab_size: ids to learn, the end-of-text token included.
        tokenizer: tokenizer.json, or a folder with one, to use instead of learning.
        field: column of .jsonl and .parquet files that holds the text.
        val_fraction: share of the documents kept for validation, between 0 and 1.
        cache: where to keep the result; none: $TRITIUM_HOME, else ~/.cache/tritium.
    """
    begin = time.perf_counter()
    folder = prepare(
        source,
        vocab_size=vocab_size,
        tokenizer=tokenizer,
        field=field,
        val_fraction=val_fraction,
        cache=cache,
    )
    manifest, _ = open_prepared(folder)
    print(folder)
    for split, shards in manifest.splits.items():
        print(f"{split}: {_summary(shards)}")
    print(f"{time.perf_counter() - begin:.1f} s")


def _summary(shards: list[Shard]) -> str:
    documents = sum(shard.documents for shard in shards)
    tokens = sum(shard.tokens for shard in shards)
    n_bytes = sum(shard.bytes for shard in shards)
    return f"{documents:,} documents, {tokens:,} tokens, {n_bytes / tokens:.2f} bytes per token"


if __name__ == "__main__":
    try:
        tyro.cli(main, prog="python -m data.prepare")
    except DataError as error:
        print(f"data.prepare: {error}", file=sys.stderr)
        sys.exit(2)
