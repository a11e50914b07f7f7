"""Faults of kernels/embedding.py: rows, runs and their borders, masks, orders, rounding."""

from functools import partial

from tests.mutants import Mutant

_mutant = partial(Mutant, file="kernels/embedding.py")

MUTANTS = [
    _mutant(
        what="a token of V is looked up",
        original="(tokens_T >= 0) & (tokens_T < V)\n    w_ptrs",
        replacement="(tokens_T >= 0) & (tokens_T <= V)\n    w_ptrs",
    ),
    _mutant(
        what="a negative token is looked up",
        original="known_T = (tokens_T >= 0) & (tokens_T < V)",
        replacement="known_T = tokens_T < V",
    ),
    _mutant(
        what="an unknown token's row is 0",
        original='other=float("nan")',
        replacement="other=0.0",
    ),
    _mutant(
        what="the table's rows taken to be D apart",
        original="w_ptr + tokens_T * stride_wV + offs_D",
        replacement="w_ptr + tokens_T * D + offs_D",
    ),
    _mutant(
        what="offsets in the table of an int32",
        original="mask=offs_T < T, other=0).to(tl.int64)",
        replacement="mask=offs_T < T, other=0).to(tl.int32)",
    ),
    _mutant(
        what="gradients in sorted order instead of the token's own place",
        original="row = tl.load(order_ptr + t, mask=t < T, other=0)",
        replacement="row = t",
    ),
    _mutant(
        what="gradients' rows taken to be D apart",
        original="dy_ptr + row * stride_dyT + offs_D",
        replacement="dy_ptr + row * D + offs_D",
    ),
    _mutant(
        what="no head of a block that one run fills",
        original="tl.where((token == before) & (ends | border), D, 0)",
        replacement="tl.where((token == before) & ends, D, 0)",
    ),
    _mutant(
        what="no tail",
        original="tl.where((token == following) & begins & border, D, 0)",
        replacement="tl.where((token == following) & begins & ends, D, 0)",
    ),
    _mutant(
        what="a sum carried from one token into the next",
        original="dw_D = tl.where(ends, 0.0, dw_D)",
        replacement="dw_D = tl.where(ends & begins, 0.0, dw_D)",
    ),
    _mutant(
        what="sums in the dtype of the gradient",
        original="dw_D += dy_D.to(ACC)",
        replacement="dw_D = (dw_D + dy_D.to(ACC)).to(dy_D.dtype).to(ACC)",
    ),
    _mutant(
        what="partials in the dtype of the gradient",
        original="partials_B2D = dy_TD.new_empty(plan.n_blocks, 2, D, dtype=plan.acc)",
        replacement="partials_B2D = dy_TD.new_empty(plan.n_blocks, 2, D)",
    ),
    _mutant(
        what="a run that goes through a block begins in it once more",
        original="& (token == following) & (token != before):",
        replacement="& (token == following):",
    ),
    _mutant(
        what="a long run ends after its first blocks",
        original="for first in range(b + 1, end, BLOCK_B):",
        replacement="for first in range(b + 1, b + 2, BLOCK_B):",
    ),
    _mutant(
        what="a long run's first heads added at each step",
        original="head_ptrs = partials_ptr + 2 * first * D + (",
        replacement="head_ptrs = partials_ptr + 2 * (b + 1) * D + (",
    ),
    _mutant(
        what="a long run's first blocks tell at each step where it ends",
        original="sorted_ptr + first * S + offs_B * S",
        replacement="sorted_ptr + (b + 1) * S + offs_B * S",
    ),
    _mutant(
        what="a block behind the last asked for its token",
        original="mask=offs_B < left, other=-1)",
        replacement="mask=offs_B <= left, other=-1)",
    ),
    _mutant(
        what="heads of the next token's run added",
        original="mask_BD = (head_B == token)[:, None]",
        replacement="mask_BD = (head_B >= token)[:, None]",
    ),
    _mutant(
        what="the tail forgotten",
        original="dw_D = tail_D + tl.sum(heads_BD, axis=0)",
        replacement="dw_D = tl.sum(heads_BD, axis=0)",
    ),
    _mutant(
        what="offsets in the gradient of an int32",
        original="dw_ptrs = dw_ptr + token.to(tl.int64) * D",
        replacement="dw_ptrs = dw_ptr + token * D",
    ),
    _mutant(
        what="offsets in the gradient of an int32, for runs within a block",
        original="token.to(tl.int64) * D + offs_D, total_D, mask=offs_D < width)",
        replacement="token * D + offs_D, total_D, mask=offs_D < width)",
    ),
    _mutant(
        what="padding gets a gradient",
        original="    if padding_idx >= 0:",
        replacement="    if False:",
    ),
    _mutant(
        what="tokens cut to 32 bits before they are compared",
        original="keys_T = tokens_T.clamp(-1, V)",
        replacement="keys_T = tokens_T.int().clamp(-1, V)",
    ),
    _mutant(
        what="rows that no token names are not zeros",
        original="dy_TD.new_zeros(V, dy_TD.shape[1]",
        replacement="dy_TD.new_empty(V, dy_TD.shape[1]",
    ),
    _mutant(
        what="a negative padding_idx does not count from the end",
        original="-1 if padding_idx is None else padding_idx % V",
        replacement="-1 if padding_idx is None else padding_idx",
    ),
    _mutant(
        what="strided gradients read as contiguous",
        original="dy_TD, (tokens_T,), parameter = unit_stride(dy_TD),",
        replacement="dy_TD, (tokens_T,), parameter = dy_TD,",
    ),
    _mutant(
        what="sums replace the gradient that there is",
        original="total_D = rows[k][3] + dw_D if ADD else dw_D",
        replacement="total_D = dw_D",
    ),
    _mutant(
        what="sums of runs across borders replace the gradient that there is",
        original="dw_D = tl.load(dw_ptrs, mask=offs_D < D, other=0.0) + dw_D",
        replacement="dw_D += 0.0",
    ),
    _mutant(
        what="the gradient that there is, read at another token's row",
        original="old_D = tl.load(dw_ptr + token.to(tl.int64) * D + offs_D",
        replacement="old_D = tl.load(dw_ptr + row * D + offs_D",
    ),
    _mutant(
        what="a gradient of its own although there is one",
        original="if parameter is not None and parameter.grad is not None:",
        replacement="if False:",
    ),
    _mutant(
        what="the gradient given to autograd as well",
        original="        parameter.grad = dw_VD\n        return (None,) * 5",
        replacement="        parameter.grad = dw_VD\n        return None, dw_VD, None, None, None",
    ),
    _mutant(
        what="the result in the dtype of the weight",
        original="w_VD, excluded, dtype or weight.dtype, parameter)",
        replacement="w_VD, excluded, weight.dtype, parameter)",
    ),
]
