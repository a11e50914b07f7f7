"""Speed of preparing text and of loading batches: `python -m tritium.bench data`.

`prepare` reads JSON lines from disk, splits, encodes, writes and syncs; it is compared with
`tiktoken.Encoding.encode_ordinary_batch` on the same documents, in memory already, on the same
cores. The two take turns, and "of bare" is the median over the turns. The loaders read shards that
are in the page cache.
"""

import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import tiktoken
import torch
from rich.table import Table

from tritium.bench import tables
from tritium.bench.ends import at_least
from tritium.bench.harness import device_name
from tritium.data import DocumentLoader, Tokenizer, TokenLoader, prepare
from tritium.data.corpus import documents
from tritium.data.shards import open_prepared, verify
from tritium.kernels.units import counted

RESULTS = "data.md"  # in the folder of results
WIDTH = 120
PARAGRAPH = 1000  # characters
BATCHES = 200


def main(mb: float = 48, repeats: int = 7, write: bool = False) -> None:
    """Show the rates of prepare and of the loaders.

    Args:
        mb: text to encode, in millions of characters; the standard library, repeated.
        repeats: how often each is measured; the median and the best are shown.
        write: keep the tables in data.md, in the folder of results.
    """
    at_least(0.1, mb=mb)
    at_least(1, repeats=repeats)
    encoding = Table(
        "documents", "what", "MB/s", "best", "M tokens/s", "of bare", "CPU s", "of bare"
    )
    loading = Table("what", "M tokens/s", "best", "M tokens per CPU s")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        modules = [*_texts(int(mb * 1e6))]
        parts = [t[i : i + PARAGRAPH] for t in modules for i in range(0, len(t), PARAGRAPH)]
        tokenizer = Tokenizer.train(modules[: len(modules) // 2 + 1], 4096)
        tokenizer.save(root)
        for name, texts in (("modules", modules), ("paragraphs", parts)):
            for row in _prepare_rows(name, texts, tokenizer, root, repeats):
                encoding.add_row(*row)
        for row in _loader_rows(_prepare(root, "modules", "kept"), repeats):
            loading.add_row(*row)
    command = f"python -m tritium.bench data --mb {mb:g} --repeats {repeats} --write"
    lines = (
        f"`{command}`, torch {torch.__version__}, tiktoken {tiktoken.__version__}",
        f"{device_name(torch.device('cpu')).rpartition(',')[0]}, "
        f"{counted(len(os.sched_getaffinity(0)), 'core')}, load {os.getloadavg()[1]:.1f} from "
        f"this and other processes; {len(modules):,} modules or {len(parts):,} paragraphs, "
        f"vocabulary {tokenizer.vocab_size:,}, uint16",
    )
    kept = tables.results() / RESULTS if write else None
    tables.present(lines, encoding, loading, width=WIDTH, write_to=kept)


def _texts(characters: int) -> Iterator[str]:
    for text in itertools.cycle([*documents()]):
        if characters <= 0:
            return
        yield text
        characters -= len(text)


def _prepare(root: Path, name: str, run: str) -> Path:
    cache = root / f"{name} {run}"
    return prepare(root / f"{name}.jsonl", tokenizer=root, cache=cache, progress=False).folder


def _prepare_rows(
    name: str, texts: list[str], tokenizer: Tokenizer, root: Path, repeats: int
) -> Iterator[tuple[str, ...]]:
    lines = (json.dumps({"text": text}) + "\n" for text in texts)
    (root / f"{name}.jsonl").write_text("".join(lines))
    n_bytes = sum(len(text.encode()) for text in texts)
    manifest = open_prepared(_prepare(root, name, "kept")).manifest
    n_tokens = sum(shard.tokens for shards in manifest.splits.values() for shard in shards)
    calls = {
        "encode_ordinary_batch": lambda i: tokenizer.encode_batch(texts),
        "prepare": lambda i: _prepare(root, name, str(i)),
    }
    times = {what: [] for what in calls}
    for i in range(repeats):
        for what, call in calls.items():
            times[what].append(_time(partial(call, i)))
    bare = times["encode_ordinary_batch"]
    for what, measured in times.items():
        wall, cpu = _medians(measured)
        turns = zip(bare, measured, strict=True)
        speed, work = _medians([(b[0] / m[0], m[1] / b[1]) for b, m in turns])
        yield (
            name,
            what,
            f"{n_bytes / wall / 1e6:.1f}",
            f"{n_bytes / min(measured)[0] / 1e6:.1f}",
            f"{n_tokens / wall / 1e6:.2f}",
            f"{speed:.2f}",
            f"{cpu:.2f}",
            f"{work:.2f}",
        )


def _loader_rows(folder: Path, repeats: int) -> Iterator[tuple[str, ...]]:
    manifest = open_prepared(folder).manifest
    shards = manifest.splits["train"]
    calls: dict[str, tuple[Callable[[], object], int]] = {}
    for kind in (TokenLoader, DocumentLoader):
        loader = kind(folder, "train", batch_size=32, length=1024)
        calls[f"{kind.__name__}, batch 32 × 1024"] = partial(_read, loader), BATCHES * 32 * 1024
    n_tokens = sum(shard.tokens for shard in shards)
    calls["sha256 of the shards"] = partial(verify, folder, shards), n_tokens
    for what, (call, tokens) in calls.items():
        call()
        times = [_time(call) for _ in range(repeats)]
        wall, cpu = _medians(times)
        yield (what, *(f"{tokens / s / 1e6:,.0f}" for s in (wall, min(times)[0], cpu)))


def _read(loader: TokenLoader | DocumentLoader) -> None:
    for _ in range(BATCHES):
        loader.next_batch()


def _time(call: Callable[[], object]) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - cpu


def _medians(times: list[tuple[float, float]]) -> list[float]:
    return [statistics.median(each) for each in zip(*times, strict=True)]
