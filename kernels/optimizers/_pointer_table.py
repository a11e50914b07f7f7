"""Tables of tensor addresses and chunks, for kernels over many tensors in one launch.

A kernel over N tensors reads two tables, built on the host and kept on the device:

    tensors [N, C] int64   per tensor: the columns below
    chunks  [K, 2] int32   per chunk: its tensor, and its index among that tensor's chunks

so its grid depends on the number of elements only, not on how many tensors hold them. Elements are
taken in the order of memory: the tensors of one row must agree in their strides, and be dense.
"""

from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 8192  # elements; a multiple of every kernel's BLOCK
SLICE = 1 << 18  # elements that a reference takes at a time: 1 MB of float32; a multiple of Q
THREADS = tl.constexpr(256)  # threads of every program

# Columns of `tensors`. An optimizer fills those from GROUP to STEP, grad_norm.py GROUP alone.
SIZE = tl.constexpr(0)  # elements
DTYPE = tl.constexpr(1)  # of the gradient: its number in DTYPES
REPLICAS = tl.constexpr(2)  # how many ranks hold these elements
GROUP = tl.constexpr(3)  # parameter group, or layer
FORMAT_COLUMN = tl.constexpr(4)  # code of the storage format
KEY = tl.constexpr(5)  # seed of its random bits
LR = tl.constexpr(6)  # address of a learning rate that lives on the device, or 0
STEP = tl.constexpr(7)  # address of the step count, or 0
FIRST = tl.constexpr(8)  # index of the first chunk
ALIGNED = tl.constexpr(9)  # whether all addresses that follow are multiples of 16
GRAD = tl.constexpr(10)  # the first of these addresses; 0 for an absent tensor

FLOAT32 = tl.constexpr(0)
FLOAT16 = tl.constexpr(1)
BFLOAT16 = tl.constexpr(2)
DTYPES = {
    torch.float32: FLOAT32.value,
    torch.float16: FLOAT16.value,
    torch.bfloat16: BFLOAT16.value,
}


class Tables(NamedTuple):
    """Tables of where elements are: `tensors` [N, C] int64, `chunks` [K, 2] int32."""

    tensors: Tensor
    chunks: Tensor


def tables(rows: tuple[tuple[int, ...], ...], chunk: int, device: torch.device) -> Tables:
    """Upload `rows`, one per tensor, all columns but FIRST and ALIGNED, and the chunks of those.

    Gradients mostly return to the addresses that they had a step or two ago, hence the cache.

    Args:
        rows: their addresses differ, as of `check_distinct`.
        chunk: elements of a chunk.
        device: of the tensors.
    """
    # An upload inside a CUDA graph happens only at its replays.
    make = _tables.__wrapped__ if is_capturing() else _tables
    return make(rows, chunk, device)


@lru_cache(maxsize=8)
def _tables(rows: tuple[tuple[int, ...], ...], chunk: int, device: torch.device) -> Tables:
    about, addresses = torch.tensor(rows).tensor_split((FIRST.value,), dim=1)
    aligned = (addresses % 16 == 0).all(dim=1, keepdim=True)
    first_N, chunks = _chunks(tuple(row[SIZE.value] for row in rows), chunk, device)
    tensors = torch.cat([about, first_N[:, None], aligned, addresses], dim=1)
    return Tables(upload(tensors, device), chunks)


@lru_cache(maxsize=8)
def _chunks(sizes: tuple[int, ...], chunk: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the column FIRST, on the host, and the table of chunks."""
    # A tensor without elements has an empty chunk, so that there is always something to launch.
    count_N = ((torch.tensor(sizes) + chunk - 1) // chunk).clamp(min=1)
    first_N = count_N.cumsum(0) - count_N
    tensor_K = torch.repeat_interleave(count_N)
    index_K = torch.arange(len(tensor_K)) - first_N[tensor_K]
    return first_N, upload(torch.stack([tensor_K, index_K], dim=1).int(), device)


def flat(x: Tensor) -> Tensor:
    """Return the elements of a dense tensor in the order of memory, `[n]`: a view."""
    return x.as_strided((x.numel(),), (1,))


def upload(x: Tensor, device: torch.device) -> Tensor:
    """Copy `x` to `device` without waiting for it.

    A copy takes fresh pinned memory, which PyTorch keeps until the device has read it; a CUDA graph
    reads it at every replay.
    """
    if device.type != "cuda":
        return x
    pinned = x.pin_memory()
    if is_capturing():
        _captured.append(pinned)
    return pinned.to(device, non_blocking=True)


_captured: list[Tensor] = []


def is_capturing() -> bool:
    """Return whether a CUDA graph records what is launched."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def check_memory(op: str, x: Tensor, device: torch.device) -> None:
    """Raise unless kernels launched on `device` may find `x` by its address."""
    if x.layout != torch.strided or not _is_dense(x):
        raise ValueError(
            f"{op}: tensors must be dense in memory, got a {x.layout} of shape {list(x.shape)} "
            "with gaps or repeats; make it with .contiguous(), and embeddings with sparse=False"
        )
    if x.device != device:
        raise ValueError(
            f"{op}: tensors must be on one device, got {device} and {x.device}; "
            "pass those of each device separately"
        )
    if x.numel() and not x.data_ptr():
        raise ValueError(
            f"{op}: tensors must hold their own memory, got a {type(x).__name__} on {x.device}; "
            "materialize meta tensors first"
        )


def check_distinct(op: str, addresses: Iterable[int]) -> None:
    """Raise if two tensors that hold elements have one address: they would be changed twice."""
    held = [x for x in addresses if x]
    if len(set(held)) < len(held):
        raise ValueError(
            f"{op}: tensors must not share an address, got two alike; pass each tensor once, tie "
            "weights by making them one parameter, and give each parameter its own gradient"
        )


def _is_dense(x: Tensor) -> bool:
    """Return whether the elements of `x` fill one range of memory, each once."""
    return x.is_contiguous() or x.stride() == torch.empty_like(x, device="meta").stride()


def in_order_of(op: str, p: Tensor, x: Tensor) -> Tensor:
    """Return `x`, or a copy of it with its elements in the order of memory of `p`.

    Raises:
        ValueError: `x` is sparse or "must have the shape" of `p`.
    """
    if x.layout != torch.strided or x.shape != p.shape:
        raise ValueError(
            f"{op}: a gradient or moment must be dense, and must have the shape {list(p.shape)} of "
            f"its parameter, got a {x.layout} of {list(x.shape)}; make embeddings with "
            "sparse=False, and a new optimizer for a model of new shapes"
        )
    return x if x.stride() == p.stride() else torch.empty_like(p, dtype=x.dtype).copy_(x)


@triton.jit
def locate(
    tensors_ptr, chunks_ptr, chunk, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr
):
    """Find a chunk: its tensor, its first element, the end of its full blocks, its end."""
    tensor = tl.load(chunks_ptr + 2 * chunk).to(tl.int64)
    start = tl.load(chunks_ptr + 2 * chunk + 1).to(tl.int64) * CHUNK
    row_ptr = tensors_ptr + tensor * COLUMNS
    end = tl.minimum(start + CHUNK, tl.load(row_ptr + SIZE))
    full = start + (end - start) // BLOCK * BLOCK * tl.load(row_ptr + ALIGNED)
    return tensor, start, full, end


@triton.jit
def load(address, offs, end, DTYPE: tl.constexpr, FULL: tl.constexpr):
    """Load elements `offs` of the tensor at `address`, 16 bytes at a time where FULL allows it."""
    ptr = address.to(tl.pointer_type(DTYPE))
    if FULL:
        # Before the cast the hint is lost, and with a mask it does not help: 4-byte accesses.
        x = tl.load(tl.multiple_of(ptr, 16) + offs)
    else:
        x = tl.load(ptr + offs, mask=offs < end, other=0.0)
    return x


@triton.jit
def store(address, offs, x, end, DTYPE: tl.constexpr, FULL: tl.constexpr):
    """Store `x` at elements `offs` of the tensor at `address`, as `load` loads it."""
    ptr = address.to(tl.pointer_type(DTYPE))
    if FULL:
        tl.store(tl.multiple_of(ptr, 16) + offs, x.to(DTYPE))
    else:
        tl.store(ptr + offs, x.to(DTYPE), mask=offs < end)
