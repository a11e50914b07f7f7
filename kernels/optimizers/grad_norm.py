"""Norm of all gradients, and the factor that clips to it, for clipping and for optimizer steps.

    norm = sqrt(sum of g² over every element of every gradient, or of every one in a layer)
    coef = min(1, max_norm / (norm + 1e-6))

A fixed number P of programs, the same on every GPU, sums chunks of the gradients in a fixed order;
consumers sum the P partials in a fixed order, so the norm is reproducible.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritium.kernels.launcher import Launcher
from tritium.kernels.optimizers import _pointer_table
from tritium.kernels.optimizers._dtensor import sum_over_ranks
from tritium.kernels.optimizers._pointer_table import (
    DTYPE,
    FLOAT16,
    FLOAT32,
    GRAD,
    REPLICAS,
    SLICE,
    THREADS,
    Tables,
    flat,
    load,
    locate,
)

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

P = 512  # programs that share the gradients, not the number of multiprocessors
BLOCK = 4096  # elements that one of them sums at a time, 64 bytes per thread in float32


def squares_reference(grads: Sequence[Tensor]) -> Tensor:
    """Compute the sums of squares in plain PyTorch: `[N]` for N gradients, float32."""
    return torch.stack([_square_sum(g) for g in grads])


def _square_sum(x: Tensor) -> Tensor:
    # Not vector_norm, which on a CPU adds one by one: off by 8e-5 at 4M elements, this by 6e-8.
    if x.numel() <= SLICE:
        return x.float().square().sum()
    # A slice of squares in a cache, not all of them in fresh memory: three times as fast.
    return torch.stack([part.float().square().sum() for part in flat(x).split(SLICE)]).sum()


def norm_reference(squares_N: Tensor, replicas: Sequence[int], mesh: "DeviceMesh | None") -> Tensor:
    """Compute the norm in plain PyTorch; `replicas` ranks have a copy of each gradient."""
    return norms_reference(squares_N, [len(squares_N)], replicas, mesh)[0]


def norms_reference(
    squares_N: Tensor, sizes: Sequence[int], replicas: Sequence[int], mesh: "DeviceMesh | None"
) -> Tensor:
    """Compute the norms `[G]` of layers of `sizes` gradients each in plain PyTorch."""
    shares_N = squares_N / torch.tensor(replicas).to(squares_N)
    total_G = torch.stack([share.sum() for share in shares_N.split(list(sizes))])
    if mesh is not None:
        sum_over_ranks(total_G, mesh)
    return total_G.sqrt()


def clip_coefficient_reference(norm: Tensor, max_norm: float) -> Tensor:
    """Compute the factor that brings gradients of norm `norm` to `max_norm` at most."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


@triton.jit
def total_norm(partials_ptr, n_partials, BLOCK_P: tl.constexpr):
    """Sum the partials of `launch_partials` in a fixed order, and take the root."""
    offs_P = tl.arange(0, BLOCK_P)
    return tl.sqrt_rn(tl.sum(tl.load(partials_ptr + offs_P, mask=offs_P < n_partials, other=0.0)))


@triton.jit
def is_finite(norm):
    """Return whether `norm` is neither infinite nor NaN."""
    return norm < float("inf")


@triton.jit
def clip_coefficient(norm, max_norm):
    """Return the factor that brings gradients of norm `norm` to `max_norm` at most; NaN for NaN."""
    coef = max_norm / (norm + 1e-6)
    return tl.where(coef > 1.0, 1.0, coef)


@triton.jit
def _sum_of_squares(address, start, full, end, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    squares = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(start, full, BLOCK):
        g = load(address, first + tl.arange(0, BLOCK), end, DTYPE, True).to(tl.float32)
        squares += g * g
    for first in range(full, end, BLOCK):
        g = load(address, first + tl.arange(0, BLOCK), end, DTYPE, False).to(tl.float32)
        squares += g * g
    return tl.sum(squares)


@triton.jit
def _grad_norm_partials_kernel(
    tensors_ptr, chunks_ptr, partials_ptr, sums_ptr, n_chunks,
    COLUMNS: tl.constexpr, SUMS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    p = tl.program_id(0).to(tl.int64)
    partial = 0.0
    for chunk in range(p, n_chunks, tl.num_programs(0)):
        tensor, start, full, end = locate(tensors_ptr, chunks_ptr, chunk, COLUMNS, CHUNK, BLOCK)
        row_ptr = tensors_ptr + tensor * COLUMNS
        dtype = tl.load(row_ptr + DTYPE)
        address = tl.load(row_ptr + GRAD)
        # A scalar leaves each branch: tiles would have to agree on a layout, at a cost.
        if dtype == FLOAT32:
            squares = _sum_of_squares(address, start, full, end, tl.float32, BLOCK)
        elif dtype == FLOAT16:
            squares = _sum_of_squares(address, start, full, end, tl.float16, BLOCK)
        else:
            squares = _sum_of_squares(address, start, full, end, tl.bfloat16, BLOCK)
        if sums_ptr is not None:
            tl.store(sums_ptr + chunk * SUMS, squares)
        partial += squares / tl.load(row_ptr + REPLICAS).to(tl.float32)
    tl.store(partials_ptr + p, partial)


def launch_partials(
    tables: Tables, sums: Tensor | None = None, mesh: "DeviceMesh | None" = None
) -> Tensor:
    """Launch the sums of squares over the gradients of `tables`: `[P or fewer]`, float32.

    Column 0 of `sums` [K, C], if given, receives those of every chunk. With `mesh` the result is
    the sum over its ranks.
    """
    n_chunks = len(tables.chunks)
    programs = P if mesh is not None else min(P, n_chunks)
    partials_P = torch.empty(programs, dtype=torch.float32, device=tables.tensors.device)
    columns, n_sums = tables.tensors.shape[1], 0 if sums is None else sums.shape[1]
    _partials(
        (programs,), (*tables, partials_P, sums), (n_chunks,),
        (columns, n_sums, _pointer_table.CHUNK, BLOCK), num_warps=THREADS.value // 32,
    )  # fmt: skip
    if mesh is not None:
        sum_over_ranks(partials_P, mesh)
    return partials_P


_partials = Launcher(_grad_norm_partials_kernel)
