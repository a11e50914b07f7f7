"""Encoding of documents into shards: read in one thread, encoded in all, written in order.

What has been written depends on the documents alone, not on the threads or on interruptions: a
document belongs to a split by its text, and a shard ends with the document that fills it. So the
shards that an interrupted run left say how many documents of each split to pass over.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from tritium.data.mixture import Mixture
from tritium.data.prepare.split import assign_splits
from tritium.data.shards import SPLITS, Shard, ShardWriter, finished_shards, token_dtype
from tritium.data.tokenizer import Tokenizer

BATCH_CHARS = 1 << 20  # text that a thread encodes at a time

_In = TypeVar("_In")
_Out = TypeVar("_Out")
_Encoded = dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]


def encode(
    texts: Mixture,
    tokenizer: Tokenizer,
    val_fraction: float,
    folder: Path,
    threads: int,
    console: Console,
    total: int,
) -> dict[str, list[Shard]]:
    """Write the shards that `folder` still lacks; return those of each split.

    Args:
        texts: the documents; read from the first, whatever `folder` holds.
        tokenizer: what to encode with.
        val_fraction: see `assign_splits`.
        folder: where to write, and where an interrupted run may have left complete shards.
        threads: how many encode.
        console: where to report.
        total: bytes of the files of `texts`; 0 where they cannot be known.
    """
    begin = time.perf_counter()
    finished = finished_shards(folder, tokenizer.fingerprint)
    dtype = token_dtype(tokenizer.vocab_size)
    writers = {split: ShardWriter(folder, split, dtype, finished[split]) for split in SPLITS}
    done = {split: sum(shard.documents for shard in finished[split]) for split in SPLITS}
    if any(done.values()):
        console.print(
            f"resuming after {sum(done.values()):,} documents that an interrupted run encoded"
        )
    batches = _batches(_after(done, assign_splits(texts, val_fraction)))
    columns = (
        TextColumn("encoding"),
        BarColumn(),
        DownloadColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
    )
    shown = console.is_terminal and not console.quiet
    with (
        Progress(*columns, console=console, transient=True, disable=not shown) as progress,
        ThreadPoolExecutor(threads) as pool,
    ):
        task = progress.add_task("", total=total or None, speed="")
        tokens = n_bytes = 0
        for encoded in _in_order(pool, partial(_encode, tokenizer), batches, ahead=4 * threads):
            for split, (ids, ends, sizes) in encoded.items():
                writers[split].add(ids, ends, sizes)
                tokens += len(ids)
                n_bytes += int(sizes.sum())
            seconds = max(progress.tasks[0].elapsed or 0, 1e-9)
            progress.update(
                task, completed=texts.position(), speed=f"{tokens / seconds / 1e6:.2f}M tokens/s"
            )
    for writer in writers.values():
        writer.flush()
    console.print(f"encoded {n_bytes / 1e6:,.1f} MB in {time.perf_counter() - begin:.1f} s")
    return {split: writer.shards for split, writer in writers.items()}


def _encode(tokenizer: Tokenizer, batch: list[tuple[str, str]]) -> _Encoded:
    encoded = {}
    for split in SPLITS:
        texts = [text for its_split, text in batch if its_split == split]
        ids = tokenizer.encode_documents(texts)
        sizes = np.array([len(text.encode()) for text in texts], dtype=np.int64)
        encoded[split] = ids, np.flatnonzero(ids == tokenizer.eot) + 1, sizes
    return encoded


def _after(done: dict[str, int], items: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    left = dict(done)
    for split, text in items:
        if left[split]:
            left[split] -= 1
        else:
            yield split, text


def _batches(items: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    batch, length = [], 0
    for item in items:
        batch.append(item)
        length += len(item[1])
        if length >= BATCH_CHARS:
            yield batch
            batch, length = [], 0
    yield batch


def _in_order(
    pool: ThreadPoolExecutor, function: Callable[[_In], _Out], items: Iterable[_In], ahead: int
) -> Iterator[_Out]:
    waiting = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
