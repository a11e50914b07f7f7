"""Batches of shuffled windows without repetition, whose position is one integer.

`TokenLoader`: the N tokens of a split form a circle. Each epoch cuts it into M = N // L windows of
L + 1 tokens, each beginning where the last one's targets end, from an offset drawn anew, and visits
them in an order drawn anew. All batches of all ranks, one after another, are one sequence.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from tritium.data.error import DataError
from tritium.data.order import Order
from tritium.data.shards import SPLITS
from tritium.data.tokens import Half, Tokens

Batch = tuple[Tensor, Tensor]
_Batch = TypeVar("_Batch", bound=tuple)


class Loader(ABC, Generic[_Batch]):
    """Base class of the loaders: the order of the windows, their ranks, and the position.

    `for batch in loader` gives the next `len(loader)` batches: an epoch, rounded down to complete
    batches. The next loop begins where the last one ended.

    Attributes:
        vocab_size: V of the tokenizer. A batch with an id outside it raises DataError.
        n_tokens: N, the tokens of the split.
        n_windows: windows of an epoch, over all ranks.
        fingerprint: hex digest of the tokenizer, of the tokens of the split, and of the packing.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        split: str,
        *,
        batch_size: int,
        length: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        verify: bool = False,
        half: Half | None = None,
    ):
        """Open a split.

        Args:
            folder: the folder that `prepare` returned.
            split: `"train"` or `"val"`.
            batch_size: B, windows per batch and rank.
            length: L, tokens per window.
            seed: decides the order of the windows, together with the epoch.
            rank: which of the `world_size` equal shares of every global batch to read.
            world_size: number of ranks.
            verify: whether to read all of the split now and compare every shard with its sha256.
            half: "choose" or "report", one half of the split's documents, to choose settings and
                checkpoints by or to report the loss of what was chosen. A split too short for two
                is read whole. None: all documents.

        Raises:
            DataError: the folder is incomplete or damaged; the split is shorter than a window, or
                the training split than a global batch; an argument is out of range.
        """
        sizes_fit = min(batch_size, length, world_size) >= 1 and 0 <= rank < world_size
        if not sizes_fit or not 0 <= seed < 1 << 64:
            raise DataError(
                f"{type(self).__name__}: batch_size, length, world_size must be at least 1, rank "
                f"in [0, world_size), seed in [0, 2**64); got {batch_size}, {length}, "
                f"{world_size}, {rank}, {seed}"
            )
        self._tokens = Tokens(folder, split, verify, half, length * world_size + 1)
        self._batch_size, self._length, self._seed = batch_size, length, seed
        self._rank, self._world_size = rank, world_size
        self.vocab_size, self.n_tokens = self._tokens.vocab_size, self._tokens.n_tokens
        self.fingerprint = self._tokens.fingerprint
        if self.n_tokens <= length:
            raise DataError(
                f"{self._tokens.text} has {self.n_tokens} tokens, a window of length {length} "
                f"takes {length + 1}; add text or lower length (--model.max-seq-len of train.py)"
            )
        windows, batch = self._count(), batch_size * world_size
        shares = f" ({batch_size} on each of {world_size} ranks)" if world_size > 1 else ""
        if split == SPLITS[0] and windows < batch:
            raise DataError(
                f"{self._tokens.text} has {windows} windows of length {length}, a batch takes "
                f"{batch}{shares}; add text, or lower batch_size or length (--batch-size or "
                "--model.max-seq-len of train.py)"
            )
        self.n_windows = windows
        self._order = Order(windows, seed)
        self._taken = 0  # windows given out so far, by all ranks

    @property
    def epoch(self) -> float:
        """Epochs that all ranks together have read of the split."""
        return self._taken / self.n_windows

    def __len__(self) -> int:
        """Return how many batches of this rank are an epoch, the last part of one left out."""
        return max(1, self.n_windows // (self._batch_size * self._world_size))

    def __iter__(self) -> Iterator[_Batch]:
        """Iterate over the next `len(self)` batches of the shuffled, endless sequence."""
        return (self.next_batch() for _ in range(len(self)))

    def next_batch(self) -> _Batch:
        """Return the next batch of the shuffled, endless sequence."""
        first = self._taken + self._rank * self._batch_size
        self._taken += self._batch_size * self._world_size
        window = self._order.window
        return self._read([self._place(*window(s)) for s in range(first, first + self._batch_size)])

    def fixed_batches(self, n_tokens: int) -> Iterator[_Batch]:
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
        L, W, there = self._length, self._world_size, self._count_fixed()
        windows = min(-(-n_tokens // (L * W)), there // W)  # for each rank
        if windows < 1:
            raise DataError(
                f"{self._tokens.text} has {there} windows of length {L} for {W} ranks, and "
                f"n_tokens is {n_tokens}; each rank needs one"
            )
        places = [self._place(W * i + self._rank, 0) for i in range(windows)]
        return (
            self._read(places[i : i + self._batch_size])
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
        """Restore the position that `state` returned: the next batch is the one that was next.

        Batch size and number of ranks may differ from those of the run that saved it: the windows
        still follow in the same order, none lost, none repeated.

        Raises:
            DataError: it is of other data or packing, another tokenizer, seed or length, or
                malformed.
        """
        for key, own in self.state().items():
            saved = state.get(key)
            if key != "windows" and saved != own:
                raise DataError(
                    f"cannot resume: the saved {key} is {saved}, this run's is {own}; "
                    "give both runs the same data, packing, seed and length"
                )
        windows = state.get("windows")
        if not isinstance(windows, int) or windows < 0:
            raise DataError(f"cannot resume: the saved position is {windows!r}, not a count")
        self._taken = windows

    @abstractmethod
    def _count(self) -> int:
        """Count the windows of an epoch."""

    @abstractmethod
    def _count_fixed(self) -> int:
        """Count the windows that `fixed_batches` may give."""

    @abstractmethod
    def _place(self, window: int, draw: int) -> int:
        """Turn the number of a window into what `_read` takes."""

    @abstractmethod
    def _read(self, places: list[int]) -> _Batch:
        """Read the windows at `places`."""


class TokenLoader(Loader[Batch]):
    """Read batches `(tokens, targets)` of contiguous text: int64 `[B, L]`, targets one ahead."""

    def _count(self) -> int:
        return self.n_tokens // self._length

    def _count_fixed(self) -> int:
        return (self.n_tokens - 1) // self._length

    def _place(self, window: int, draw: int) -> int:
        return draw % self._length + window * self._length

    def _read(self, places: list[int]) -> Batch:
        windows = np.empty((len(places), self._length + 1), dtype=self._tokens.dtype)
        for window, start in zip(windows, places, strict=True):
            self._tokens.read(start, window)
        self._tokens.check(windows)
        return as_tensor(windows[:, :-1]), as_tensor(windows[:, 1:])


def as_tensor(ids: np.ndarray) -> Tensor:
    """Return a contiguous int64 copy."""
    return torch.from_numpy(ids.astype(np.int64))
