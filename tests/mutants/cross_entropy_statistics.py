"""Faults of the statistics that _cross_entropy_rows.py gathers: entropy and argmax."""

from functools import partial

from tests.mutants import Mutant

_kernel = partial(Mutant, file="kernels/_cross_entropy_rows.py")

MUTANTS = [
    _kernel(
        what="entropy: no correction when the maximum grows",
        original="spread = shrink * (spread + s * tl.maximum(m - new_m, LOWEST_GAP))",
        replacement="spread = shrink * spread",
    ),
    _kernel(
        what="entropy: lanes summed at different maxima",
        original="row_spread = tl.sum((spread + s * gap) * tl.exp2(gap * LOG2_E), axis=0)",
        replacement="row_spread = tl.sum(spread * tl.exp2(gap * LOG2_E), axis=0)",
    ),
    _kernel(
        what="entropy: a masked class makes it nan",
        original="spread += tl.sum(e_V * tl.maximum(gap_V, LOWEST_GAP), axis=1)",
        replacement="spread += tl.sum(e_V * gap_V, axis=1)",
    ),
    _kernel(
        what="argmax: the last of equals",
        original="best = tl.where(new_m > m, at, tl.minimum(at, best))",
        replacement="best = tl.where(at < NOWHERE, at, best)",
    ),
    _kernel(
        what="argmax counted from its block",
        original="offs_V, tail_V, v - h, hit, uniform",
        replacement="offs_V, tail_V, 0 - h, hit, uniform",
    ),
    _kernel(
        what="argmax: the first column of the lanes that hold it",
        original="start + tl.min(offs_V, axis=1) + lane, NOWHERE)",
        replacement="start + tl.min(offs_V, axis=1), NOWHERE)",
    ),
    _kernel(
        what="argmax counted from its lanes",
        original="start + tl.min(offs_V, axis=1) + lane, NOWHERE)",
        replacement="start + lane, NOWHERE)",
    ),
    _kernel(
        what="argmax: lanes that do not hold the maximum name a column",
        original="tl.where(lane < LANES, start + tl.min(offs_V, axis=1) + lane, NOWHERE)",
        replacement="start + tl.min(offs_V, axis=1) + lane",
    ),
    _kernel(
        what="argmax of any lane",
        original="row_best = tl.min(tl.where(m == row_m, best, NOWHERE), axis=0)",
        replacement="row_best = tl.min(best, axis=0)",
    ),
]
