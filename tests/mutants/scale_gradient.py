"""Faults of _scale_gradient.py."""

from functools import partial

from tests.mutants import Mutant

_mutant = partial(Mutant, file="kernels/_scale_gradient.py")

MUTANTS = [
    _mutant(
        what="the tail left as it is",
        original="if p == tl.num_programs(0) - 1:",
        replacement="if p == tl.num_programs(0):",
    ),
    _mutant(
        what="the tail scaled by every program",
        original="if p == tl.num_programs(0) - 1:",
        replacement="if p >= 0:",
    ),
    _mutant(
        what="each program scales the next one's blocks too",
        original="range(p * BLOCK, full, tl.num_programs(0) * BLOCK)",
        replacement="range(p * BLOCK, full, BLOCK)",
    ),
    _mutant(
        what="only the first blocks",
        original="range(p * BLOCK, full, tl.num_programs(0) * BLOCK)",
        replacement="range(p * BLOCK, p * BLOCK + 1, BLOCK)",
    ),
    _mutant(
        what="a factor of 1 is multiplied by",
        original="        if factor != 1.0:",
        replacement="        if factor == factor:",
    ),
    _mutant(
        what="no factor at all",
        original="        if factor != 1.0:",
        replacement="        if factor > 1e30:",
    ),
    _mutant(
        what="computed in the dtype of the gradient",
        original="        x_N = tl.load(x_ptr + start + offs_N).to(ACC)",
        replacement="        x_N = tl.load(x_ptr + start + offs_N)\n"
        "        factor = factor.to(x_N.dtype)",
    ),
    _mutant(
        what="the copy is the gradient itself",
        original="    _launch(x, y, factor, False)\n",
        replacement="    y.copy_(x)\n",
    ),
]
