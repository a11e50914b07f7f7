"""Faults of geglu: the two references of GELU, their slopes and their ends."""

from functools import partial

from tests.mutants import Mutant

_mutant = partial(Mutant, file="kernels/_activation.py")

MUTANTS = [
    _mutant(
        what="error function of the gate itself",
        original="tl.erf(a * 0.7071067811865476)",
        replacement="tl.erf(a)",
    ),
    _mutant(
        what="a constant of float32 precision",
        original="0.7071067811865476",
        replacement="0.70710678",
    ),
    _mutant(
        what="slope without the density",
        original="phi + a * density",
        replacement="phi",
    ),
    _mutant(
        what="density of another variance",
        original="tl.exp(-0.5 * a * a)",
        replacement="tl.exp(-a * a)",
    ),
    _mutant(
        what="approximation without the cube",
        original="(1.5957691216057308 + 0.07135481627260025 * square)",
        replacement="1.5957691216057308",
    ),
    _mutant(
        what="the cube not differentiated",
        original="0.21406444881780073",
        replacement="0.07135481627260025",
    ),
    _mutant(
        what="slope of the exponent left out",
        original="sigma + value * rest * ds",
        replacement="sigma + value * rest",
    ),
    _mutant(
        what="the cube overflows at the lower end",
        original="a = tl.maximum(a, -9.5, propagate_nan=tl.PropagateNan.ALL)",
        replacement="a = a",
    ),
    _mutant(
        what="NaN taken for the lower end",
        original="a = tl.maximum(a, -9.5, propagate_nan=tl.PropagateNan.ALL)",
        replacement="a = tl.maximum(a, -9.5)",
    ),
    _mutant(
        what="the square overflows at the upper end",
        original="square = tl.minimum(a * a, 1e4)",
        replacement="square = a * a",
    ),
    _mutant(
        what="1 - σ without its digits",
        original='rest = exp * sigma if ACTIVATION == "gelu_tanh" else 1 - sigma',
        replacement="rest = 1 - sigma",
    ),
    _mutant(
        what="the references exchanged",
        file="kernels/geglu.py",
        original='{"none": "gelu", "tanh": "gelu_tanh"}',
        replacement='{"none": "gelu_tanh", "tanh": "gelu"}',
    ),
]
