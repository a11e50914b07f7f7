"""Inspection of a prepared folder: counts, a picture of the lengths, samples of the text."""

from pathlib import Path

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from tritium.data.atomic import replacing
from tritium.data.error import DataError, printable
from tritium.data.shards import SPLITS, Manifest, Shard, open_prepared
from tritium.data.tokenizer import Tokenizer
from tritium.data.tokens import Tokens

SAMPLE_TOKENS = 120


def inspect(
    folder: Path, console: Console, *, samples: int = 3, seed: int = 0, picture: Path | None = None
) -> None:
    """Print what `folder` holds, and draw the lengths of its documents.

    Args:
        folder: what `prepare` returned; every shard is read and compared with its sha256.
        console: where to print.
        samples: documents to show the beginning of.
        seed: decides which.
        picture: PNG file to write; None is lengths.png in `folder`.

    Raises:
        DataError: the folder is incomplete or damaged, or the picture cannot be written.
    """
    prepared = open_prepared(folder)
    manifest, tokenizer = prepared.manifest, prepared.tokenizer
    tokens = {split: Tokens(prepared, split, check=True) for split in SPLITS}
    ends = {split: tokens[split].document_ends() for split in SPLITS}
    lengths = {split: np.diff(ends[split], prepend=0) for split in SPLITS}
    n_shards = sum(map(len, manifest.splits.values()))
    console.print(
        f"{printable(folder)}\nfrom {manifest.source}\n"
        f"{manifest.vocab_size:,} ids as {np.dtype(manifest.dtype).name}, tokenizer "
        f"{manifest.tokenizer}; {n_shards} shards, each as its sha256 says",
        soft_wrap=True,
    )
    console.print(_counts(manifest, lengths), _sources(manifest))
    picture = picture or folder / "lengths.png"
    try:
        with replacing(picture) as draft:
            draw_lengths(lengths, draft)
    except OSError as error:
        raise DataError(f"cannot write {picture}: {error.strerror}; name another") from error
    console.print(f"lengths of the documents: {printable(picture)}", soft_wrap=True)
    chosen = np.random.default_rng(seed).permutation(len(ends["train"]))[:samples]
    for i in sorted(chosen.tolist()):
        n = int(lengths["train"][i])
        text = _beginning(tokens["train"], tokenizer, int(ends["train"][i]) - n, n)
        console.rule(f"train document {i:,}, {n:,} tokens", align="left", style="dim")
        console.print(text)


def draw_lengths(lengths: dict[str, np.ndarray], path: Path) -> None:
    """Draw how many documents and how many tokens there are by the length of the document.

    Args:
        lengths: of the documents of each split, in tokens, end-of-text included.
        path: PNG file to write.
    """
    from matplotlib.figure import Figure  # not pyplot, which would open windows

    together = np.concatenate([*lengths.values()])
    edges = np.unique(np.geomspace(together.min(), together.max() + 1, 49).round())
    figure = Figure(figsize=(7, 5.2), layout="constrained")
    counts, shares = figure.subplots(2, 1, sharex=True)
    for split, of_split in lengths.items():
        label = f"{split}: {len(of_split):,} documents, median {np.median(of_split):,.0f} tokens"
        documents, tokens = (np.histogram(of_split, edges, weights=w)[0] for w in (None, of_split))
        counts.stairs(documents, edges, linewidth=1.5, label=label)
        shares.plot(edges[1:], 100 * np.cumsum(tokens) / tokens.sum(), linewidth=1.5)
    counts.set_xscale("log")
    counts.set_yscale("log")
    counts.set_ylabel("documents per bin")
    counts.legend(frameon=False, fontsize="small", loc="lower left", bbox_to_anchor=(0, 1))
    shares.set_ylabel("tokens in documents\nup to this length, %")
    shares.set_xlabel("length of a document, tokens")
    counts.yaxis.set_major_formatter("{x:,.0f}")
    shares.xaxis.set_major_formatter("{x:,.0f}")
    for axes in (counts, shares):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.savefig(path, dpi=130)


def _counts(manifest: Manifest, lengths: dict[str, np.ndarray]) -> Table:
    table = Table("", box=box.SIMPLE)
    columns = []
    for split, shards in manifest.splits.items():
        table.add_column(split, justify="right")
        tokens, size = _total(shards, "tokens"), _total(shards, "bytes")
        quantiles = np.quantile(lengths[split], [0, 0.5, 0.9, 1])
        columns.append(
            {
                "shards": f"{len(shards):,}",
                "documents": f"{_total(shards, 'documents'):,}",
                "tokens": f"{tokens:,}",
                "text, MB": f"{size / 1e6:,.1f}",
                "bytes per token": f"{size / tokens:.2f}",
                "shortest document, tokens": f"{quantiles[0]:,.0f}",
                "median": f"{quantiles[1]:,.0f}",
                "90 %": f"{quantiles[2]:,.0f}",
                "longest": f"{quantiles[3]:,.0f}",
            }
        )
    for name in columns[0]:
        table.add_row(name, *(column[name] for column in columns))
    return table


def _sources(manifest: Manifest) -> Table:
    table = Table("source", "documents", "bad", "left out", box=box.SIMPLE)
    for read in manifest.read:
        table.add_row(
            read["source"],
            f"{read['documents']:,}",
            _reasons(read["bad"]) + (f"; first: {read['first_bad']}" if read["bad"] else ""),
            _reasons(read["left_out"]),
        )
    return table


def _reasons(counts: dict[str, int]) -> str:
    return ", ".join(f"{n:,} {reason}" for reason, n in counts.items()) or "none"


def _total(shards: list[Shard], what: str) -> int:
    return sum(getattr(shard, what) for shard in shards)


def _beginning(tokens: Tokens, tokenizer: Tokenizer, start: int, length: int) -> str:
    ids = np.empty(min(length - 1, SAMPLE_TOKENS), dtype=tokens.dtype)
    tokens.read(start, ids)
    return tokenizer.decode(ids.tolist()) + (" ..." if length - 1 > SAMPLE_TOKENS else "")
