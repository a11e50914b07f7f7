"""Clipping of gradients to a norm: of all gradients together, or layer by layer.

    coef = min(1, max_norm / (norm + 1e-6))
    g   := coef · g

`grad_norm` has the norm. For layers the sums of single chunks are stored, and one program per layer
adds its own, in order.

Pascanu, Mikolov & Bengio, "On the difficulty of training recurrent neural networks", 2013.
https://arxiv.org/abs/1211.5063
"""

from collections.abc import Iterable
from itertools import accumulate, chain
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritium.kernels.optimizers import _pointer_table, grad_norm
from tritium.kernels.optimizers._dtensor import (
    are_distributed,
    local,
    mesh_of,
    replicas,
    sum_over_ranks,
)
from tritium.kernels.optimizers._pointer_table import (
    DTYPE,
    DTYPES,
    FIRST,
    FLOAT16,
    FLOAT32,
    GRAD,
    GROUP,
    REPLICAS,
    THREADS,
    Tables,
    check_distinct,
    check_memory,
    load,
    locate,
    store,
    upload,
)
from tritium.kernels.optimizers._pointer_table import tables as tables_of
from tritium.kernels.optimizers.grad_norm import (
    clip_coefficient,
    clip_coefficient_reference,
    launch_partials,
    norm_reference,
    norms_reference,
    squares_reference,
    total_norm,
)
from tritium.kernels.runtime import uses_triton, widen

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

CLIP_BLOCK = 2048  # elements that a program scales at a time: 16 bytes per thread in bfloat16
LAYER_BLOCK = 1024  # sums of chunks, or of layers, read by one program at a time


def _scale_reference(g: Tensor, coef: Tensor) -> None:
    # Rounded once. On a GPU `g.mul_(coef)` would round the factor to the dtype of g before.
    g.copy_(widen(g) * coef)


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
def _scale_chunk(row_ptr, coef, start, full, end, BLOCK: tl.constexpr):
    dtype = tl.load(row_ptr + DTYPE)
    address = tl.load(row_ptr + GRAD)
    if dtype == FLOAT32:
        _scale(address, coef, start, full, end, tl.float32, BLOCK)
    elif dtype == FLOAT16:
        _scale(address, coef, start, full, end, tl.float16, BLOCK)
    else:
        _scale(address, coef, start, full, end, tl.bfloat16, BLOCK)


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
        _scale_chunk(tensors_ptr + tensor * COLUMNS, coef, start, full, end, BLOCK)


@triton.jit
def _grad_norms_layers_kernel(
    tensors_ptr, chunks_ptr, sums_ptr, layers_ptr, squares_ptr, n_tensors, n_chunks,
    COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    layer = tl.program_id(0).to(tl.int64)
    tensor = tl.load(layers_ptr + layer)
    after = tl.load(layers_ptr + layer + 1)
    first_ptr = tensors_ptr + FIRST
    first = tl.load(first_ptr + tensor * COLUMNS, mask=tensor < n_tensors, other=n_chunks)
    end = tl.load(first_ptr + after * COLUMNS, mask=after < n_tensors, other=n_chunks)
    squares_K = tl.zeros((BLOCK_K,), dtype=tl.float32)
    for start in range(first, end, BLOCK_K):
        offs_K = start + tl.arange(0, BLOCK_K)
        mask_K = offs_K < end
        tensor_K = tl.load(chunks_ptr + 2 * offs_K, mask=mask_K, other=0).to(tl.int64)
        replicas_ptr_K = tensors_ptr + tensor_K * COLUMNS + REPLICAS
        replicas_K = tl.load(replicas_ptr_K, mask=mask_K, other=1).to(tl.float32)
        squares_K += tl.load(sums_ptr + offs_K, mask=mask_K, other=0.0) / replicas_K
    tl.store(squares_ptr + layer, tl.sum(squares_K))


@triton.jit
def _grad_norms_clip_kernel(
    tensors_ptr, chunks_ptr, squares_ptr, norms_ptr, max_norm, n_chunks, n_layers,
    COLUMNS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    p = tl.program_id(0).to(tl.int64)
    if p == 0:
        for start in range(0, n_layers, BLOCK_G):
            offs_G = start + tl.arange(0, BLOCK_G)
            squares_G = tl.load(squares_ptr + offs_G, mask=offs_G < n_layers, other=0.0)
            tl.store(norms_ptr + offs_G, tl.sqrt_rn(squares_G), mask=offs_G < n_layers)
    for chunk in range(p, n_chunks, tl.num_programs(0)):
        tensor, start, full, end = locate(tensors_ptr, chunks_ptr, chunk, COLUMNS, CHUNK, BLOCK)
        row_ptr = tensors_ptr + tensor * COLUMNS
        norm = tl.sqrt_rn(tl.load(squares_ptr + tl.load(row_ptr + GROUP)))
        coef = clip_coefficient(norm, max_norm)
        if coef != 1.0:
            _scale_chunk(row_ptr, coef, start, full, end, BLOCK)


def _tables(grads: list[Tensor], counts: list[int], layers: Iterable[int]) -> Tables:
    rows = [
        (g.numel(), DTYPES[g.dtype], count, layer, 0, 0, 0, 0, g.data_ptr())
        for g, count, layer in zip(grads, counts, layers, strict=True)
    ]
    return tables_of(tuple(rows), _pointer_table.CHUNK, grads[0].device)


def _launch_clip(
    grads: list[Tensor], counts: list[int], mesh: "DeviceMesh | None", max_norm: float,
    only_finite: bool,
) -> Tensor:  # fmt: skip
    tables = _tables(grads, counts, [0] * len(grads))
    partials_P = launch_partials(tables, mesh=mesh)
    if only_finite:
        _check_finite(partials_P.sum().sqrt())
    norm = partials_P.new_empty(())
    n_chunks = len(tables.chunks)
    _grad_norm_clip_kernel[(len(partials_P),)](
        *tables, partials_P, norm, max_norm, n_chunks, len(partials_P),
        COLUMNS=tables.tensors.shape[1], CHUNK=_pointer_table.CHUNK, BLOCK=CLIP_BLOCK,
        BLOCK_P=grad_norm.P, num_warps=THREADS.value // 32, enable_fp_fusion=True,
    )  # fmt: skip
    return norm


def _launch_clip_layers(
    grads: list[Tensor], sizes: list[int], counts: list[int], mesh: "DeviceMesh | None",
    max_norm: float,
) -> Tensor:  # fmt: skip
    layers = chain.from_iterable([layer] * size for layer, size in enumerate(sizes))
    tables = _tables(grads, counts, layers)
    (n_tensors, columns), n_chunks = tables.tensors.shape, len(tables.chunks)
    sums = torch.empty(n_chunks, 1, dtype=torch.float32, device=tables.tensors.device)
    launch_partials(tables, sums)
    squares_G = sums.new_empty(len(sizes))
    _grad_norms_layers_kernel[(len(sizes),)](
        *tables, sums, upload(torch.tensor([0, *accumulate(sizes)]), sums.device), squares_G,
        n_tensors, n_chunks, COLUMNS=columns, BLOCK_K=LAYER_BLOCK, enable_fp_fusion=True,
    )  # fmt: skip
    if mesh is not None:
        sum_over_ranks(squares_G, mesh)
    norms_G = torch.empty_like(squares_G)
    _grad_norms_clip_kernel[(min(grad_norm.P, n_chunks),)](
        *tables, squares_G, norms_G, max_norm, n_chunks, len(sizes),
        COLUMNS=columns, CHUNK=_pointer_table.CHUNK, BLOCK=CLIP_BLOCK, BLOCK_G=LAYER_BLOCK,
        num_warps=THREADS.value // 32, enable_fp_fusion=True,
    )  # fmt: skip
    return norms_G


def _found(op: str, grads: list[Tensor]) -> tuple[list[Tensor], list[int], "DeviceMesh | None"]:
    """Check `grads`; return their shards on this rank, the replicas of each, and the mesh."""
    mesh = mesh_of(op, grads) if are_distributed(grads) else None
    counts = [1 if mesh is None else replicas(op, g, mesh) for g in grads]
    grads = list(map(local, grads))
    for g in grads:
        if g.dtype not in DTYPES:
            raise TypeError(
                f"{op}: gradients must be float32, float16 or bfloat16, got {g.dtype}; "
                "convert the parameters"
            )
        check_memory(op, g, grads[0].device)
    check_distinct(op, [g.data_ptr() for g in grads if g.numel()])
    return grads, counts, mesh


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Scale the gradients of `parameters` in place, to a global norm of `max_norm` at most.

    As `torch.nn.utils.clip_grad_norm_` with norm 2, in two launches and without reading back to the
    host. A gradient that holds an infinity or a NaN makes the factor 0 or NaN, as it does there.
    With DTensors each rank scales its shards by the norm of all ranks of the mesh, which must call
    this together; plain gradients beside them must be the same on every rank.

    Args:
        parameters: a tensor or an iterable of tensors, each once; those without `.grad` are
            skipped. Gradients are float32, float16 or bfloat16, of one device, dense in memory.
        max_norm: the norm to stay below.
        norm_type: 2, the only norm there is here.
        error_if_nonfinite: raise if the norm is not finite, before anything is scaled; the host
            then waits for the norm.
        foreach: taken for the sake of torch's signature; all gradients share the launches anyway.

    Returns:
        The norm before clipping, 0-dim float32 on the device of the gradients; summed in float32,
        so infinite above about 1.8e19. `tensor(0.)` if there is no gradient.

    Raises:
        TypeError: a gradient "must be float32, float16 or bfloat16".
        ValueError: gradients "must be dense", "must be on one device", "must hold their own
            memory" or "must not share an address"; distributed ones "must share one device mesh"
            or "must be sharded or replicated"; or norm_type "must be 2".
        RuntimeError: the norm "must be finite", with `error_if_nonfinite`.
    """
    if norm_type != 2:
        raise ValueError(
            f"clip_grad_norm_: norm_type must be 2, got {norm_type}; for another norm use "
            "torch.nn.utils.clip_grad_norm_"
        )
    max_norm, held = float(max_norm), _grads_of(parameters)
    if not held:
        return torch.tensor(0.0, dtype=torch.float32)
    grads, counts, mesh = _found("clip_grad_norm_", held)
    if uses_triton(grads[0], "clip_grad_norm_"):
        with torch.cuda.device_of(grads[0]):
            norm = _launch_clip(grads, counts, mesh, max_norm, error_if_nonfinite)
    else:
        norm = norm_reference(squares_reference(grads), counts, mesh)
        if error_if_nonfinite:
            _check_finite(norm)
        coef = clip_coefficient_reference(norm, max_norm)
        for g in grads:
            _scale_reference(g, coef)
    torch.autograd.graph.increment_version(held)
    return norm


def _check_finite(norm: Tensor) -> None:
    if not norm.isfinite():
        raise RuntimeError(
            f"clip_grad_norm_: the norm of the gradients must be finite, got {norm.item()}; "
            "error_if_nonfinite=False scales them nevertheless"
        )


@torch.no_grad()
def clip_grad_norms_(layers: Iterable[Tensor | Iterable[Tensor]], max_norm: float) -> Tensor:
    """Scale the gradients of every layer in place, each layer's to a norm of `max_norm` at most.

    `clip_grad_norm_` of one layer after another, in three launches however many there are and
    without reading back to the host. What is not finite in one layer does not reach another.

    Args:
        layers: G layers, each a tensor or an iterable of tensors, as `clip_grad_norm_` takes them:
            `model.parameters()` clips every parameter alone,
            `[block.parameters() for block in model.blocks]` every block. No tensor is in two.
        max_norm: the norm that each layer is to stay below.

    Returns:
        The norms before clipping, `[G]` float32 on the device of the gradients; 0 for a layer
        without a gradient.

    Raises:
        TypeError, ValueError: as `clip_grad_norm_`.
    """
    by_layer = list(map(_grads_of, layers))
    held, sizes = list(chain.from_iterable(by_layer)), list(map(len, by_layer))
    if not held:
        return torch.zeros(len(sizes), dtype=torch.float32)
    grads, counts, mesh = _found("clip_grad_norms_", held)
    if uses_triton(grads[0], "clip_grad_norms_"):
        with torch.cuda.device_of(grads[0]):
            norm_G = _launch_clip_layers(grads, sizes, counts, mesh, max_norm)
    else:
        norm_G = norms_reference(squares_reference(grads), sizes, counts, mesh)
        coef_G = clip_coefficient_reference(norm_G, max_norm)
        coef_N = coef_G.repeat_interleave(torch.tensor(sizes, device=coef_G.device))
        for g, coef in zip(grads, coef_N, strict=True):
            _scale_reference(g, coef)
    torch.autograd.graph.increment_version(held)
    return norm_G


def _grads_of(parameters: Tensor | Iterable[Tensor]) -> list[Tensor]:
    parameters = [parameters] if isinstance(parameters, Tensor) else parameters
    return [p.grad for p in parameters if p.grad is not None]
