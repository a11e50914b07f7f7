"""Rows of logits whose columns end in padding: accesses that the kernels of language heads share.

A row is W long, of which V are classes and the rest 0, before and after: W is a multiple of 64, so
that all accesses are wide. Blocks hold classes only, except for the last one, which is MASKED.
"""

import triton
import triton.language as tl


@triton.jit
def load_logits(x_ptr, offs_V, W, MASKED: tl.constexpr, ACC: tl.constexpr):
    if MASKED:
        x_V = tl.load(x_ptr + offs_V, mask=offs_V < W, other=0.0).to(ACC)
    else:
        x_V = tl.load(x_ptr + offs_V).to(ACC)
    return x_V


@triton.jit
def store_gradient(x_ptr, offs_V, V, W, dz_V, MASKED: tl.constexpr):
    if MASKED:
        dz_V = tl.where(offs_V < V, dz_V, 0.0)
        tl.store(x_ptr + offs_V, dz_V.to(x_ptr.dtype.element_ty), mask=offs_V < W)
    else:
        tl.store(x_ptr + offs_V, dz_V.to(x_ptr.dtype.element_ty))


@triton.jit
def store_zeros(x_ptr, offs_V, full, W, BLOCK_V: tl.constexpr):
    # The gradient of a row that does not count, whatever its logits hold.
    zero_V = tl.zeros(offs_V.shape, x_ptr.dtype.element_ty)
    for v in range(0, full, BLOCK_V):
        tl.store(x_ptr + v + offs_V, zero_V)
    tl.store(x_ptr + full + offs_V, zero_V, mask=offs_V < W - full)
