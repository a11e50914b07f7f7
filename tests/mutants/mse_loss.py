"""Faults of kernels/mse_loss.py: tiles, tail, partials, scales, signs, rounding."""

from functools import partial

from tests.mutants import Mutant

_mutant = partial(Mutant, file="kernels/mse_loss.py")

MUTANTS = [
    _mutant(
        what="squares rounded before they are summed",
        original="    return (input - target) * (input - target)",
        replacement="    d = (input - target).to(input_ptr.dtype.element_ty)\n    return d * d",
    ),
    _mutant(
        what="the tail in every program",
        original="own_N = tl.where(p == 0, N, 0)",
        replacement="own_N = N",
    ),
    _mutant(
        what="no tail",
        original="own_N = tl.where(p == 0, N, 0)",
        replacement="own_N = 0 * N",
    ),
    _mutant(
        what="a full tile too many",
        original="full = tl.cast(N, tl.int64) // TILE",
        replacement="full = tl.cdiv(tl.cast(N, tl.int64), TILE)",
    ),
    _mutant(
        what="every program begins with the first tile",
        original="for tile in range(p, full, tl.num_programs(0)):",
        replacement="for tile in range(0, full, tl.num_programs(0)):",
    ),
    _mutant(
        what="one tile per program",
        original="for tile in range(p, full, tl.num_programs(0)):",
        replacement="for tile in range(p, tl.minimum(full, p + 1), tl.num_programs(0)):",
    ),
    _mutant(
        what="the last partial left out",
        original="mask=offs_P < P, other=0.0",
        replacement="mask=offs_P < P - 1, other=0.0",
    ),
    _mutant(
        what="offsets of an int32 in the sum",
        original="full = tl.cast(N, tl.int64) // TILE",
        replacement="full = (tl.cast(N, tl.int64) // TILE).to(tl.int32)",
    ),
    _mutant(
        what="a mean that is a sum",
        original="loss / tl.cast(divisor, loss.dtype)",
        replacement="loss",
    ),
    _mutant(
        what="the gradient of a mean as of a sum",
        original="dloss = tl.load(dloss_ptr) / tl.cast(divisor, ACC)",
        replacement="dloss = tl.load(dloss_ptr)",
    ),
    _mutant(
        what="the incoming gradient ignored",
        original="dloss = tl.load(dloss_ptr) / tl.cast(divisor, ACC)",
        replacement="dloss = 1 / tl.cast(divisor, ACC)",
    ),
    _mutant(
        what="the incoming gradient of the first element for all",
        original="(each, TILE, accumulator(dtypes[0]))",
        replacement="(False, TILE, accumulator(dtypes[0]))",
    ),
    _mutant(
        what="a derivative without its 2",
        original="dinput = 2 * dloss * (input - target)",
        replacement="dinput = dloss * (input - target)",
    ),
    _mutant(
        what="the target's gradient with the sign of the input's",
        original="tl.store(dtarget_ptr + offs, -dinput, mask=offs < N)",
        replacement="tl.store(dtarget_ptr + offs, dinput, mask=offs < N)",
    ),
    _mutant(
        what="gradients beyond the last element",
        original="tl.store(dinput_ptr + offs, dinput, mask=offs < N)",
        replacement="tl.store(dinput_ptr + offs, dinput)",
    ),
    _mutant(
        what="a strided gradient read as contiguous",
        original="_backward(dloss.contiguous(),",
        replacement="_backward(dloss,",
    ),
    _mutant(
        what="a loss in the dtype of the input",
        original="return input.new_empty((), dtype=_wide(input, target))",
        replacement="return input.new_empty(())",
    ),
    _mutant(
        what="a strided target in another order than its input",
        original="target.contiguous().view(-1)",
        replacement="target.as_strided((target.numel(),), (1,))",
    ),
]
