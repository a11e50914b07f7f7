"""Softmax and log-softmax over one axis, scaled, optionally causal.

    z_MN = scale · x_MN, and -inf where a causal query may not look
    softmax:      y_MN = exp(z_MN - max_N) / sum_N(exp(z_MN - max_N))
    log_softmax:  y_MN = z_MN - max_N - log(sum_N(exp(z_MN - max_N)))

Backward saves only the output:

    softmax:      dx_MN = scale · y_MN · (dy_MN - sum_N(dy_MN · y_MN) / sum_N(y_MN))
    log_softmax:  dx_MN = scale · (dy_MN - exp(y_MN) · sum_N(dy_MN))

Without rounding of y, sum_N(y_MN) would be 1: dividing by it keeps the gradient of a row whose mass
is on one element, where bfloat16 stores 0.999 as 1 and `dy - sum(dy · y)` cancels to noise.

With softmax comes, on request, lse_M = log(sum_N(exp(z_MN))), whose gradient joins at no cost:

    dx_MN = scale · y_MN · (dy_MN - (sum_N(dy_MN · y_MN) / sum_N(y_MN) - dlse_M))

M rows (every other axis, flattened), N columns. A row of up to MAX_TILE columns stays in registers
between its one read and its one write; a longer one is read twice (`_softmax_long_rows.py`).

Milakov & Gimelshein, "Online normalizer calculation for softmax", 2018.
https://arxiv.org/abs/1805.02867
"""

import math
from typing import Literal, overload

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritium.kernels._cross_entropy_options import check_number
from tritium.kernels._softmax_long_rows import (
    LOG2E,
    launch_backward,
    launch_forward,
    softmax_gradient,
    softmax_lse,
    softmax_norm,
    softmax_normalise,
    softmax_visible,
)
from tritium.kernels.launcher import Launcher
from tritium.kernels.runtime import (
    accumulator,
    apply,
    cdiv,
    once_differentiable,
    operator,
    power_of_2,
    unit_stride,
    uses_triton,
)

TILE = 2048  # elements per program where rows are short: 16 a thread
MAX_TILE = 16384  # the longest row that fits in the registers of 16 warps


def softmax_reference(
    x: Tensor,
    dim: int = -1,
    *,
    scale: float = 1.0,
    causal: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute `softmax` in plain PyTorch, in float32 (float64 for float64 `x`)."""
    hidden = _hidden(x) if causal else x.new_zeros((), dtype=torch.bool)
    z = (x.to(_wide(x)) * scale).masked_fill(hidden, -math.inf)
    y = torch.softmax(z, dim).masked_fill(hidden, 0).to(x.dtype)
    return (y, torch.logsumexp(z, dim)) if return_lse else y


def log_softmax_reference(
    x: Tensor, dim: int = -1, *, scale: float = 1.0, causal: bool = False
) -> Tensor:
    """Compute `log_softmax` in plain PyTorch, in float32 (float64 for float64 `x`)."""
    hidden = _hidden(x) if causal else x.new_zeros((), dtype=torch.bool)
    z = (x.to(_wide(x)) * scale).masked_fill(hidden, -math.inf)
    return torch.log_softmax(z, dim).masked_fill(hidden, -math.inf).to(x.dtype)


def _hidden(x: Tensor) -> Tensor:
    """Return `[Lq, Lk]`: True where query i may not see key j, that is where j > i + Lk - Lq."""
    Lq, Lk = x.shape[-2:]
    return x.new_ones((Lq, Lk), dtype=torch.bool).triu(Lk - Lq + 1)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


@triton.jit
def _softmax_forward_tile_kernel(
    x_ptr, y_ptr, lse_ptr, M, N, Lq, stride_xM, scale: tl.float64,
    CAUSAL: tl.constexpr, LOG: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    LOWEST: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    scale = tl.full((), scale, ACC)  # a float without a type arrives as float32
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    offs_N = tl.arange(0, BLOCK_N)[None, :]
    mask_MN = (m < M) & (offs_N < N)
    n = softmax_visible(m, N, Lq, CAUSAL)
    # Reads stop at a multiple of 16 columns: a mask that changes anywhere else is read one by one.
    read_MN = mask_MN & (offs_N < (n + 15) // 16 * 16)
    x_MN = tl.load(x_ptr + m * stride_xM + offs_N, mask=read_MN, other=0.0).to(ACC)
    z_MN = tl.where(offs_N < n, x_MN * scale, -float("inf"))
    # Finite, so that a row of all -inf sums to 0 and not to -inf - -inf.
    top_M = tl.maximum(tl.max(z_MN, axis=1, keep_dims=True), LOWEST)
    z_MN -= top_M
    total_M = tl.sum(tl.exp2(z_MN * LOG2E), axis=1, keep_dims=True)
    y_MN = softmax_normalise(z_MN, softmax_norm(total_M, LOG), LOG)
    if CAUSAL:  # exactly, also where the row is NaN
        y_MN = tl.where(offs_N < n, y_MN, -float("inf") if LOG else 0.0)
    tl.store(y_ptr + m * N + offs_N, y_MN, mask=mask_MN)
    if lse_ptr is not None:
        tl.store(lse_ptr + m, softmax_lse(top_M, total_M), mask=m < M)


@triton.jit
def _softmax_backward_tile_kernel(
    dy_ptr, y_ptr, dlse_ptr, dx_ptr, M, N, Lq, stride_dyM, stride_dlseM, scale: tl.float64,
    CAUSAL: tl.constexpr, LOG: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    scale = tl.full((), scale, ACC)  # a float without a type arrives as float32
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    offs_N = tl.arange(0, BLOCK_N)[None, :]
    mask_MN = (m < M) & (offs_N < N)
    n = softmax_visible(m, N, Lq, CAUSAL)
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
    if dlse_ptr is not None:
        total_M -= tl.load(dlse_ptr + m * stride_dlseM, mask=m < M, other=0.0)
    dx_MN = softmax_gradient(y_MN, dy_MN, total_M, scale, LOG)
    if CAUSAL:
        dx_MN = tl.where(offs_N < n, dx_MN, 0.0)
    tl.store(dx_ptr + m * N + offs_N, dx_MN, mask=mask_MN)


def _tile(N: int) -> tuple[int, int, int]:
    """Return tile size and warps: several rows per program where they are short, else one."""
    block_N = power_of_2(N)
    return max(TILE // block_N, 1), block_N, min(max(block_N // 512, 4), 16)


_forward_tile = Launcher(_softmax_forward_tile_kernel)
_backward_tile = Launcher(_softmax_backward_tile_kernel)


def _launch_forward(
    x_MN: Tensor, Lq: int, scale: float, log: bool, return_lse: bool
) -> list[Tensor]:
    M, N = x_MN.shape
    y_MN = x_MN.new_empty(M, N)
    lse_M = x_MN.new_empty(M, dtype=_wide(x_MN)) if return_lse else None
    if N <= MAX_TILE:
        block_M, block_N, num_warps = _tile(N)
        lowest, acc = torch.finfo(_wide(x_MN)).min, accumulator(x_MN.dtype)
        _forward_tile(
            (cdiv(M, block_M),), (x_MN, y_MN, lse_M), (M, N, Lq, x_MN.stride(0), float(scale)),
            (Lq > 0, log, block_M, block_N, lowest, acc), num_warps,
        )  # fmt: skip
    else:
        launch_forward(x_MN, y_MN, lse_M, Lq, scale, log)
    return [y_MN] if lse_M is None else [y_MN, lse_M]


def _launch_backward(
    dy_MN: Tensor, y_MN: Tensor, dlse_M: Tensor | None, Lq: int, scale: float, log: bool
) -> Tensor:
    M, N = y_MN.shape
    dx_MN = y_MN.new_empty(M, N)
    if N <= MAX_TILE:
        block_M, block_N, num_warps = _tile(N)
        stride_dlseM = 0 if dlse_M is None else dlse_M.stride(0)
        _backward_tile(
            (cdiv(M, block_M),), (dy_MN, y_MN, dlse_M, dx_MN),
            (M, N, Lq, dy_MN.stride(0), stride_dlseM, float(scale)),
            (Lq > 0, log, block_M, block_N, accumulator(y_MN.dtype)), num_warps,
        )  # fmt: skip
    else:
        launch_backward(dy_MN, y_MN, dlse_M, dx_MN, Lq, scale, log)
    return dx_MN


def _fake_forward(x: Tensor, Lq: int, scale: float, log: bool, return_lse: bool) -> list[Tensor]:
    y = x.new_empty(x.shape)
    return [y, x.new_empty(x.shape[0], dtype=_wide(x))] if return_lse else [y]


_forward = operator(
    "softmax_forward(Tensor x, SymInt Lq, float scale, bool log, bool return_lse) -> Tensor[]",
    _launch_forward,
    _fake_forward,
)
_backward = operator(
    "softmax_backward(Tensor dy, Tensor y, Tensor? dlse, SymInt Lq, float scale, bool log)"
    " -> Tensor",
    _launch_backward,
    lambda dy, y, dlse, Lq, scale, log: y.new_empty(y.shape),
)


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_MN: Tensor, Lq: int, scale: float, log: bool, return_lse: bool):
        ctx.set_materialize_grads(False)
        y_MN, *lse_M = _forward(x_MN, Lq, scale, log, return_lse)
        ctx.save_for_backward(y_MN)
        ctx.options = (Lq, scale, log)
        return (y_MN, *lse_M)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_MN: Tensor | None, dlse_M: Tensor | None = None):
        (y_MN,) = ctx.saved_tensors
        if dy_MN is None:  # one row of zeros, expanded, for all rows
            dy_MN = y_MN.new_zeros(1, y_MN.shape[1]).expand(y_MN.shape)
        dx_MN = _backward(unit_stride(dy_MN), y_MN, dlse_M, *ctx.options)
        return dx_MN, None, None, None, None


@overload
def softmax(
    input: Tensor, dim: int | None = ..., _stacklevel: int = ..., dtype: torch.dtype | None = ...,
    *, scale: float = ..., causal: bool = ..., return_lse: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip
@overload
def softmax(
    input: Tensor, dim: int | None = ..., _stacklevel: int = ..., dtype: torch.dtype | None = ...,
    *, scale: float = ..., causal: bool = ..., return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def softmax(
    input: Tensor,
    dim: int | None = None,
    _stacklevel: int = 3,
    dtype: torch.dtype | None = None,
    *,
    scale: float = 1.0,
    causal: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute the softmax of `scale · input` over `dim`.

    A call of `torch.nn.functional.softmax` means the same here, but `dim` must be given for more
    than two axes.

    A row that is all -inf, or that holds +inf or NaN, is NaN, as in PyTorch. Keeps only its output
    for backward.

    Args:
        input: `[...]`; float32, float16, bfloat16 or float64. Copied only if `dim`
            is not contiguous in memory or the other axes do not flatten into one.
        dim: the axis over which the outputs sum to 1. None: the last, of at most two axes or with
            `causal`.
        dtype: to which `input` is converted first, as in PyTorch.
        scale: multiplies `input`; an attention's 1/sqrt(K) or a sampler's 1/temperature.
        causal: the last two axes are queries and keys, `[..., Lq, Lk]`, and query i sees the keys
            j <= i + Lk - Lq: the last query sees every key. What a query does not see is 0, takes
            no gradient, and need not be finite.
        return_lse: return the normaliser too. Both outputs may take a gradient.

    Returns:
        The shape and dtype of `x`, also under autocast. Computed in float32 (float64 for float64)
        and rounded once. With `return_lse` a pair: that, and log(sum(exp(scale · x))) over what is
        visible, in nats, `[...]` without `dim`, float32 (float64 for float64); -inf for a row that
        is all -inf.

    Raises:
        ValueError: `input` is not floating point, `dim` is left open; or, with `causal`, `dim` is
            not the last axis, or Lq exceeds Lk.
        IndexError: `input` has no axis `dim`.
    """
    x, dim = _prepare("softmax", input, dim, dtype, scale, causal)
    if not uses_triton(x, "softmax"):
        return softmax_reference(x, dim, scale=scale, causal=causal, return_lse=return_lse)
    y, *lse = _apply(x, dim, scale, causal, log=False, return_lse=return_lse)
    return (y, lse[0]) if return_lse else y


def log_softmax(
    input: Tensor,
    dim: int | None = None,
    _stacklevel: int = 3,
    dtype: torch.dtype | None = None,
    *,
    scale: float = 1.0,
    causal: bool = False,
) -> Tensor:
    """Compute the logarithm of `softmax`, without the rounding of taking it afterwards.

    Arguments, dtypes and errors are those of `softmax`. What a query does not see is -inf.
    """
    x, dim = _prepare("log_softmax", input, dim, dtype, scale, causal)
    if not uses_triton(x, "log_softmax"):
        return log_softmax_reference(x, dim, scale=scale, causal=causal)
    (y,) = _apply(x, dim, scale, causal, log=True, return_lse=False)
    return y


def _prepare(
    op: str, x: Tensor, dim: int | None, dtype: torch.dtype | None, scale: float, causal: bool
) -> tuple[Tensor, int]:
    """Return the input in its dtype and the axis, after checking them for either path."""
    x = x if dtype is None else x.to(dtype)
    if not x.is_floating_point():
        raise ValueError(f"{op}: input must be floating point, got {x.dtype}; pass dtype")
    if dim is None and x.ndim > 2 and not causal:
        raise ValueError(
            f"{op}: dim must be given for an input of more than two axes, got {list(x.shape)}; "
            "pass dim=-1 for the last"
        )
    dim = -1 if dim is None else dim
    check_number(op, "scale", scale)
    if not -max(x.ndim, 1) <= dim < max(x.ndim, 1):
        raise IndexError(f"{op}: dim must be an axis of the input {list(x.shape)}, got {dim}")
    if not causal:
        return x, dim
    if x.ndim < 2 or dim not in (-1, x.ndim - 1):
        raise ValueError(
            f"{op}: causal needs input [..., Lq, Lk] and dim=-1, got {list(x.shape)} and dim={dim}"
        )
    if x.shape[-2] > x.shape[-1]:
        raise ValueError(
            f"{op}: causal needs no more queries than keys, got [Lq, Lk] = {list(x.shape[-2:])}"
        )
    return x, dim


def _apply(
    x: Tensor, dim: int, scale: float, causal: bool, *, log: bool, return_lse: bool
) -> tuple[Tensor, ...]:
    if x.ndim == 0:
        return tuple(
            y.view(()) for y in _apply(x.view(1), 0, scale, causal, log=log, return_lse=return_lse)
        )
    if x.ndim == 2 and dim in (-1, 1):
        Lq = x.shape[0] if causal else 0
        return apply(_Softmax, unit_stride(x), Lq, scale, log, return_lse)
    moved = x.movedim(dim, -1)
    x_MN = unit_stride(moved.reshape(math.prod(moved.shape[:-1]), moved.shape[-1]))
    Lq = x.shape[-2] if causal else 0
    y_MN, *lse_M = apply(_Softmax, x_MN, Lq, scale, log, return_lse)
    y = y_MN.view(moved.shape).movedim(-1, dim)
    return (y, *(lse.view(moved.shape[:-1]) for lse in lse_M))
