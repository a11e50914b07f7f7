"""Faults of qk_norm_rope and its kernels: heads, signs, masks, strides, sums, memory written."""

from functools import partial

from tests.mutants import Mutant

_mutant = partial(Mutant, file="kernels/qk_norm_rope.py")
_on_cpu = partial(Mutant, file="kernels/_qk_norm_rope_cpu.py")
_in_kernels = partial(Mutant, file="kernels/_qk_norm_rope_kernels.py")

MUTANTS = [
    _in_kernels(
        what="keys read where the queries are",
        original="heads, first, start_N, y_ptr, w_ptr = G, H, (n - q_tiles)",
        replacement="heads, first, start_N, y_ptr, w_ptr = G, 0, (n - q_tiles)",
    ),
    _in_kernels(
        what="keys scaled as queries in backward",
        original="dy_ptr, w_ptr = G, H, (n - q_tiles) * BLOCK_N, dk_ptr, k_weight_ptr",
        replacement="dy_ptr, w_ptr = G, H, (n - q_tiles) * BLOCK_N, dk_ptr, q_weight_ptr",
    ),
    _in_kernels(
        what="strides of the queries' gradient for the keys'",
        original="stride_B, stride_L, stride_N = stride_kB, stride_kL, stride_kN",
        replacement="stride_B, stride_L, stride_N = stride_qB, stride_qL, stride_qN",
    ),
    _in_kernels(
        what="strides of the keys' gradient for the values'",
        original="stride_B, stride_L, stride_N = stride_vB, stride_vL, stride_vN",
        replacement="stride_B, stride_L, stride_N = stride_kB, stride_kL, stride_kN",
    ),
    _in_kernels(
        what="values' gradient written over the keys'",
        original="first, start_N, dy_ptr = H + G, (n",
        replacement="first, start_N, dy_ptr = H, (n",
    ),
    _in_kernels(
        what="one position too many",
        original="    mask_LN = (offs_L < L) & (offs_N < heads)\n\n",
        replacement="    mask_LN = (offs_L <= L) & (offs_N < heads)\n\n",
    ),
    _in_kernels(
        what="one head too many in backward",
        original="            mask_LN = (offs_L < L) & (offs_N < heads)\n",
        replacement="            mask_LN = (offs_L < L) & (offs_N <= heads)\n",
    ),
    _in_kernels(
        what="one value too many",
        original="mask = (offs_L < L) & (offs_N < heads) & (offs_K < K)",
        replacement="mask = (offs_L < L) & (offs_N <= heads) & (offs_K < K)",
    ),
    _in_kernels(
        what="features of the next head behind the last",
        original="mask=mask & (offs_R < K - 2 * J), other=0.0)",
        replacement="mask=mask & (offs_R <= K - 2 * J), other=0.0)",
    ),
    _in_kernels(
        what="features behind the pairs read from the first on",
        original="rest = tl.load(ptrs + 2 * J + offs_R,",
        replacement="rest = tl.load(ptrs + offs_R,",
    ),
    _in_kernels(
        what="features behind the pairs left unwritten",
        original="tl.store(ptrs + offs_K, rest, mask=mask & (offs_K < K))",
        replacement="tl.store(ptrs + offs_K, rest, mask=mask & (offs_K < K - 1))",
    ),
    _in_kernels(
        what="features behind the pairs left out of the mean",
        original="keep_dims=True) + tl.sum(rest, axis=2, keep_dims=True)",
        replacement="keep_dims=True) + 0 * tl.sum(rest, axis=2, keep_dims=True)",
    ),
    _in_kernels(
        what="mean over the pairs alone",
        original="_sum_of_features(x1 * x1, x2 * x2, rest * rest) / K + eps",
        replacement="_sum_of_features(x1 * x1, x2 * x2, rest * rest) / (2 * J) + eps",
    ),
    _in_kernels(
        what="backward without eps",
        original="_sum_of_features(x1 * x1, x2 * x2, x_rest * x_rest) / K + eps",
        replacement="_sum_of_features(x1 * x1, x2 * x2, x_rest * x_rest) / K + 1e-6",
    ),
    _in_kernels(
        what="1 / 0 of what pads a tile summed",
        original="r_LN = tl.where(mask_LN, r_LN, 0.0)",
        replacement="r_LN = r_LN",
    ),
    _in_kernels(
        what="weight left out of the projection's mean",
        original="_sum_of_features(gx1 * w1, gx2 * w2, gx_rest * w_rest)",
        replacement="_sum_of_features(gx1, gx2, gx_rest)",
    ),
    _in_kernels(
        what="weight's gradient of the raw projection",
        original="dw2 += gx2 * r_LN",
        replacement="dw2 += gx2",
    ),
    _in_kernels(
        what="last block alone in the weight's gradient",
        original="dw1 += gx1 * r_LN",
        replacement="dw1 = gx1 * r_LN",
    ),
    _in_kernels(
        what="forward turns backward",
        original="    y1 = x1 * cos_LJ - x2 * sin_LJ\n    y2 = x2 * cos_LJ + x1 * sin_LJ",
        replacement="    y1 = x1 * cos_LJ + x2 * sin_LJ\n    y2 = x2 * cos_LJ - x1 * sin_LJ",
    ),
    _in_kernels(
        what="backward turns forward",
        original="g1 = dy1 * cos_LJ + dy2 * sin_LJ",
        replacement="g1 = dy1 * cos_LJ - dy2 * sin_LJ",
    ),
    _in_kernels(
        what="positions beyond the tables",
        original="inside_L = (row_L >= 0) & (row_L < S)",
        replacement="inside_L = (row_L >= 0) & (row_L <= S)",
    ),
    _in_kernels(
        what="positions outside the tables not turned",
        original='sin_LJ = tl.where(inside_L | (offs_L >= L), sin_LJ, float("nan"))',
        replacement="sin_LJ = sin_LJ",
    ),
    _in_kernels(
        what="padding outside the tables spoils the weight's gradient",
        original="tl.where(inside_L | (offs_L >= L), sin_LJ",
        replacement="tl.where(inside_L, sin_LJ",
    ),
    _in_kernels(
        what="all sequences begin with the first",
        original="row_L += tl.load(offset_ptr + b)",
        replacement="row_L += tl.load(offset_ptr)",
    ),
    _in_kernels(
        what="offsets in 32 bits",
        original="    tile = tl.program_id(0).to(tl.int64)",
        replacement="    tile = tl.program_id(0)",
    ),
    _in_kernels(
        what="offsets in 32 bits in backward",
        original="    p = tl.program_id(0).to(tl.int64)",
        replacement="    p = tl.program_id(0)",
    ),
    _in_kernels(
        what="partial sums of keys in the queries'",
        original="first, last, total_ptr = 0, q_tiles, dq_weight_ptr",
        replacement="first, last, total_ptr = 0, q_tiles + 1, dq_weight_ptr",
    ),
    _in_kernels(
        what="first block of partial sums alone",
        original="total_K += tl.sum(tl.load(ptrs_PK",
        replacement="total_K = tl.sum(tl.load(ptrs_PK",
    ),
    _mutant(
        what="strided weights read as contiguous",
        original="(None if w is None else w.contiguous() for w in (q_weight, k_weight))",
        replacement="(q_weight, k_weight)",
    ),
    _mutant(
        what="a number as offset forgotten",
        original="(_rows(table, qkv.shape[-3], offset) for table in (cos, sin))",
        replacement="(_rows(table, qkv.shape[-3], 0) for table in (cos, sin))",
    ),
    _on_cpu(
        what="hand-written: backward turns forward",
        original="_turn(widen(dk), cos, -sin, ctx.interleaved, g[..., H:, :])",
        replacement="_turn(widen(dk), cos, sin, ctx.interleaved, g[..., H:, :])",
    ),
    _on_cpu(
        what="hand-written: values' gradient left out",
        original="dqkv[..., -G:, :] = dv",
        replacement="dqkv[..., -G:, :] = 0",
    ),
    _on_cpu(
        what="hand-written: all heads in the queries' weight",
        original="dw_NK[:H].sum(0)",
        replacement="dw_NK.sum(0)",
    ),
    _on_cpu(
        what="hand-written: mean of the unscaled gradient",
        original="mean = gz.mul_(w_NK).mean(-1, keepdim=True)",
        replacement="mean = gz.mean(-1, keepdim=True)",
    ),
]
