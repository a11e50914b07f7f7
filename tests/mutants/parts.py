"""Faults of parts.py: what of a model each rank has."""

from functools import partial

from tests.mutants import Mutant

_parts = partial(Mutant, file="bench/scale/parts.py")

MUTANTS = [
    _parts(
        what="rows of parts are not padded",
        original="-(-rows // ranks) * ranks * torch",
        replacement="rows * torch",
    ),
    _parts(
        what="groups of nodes think that they share one",
        original='"replicas": self.tensor * self.shards}',
        replacement='"replicas": 1}',
    ),
    _parts(
        what="heads that cannot be shared out",
        original="        if size % ranks:",
        replacement="        if False:",
    ),
]
