"""Faults of relu_squared: value, slope, NaN, and the input that it does not have."""

from functools import partial

from tests.mutants import Mutant

_mutant = partial(Mutant, file="kernels/_activation.py")

MUTANTS = [
    _mutant(
        what="not squared",
        original="return relu * relu, 2 * relu",
        replacement="return relu, 2 * relu",
    ),
    _mutant(
        what="slope without the two",
        original="return relu * relu, 2 * relu",
        replacement="return relu * relu, relu",
    ),
    _mutant(
        what="a negative slope",
        original="return relu * relu, 2 * relu",
        replacement="return relu * relu, 2 * a",
    ),
    _mutant(
        what="NaN taken for zero",
        original="relu = tl.where(a < 0, 0.0, a)",
        replacement="relu = tl.where(a > 0, a, 0.0)",
    ),
    _mutant(
        what="the stride of the rows taken for their width",
        original="dx_TF = dh_TF * slope_TF",
        replacement="dx_TF = tl.load(dh_ptr + offs_T * F + offs_F, mask=mask_TF, other=0.0)"
        ".to(ACC) * slope_TF",
    ),
    _mutant(
        what="strided rows read as contiguous",
        original="return unit_stride(x.reshape(T, F))",
        replacement="return x.reshape(T, F)",
    ),
]
