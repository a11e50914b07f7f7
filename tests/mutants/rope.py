"""Faults of kernels/rope.py: signs, masks, halves, strides, offsets."""

from functools import partial

from . import Mutant

_mutant = partial(Mutant, file="kernels/rope.py")

MUTANTS = [
    _mutant(
        what="backward turns forward",
        original="sin_LJ = -sin_LJ",
        replacement="sin_LJ = sin_LJ",
    ),
    _mutant(
        what="positions beyond the sequence",
        original="mask_LJ = (offs_L < L) & (offs_J < J)",
        replacement="mask_LJ = offs_J < J",
    ),
    _mutant(
        what="one head too many",
        original="mask_LHJ = mask_LJ & (offs_H < H)",
        replacement="mask_LHJ = mask_LJ & (offs_H <= H)",
    ),
    _mutant(
        what="second half at the padded width",
        original="tl.load(x_ptrs + J",
        replacement="tl.load(x_ptrs + BLOCK_J",
    ),
    _mutant(
        what="stride of the batch guessed",
        original="b * stride_xB",
        replacement="b * stride_xL * L",
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
]
