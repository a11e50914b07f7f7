"""Faults of sources: a file alone in its folder."""

from functools import partial

from tests.mutants import Mutant

_corpus = partial(Mutant, file="data/corpus.py")

MUTANTS = [
    _corpus(
        what="a file alone in its folder kept whole",
        original="alone = len(files) == 1 and",
        replacement="alone = len(files) == 1 and files == [source.path] and",
    ),
    _corpus(
        what="files beside each other cut",
        original="alone = len(files) == 1 and",
        replacement="alone = len(files) >= 1 and",
    ),
]
