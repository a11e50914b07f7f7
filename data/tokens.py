"""Memory-mapped tokens of a split, read with wrap-around."""

import hashlib
import json
import os
from bisect import bisect_right
from typing import Literal

import numpy as np

from tritium.data.error import DataError
from tritium.data.shards import SPLITS, open_prepared, verify

Half = Literal["choose", "report"]
HALVED = 1 << 25  # tokens of a split that are dealt out to its halves, which are held in memory


class Tokens:
    """The shards of one split, as one sequence in which the first token follows the last.

    A half is made of whole documents: each goes to the half that has fewer tokens so far, the first
    to "choose"; of one document alone each gets a part. Where a half would be shorter than
    `least`, it is the whole split. Of a split of more than HALVED tokens only so many are halved.

    Attributes:
        name: the folder and the split, for messages.
        text: the same by the source of the text, for messages about its length.
        n_tokens: N.
        vocab_size: V of the tokenizer.
        eot: the id that ends each document.
        dtype: of the ids, in numpy's notation.
        fingerprint: hex digest of the tokenizer and of the tokens.
    """

    def __init__(
        self, folder: str | os.PathLike[str], split: str, check: bool, half: Half | None = None,
        least: int = 1,
    ):  # fmt: skip
        """Open `split` of `folder`; with `check`, read all of it and compare it with its sha256.

        Args:
            folder: the prepared folder.
            split: "train" or "val".
            check: whether to verify the shards.
            half: which half of the split. None: all of it.
            least: tokens that each half must have.
        """
        if split not in SPLITS:
            raise DataError(f"split must be one of {SPLITS}, got {split!r}")
        prepared = open_prepared(folder)
        manifest, tokenizer = prepared.manifest, prepared.tokenizer
        shards = manifest.splits[split]
        if check:
            verify(prepared, shards)
        self._shards = [
            np.asarray(np.memmap(prepared / shard.file, manifest.dtype, mode="r"))
            for shard in shards
        ]
        self.name, self.text = f"{folder}: {split}", f"{manifest.source}: the split {split}"
        if half is not None:
            halves = _halves(_first(self._shards, HALVED), tokenizer.eot)
            if min(map(len, halves.values())) >= least:
                self._shards = [halves[half]]
                self.name += f", the half to {half}"
                self.text += f", the half to {half},"
        self._ends = np.cumsum([len(shard) for shard in self._shards]).tolist()
        self.n_tokens = self._ends[-1]
        self.vocab_size, self.eot, self.dtype = manifest.vocab_size, tokenizer.eot, manifest.dtype
        content = json.dumps([manifest.tokenizer, *(shard.sha256 for shard in shards)])
        self.fingerprint = hashlib.sha256(content.encode()).hexdigest()[:16]

    def read(self, start: int, out: np.ndarray) -> None:
        """Fill `out` with the tokens from `start` on."""
        while len(out):
            start %= self.n_tokens
            i = bisect_right(self._ends, start)
            begin = start - self._ends[i] + len(self._shards[i])
            piece = self._shards[i][begin : begin + len(out)]
            out[: len(piece)] = piece
            out = out[len(piece) :]
            start += len(piece)

    def check(self, ids: np.ndarray) -> None:
        """Raise DataError if one of `ids` is outside the vocabulary."""
        highest = ids.max()
        if highest >= self.vocab_size:
            raise DataError(
                f"{self.name} holds the id {highest}, the vocabulary has {self.vocab_size}; "
                "remove the folder, then run prepare again"
            )

    def document_ends(self) -> np.ndarray:
        """Return the positions after every document, int64; reads all tokens once."""
        firsts = [0, *self._ends]
        places = [np.flatnonzero(shard == self.eot) for shard in self._shards]
        ends = np.concatenate([p + first + 1 for p, first in zip(places, firsts, strict=False)])
        cut = not len(ends) or ends[-1] < self.n_tokens  # part of a document that was halved
        return np.append(ends, self.n_tokens) if cut else ends


def _first(shards: list[np.ndarray], n: int) -> np.ndarray:
    pieces = []
    for shard in shards:
        pieces.append(shard[: n - sum(map(len, pieces))])
    return np.concatenate(pieces)


def _halves(ids: np.ndarray, eot: int) -> dict[Half, np.ndarray]:
    """Deal out the documents of `ids`, in their order."""
    ends = np.flatnonzero(ids == eot) + 1
    if len(ends) < 2:
        middle = len(ids) // 2
        return {"choose": ids[:middle], "report": ids[middle:]}
    dealt: dict[Half, list[np.ndarray]] = {"choose": [], "report": []}
    sizes = dict.fromkeys(dealt, 0)
    for document in np.split(ids[: ends[-1]], ends[:-1]):
        half = min(sizes, key=lambda name: sizes[name])
        dealt[half].append(document)
        sizes[half] += len(document)
    return {half: np.concatenate(documents) for half, documents in dealt.items()}
