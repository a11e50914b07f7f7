"""Faults of ranks: the numbers that they draw, and how one ends that fails or has lost another."""

from functools import partial

from tests.mutants import Mutant

_ranks = partial(Mutant, file="training/run/ranks.py")

MUTANTS = [
    _ranks(
        what="the same random numbers on every rank",
        original="(seed, step, self.rank)",
        replacement="(seed, step, 0)",
    ),
    _ranks(
        what="the same random numbers in every step",
        original="(seed, step, self.rank)",
        replacement="(seed, 0, self.rank)",
    ),
    _ranks(
        what="others kept waiting though torchrun has seen the cause",
        original="if ranks.stopped_by not in TORCHRUN_SENDS:",
        replacement="if True:",
    ),
    _ranks(
        what="a lost rank taken for the cause",
        original="if ranks.stopped_by not in TORCHRUN_SENDS:",
        replacement="if ranks.stopped_by is None and False:",
    ),
    Mutant(
        what="a signal of which the ranks hear nothing",
        file="training/signals.py",
        original="        self._ranks.stopped_by = self.name\n",
        replacement="",
    ),
    _ranks(
        what="torchrun not told why a rank exits",
        original="                Path(file).write_text(json.dumps(told))\n",
        replacement="                del told\n",
    ),
    _ranks(
        what="a lost rank told as the cause, after the interpreter's end",
        original="            if isinstance(cause, LostRankError):\n",
        replacement="            if False:\n",
    ),
]
