"""Batches of complete documents, for attention that stays within each.

A document of n tokens, its end-of-text token included, takes n places: it is fed from the token
before it, which is the end-of-text token of another document, and its own tokens are the targets.
So every token of the split is a target once in every epoch. A document longer than a window is cut;
no other is.
"""

import hashlib
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tritium.data.loader import Loader, as_tensor
from tritium.data.packing import cut, pack

IGNORE = -100  # torch.nn.functional.cross_entropy's ignore_index


class PackedBatch(NamedTuple):
    """Windows of complete documents; int64 `[B, L]` each."""

    tokens: Tensor
    """Ids; the end-of-text token where nothing is left to fill a window with."""
    targets: Tensor
    """Id that follows each, -100 for padding."""
    positions: Tensor
    """Position of each token in its document, or in its piece of one that was cut; each padded
    place is a document of its own."""

    @property
    def documents(self) -> Tensor:
        """Number the documents of each window from 0: `[B, L]`.

        A token may attend to those before it of the same number.
        """
        return (self.positions == 0).cumsum(-1) - 1


class DocumentLoader(Loader[PackedBatch]):
    """Read batches of complete documents, packed best-fit decreasing; arguments as `TokenLoader`'s.

    Opening it reads the split once, to find its documents. Which documents share a window is the
    same in every epoch; the order of the windows is not.

    Attributes:
        filled: the share of places in windows that hold a token.
    """

    def next_batch(self) -> PackedBatch:
        """Return the next batch of the shuffled, endless sequence."""
        return super().next_batch()

    def _count(self) -> int:
        starts, ends = cut(self._tokens.document_ends(), self._length)
        windows = pack(ends - starts, self._length)
        by_window = np.argsort(windows, kind="stable")
        self._starts, self._lengths = starts[by_window], (ends - starts)[by_window]
        self._firsts = np.searchsorted(windows[by_window], np.arange(windows.max() + 2))
        n_windows = len(self._firsts) - 1
        self.filled = self.n_tokens / (n_windows * self._length)
        packing = f"{self._tokens.fingerprint} documents"
        self.fingerprint = hashlib.sha256(packing.encode()).hexdigest()[:16]
        return n_windows

    def _count_fixed(self) -> int:
        return len(self._firsts) - 1

    def _place(self, window: int, draw: int) -> int:
        return window

    def _read(self, places: list[int]) -> PackedBatch:
        B, L = len(places), self._length
        tokens = np.full((B, L), self._tokens.eot, dtype=self._tokens.dtype)
        targets = np.full((B, L), self._tokens.eot, dtype=self._tokens.dtype)
        positions = np.zeros((B, L), dtype=np.int64)
        count = np.arange(L)
        ends = []
        for row, window in enumerate(places):
            end = 0
            for i in range(self._firsts[window], self._firsts[window + 1]):
                start, n = int(self._starts[i]), int(self._lengths[i])
                here = slice(end, end + n)
                self._tokens.read(start - 1, tokens[row, here])
                self._tokens.read(start, targets[row, here])
                positions[row, here] = count[:n]
                end += n
            ends.append(end)
        self._tokens.check(tokens)
        self._tokens.check(targets)
        known = torch.from_numpy(count < np.array(ends)[:, None])
        return PackedBatch(
            as_tensor(tokens),
            as_tensor(targets).masked_fill_(~known, IGNORE),
            torch.from_numpy(positions),
        )
