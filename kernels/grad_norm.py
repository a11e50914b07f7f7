"""Global gradient norm, and clipping to it.

    norm = sqrt(sum of g² over every element of every gradient)
    coef = min(1, max_norm / (norm + 1e-6))
    g   := coef · g

P programs, as many on every GPU, each sum their chunks of the gradients in a fixed order; whoever
needs the norm sums the P partials in a fixed order again. So the norm is the same on every run.

Pascanu, Mikolov & Bengio, "On the difficulty of training recurrent neural networks", 2013.
https://arxiv.org/abs/1211.5063
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _multi_tensor
from ._multi_tensor import (
    DTYPE,
    DTYPES,
    FLOAT16,
    FLOAT32,
    GRAD,
    REPLICAS,
    THREADS,
    Tables,
    check_memory,
    load,
    locate,
    store,
)
from ._multi_tensor import tables as tables_of
from ._runtime import uses_triton
from ._shards import are_distributed, local, mesh_of, replicas, sum_over_ranks

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

P = 512  # programs that share the gradients, not the number of multiprocessors
BLOCK = 4096  # elements that one of them sums at a time, 64 bytes per thread in float32
CLIP_BLOCK = 2048  # and that it scales at a time: 16 bytes per thread in bfloat16


def squares_reference(grads: Sequence[Tensor]) -> Tensor:
    """The definition of the sums of squares in plain PyTorch: `[N]` for N gradients, float32."""
    # Not vector_norm, which on a CPU adds one by one: off by 8e-5 at 4M elements, this by 6e-8.
    return torch.stack([g.float().square().sum() for g in grads])


def norm_reference(squares_N: Tensor, replicas: Sequence[int], mesh: "DeviceMesh | None") -> Tensor:
    """The definition of the norm, of gradients of which `replicas` ranks hold a copy each."""
    total = (squares_N / torch.tensor(replicas).to(squares_N)).sum()
    if mesh is not None:
        sum_over_ranks(total, mesh)
    return total.sqrt()


def clip_coefficient_reference(norm: Tensor, max_norm: float) -> Tensor:
    """The definition of the factor that brings gradients of norm `norm` to `max_norm` at most."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


@triton.jit
def total_norm(partials_ptr, n_partials, BLOCK_P: tl.constexpr):
    """Sum the partials of `launch_partials` in a fixed order, and take the root."""
    offs_P = tl.arange(0, BLOCK_P)
    return tl.sqrt_rn(tl.sum(tl.load(partials_ptr + offs_P, mask=offs_P < n_partials, other=0.0)))


@triton.jit
def is_finite(norm):
    """Whether `norm` is neither infinite nor NaN."""
    return norm < float("inf")


@triton.jit
def clip_coefficient(norm, max_norm):
    """The factor that brings gradients of norm `norm` to `max_norm` at most; NaN for NaN."""
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


@triton.jit
def _scale(address, coef, start, full, end, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    for first in range(start, full, BLOCK):
        offs = first + tl.arange(0, BLOCK)
        g = load(address, offs, end, DTYPE, True).to(tl.float32)
        store(address, offs, g * coef, end, DTYPE, True)
    for first in range(full, end, THREADS):
        offs = first + tl.arange(0, THREADS)
        g = load(address, offs, end, DTYPE, False).to(tl.float32)
        store(address, offs, g * coef, end, DTYPE, False)


@triton.jit
def _grad_norm_clip_kernel(
    tensors_ptr, chunks_ptr, partials_ptr, norm_ptr, max_norm, n_chunks, n_partials,
    COLUMNS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    p = tl.program_id(0).to(tl.int64)
    norm = total_norm(partials_ptr, n_partials, BLOCK_P)
    if p == 0:
        tl.store(norm_ptr, norm)
    coef = clip_coefficient(norm, max_norm)
    if coef == 1.0:
        return
    for chunk in range(p, n_chunks, tl.num_programs(0)):
        tensor, start, full, end = locate(tensors_ptr, chunks_ptr, chunk, COLUMNS, CHUNK, BLOCK)
        dtype = tl.load(tensors_ptr + tensor * COLUMNS + DTYPE)
        address = tl.load(tensors_ptr + tensor * COLUMNS + GRAD)
        if dtype == FLOAT32:
            _scale(address, coef, start, full, end, tl.float32, BLOCK)
        elif dtype == FLOAT16:
            _scale(address, coef, start, full, end, tl.float16, BLOCK)
        else:
            _scale(address, coef, start, full, end, tl.bfloat16, BLOCK)


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
    _grad_norm_partials_kernel[(programs,)](
        *tables, partials_P, sums, n_chunks,
        COLUMNS=tables.tensors.shape[1], SUMS=0 if sums is None else sums.shape[1],
        CHUNK=_multi_tensor.CHUNK, BLOCK=BLOCK, num_warps=THREADS.value // 32,
    )  # fmt: skip
    if mesh is not None:
        sum_over_ranks(partials_P, mesh)
    return partials_P


def _launch_clip(
    grads: list[Tensor], counts: list[int], mesh: "DeviceMesh | None", max_norm: float
) -> Tensor:
    rows = tuple(
        [
            (g.numel(), DTYPES[g.dtype], count, 0, 0, 0, 0, 0, g.data_ptr())
            for g, count in zip(grads, counts, strict=True)
        ]
    )
    tables = tables_of(rows, _multi_tensor.CHUNK, grads[0].device)
    partials_P = launch_partials(tables, mesh=mesh)
    norm = partials_P.new_empty(())
    n_chunks = len(tables.chunks)
    _grad_norm_clip_kernel[(len(partials_P),)](
        *tables, partials_P, norm, max_norm, n_chunks, len(partials_P),
        COLUMNS=tables.tensors.shape[1], CHUNK=_multi_tensor.CHUNK, BLOCK=CLIP_BLOCK, BLOCK_P=P,
        num_warps=THREADS.value // 32,
    )  # fmt: skip
    torch.autograd.graph.increment_version(grads)
    return norm


def _check(grads: list[Tensor]) -> None:
    for g in grads:
        if g.dtype not in DTYPES:
            raise TypeError(
                "clip_grad_norm_: gradients must be float32, float16 or bfloat16, "
                f"got {g.dtype}; convert the parameters"
            )
        check_memory("clip_grad_norm_", g, grads[0].device)


@torch.no_grad()
def clip_grad_norm_(parameters: Tensor | Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale the gradients of `parameters` in place, to a global norm of `max_norm` at most.

    As `torch.nn.utils.clip_grad_norm_` with norm 2, in two launches and without reading back to the
    host. A gradient that holds an infinity or a NaN makes the factor 0 or NaN, as it does there.

    Args:
        parameters: a tensor or an iterable of tensors, each once; those without `.grad` are
            skipped. Gradients are float32, float16 or bfloat16, of one device, dense in memory.
        max_norm: the norm to stay below.

    Returns:
        The norm before clipping, 0-dim float32 on the device of the gradients; summed in float32,
        so infinite above about 1.8e19. `tensor(0.)` if there is no gradient.

    Raises:
        TypeError: a gradient "must be float32, float16 or bfloat16".
        ValueError: gradients "must be dense", "must lie on one device", "must hold their own
            memory" or "must lie apart".
    """
    parameters = [parameters] if isinstance(parameters, Tensor) else parameters
    grads = [p.grad for p in parameters if p.grad is not None]
    if not grads:
        return torch.tensor(0.0)
    op = "clip_grad_norm_"
    mesh = mesh_of(op, grads) if are_distributed(grads) else None
    counts = [1 if mesh is None else replicas(op, g, mesh) for g in grads]
    grads = list(map(local, grads))
    _check(grads)
    if uses_triton(grads[0]):
        with torch.cuda.device_of(grads[0]):
            return _launch_clip(grads, counts, mesh, max_norm)
    norm = norm_reference(squares_reference(grads), counts, mesh)
    coef = clip_coefficient_reference(norm, max_norm)
    for g in grads:
        g.mul_(coef)
    return norm
