"""Faults of kernels/grad_norm.py: sums, the factor, races, dtypes."""

from functools import partial

from . import Mutant

_mutant = partial(Mutant, file="kernels/grad_norm.py")

MUTANTS = [
    _mutant(
        what="a factor above one for nan",
        original="tl.where(coef > 1.0, 1.0, coef)",
        replacement="tl.where(coef < 1.0, coef, 1.0)",
    ),
    _mutant(
        what="never scales",
        original="if coef == 1.0:",
        replacement="if coef <= 1.0:",
    ),
    _mutant(
        what="every program writes the norm",
        original="    if p == 0:\n        tl.store(norm_ptr, norm)",
        replacement="    tl.store(norm_ptr, norm)",
    ),
    _mutant(
        what="float16 read as bfloat16",
        original="elif dtype == FLOAT16:\n            partial",
        replacement="elif dtype == FLOAT32:\n            partial",
    ),
    _mutant(
        what="the last element of a tail left out",
        original="for first in range(full, end, BLOCK):\n        g = load(address, first",
        replacement="for first in range(full, end - 1, BLOCK):\n        g = load(address, first",
    ),
    _mutant(
        what="the change not counted",
        original="    torch.autograd.graph.increment_version(grads)\n",
        replacement="",
    ),
]
