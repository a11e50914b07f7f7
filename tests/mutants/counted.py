"""Faults of the bytes that a step on several ranks is predicted to send and keep."""

from functools import partial

from tests.mutants import Mutant

_parts = partial(Mutant, file="bench/scale/parts.py")
_predict = partial(Mutant, file="bench/scale/predict.py")

MUTANTS = [
    _parts(
        what="a block gathered once in each micro-batch",
        original="shards, 2 * n * passes)",
        replacement="shards, n * passes)",
    ),
    _parts(
        what="gradients scattered in each micro-batch",
        original="block * REDUCED, shards, n)",
        replacement="block * REDUCED, shards, n * passes)",
    ),
    _parts(
        what="a recomputed block runs to its end",
        original="(4 * n + recomputed) * passes",
        replacement="(4 * n + 2 * recomputed) * passes",
    ),
    _parts(
        what="four statistics of a token",
        original="STATISTICS = 5",
        replacement="STATISTICS = 4",
    ),
    _parts(
        what="gradients of norms of heads forgotten",
        original="tensor, len(partial) * n * passes)",
        replacement="tensor, 0)",
    ),
    _predict(
        what="DDP's buckets forgotten",
        original="buckets = REDUCED * (root + n * block)",
        replacement="buckets = 0 * (root + n * block)",
    ),
    _predict(
        what="sums of micro-batches forgotten",
        original="if self.passes > 1 else 0",
        replacement="if False else 0",
    ),
    _predict(
        what="moments of one kind",
        original="gradients, 8 * elements",
        replacement="gradients, 4 * elements",
    ),
]
