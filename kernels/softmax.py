"""Softmax and log-softmax over one axis, scaled, optionally causal.

    z_MN = scale · x_MN, and -inf where a causal query may not look
    softmax:      y_MN = exp(z_MN - max_N) / sum_N(exp(z_MN - max_N))
    log_softmax:  y_MN = z_MN - max_N - log(sum_N(exp(z_MN - max_N)))

Backward keeps the output alone:

    softmax:      dx_MN = scale · y_MN · (dy_MN - sum_N(dy_MN · y_MN) / sum_N(y_MN))
    log_softmax:  dx_MN = scale · (dy_MN - exp(y_MN) · sum_N(dy_MN))

sum_N(y_MN) would be 1 but for the rounding of y: dividing by it keeps the gradient of a row whose
mass sits on one element, where bfloat16 stores 0.999 as 1 and `dy - sum(dy · y)` cancels to noise.

M rows (every other axis, flattened), N columns. A row of up to MAX_TILE columns stays in registers
between its one read and its one write; a longer one is read twice.

Milakov & Gimelshein, "Online normalizer calculation for softmax", 2018.
https://arxiv.org/abs/1805.02867
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._runtime import accumulator, once_differentiable, operator, unit_stride, uses_triton

TILE = 2048  # elements per program where rows are short: 16 a thread
MAX_TILE = 16384  # the longest row that 16 warps hold without spilling
LOOP_BLOCK = 4096  # columns per step over a longer row
LOG2E = tl.constexpr(math.log2(math.e))


def softmax_reference(
    x: Tensor, dim: int = -1, *, scale: float = 1.0, causal: bool = False
) -> Tensor:
    """The definition of `softmax` in plain PyTorch, in float32 or the wider dtype of `x`."""
    hidden = _hidden(x) if causal else x.new_zeros((), dtype=torch.bool)
    z = (x.to(_wide(x)) * scale).masked_fill(hidden, -math.inf)
    return torch.softmax(z, dim).masked_fill(hidden, 0).to(x.dtype)


def log_softmax_reference(
    x: Tensor, dim: int = -1, *, scale: float = 1.0, causal: bool = False
) -> Tensor:
    """The definition of `log_softmax` in plain PyTorch, in float32 or the wider dtype of `x`."""
    hidden = _hidden(x) if causal else x.new_zeros((), dtype=torch.bool)
    z = (x.to(_wide(x)) * scale).masked_fill(hidden, -math.inf)
    return torch.log_softmax(z, dim).masked_fill(hidden, -math.inf).to(x.dtype)


def _hidden(x: Tensor) -> Tensor:
    """`[Lq, Lk]`: True where query i may not see key j, that is where j > i + Lk - Lq."""
    Lq, Lk = x.shape[-2:]
    return x.new_ones((Lq, Lk), dtype=torch.bool).triu(Lk - Lq + 1)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


@triton.jit
def _softmax_visible(m, N, Lq, CAUSAL: tl.constexpr):
    # How many leading columns row m sees.
    return N - Lq + 1 + m % Lq if CAUSAL else m * 0 + N


@triton.jit
def _softmax_normalise(z, total, LOG: tl.constexpr):
    # z is already less the row's maximum.
    return z - tl.log(total) if LOG else tl.exp2(z * LOG2E) / total


@triton.jit
def _softmax_gradient(y, dy, total, scale, LOG: tl.constexpr):
    # total: sum(dy) for the logarithm, sum(dy · y) / sum(y) otherwise.
    return scale * (dy - tl.exp2(y * LOG2E) * total) if LOG else scale * y * (dy - total)


@triton.jit
def _softmax_forward_tile_kernel(
    x_ptr, y_ptr, M, N, Lq, stride_xM, scale, CAUSAL: tl.constexpr, LOG: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    offs_N = tl.arange(0, BLOCK_N)[None, :]
    mask_MN = (m < M) & (offs_N < N)
    n = _softmax_visible(m, N, Lq, CAUSAL)
    # Reads stop at a multiple of 16 columns: a mask that changes anywhere else is read one by one.
    read_MN = mask_MN & (offs_N < (n + 15) // 16 * 16)
    x_MN = tl.load(x_ptr + m * stride_xM + offs_N, mask=read_MN, other=0.0).to(ACC)
    z_MN = tl.where(offs_N < n, x_MN * scale, -float("inf"))
    z_MN -= tl.max(z_MN, axis=1, keep_dims=True)
    total_M = tl.sum(tl.exp2(z_MN * LOG2E), axis=1, keep_dims=True)
    y_MN = _softmax_normalise(z_MN, total_M, LOG)
    if CAUSAL:  # exactly, also where the row is NaN
        y_MN = tl.where(offs_N < n, y_MN, -float("inf") if LOG else 0.0)
    tl.store(y_ptr + m * N + offs_N, y_MN, mask=mask_MN)


@triton.jit
def _softmax_backward_tile_kernel(
    dy_ptr, y_ptr, dx_ptr, M, N, Lq, stride_dyM, scale, CAUSAL: tl.constexpr, LOG: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    offs_N = tl.arange(0, BLOCK_N)[None, :]
    mask_MN = (m < M) & (offs_N < N)
    n = _softmax_visible(m, N, Lq, CAUSAL)
    read_MN = mask_MN & (offs_N < (n + 15) // 16 * 16)
    dy_MN = tl.load(dy_ptr + m * stride_dyM + offs_N, mask=read_MN, other=0.0).to(ACC)
    y_MN = tl.load(y_ptr + m * N + offs_N, mask=read_MN, other=0.0).to(ACC)
    if CAUSAL:
        dy_MN = tl.where(offs_N < n, dy_MN, 0.0)
    if LOG:
        total_M = tl.sum(dy_MN, axis=1, keep_dims=True)
    else:
        mass_M = tl.sum(y_MN, axis=1, keep_dims=True)
        total_M = tl.sum(dy_MN * y_MN, axis=1, keep_dims=True) / mass_M
    dx_MN = _softmax_gradient(y_MN, dy_MN, total_M, scale, LOG)
    if CAUSAL:
        dx_MN = tl.where(offs_N < n, dx_MN, 0.0)
    tl.store(dx_ptr + m * N + offs_N, dx_MN, mask=mask_MN)


@triton.jit
def _softmax_online(top_B, total_B, z_BL):
    # Each thread follows the maximum of its own lanes: the loop has no barrier in it. The maximum
    # starts finite, so lanes that are all -inf so far give exp2(-inf) = 0 and not -inf - -inf.
    new_B = tl.maximum(top_B, tl.max(z_BL, axis=1, keep_dims=True))
    exp_BL = tl.exp2((z_BL - new_B) * LOG2E)
    total_B = total_B * tl.exp2((top_B - new_B) * LOG2E) + tl.sum(exp_BL, axis=1, keep_dims=True)
    return new_B, total_B


@triton.jit
def _softmax_forward_loop_kernel(
    x_ptr, y_ptr, N, Lq, stride_xM, scale, CAUSAL: tl.constexpr, LOG: tl.constexpr,
    BLOCK: tl.constexpr, LANES: tl.constexpr, LOWEST: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0).to(tl.int64)
    x_ptr += m * stride_xM
    y_ptr += m * N
    n = _softmax_visible(m, N, Lq, CAUSAL)
    offs_BL = tl.arange(0, BLOCK // LANES)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    # The tail is peeled off: one mask in the loop would cost it its 16-byte accesses.
    tail = n // BLOCK * BLOCK
    seen_BL = tail + offs_BL < n

    top_B = tl.full((BLOCK // LANES, 1), LOWEST, dtype=ACC)
    total_B = tl.zeros((BLOCK // LANES, 1), dtype=ACC)
    for start in range(0, tail, BLOCK):
        x_BL = tl.load(x_ptr + start + offs_BL).to(ACC)
        top_B, total_B = _softmax_online(top_B, total_B, x_BL * scale)
    x_BL = tl.load(x_ptr + tail + offs_BL, mask=seen_BL, other=0.0).to(ACC)
    z_BL = tl.where(seen_BL, x_BL * scale, -float("inf"))
    top_B, total_B = _softmax_online(top_B, total_B, z_BL)
    top = tl.max(top_B)
    total = tl.sum(total_B * tl.exp2((top_B - top) * LOG2E))

    hidden = -float("inf") if LOG else 0.0
    y_BL = tl.where(seen_BL, _softmax_normalise(z_BL - top, total, LOG), hidden)
    tl.store(y_ptr + tail + offs_BL, y_BL, mask=tail + offs_BL < N)
    for start in range(0, tail, BLOCK):
        x_BL = tl.load(x_ptr + start + offs_BL).to(ACC)
        tl.store(y_ptr + start + offs_BL, _softmax_normalise(x_BL * scale - top, total, LOG))
    for start in range(tail + BLOCK, N, BLOCK):
        hidden_BL = tl.full((BLOCK // LANES, LANES), hidden, dtype=ACC)
        tl.store(y_ptr + start + offs_BL, hidden_BL, mask=start + offs_BL < N)


@triton.jit
def _softmax_backward_loop_kernel(
    dy_ptr, y_ptr, dx_ptr, N, Lq, stride_dyM, scale, CAUSAL: tl.constexpr, LOG: tl.constexpr,
    BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0).to(tl.int64)
    dy_ptr += m * stride_dyM
    y_ptr += m * N
    dx_ptr += m * N
    n = _softmax_visible(m, N, Lq, CAUSAL)
    offs_B = tl.arange(0, BLOCK)
    tail = n // BLOCK * BLOCK
    seen_B = tail + offs_B < n

    dy_B = tl.load(dy_ptr + tail + offs_B, mask=seen_B, other=0.0).to(ACC)
    mass_B = tl.load(y_ptr + tail + offs_B, mask=seen_B, other=0.0).to(ACC)
    total_B = dy_B if LOG else dy_B * mass_B
    for start in range(0, tail, BLOCK):
        dy_B = tl.load(dy_ptr + start + offs_B).to(ACC)
        if LOG:
            total_B += dy_B
        else:
            y_B = tl.load(y_ptr + start + offs_B).to(ACC)
            mass_B += y_B
            total_B += dy_B * y_B
    total = tl.sum(total_B) if LOG else tl.sum(total_B) / tl.sum(mass_B)

    # Read again rather than kept: registers held across the loop spill.
    dy_B = tl.load(dy_ptr + tail + offs_B, mask=seen_B, other=0.0).to(ACC)
    y_B = tl.load(y_ptr + tail + offs_B, mask=seen_B, other=0.0).to(ACC)
    dx_B = tl.where(seen_B, _softmax_gradient(y_B, dy_B, total, scale, LOG), 0.0)
    tl.store(dx_ptr + tail + offs_B, dx_B, mask=tail + offs_B < N)
    for start in range(0, tail, BLOCK):
        dy_B = tl.load(dy_ptr + start + offs_B).to(ACC)
        y_B = tl.load(y_ptr + start + offs_B).to(ACC)
        tl.store(dx_ptr + start + offs_B, _softmax_gradient(y_B, dy_B, total, scale, LOG))
    for start in range(tail + BLOCK, N, BLOCK):
        tl.store(dx_ptr + start + offs_B, tl.zeros((BLOCK,), dtype=ACC), mask=start + offs_B < N)


def _tile(N: int) -> dict[str, Any]:
    """Several rows per program where they are short, else one."""
    block_N = triton.next_power_of_2(max(N, 1))
    num_warps = min(max(block_N // 512, 4), 16)
    return {"BLOCK_M": max(TILE // block_N, 1), "BLOCK_N": block_N, "num_warps": num_warps}


def _launch_forward(x_MN: Tensor, Lq: int, scale: float, log: bool) -> Tensor:
    M, N = x_MN.shape
    y_MN = x_MN.new_empty(M, N)
    row = (N, Lq, x_MN.stride(0), scale)
    options: dict[str, Any] = {"CAUSAL": Lq > 0, "LOG": log, "ACC": accumulator(x_MN.dtype)}
    if N <= MAX_TILE:
        options |= _tile(N)
        grid = (triton.cdiv(M, options["BLOCK_M"]),)
        _softmax_forward_tile_kernel[grid](x_MN, y_MN, M, *row, **options)
    else:
        lanes, lowest = 16 // x_MN.element_size(), torch.finfo(_wide(x_MN)).min
        options |= {"BLOCK": LOOP_BLOCK, "LANES": lanes, "LOWEST": lowest, "num_warps": 8}
        _softmax_forward_loop_kernel[(M,)](x_MN, y_MN, *row, **options)
    return y_MN


def _launch_backward(dy_MN: Tensor, y_MN: Tensor, Lq: int, scale: float, log: bool) -> Tensor:
    M, N = y_MN.shape
    dx_MN = y_MN.new_empty(M, N)
    row = (N, Lq, dy_MN.stride(0), scale)
    options: dict[str, Any] = {"CAUSAL": Lq > 0, "LOG": log, "ACC": accumulator(y_MN.dtype)}
    if N <= MAX_TILE:
        options |= _tile(N)
        grid = (triton.cdiv(M, options["BLOCK_M"]),)
        _softmax_backward_tile_kernel[grid](dy_MN, y_MN, dx_MN, M, *row, **options)
    else:
        options |= {"BLOCK": LOOP_BLOCK, "num_warps": 8}
        _softmax_backward_loop_kernel[(M,)](dy_MN, y_MN, dx_MN, *row, **options)
    return dx_MN


_forward = operator(
    "softmax_forward(Tensor x, SymInt Lq, float scale, bool log) -> Tensor",
    _launch_forward,
    lambda x, Lq, scale, log: x.new_empty(x.shape),
)
_backward = operator(
    "softmax_backward(Tensor dy, Tensor y, SymInt Lq, float scale, bool log) -> Tensor",
    _launch_backward,
    lambda dy, y, Lq, scale, log: y.new_empty(y.shape),
)


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_MN: Tensor, Lq: int, scale: float, log: bool) -> Tensor:
        y_MN = _forward(x_MN, Lq, scale, log)
        ctx.save_for_backward(y_MN)
        ctx.options = (Lq, scale, log)
        return y_MN

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_MN: Tensor):
        (y_MN,) = ctx.saved_tensors
        return _backward(unit_stride(dy_MN), y_MN, *ctx.options), None, None, None


def softmax(x: Tensor, dim: int = -1, *, scale: float = 1.0, causal: bool = False) -> Tensor:
    """Compute the softmax of `scale · x` over `dim`.

    A row that is all -inf, or that holds +inf or NaN, is NaN, as in PyTorch. Keeps only its output
    for backward.

    Args:
        x: `[...]`, at least one axis; float32, float16, bfloat16 or float64. Copied only if `dim`
            is not contiguous in memory or the other axes do not flatten into one.
        dim: the axis over which the outputs sum to 1.
        scale: multiplies `x`; an attention's 1/sqrt(K) or a sampler's 1/temperature.
        causal: the last two axes are queries and keys, `[..., Lq, Lk]`, and query i sees the keys
            j <= i + Lk - Lq: the last query sees every key. What a query does not see is 0, takes
            no gradient, and need not be finite.

    Returns:
        The shape and dtype of `x`, also under autocast. Computed in float32 (float64 for float64)
        and rounded once.

    Raises:
        ValueError: `x` has no axis or is not floating point; or, with `causal`, `dim` is not the
            last axis, or Lq exceeds Lk.
        IndexError: `x` has no axis `dim`.
    """
    _validate("softmax", x, dim, causal)
    if not uses_triton(x):
        return softmax_reference(x, dim, scale=scale, causal=causal)
    return _apply(x, dim, scale, causal, log=False)


def log_softmax(x: Tensor, dim: int = -1, *, scale: float = 1.0, causal: bool = False) -> Tensor:
    """Compute the logarithm of `softmax`, without the rounding of taking it afterwards.

    Arguments, dtypes and errors are those of `softmax`. What a query does not see is -inf.
    """
    _validate("log_softmax", x, dim, causal)
    if not uses_triton(x):
        return log_softmax_reference(x, dim, scale=scale, causal=causal)
    return _apply(x, dim, scale, causal, log=True)


def _validate(op: str, x: Tensor, dim: int, causal: bool) -> None:
    if x.ndim == 0 or not x.is_floating_point():
        raise ValueError(
            f"{op}: x must be floating point with at least one axis, got {x.dtype} {list(x.shape)}"
        )
    if not causal:
        return
    if x.ndim < 2 or dim not in (-1, x.ndim - 1):
        raise ValueError(
            f"{op}: causal needs x [..., Lq, Lk] and dim=-1, got {list(x.shape)} and dim={dim}"
        )
    if x.shape[-2] > x.shape[-1]:
        raise ValueError(
            f"{op}: causal needs no more queries than keys, got [Lq, Lk] = {list(x.shape[-2:])}"
        )


def _apply(x: Tensor, dim: int, scale: float, causal: bool, *, log: bool) -> Tensor:
    moved = x.movedim(dim, -1)
    x_MN = unit_stride(moved.reshape(math.prod(moved.shape[:-1]), moved.shape[-1]))
    Lq = x.shape[-2] if causal else 0
    return _Softmax.apply(x_MN, Lq, scale, log).view(moved.shape).movedim(-1, dim)
