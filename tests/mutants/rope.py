"""Faults of kernels/rope.py: signs, masks, pairs, strides, positions, memory written."""

from functools import partial

from tests.mutants import Mutant

_mutant = partial(Mutant, file="kernels/rope.py")

MUTANTS = [
    _mutant(
        what="backward turns forward",
        original="sin_LJ = -sin_LJ",
        replacement="sin_LJ = sin_LJ",
    ),
    _mutant(
        what="heads beyond the last position",
        original="mask_LH = (offs_L < L) & (offs_H < H)",
        replacement="mask_LH = (offs_L <= L) & (offs_H < H)",
    ),
    _mutant(
        what="one head too many",
        original="mask_LH = (offs_L < L) & (offs_H < H)",
        replacement="mask_LH = (offs_L < L) & (offs_H <= H)",
    ),
    _mutant(
        what="second half at the padded width",
        original="tl.load(ptrs + J + offs_J",
        replacement="tl.load(ptrs + BLOCK_J + offs_J",
    ),
    _mutant(
        what="half of the interleaved features",
        original="mask=mask & (offs_K < 2 * J), other=0.0)",
        replacement="mask=mask & (offs_K < J), other=0.0)",
    ),
    _mutant(
        what="interleaved features beyond the last",
        original="tl.interleave(y1, y2), mask=mask & (offs_K < 2 * J))",
        replacement="tl.interleave(y1, y2), mask=mask)",
    ),
    _mutant(
        what="members of a pair exchanged",
        original="tl.interleave(y1, y2)",
        replacement="tl.interleave(y2, y1)",
    ),
    _mutant(
        what="backward forgets the order of the pairs",
        original="*ctx.saved_tensors, ctx.interleaved)",
        replacement="*ctx.saved_tensors, False)",
    ),
    _mutant(
        what="stride of the batch guessed",
        original="x_ptr + b * stride_xB",
        replacement="x_ptr + b * stride_xL * L",
    ),
    _mutant(
        what="what is overwritten taken for contiguous",
        original="y_ptr + b * stride_yB + offs_L * stride_yL",
        replacement="y_ptr + (b * L + offs_L) * H * 2 * J",
    ),
    _mutant(
        what="offsets in 32 bits",
        original="tile = tl.program_id(0).to(tl.int64)",
        replacement="tile = tl.program_id(0)",
    ),
    _mutant(
        what="strided tables read as contiguous",
        original="cos.contiguous(), sin.contiguous()",
        replacement="cos, sin",
    ),
    _mutant(
        what="all sequences begin with the first",
        original="tl.load(offset_ptr + b)",
        replacement="tl.load(offset_ptr)",
    ),
    _mutant(
        what="an offset without its sign",
        original="mask_LJ = (row_L >= 0) & (row_L < S)",
        replacement="mask_LJ = row_L < S",
    ),
    _mutant(
        what="positions beyond the tables",
        original="mask_LJ = (row_L >= 0) & (row_L < S)",
        replacement="mask_LJ = (row_L >= 0) & (row_L <= S)",
    ),
    _mutant(
        what="positions outside the tables taken for the nearest inside",
        original="    # A position outside the tables gives NaN.\n",
        replacement="    row_L = tl.minimum(tl.maximum(row_L, 0), S - 1)\n",
    ),
    _mutant(
        what="a number as offset forgotten",
        original="cos, sin = (_rows(table, x.shape[-3], offset)",
        replacement="cos, sin = (_rows(table, x.shape[-3], 0)",
    ),
    _mutant(
        what="strided offsets read as contiguous",
        original="offset_B = offset.reshape(-1).contiguous()",
        replacement="offset_B = offset.reshape(-1)",
    ),
    _mutant(
        what="a copy rotated in place of the view",
        original="            x.copy_(x_BLHK.view(x.shape))\n",
        replacement="            pass\n",
    ),
    _mutant(
        what="autograd not told what was overwritten",
        original="        ctx.mark_dirty(x)\n",
        replacement="",
    ),
    _mutant(
        what="a parameter overwritten through a view",
        original="owner = x if x._base is None else x._base",
        replacement="owner = x",
    ),
]
