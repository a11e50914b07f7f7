"""A gradient times a scalar that only the device knows, in one pass, or in none where it is 1.

    y_N = factor · x_N

computed in float32 (float64 for float64) and rounded once. Losses make their gradients in the
forward pass, for an incoming gradient of 1; what then comes in is nearly always that 1. N elements.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._C._autograd import _get_current_graph_task_keep_graph

from tritium.kernels.launcher import Launcher
from tritium.kernels.runtime import (
    accumulator,
    cdiv,
    operator,
    sees_through,
    uses_triton,
)

BLOCK = 4096  # elements of a step: 16 a thread
P_MAX = 1024  # programs, which share the blocks; where the factor is 1 each reads that and ends


@triton.jit
def _scale_blocks(x_ptr, y_ptr, factor, N, BLOCK: tl.constexpr, ACC: tl.constexpr):
    p = tl.program_id(0).to(tl.int64)
    offs_N = tl.arange(0, BLOCK)
    full = N // BLOCK * BLOCK
    for start in range(p * BLOCK, full, tl.num_programs(0) * BLOCK):
        x_N = tl.load(x_ptr + start + offs_N).to(ACC)
        tl.store(y_ptr + start + offs_N, (x_N * factor).to(y_ptr.dtype.element_ty))
    if p == tl.num_programs(0) - 1:  # the tail apart: a mask in the loop narrows its accesses
        mask_N = offs_N < N - full
        x_N = tl.load(x_ptr + full + offs_N, mask=mask_N, other=0.0).to(ACC)
        tl.store(y_ptr + full + offs_N, (x_N * factor).to(y_ptr.dtype.element_ty), mask=mask_N)


@triton.jit
def _scale_gradient_kernel(
    x_ptr, y_ptr, factor_ptr, N, INPLACE: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr
):
    factor = tl.load(factor_ptr).to(ACC)
    if INPLACE:
        if factor != 1.0:  # decided on the device: the host never waits
            _scale_blocks(x_ptr, y_ptr, factor, N, BLOCK, ACC)
    else:
        _scale_blocks(x_ptr, y_ptr, factor, N, BLOCK, ACC)


_scale = Launcher(_scale_gradient_kernel)


def _launch(x: Tensor, y: Tensor, factor: Tensor, inplace: bool) -> None:
    N = x.numel()
    if N:
        grid = (min(cdiv(N, BLOCK), P_MAX),)
        _scale(grid, (x, y, factor), (N,), (inplace, BLOCK, accumulator(x.dtype)), num_warps=8)


def _launch_inplace(x: Tensor, factor: Tensor) -> None:
    if uses_triton(x, "cross_entropy"):
        _launch(x, x, factor, True)
    elif x.dtype == factor.dtype:
        x.mul_(factor)
    else:
        x.copy_(_launch_copy(x, factor, x.dtype))


def _launch_copy(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    if not uses_triton(x, "cross_entropy"):
        # In float32: on a GPU bfloat16 times a 0-dim tensor rounds that one to bfloat16 first.
        return (x.to(factor.dtype) * factor).to(dtype)
    y = torch.empty_like(x, dtype=dtype)
    _launch(x, y, factor, False)
    return y


scale_gradient_ = operator(
    "scale_gradient_(Tensor(a!) x, Tensor factor) -> ()", _launch_inplace, lambda x, factor: None
)
"""Multiply contiguous `x` by the scalar `factor` in place."""
scale_gradient = operator(
    "scale_gradient(Tensor x, Tensor factor, ScalarType dtype) -> Tensor",
    _launch_copy,
    lambda x, factor, dtype: torch.empty_like(x, dtype=dtype),
)
"""Return contiguous `x` times the scalar `factor`, in `dtype`."""


def scaled(g: Tensor, factor: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return `g` times `factor` in `dtype`, for a backward pass: in place, unless `g` is kept.

    It is kept where the graph is, for another backward pass.
    """
    if factor is None:
        return g.to(dtype)
    if torch.compiler.is_compiling() or sees_through():
        return (g.to(factor.dtype) * factor).to(dtype)
    if g.dtype == dtype and not _get_current_graph_task_keep_graph():
        scale_gradient_(g, factor)
        return g
    return scale_gradient(g, factor, dtype)
