"""Rotary position embedding: turn each pair of features by an angle that grows with position.

    y1 = x1 · cos - x2 · sin
    y2 = x2 · cos + x1 · sin

x1 and x2 are the first and the second half of the last axis: the convention of Llama and of
Hugging Face, not the interleaved one of the paper. A rotation's transpose is its inverse, so
backward is the same kernel with the sign of sin reversed.

B batch (every axis before L, flattened), L sequence, H heads, K head width, J = K / 2 pairs.

Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021.
https://arxiv.org/abs/2104.09864
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._runtime import accumulator, once_differentiable, operator, unit_stride, uses_triton

TILE = 2048  # pairs per program: 16 a thread


def rope_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The definition of `rope` in plain PyTorch, in float32 or the wider dtype of `x`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    x1, x2 = x.to(wide).chunk(2, dim=-1)
    cos, sin = cos.to(wide).unsqueeze(1), sin.to(wide).unsqueeze(1)  # [L, 1, J]
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1).to(x.dtype)


@triton.jit
def _rope_kernel(
    x_ptr, cos_ptr, sin_ptr, y_ptr, L, H, J, stride_xB, stride_xL, stride_xH,
    INVERSE: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_J: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    n_L = tl.cdiv(L, BLOCK_L)
    tile = tl.program_id(0).to(tl.int64)
    b = tile // n_L
    offs_L = tile % n_L * BLOCK_L + tl.arange(0, BLOCK_L)[:, None, None]
    offs_H = tl.arange(0, BLOCK_H)[None, :, None]
    offs_J = tl.arange(0, BLOCK_J)[None, None, :]
    mask_LJ = (offs_L < L) & (offs_J < J)
    mask_LHJ = mask_LJ & (offs_H < H)

    x_ptrs = x_ptr + b * stride_xB + offs_L * stride_xL + offs_H * stride_xH + offs_J
    x1_LHJ = tl.load(x_ptrs, mask=mask_LHJ, other=0.0).to(ACC)
    x2_LHJ = tl.load(x_ptrs + J, mask=mask_LHJ, other=0.0).to(ACC)
    cos_LJ = tl.load(cos_ptr + offs_L * J + offs_J, mask=mask_LJ, other=0.0).to(ACC)
    sin_LJ = tl.load(sin_ptr + offs_L * J + offs_J, mask=mask_LJ, other=0.0).to(ACC)
    if INVERSE:
        sin_LJ = -sin_LJ
    y_ptrs = y_ptr + ((b * L + offs_L) * H + offs_H) * (2 * J) + offs_J
    tl.store(y_ptrs, x1_LHJ * cos_LJ - x2_LHJ * sin_LJ, mask=mask_LHJ)
    tl.store(y_ptrs + J, x2_LHJ * cos_LJ + x1_LHJ * sin_LJ, mask=mask_LHJ)


def _launch(x_BLHK: Tensor, cos_LJ: Tensor, sin_LJ: Tensor, *, inverse: bool) -> Tensor:
    B, L, H, K = x_BLHK.shape
    block_H, block_J = (triton.next_power_of_2(max(n, 1)) for n in (H, K // 2))
    block_L = max(1, TILE // (block_H * block_J))
    options: dict[str, Any] = {
        "BLOCK_L": block_L, "BLOCK_H": block_H, "BLOCK_J": block_J,
        "INVERSE": inverse, "ACC": accumulator(x_BLHK.dtype),
    }  # fmt: skip
    y_BLHK = x_BLHK.new_empty(x_BLHK.shape)
    stride_B, stride_L, stride_H, _ = x_BLHK.stride()
    _rope_kernel[(B * triton.cdiv(L, block_L),)](
        x_BLHK, cos_LJ, sin_LJ, y_BLHK, L, H, K // 2, stride_B, stride_L, stride_H, **options
    )
    return y_BLHK


def _launch_forward(x_BLHK: Tensor, cos_LJ: Tensor, sin_LJ: Tensor) -> Tensor:
    return _launch(x_BLHK, cos_LJ, sin_LJ, inverse=False)


def _launch_backward(dy_BLHK: Tensor, cos_LJ: Tensor, sin_LJ: Tensor) -> Tensor:
    return _launch(dy_BLHK, cos_LJ, sin_LJ, inverse=True)


_forward = operator(
    "rope_forward(Tensor x, Tensor cos, Tensor sin) -> Tensor",
    _launch_forward,
    lambda x, cos, sin: x.new_empty(x.shape),
)
_backward = operator(
    "rope_backward(Tensor dy, Tensor cos, Tensor sin) -> Tensor",
    _launch_backward,
    lambda dy, cos, sin: dy.new_empty(dy.shape),
)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BLHK: Tensor, cos_LJ: Tensor, sin_LJ: Tensor) -> Tensor:
        ctx.save_for_backward(cos_LJ, sin_LJ)
        return _forward(x_BLHK, cos_LJ, sin_LJ)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_BLHK: Tensor):
        return _backward(unit_stride(dy_BLHK), *ctx.saved_tensors), None, None


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (k, k + K/2) of each head by the angles of its position.

    Args:
        x: `[..., L, H, K]`, K even; float32, float16, bfloat16 or float64. Queries or keys cut out
            of a packed projection are read where they are: `x` is copied only if its last axis is
            not contiguous or the axes before L do not flatten into one.
        cos: `[L, K/2]`, float32 or float64: cosines of the angles, row l for position l. Slice a
            longer table to begin elsewhere. Takes no gradient.
        sin: as `cos`, the sines.

    Returns:
        `[..., L, H, K]`, contiguous, in the dtype of `x`, also under autocast. Computed in float32
        (float64 for float64) and rounded once.

    Raises:
        ValueError: `x` has fewer than 3 axes, an odd K, or is not floating point; `cos` or `sin`
            is not `[L, K/2]`, of another dtype, on another device, or requires a gradient.
    """
    _validate(x, cos=cos, sin=sin)
    if not uses_triton(x):
        return rope_reference(x, cos, sin)
    x_BLHK = unit_stride(x.reshape(math.prod(x.shape[:-3]), *x.shape[-3:]))
    return _Rope.apply(x_BLHK, cos.contiguous(), sin.contiguous()).view(x.shape)


def _validate(x: Tensor, **tables: Tensor) -> None:
    if x.ndim < 3 or x.shape[-1] % 2 or not x.is_floating_point():
        raise ValueError(
            f"rope: x must be floating point [..., L, H, K] with K even, "
            f"got {x.dtype} {list(x.shape)}"
        )
    shape = (x.shape[-3], x.shape[-1] // 2)
    for name, table in tables.items():
        if table.shape != shape:
            raise ValueError(f"rope: {name} must be {list(shape)}, got {list(table.shape)}")
        if table.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"rope: {name} must be float32, got {table.dtype}; keep angles wide")
        if table.device != x.device:
            raise ValueError(f"rope: {name} must be on {x.device}, got {table.device}")
        if table.requires_grad:
            raise ValueError(f"rope: {name} has no gradient, got requires_grad; detach it")
