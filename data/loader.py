"""Shards to batches: shuffled windows without repetition, and a position that fits in one integer.

The N tokens of a split form a circle. Epoch e cuts it into M = N // L windows of L + 1 tokens, each
beginning where the last one's targets end, from an offset drawn anew, and visits them in an order
drawn anew. All batches of all ranks, one after another, are one sequence of windows: window s of a
run is number s mod M of epoch s // M. Hence the position is a count, restored at no cost, and it
stays exact when the batch size or the number of ranks changes.
"""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .error import DataError
from .shards import SPLITS, open_prepared

Batch = tuple[Tensor, Tensor]


class TokenLoader:
    """Read batches of tokens and targets from a folder that `prepare` made.

    Attributes:
        vocab_size: V of the tokenizer. A batch with an id outside it raises DataError.
        n_tokens: N, the tokens of the split.
        fingerprint: hex digest of the tokenizer and of the tokens of the split.
    """

    def __init__(
        self,
        folder: str | Path,
        split: str,
        *,
        batch_size: int,
        length: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        """Open a split; nothing is read until a batch is.

        Args:
            folder: what `prepare` returned.
            split: `"train"` or `"val"`.
            batch_size: B, windows per batch and rank.
            length: L, tokens per window.
            seed: decides the order of the windows, together with the epoch.
            rank: which of the `world_size` equal shares of every global batch to read.
            world_size: number of ranks.

        Raises:
            DataError: the folder is incomplete or damaged; the split is shorter than a window, or
                the training split than a global batch; an argument is out of range.
        """
        sizes_fit = min(batch_size, length, world_size) >= 1 and 0 <= rank < world_size
        if not sizes_fit or not 0 <= seed < 1 << 64:
            raise DataError(
                "TokenLoader: batch_size, length, world_size must be at least 1, rank in "
                f"[0, world_size), seed in [0, 2**64); got {batch_size}, {length}, {world_size}, "
                f"{rank}, {seed}"
            )
        if split not in SPLITS:
            raise DataError(f"TokenLoader: split must be one of {SPLITS}, got {split!r}")
        manifest, _ = open_prepared(folder)
        shards = manifest.splits[split]
        self._folder, self._split = Path(folder), split
        self._batch_size, self._length, self._seed = batch_size, length, seed
        self._rank, self._world_size = rank, world_size
        self._shards = [
            np.asarray(np.memmap(self._folder / shard.file, manifest.dtype, mode="r"))
            for shard in shards
        ]
        self._ends = np.cumsum([shard.tokens for shard in shards]).tolist()
        self.vocab_size = manifest.vocab_size
        self.n_tokens = self._ends[-1]
        content = json.dumps([manifest.tokenizer, *(shard.sha256 for shard in shards)])
        self.fingerprint = hashlib.sha256(content.encode()).hexdigest()[:16]
        self._check_enough()
        self._epoch, self._order, self._offset = -1, np.empty(0, np.int64), 0
        self._taken = 0  # windows given out so far, by all ranks

    def _check_enough(self) -> None:
        windows, batch = self.n_tokens // self._length, self._batch_size * self._world_size
        if self.n_tokens <= self._length:
            raise DataError(
                f"{self._folder}: {self._split} has {self.n_tokens} tokens, a window of length "
                f"{self._length} takes {self._length + 1}; add text or lower the length"
            )
        if self._split == "train" and windows < batch:
            raise DataError(
                f"{self._folder}: train has {windows} windows of length {self._length}, a batch "
                f"takes {batch} ({self._batch_size} on each of {self._world_size} ranks); add "
                "text, or lower batch_size or length"
            )

    def next_batch(self) -> Batch:
        """Return the next `(tokens, targets)`: int64 `[B, L]` each, targets one token ahead."""
        first = self._taken + self._rank * self._batch_size
        self._taken += self._batch_size * self._world_size
        return self._read([self._start(s) for s in range(first, first + self._batch_size)])

    def fixed_batches(self, n_tokens: int) -> Iterator[Batch]:
        """Iterate over the first windows of the split, unshuffled: the same at every call.

        The ranks share them, and each gets as many batches of the same shapes as the others. The
        last batch may have fewer than B rows. `Tokenizer.byte_lengths[targets].sum()` is the text
        that a batch's targets stand for, in bytes.

        Args:
            n_tokens: targets wanted over all ranks, rounded up to one window for each rank; all
                that the split has when that is less.

        Raises:
            DataError: the split has fewer windows than there are ranks.
        """
        L, W = self._length, self._world_size
        wanted = -(-n_tokens // (L * W))
        windows = min(wanted, (self.n_tokens - 1) // L // W)  # for each rank
        if windows < 1:
            raise DataError(
                f"{self._folder}: {self._split} has {(self.n_tokens - 1) // L} windows of length "
                f"{L} for {W} ranks, and n_tokens is {n_tokens}; each rank needs one"
            )
        starts = [L * (W * i + self._rank) for i in range(windows)]
        return (
            self._read(starts[i : i + self._batch_size])
            for i in range(0, windows, self._batch_size)
        )

    def state(self) -> dict:
        """Return the position, to be saved as JSON. It is the same on every rank."""
        return {
            "fingerprint": self.fingerprint,
            "seed": self._seed,
            "length": self._length,
            "windows": self._taken,
        }

    def load_state(self, state: dict) -> None:
        """Go to the position that `state` describes: the next batch is the one that was next.

        Batch size and number of ranks may differ from those of the run that saved it: the windows
        still follow in the same order, none lost, none repeated.

        Raises:
            DataError: it is of other data or another tokenizer, seed or length, or malformed.
        """
        for key, ours in self.state().items():
            theirs = state.get(key)
            if key != "windows" and theirs != ours:
                raise DataError(
                    f"cannot resume: the saved {key} is {theirs}, this run's is {ours}; "
                    "give both runs the same data, seed and length"
                )
        windows = state.get("windows")
        if not isinstance(windows, int) or windows < 0:
            raise DataError(f"cannot resume: the saved position is {windows!r}, not a count")
        self._taken = windows

    def _start(self, window: int) -> int:
        epoch, i = divmod(window, self.n_tokens // self._length)
        if epoch != self._epoch:
            self._shuffle(epoch)
        return self._offset + int(self._order[i]) * self._length

    def _shuffle(self, epoch: int) -> None:
        # Sorting raw bits, because numpy keeps those the same in every version, as it does not
        # promise of Generator.permutation: a resumed run must not depend on an upgrade.
        key = np.array([self._seed, epoch], dtype=np.uint64)
        bits = np.random.Philox(key=key).random_raw(1 + self.n_tokens // self._length)
        self._epoch, self._offset = epoch, int(bits[0]) % self._length
        self._order = np.argsort(bits[1:], kind="stable")

    def _read(self, starts: list[int]) -> Batch:
        windows = np.empty((len(starts), self._length + 1), dtype=np.int64)
        for window, start in zip(windows, starts, strict=True):
            self._copy(start, window)
        if windows.max() >= self.vocab_size:
            raise DataError(
                f"{self._folder}: {self._split} holds the id {windows.max()}, the vocabulary has "
                f"{self.vocab_size}; run prepare again"
            )
        ids = torch.from_numpy(windows)
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def _copy(self, start: int, out: np.ndarray) -> None:
        while len(out):
            i = bisect_right(self._ends, start)
            begin = start - self._ends[i] + len(self._shards[i])
            piece = self._shards[i][begin : begin + len(out)]
            out[: len(piece)] = piece
            out = out[len(piece) :]
            start = (start + len(piece)) % self.n_tokens
