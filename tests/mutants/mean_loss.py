"""Faults of _mean_loss.py: what counts, what divides, what more programs leave out."""

from functools import partial

from tests.mutants import Mutant

_mutant = partial(Mutant, file="kernels/_mean_loss.py")

MUTANTS = [
    _mutant(
        what="ignored targets count",
        original="counts_T = target_T != ignore_index\n",
        replacement="counts_T = mask_T\n",
    ),
    _mutant(
        what="padding counts as rows",
        original="w_T += tl.where(mask_T, 1.0, 0.0)",
        replacement="w_T += 1.0",
    ),
    _mutant(
        what="padding counts as targets",
        original="mask=mask_T, other=ignore_index)",
        replacement="mask=mask_T, other=0)",
    ),
    _mutant(
        what="each program sums the next one's blocks too",
        original="range(p * BLOCK, T, P * BLOCK)",
        replacement="range(p * BLOCK, T, BLOCK)",
    ),
    _mutant(
        what="only the first block of each program",
        original="range(p * BLOCK, T, P * BLOCK)",
        replacement="range(p * BLOCK, min(T, p * BLOCK + 1), P * BLOCK)",
    ),
    _mutant(
        what="the first of several programs divides",
        original="P == 1, block, wide)",
        replacement="True, block, wide)",
    ),
    _mutant(
        what="the second launch does not divide",
        original='(loss, "sums", True, ',
        replacement='(loss, "sums", False, ',
    ),
    _mutant(
        what="the second launch leaves out the last sum",
        original="Plan((1,), (P, 0, 0)",
        replacement="Plan((1,), (P - 1, 0, 0)",
    ),
    _mutant(
        what="a total of 0 divides",
        original='total = tl.where(total == 0.0, float("nan"), total)\n',
        replacement="total += 0.0\n",
    ),
    _mutant(
        what="a weight beyond the classes is read",
        original="counts_T &= (target_T >= 0) & (target_T < n_classes)\n",
        replacement="counts_T &= target_T >= 0\n",
    ),
    _mutant(
        what="a weight before the classes is read",
        original="counts_T &= (target_T >= 0) & (target_T < n_classes)\n",
        replacement="counts_T &= target_T < n_classes\n",
    ),
    _mutant(
        what="class weights left out",
        original='else "weights" if w_dtype else',
        replacement="else",
    ),
    _mutant(
        what="float64 summed in float32",
        original="accumulator(acc)",
        replacement="accumulator(torch.float32)",
    ),
    _mutant(
        what="the total in place of the scale",
        original="        scale = tl.div_rn(one, total) if ACC is tl.float32 else one / total\n",
        replacement="        scale += 0 * one\n",
    ),
    _mutant(
        what="all programs store in one place",
        original="tl.store(scale_ptr + p, scale)",
        replacement="tl.store(scale_ptr, scale)",
    ),
]
