"""Shuffled order of windows with O(1) access to any position.

Window s of a run is number s mod M of epoch s // M, and each epoch has an order of its own. Hence
the position of a run is a count: restored at no cost, and exact when the batch size or the number
of ranks changes.
"""

import numpy as np


class Order:
    """The orders in which epoch after epoch visits `n` windows, decided by `seed`."""

    def __init__(self, n: int, seed: int):
        self._n, self._seed = n, seed
        self._epoch, self._draw, self._order = -1, 0, np.empty(0, np.int64)

    def window(self, s: int) -> tuple[int, int]:
        """Return which window comes at place `s`, and a number drawn for its epoch, below 2**64."""
        epoch, i = divmod(s, self._n)
        if epoch != self._epoch:
            self._shuffle(epoch)
        return int(self._order[i]), self._draw

    def _shuffle(self, epoch: int) -> None:
        # Sorting raw bits, because numpy keeps those the same in every version, as it does not
        # promise of Generator.permutation: a resumed run must not depend on an upgrade.
        key = np.array([self._seed, epoch], dtype=np.uint64)
        bits = np.random.Philox(key=key).random_raw(1 + self._n)
        self._epoch, self._draw = epoch, int(bits[0])
        self._order = np.argsort(bits[1:], kind="stable")
