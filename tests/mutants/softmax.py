"""Faults of kernels/softmax.py: causal bounds, maxima, tails, hidden positions, offsets."""

from functools import partial

from . import Mutant

_mutant = partial(Mutant, file="kernels/softmax.py")

MUTANTS = [
    _mutant(
        what="a query does not see its own key",
        original="return N - Lq + 1 + m % Lq if CAUSAL else m * 0 + N",
        replacement="return N - Lq + m % Lq if CAUSAL else m * 0 + N",
    ),
    _mutant(
        what="causal counted from the upper left",
        original="return N - Lq + 1 + m % Lq if CAUSAL else m * 0 + N",
        replacement="return 1 + m % Lq if CAUSAL else m * 0 + N",
    ),
    _mutant(
        what="rounded mass ignored in the tile",
        original="total_M = tl.sum(dy_MN * y_MN, axis=1, keep_dims=True) / mass_M",
        replacement="total_M = tl.sum(dy_MN * y_MN, axis=1, keep_dims=True)",
    ),
    _mutant(
        what="rounded mass ignored in the loop",
        original="total = tl.sum(total_B) if LOG else tl.sum(total_B) / tl.sum(mass_B)",
        replacement="total = tl.sum(total_B)",
    ),
    _mutant(
        what="scale after the mask",
        original='z_MN = tl.where(offs_N < n, x_MN * scale, -float("inf"))',
        replacement='z_MN = tl.where(offs_N < n, x_MN, -float("inf")) * scale',
    ),
    _mutant(
        what="a maximum that starts at -inf",
        original="top_B = tl.full((BLOCK // LANES, 1), LOWEST, dtype=ACC)",
        replacement='top_B = tl.full((BLOCK // LANES, 1), -float("inf"), dtype=ACC)',
    ),
    _mutant(
        what="no rescaling when the maximum grows",
        original="total_B = total_B * tl.exp2((top_B - new_B) * LOG2E)",
        replacement="total_B = total_B",
    ),
    _mutant(
        what="hidden gradients count",
        original="dy_MN = tl.where(offs_N < n, dy_MN, 0.0)",
        replacement="dy_MN = dy_MN",
    ),
]
