"""Memory-mapped tokens of a split, read with wrap-around."""

import hashlib
import json
import os
from bisect import bisect_right

import numpy as np

from tritium.data.error import DataError
from tritium.data.shards import SPLITS, open_prepared, verify


class Tokens:
    """The shards of one split, as one sequence in which the first token follows the last.

    Attributes:
        name: the folder and the split, for messages.
        n_tokens: N.
        vocab_size: V of the tokenizer.
        eot: the id that ends each document.
        dtype: of the ids, in numpy's notation.
        fingerprint: hex digest of the tokenizer and of the tokens.
    """

    def __init__(self, folder: str | os.PathLike[str], split: str, check: bool):
        """Open `split` of `folder`; with `check`, read all of it and compare it with its sha256."""
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
        self._ends = np.cumsum([shard.tokens for shard in shards]).tolist()
        self.name = f"{folder}: {split}"
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
        return np.concatenate([p + first + 1 for p, first in zip(places, firsts, strict=False)])
