"""Faults of kernels/dropout_add.py: words, their places, threshold, scale, rounding, seeds."""

from functools import partial

from tests.mutants import Mutant

_mutant = partial(Mutant, file="kernels/dropout_add.py")

MUTANTS = [
    _mutant(
        what="the scale of inverted dropout forgotten",
        original="tl.where(words[k] >= n, x * scale, 0.0)",
        replacement="tl.where(words[k] >= n, x, 0.0)",
    ),
    _mutant(
        what="dropped and kept exchanged in the kernel",
        original="tl.where(words[k] >= n,",
        replacement="tl.where(words[k] < n,",
    ),
    _mutant(
        what="words compared with a sign",
        original="words[k] >= n,",
        replacement="words[k].to(tl.int32) >= n.to(tl.int32),",
    ),
    _mutant(
        what="one word of the four for all quarters of a slab",
        original="words[k] >= n,",
        replacement="words[0] >= n,",
    ),
    _mutant(
        what="what is dropped multiplied by 0, which keeps its NaN",
        original="tl.where(words[k] >= n, x * scale, 0.0)",
        replacement="x * scale * (words[k] >= n).to(ACC)",
    ),
    _mutant(
        what="the same mask in every slab",
        original="slab * S + offs_S, ROUNDS)",
        replacement="slab * 0 + offs_S, ROUNDS)",
    ),
    _mutant(
        what="offsets of an int32",
        original="slab = tl.program_id(0).to(tl.int64)",
        replacement="slab = tl.program_id(0)",
    ),
    _mutant(
        what="the residual beyond the last element",
        original="tl.load(residual_ptr + offs, mask=offs < N, other=0.0)",
        replacement="tl.load(residual_ptr + offs)",
    ),
    _mutant(
        what="the branch rounded before the sum",
        original="            y += tl.load(",
        replacement="            y = y.to(y_ptr.dtype.element_ty).to(ACC) + tl.load(",
    ),
    _mutant(
        what="gradient of x in the dtype of the residual",
        original="return _launch(dy, None, seed, threshold, dtype)",
        replacement="return _launch(dy, None, seed, threshold, dy.dtype)",
    ),
    _mutant(
        what="strided gradients read as contiguous",
        original="_backward(dy.contiguous(),",
        replacement="_backward(dy,",
    ),
    _mutant(
        what="strided x read as contiguous",
        original="apply(_DropoutAdd, x.contiguous(),",
        replacement="apply(_DropoutAdd, x,",
    ),
    _mutant(
        what="only half of the seed counts",
        original="return torch.full((), seed, dtype=torch.int64, device=x.device)",
        replacement="return torch.full((), seed & 0xFFFFFFFF, dtype=torch.int64, device=x.device)",
    ),
    _mutant(
        what="the reference with another key schedule",
        original="k1 + 0xBB67AE85",
        replacement="k1 + 0xBB67AE86",
    ),
    _mutant(
        what="without a seed always the same",
        original="return torch.randint((1 << 63) - 1, (), device=x.device)",
        replacement="return torch.zeros((), dtype=torch.int64, device=x.device)",
    ),
    _mutant(
        what="dropout outside training",
        original="n = _threshold(p) if training else 0\n    if n == 0:\n        return",
        replacement="n = _threshold(p)\n    if n == 0:\n        return",
    ),
    _mutant(
        what="p = 1 leaves x without a gradient of zeros",
        original="torch.where(x.new_zeros((), dtype=torch.bool), x, 0)",
        replacement="torch.zeros_like(x)",
    ),
    _mutant(
        what="the reference with the words of a counter side by side",
        original="words.view(4, slabs, S.value).transpose(0, 1).flatten()",
        replacement="words.T.flatten()",
    ),
    _mutant(
        what="planned alike with a residual and without",
        original="x.dtype, dtype_of(residual), dtype)",
        replacement="x.dtype, None, dtype)",
    ),
]
