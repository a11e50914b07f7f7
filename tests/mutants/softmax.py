"""Faults of kernels/softmax.py: causal bounds, maxima, edges, tails, shares, lse, offsets."""

from functools import partial

from tests.mutants import Mutant

_mutant = partial(Mutant, file="kernels/softmax.py")
_mutant_in_rows = partial(Mutant, file="kernels/_softmax_long_rows.py")

MUTANTS = [
    _mutant_in_rows(
        what="a query does not see its own key",
        original="return N - Lq + 1 + m % Lq if CAUSAL else m * 0 + N",
        replacement="return N - Lq + m % Lq if CAUSAL else m * 0 + N",
    ),
    _mutant_in_rows(
        what="causal counted from the upper left",
        original="return N - Lq + 1 + m % Lq if CAUSAL else m * 0 + N",
        replacement="return 1 + m % Lq if CAUSAL else m * 0 + N",
    ),
    _mutant(
        what="rounded mass ignored in the tile",
        original="total_M = tl.sum(dy_MN * y_MN, axis=1, keep_dims=True) / mass_M",
        replacement="total_M = tl.sum(dy_MN * y_MN, axis=1, keep_dims=True)",
    ),
    _mutant_in_rows(
        what="rounded mass ignored in the loop",
        original="total = total if LOG else total / mass",
        replacement="total = total",
    ),
    _mutant(
        what="scale after the mask",
        original='z_MN = tl.where(offs_N < n, x_MN * scale, -float("inf"))',
        replacement='z_MN = tl.where(offs_N < n, x_MN, -float("inf")) * scale',
    ),
    _mutant_in_rows(
        what="a maximum that starts at -inf",
        original="top_B = tl.full((BLOCK // LANES, 1), LOWEST, dtype=ACC)",
        replacement='top_B = tl.full((BLOCK // LANES, 1), -float("inf"), dtype=ACC)',
    ),
    _mutant_in_rows(
        what="no rescaling when the maximum grows",
        original="total_B = total_B * tl.exp2((top_B - new_B) * LOG2E)",
        replacement="total_B = total_B",
    ),
    _mutant(
        what="hidden gradients count",
        original="dy_MN = tl.where(offs_N < n, dy_MN, 0.0)",
        replacement="dy_MN = dy_MN",
    ),
    _mutant(
        what="a row of all -inf loses its lse",
        original="top_M = tl.maximum(tl.max(z_MN, axis=1, keep_dims=True), LOWEST)",
        replacement="top_M = tl.max(z_MN, axis=1, keep_dims=True)",
    ),
    _mutant(
        what="the gradient of lse with the wrong sign",
        original="total_M -= tl.load(dlse_ptr + m * stride_dlseM, mask=m < M, other=0.0)",
        replacement="total_M += tl.load(dlse_ptr + m * stride_dlseM, mask=m < M, other=0.0)",
    ),
    _mutant(
        what="the gradient of lse read as contiguous",
        original="total_M -= tl.load(dlse_ptr + m * stride_dlseM, mask=m < M, other=0.0)",
        replacement="total_M -= tl.load(dlse_ptr + m, mask=m < M, other=0.0)",
    ),
    _mutant(
        what="lse of the rows past the end is written",
        original="tl.store(lse_ptr + m, softmax_lse(top_M, total_M), mask=m < M)",
        replacement="tl.store(lse_ptr + m, softmax_lse(top_M, total_M), mask=m < M + 1)",
    ),
    _mutant(
        what="lse rounded to the dtype of x",
        original="lse_M = x_MN.new_empty(M, dtype=_wide(x_MN)) if return_lse else None",
        replacement="lse_M = x_MN.new_empty(M) if return_lse else None",
    ),
    _mutant(
        what="the output's stride taken for the input's",
        original="x_MN = tl.load(x_ptr + m * stride_xM + offs_N, mask=read_MN",
        replacement="x_MN = tl.load(x_ptr + m * N + offs_N, mask=read_MN",
    ),
    _mutant_in_rows(
        what="lse without the maximum",
        original="""return tl.where(top == float("inf"), top, top + tl.log(total))""",
        replacement="""return tl.where(top == float("inf"), top, tl.log(total))""",
    ),
    _mutant_in_rows(
        what="lse of a row with +inf is NaN",
        original="""return tl.where(top == float("inf"), top, top + tl.log(total))""",
        replacement="""return top + tl.log(total)""",
    ),
    _mutant_in_rows(
        what="the loop leaves out the gradient of lse",
        original="total -= tl.load(dlse_ptr + m * stride_dlseM)",
        replacement="total -= 0.0",
    ),
    _mutant_in_rows(
        what="the front edge counts the row before",
        original="return c_E, (c_E >= h) & (c_E < tl.where(share == 0, h + N, 0))",
        replacement="return c_E, (c_E >= h - 1) & (c_E < tl.where(share == 0, h + N, 0))",
    ),
    _mutant_in_rows(
        what="the back edge one column short",
        original="return c_E, (c_E >= h) & (c_E < tl.where(share == 0, h + N, 0))",
        replacement="return c_E, (c_E >= h) & (c_E < tl.where(share == 0, h + N - 1, 0))",
    ),
    _mutant_in_rows(
        what="every share counts the edges",
        original="return c_E, (c_E >= h) & (c_E < tl.where(share == 0, h + N, 0))",
        replacement="return c_E, (c_E >= h) & (c_E < h + N)",
    ),
    _mutant_in_rows(
        what="a short row's bulk begins before its front edge ends",
        original="return row, h, tl.maximum((h + N) // 16 * 16, LEAD)",
        replacement="return row, h, (h + N) // 16 * 16",
    ),
    _mutant_in_rows(
        what="shares overlap by the front edge",
        original="first = LEAD + share * width",
        replacement="first = tl.where(share == 0, LEAD, share * width)",
    ),
    _mutant_in_rows(
        what="the last share runs past the row",
        original="last = tl.maximum(tl.minimum(first + width, cut), first)",
        replacement="last = first + width",
    ),
    _mutant_in_rows(
        what="edges left out of the maximum",
        original="top = tl.maximum(tl.max(top_B), tl.max(z_E))",
        replacement="top = tl.max(top_B)",
    ),
    _mutant_in_rows(
        what="edges left out of the sum",
        original="total += tl.sum(tl.exp2((z_E - top) * LOG2E))",
        replacement="total += 0.0",
    ),
    _mutant_in_rows(
        what="hidden keys at the edges are seen",
        original='z_E = tl.where(own_E & (c_E < end), x_E * scale, -float("inf"))',
        replacement='z_E = tl.where(own_E, x_E * scale, -float("inf"))',
    ),
    _mutant_in_rows(
        what="shares of unwritten memory",
        original="top_S = tl.load(part_ptr + part_ptrs_S, mask=mask_S, other=LOWEST)",
        replacement="top_S = tl.load(part_ptr + part_ptrs_S)",
    ),
    _mutant_in_rows(
        what="shares not brought to one maximum",
        original="total = tl.sum(total_S * tl.exp2((top_S - top) * LOG2E))",
        replacement="total = tl.sum(total_S)",
    ),
    _mutant_in_rows(
        what="hidden gradients of the tail count",
        original="total_B = tl.where(seen_B, dy_B if LOG else dy_B * y_B, 0.0)",
        replacement="total_B = dy_B if LOG else dy_B * y_B",
    ),
    _mutant_in_rows(
        what="the edges' mass left out",
        original="mass = tl.sum(mass_B) + tl.sum(y_E)",
        replacement="mass = tl.sum(mass_B)",
    ),
    _mutant_in_rows(
        what="rows that begin apart taken to begin alike",
        original="alike = M == 1 or in_MN.stride(0) == N",
        replacement="alike = True",
    ),
    _mutant_in_rows(
        what="a share too narrow for the longest rows",
        original="width = max(BLOCK, power_of_2(cdiv(N, SHARES)))",
        replacement="width = BLOCK",
    ),
    _mutant_in_rows(
        what="softmax read forwards and written backwards",
        original="tl.store(y_ptr + start + offs_BL, softmax_normalise(x_BL",
        replacement="tl.store(y_ptr + back + offs_BL, softmax_normalise(x_BL",
    ),
    _mutant_in_rows(
        what="gradient read forwards and written backwards",
        original="tl.store(dx_ptr + start + offs_B, softmax_gradient(",
        replacement="tl.store(dx_ptr + back + offs_B, softmax_gradient(",
    ),
]
