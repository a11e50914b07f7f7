"""The commands `python -m tritium.data.prepare [SOURCE ...]` and `... prepare inspect DIR`."""

import sys
import time
from pathlib import Path

import tyro
from rich.console import Console

import tritium
from tritium.data.error import DataError, printable
from tritium.data.prepare import VAL_FRACTION, VOCAB_SIZE, prepare
from tritium.data.prepare.inspection import inspect
from tritium.data.shards import Shard


def prepare_command(
    sources: tyro.conf.Positional[tuple[str, ...]] = (),
    *,
    vocab_size: int = VOCAB_SIZE,
    tokenizer: str | None = None,
    field: str = "text",
    val_fraction: float = VAL_FRACTION,
    deduplicate: bool = False,
    threads: int | None = None,
    cache: Path | None = None,
    out: Path | None = None,
) -> None:
    """Tokenize text into shards to train on, and print the folder that holds them.

    Args:
        sources: text files, .jsonl, .parquet (.gz and .zst too), folders of these, datasets
            hf://OWNER/NAME@REVISION, or python://installed, all Python code that is installed; each
            may end in '?key=value&...' with the keys weight, epochs, field, min_chars, max_chars,
            match, limit, config, split, max_bad, stream. None: Python's standard library.
        vocab_size: size of the vocabulary to train, the end-of-text token included.
        tokenizer: one to use instead of training one: gpt2, cl100k_base or o200k_base (fetched
            once), a rank file of these, a tokenizer.json, or a folder with one.
        field: column of tables that holds the text, for the sources that name none.
        val_fraction: share of the documents kept for validation, between 0 and 1.
        deduplicate: leave out documents whose text came before.
        threads: threads that encode; none: one per core.
        cache: where to keep the result; none: $TRITIUM_HOME, else ~/.cache/tritium.
        out: the folder to make instead of one in the cache; new or empty.
    """
    begin = time.perf_counter()
    prepared = prepare(
        sources or None,
        vocab_size=vocab_size,
        tokenizer=tokenizer,
        field=field,
        val_fraction=val_fraction,
        deduplicate=deduplicate,
        threads=threads,
        cache=cache,
        out=out,
    )
    print(printable(prepared))
    for split, shards in prepared.manifest.splits.items():
        print(f"{split}: {_summary(shards)}")
    print(f"{time.perf_counter() - begin:.1f} s")


def inspect_command(
    folder: tyro.conf.Positional[Path],
    *,
    samples: int = 3,
    seed: int = 0,
    picture: Path | None = None,
) -> None:
    """Show what a prepared folder holds: counts, lengths, samples; and check every shard.

    Args:
        folder: as `python -m tritium.data.prepare` printed it.
        samples: number of documents of which the beginning is shown.
        seed: seed of their choice.
        picture: PNG file for the lengths of the documents; none: lengths.png in the folder.
    """
    console = Console(highlight=False, markup=False)
    inspect(folder, console, samples=samples, seed=seed, picture=picture)


def main() -> None:
    """Inspect a folder if the first argument says so, else prepare."""
    if sys.argv[1:2] == ["inspect"]:
        tyro.cli(inspect_command, args=sys.argv[2:], prog="python -m tritium.data.prepare inspect")
    else:
        tyro.cli(prepare_command, prog="python -m tritium.data.prepare")


def _summary(shards: list[Shard]) -> str:
    documents = sum(shard.documents for shard in shards)
    tokens = sum(shard.tokens for shard in shards)
    n_bytes = sum(shard.bytes for shard in shards)
    return f"{documents:,} documents, {tokens:,} tokens, {n_bytes / tokens:.2f} bytes per token"


if __name__ == "__main__":
    stopped = "tritium.data.prepare: stopped; the same command resumes from here"
    try:
        with tritium.interruptible(stopped):
            main()
    except DataError as error:
        print(f"tritium.data.prepare: {error}", file=sys.stderr)
        sys.exit(2)
