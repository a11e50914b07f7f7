"""Rotary position embedding: rotate each pair of features by an angle that grows with position.

    y1 = x1 · cos - x2 · sin
    y2 = x2 · cos + x1 · sin

x1 and x2 are the first and the second half of the last axis, the convention of Llama in Hugging
Face's layout; or, interleaved, its even and its odd elements, that of the paper, of GPT-J and of
Meta's own Llama. A rotation's transpose is its inverse, so backward is the same kernel with the
sign of sin reversed.

B batch (every axis before L, flattened), L sequence, H heads, K head width, J = K / 2 pairs,
S rows of the tables.

Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021.
https://arxiv.org/abs/2104.09864
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritium.kernels._cpu_backward import uses_cpu_backward
from tritium.kernels.launcher import Launcher, Plan, dtype_of, planned
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

TILE = 2048  # pairs per program: 16 a thread. In place, no two threads may load one element.


def rope_reference(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    offset: int | Tensor = 0,
    interleaved: bool = False,
) -> Tensor:
    """Compute `rope` in plain PyTorch, in float32 (float64 for float64 `x`)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = (_rows(table.to(wide), x.shape[-3], offset).unsqueeze(-2) for table in (cos, sin))
    x_K = x.to(wide)
    x1, x2 = (x_K[..., ::2], x_K[..., 1::2]) if interleaved else x_K.chunk(2, -1)
    cos_K, sin_K, other_K = (
        torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
        for pair in ((cos, cos), (-sin, sin), (x2, x1))
    )
    return torch.addcmul(x_K * cos_K, other_K, sin_K).to(x.dtype)


class _CpuBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x: Tensor, cos: Tensor, sin: Tensor, offset: int | Tensor, interleaved: bool
    ) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.how = {"offset": offset, "interleaved": interleaved}
        return rope_reference(x, cos, sin, **ctx.how)

    @staticmethod
    def backward(ctx, dy: Tensor):
        cos, sin = ctx.saved_tensors
        return rope_reference(dy, cos, -sin, **ctx.how), None, None, None, None


def _rows(table: Tensor, L: int, offset: int | Tensor) -> Tensor:
    """Return the rows of `table` for L positions from `offset`; NaN where there is no such row."""
    if not isinstance(offset, Tensor):
        return table[offset : offset + L]
    position = offset.long().unsqueeze(-1) + torch.arange(L, device=table.device)
    inside = (position >= 0) & (position < table.shape[0])
    return table[torch.where(inside, position, 0)].where(inside.unsqueeze(-1), math.nan)


@triton.jit
def _load_pairs(ptrs, J, mask, INTERLEAVED: tl.constexpr, BLOCK_J: tl.constexpr):
    """Return the two members of each pair of the heads at `ptrs`: `[L, H, J]` each."""
    if INTERLEAVED:
        offs_K = tl.arange(0, 2 * BLOCK_J)[None, None, :]
        x = tl.load(ptrs + offs_K, mask=mask & (offs_K < 2 * J), other=0.0)
        return tl.split(tl.reshape(x, (x.shape[0], x.shape[1], BLOCK_J, 2)))
    else:
        offs_J = tl.arange(0, BLOCK_J)[None, None, :]
        mask = mask & (offs_J < J)
        x1 = tl.load(ptrs + offs_J, mask=mask, other=0.0)
        return x1, tl.load(ptrs + J + offs_J, mask=mask, other=0.0)


@triton.jit
def _store_pairs(ptrs, y1, y2, J, mask, INTERLEAVED: tl.constexpr, BLOCK_J: tl.constexpr):
    if INTERLEAVED:
        offs_K = tl.arange(0, 2 * BLOCK_J)[None, None, :]
        tl.store(ptrs + offs_K, tl.interleave(y1, y2), mask=mask & (offs_K < 2 * J))
    else:
        offs_J = tl.arange(0, BLOCK_J)[None, None, :]
        mask = mask & (offs_J < J)
        tl.store(ptrs + offs_J, y1, mask=mask)
        tl.store(ptrs + J + offs_J, y2, mask=mask)


@triton.jit
def _rope_kernel(
    x_ptr, cos_ptr, sin_ptr, offset_ptr, y_ptr, L, H, J, S,
    stride_xB, stride_xL, stride_xH, stride_yB, stride_yL, stride_yH,
    INVERSE: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_J: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    n_L = tl.cdiv(L, BLOCK_L)
    tile = tl.program_id(0).to(tl.int64)
    b = tile // n_L
    offs_L = tile % n_L * BLOCK_L + tl.arange(0, BLOCK_L)[:, None, None]
    offs_H = tl.arange(0, BLOCK_H)[None, :, None]
    offs_J = tl.arange(0, BLOCK_J)[None, None, :]
    mask_LH = (offs_L < L) & (offs_H < H)

    row_L = offs_L
    if offset_ptr is not None:
        row_L += tl.load(offset_ptr + b).to(tl.int64)
    # A position outside the tables gives NaN.
    mask_LJ = (row_L >= 0) & (row_L < S) & (offs_J < J)
    cos_LJ = tl.load(cos_ptr + row_L * J + offs_J, mask=mask_LJ, other=float("nan")).to(ACC)
    sin_LJ = tl.load(sin_ptr + row_L * J + offs_J, mask=mask_LJ, other=float("nan")).to(ACC)
    if INVERSE:
        sin_LJ = -sin_LJ

    x_ptrs = x_ptr + b * stride_xB + offs_L * stride_xL + offs_H * stride_xH
    x1, x2 = _load_pairs(x_ptrs, J, mask_LH, INTERLEAVED, BLOCK_J)
    x1_LHJ, x2_LHJ = x1.to(ACC), x2.to(ACC)
    y1_LHJ = (x1_LHJ * cos_LJ - x2_LHJ * sin_LJ).to(y_ptr.dtype.element_ty)
    y2_LHJ = (x2_LHJ * cos_LJ + x1_LHJ * sin_LJ).to(y_ptr.dtype.element_ty)
    y_ptrs = y_ptr + b * stride_yB + offs_L * stride_yL + offs_H * stride_yH
    _store_pairs(y_ptrs, y1_LHJ, y2_LHJ, J, mask_LH, INTERLEAVED, BLOCK_J)


@planned
def _plan(
    shape: torch.Size, x_strides: tuple[int, ...], y_strides: tuple[int, ...], S: int,
    dtypes: tuple[torch.dtype | None, ...], inverse: bool, interleaved: bool,
) -> Plan:  # fmt: skip
    B, L, H, K = shape
    block_H, block_J = power_of_2(H), power_of_2(K // 2)
    block_L = max(1, TILE // (block_H * block_J))
    return Plan(
        (B * cdiv(L, block_L),), (L, H, K // 2, S, *x_strides[:3], *y_strides[:3]),
        (inverse, interleaved, block_L, block_H, block_J, accumulator(dtypes[0])),
    )  # fmt: skip


def _launch(
    x_BLHK: Tensor, cos_SJ: Tensor, sin_SJ: Tensor, offset_B: Tensor | None, y_BLHK: Tensor,
    inverse: bool, interleaved: bool,
) -> None:  # fmt: skip
    """Write the turned pairs of x into y, which has the dtype of x and may be x."""
    plan = _plan(
        x_BLHK.shape, x_BLHK.stride(), y_BLHK.stride(), cos_SJ.shape[0],
        (x_BLHK.dtype, cos_SJ.dtype, sin_SJ.dtype, dtype_of(offset_B)), inverse, interleaved,
    )  # fmt: skip
    _turn.launch(plan, x_BLHK, cos_SJ, sin_SJ, offset_B, y_BLHK)


_turn = Launcher(_rope_kernel)


def _launch_forward(
    x_BLHK: Tensor, cos_SJ: Tensor, sin_SJ: Tensor, offset_B: Tensor | None, interleaved: bool
) -> Tensor:
    y_BLHK = _empty_like(x_BLHK)
    _launch(x_BLHK, cos_SJ, sin_SJ, offset_B, y_BLHK, False, interleaved)
    return y_BLHK


def _launch_backward(
    dy_BLHK: Tensor, cos_SJ: Tensor, sin_SJ: Tensor, offset_B: Tensor | None, interleaved: bool
) -> Tensor:
    dx_BLHK = _empty_like(dy_BLHK)
    _launch(dy_BLHK, cos_SJ, sin_SJ, offset_B, dx_BLHK, True, interleaved)
    return dx_BLHK


def _empty_like(x: Tensor) -> Tensor:
    return torch.empty_like(x) if x.is_contiguous() else x.new_empty(x.shape)


def _launch_inplace(
    x_BLHK: Tensor, cos_SJ: Tensor, sin_SJ: Tensor, offset_B: Tensor | None, interleaved: bool
) -> None:
    _launch(x_BLHK, cos_SJ, sin_SJ, offset_B, x_BLHK, False, interleaved)


ARGUMENTS = "Tensor cos, Tensor sin, Tensor? offset, bool interleaved"
_forward = operator(
    f"rope_forward(Tensor x, {ARGUMENTS}) -> Tensor",
    _launch_forward,
    lambda x, *_: x.new_empty(x.shape),
    incoming=4,
)
_backward = operator(
    f"rope_backward(Tensor dy, {ARGUMENTS}) -> Tensor",
    _launch_backward,
    lambda dy, *_: dy.new_empty(dy.shape),
    incoming=1,
)
_inplace = operator(
    f"rope_inplace(Tensor(a!) x, {ARGUMENTS}) -> ()", _launch_inplace, lambda x, *_: None
)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x: Tensor, cos_SJ: Tensor, sin_SJ: Tensor, offset_B: Tensor | None,
        interleaved: bool, inplace: bool,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(cos_SJ, sin_SJ, offset_B)
        ctx.interleaved = interleaved
        if not inplace:
            return _forward(x, cos_SJ, sin_SJ, offset_B, interleaved)
        x_BLHK = _heads(x)
        _inplace(x_BLHK, cos_SJ, sin_SJ, offset_B, interleaved)
        if x_BLHK.data_ptr() != x.data_ptr():
            x.copy_(x_BLHK.view(x.shape))
        ctx.mark_dirty(x)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        dx_BLHK = _backward(_heads(dy), *ctx.saved_tensors, ctx.interleaved)
        dx = dx_BLHK if dy.ndim == 4 else dx_BLHK.view(dy.shape)
        return dx, None, None, None, None, None


def _heads(x: Tensor) -> Tensor:
    """Return `x` as `[B, L, H, K]`: a view where the strides allow, else a copy."""
    if x.ndim == 4:
        return unit_stride(x)
    if x.ndim == 3:
        return unit_stride(x.unsqueeze(0))
    return unit_stride(x.reshape(math.prod(x.shape[:-3]), *x.shape[-3:]))


def rope(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    offset: int | Tensor = 0,
    interleaved: bool = False,
    inplace: bool = False,
) -> Tensor:
    """Rotate the pairs (k, k + K/2) of each head by the angles of its position.

    Args:
        x: `[..., L, H, K]`, K even; float32, float16, bfloat16 or float64. Queries or keys cut out
            of a packed projection are read where they are: `x` is copied only if its last axis is
            not contiguous or the axes before L do not flatten into one.
        cos: `[S, K/2]`, float32 or float64, S >= offset + L: cosines of the angles, row s for
            position s. Takes no gradient.
        sin: as `cos`, the sines.
        offset: position of the first of the L elements: one number, or an integer tensor of the
            axes before L, on the device of `x`, for sequences that begin at different positions.
            The tensor is not read on the host: a position outside the tables gives NaN.
        interleaved: rotate the pairs (2k, 2k + 1) instead.
        inplace: overwrite `x`, by way of a copy where `x` would be copied. The result is `x`, and
            the rest of the memory that it is a view of stays as it is. Where a gradient is wanted
            take `x` out of a projection by slicing: autograd refuses the parts that `split`,
            `chunk` or `unbind` return. Under torch.compile the compiler decides where the result
            is written.

    Returns:
        `[..., L, H, K]`, in the dtype of `x`, also under autocast; contiguous unless it is `x`.
        Computed in float32 (float64 for float64) and rounded once.

    Raises:
        ValueError: `x` has fewer than 3 axes, an odd K, or is not floating point; `cos` or `sin`
            is not `[S, K/2]`, too short, of another dtype, on another device, or requires a
            gradient; `offset` is negative, or not an integer tensor of the axes before L on the
            device of `x`; `x` is to be overwritten, but is a leaf that requires a gradient, a view
            of one, or expanded.
    """
    _validate(x, offset, cos, sin)
    if inplace and not torch.compiler.is_compiling():
        _validate_inplace(x)
    if inplace and (torch.compiler.is_compiling() or not uses_triton(x, "rope")):
        return x.copy_(rope(x, cos, sin, offset=offset, interleaved=interleaved))
    if not uses_triton(x, "rope"):
        if uses_cpu_backward(x):
            return _CpuBackward.apply(x, cos, sin, offset, interleaved)
        return rope_reference(x, cos, sin, offset=offset, interleaved=interleaved)
    if not isinstance(offset, Tensor):
        if offset:
            cos, sin = (_rows(table, x.shape[-3], offset) for table in (cos, sin))
        offset_B = None
    else:
        offset_B = offset.reshape(-1).contiguous()
    angles = cos.contiguous(), sin.contiguous(), offset_B
    if inplace:
        return apply(_Rope, x, *angles, interleaved, True)
    y_BLHK = apply(_Rope, _heads(x), *angles, interleaved, False)
    return y_BLHK if x.ndim == 4 else y_BLHK.view(x.shape)


def _validate(x: Tensor, offset: int | Tensor, cos: Tensor, sin: Tensor) -> None:
    if x.ndim < 3 or x.shape[-1] % 2 or not x.is_floating_point():
        raise ValueError(
            f"rope: x must be floating point [..., L, H, K] with K even, "
            f"got {x.dtype} {list(x.shape)}"
        )
    validate_tables("rope", x, offset, least=x.shape[-1] // 2, cos=cos, sin=sin)


def validate_tables(
    op: str, x: Tensor, offset: int | Tensor, *, least: int = 1, cos: Tensor, sin: Tensor
) -> None:
    """Raise a ValueError in the name of `op` unless the tables turn at least `least` pairs."""
    rows, most = _validate_offset(op, x, offset), x.shape[-1] // 2
    for name, table, shape in (("cos", cos, cos.shape), ("sin", sin, sin.shape)):
        if len(shape) != 2 or shape[0] < rows or shape[1] < least or shape[1] > most:
            pairs = f"{most}" if least == most else f"{least} to {most}"
            raise ValueError(f"{op}: {name} must be [{rows} or more, {pairs}], got {list(shape)}")
        if table.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"{op}: {name} must be float32, got {table.dtype}; keep angles in float32"
            )
        if table.device != x.device:
            raise ValueError(f"{op}: {name} must be on {x.device}, got {table.device}")
        if table.requires_grad:
            raise ValueError(f"{op}: {name} has no gradient, got requires_grad; detach it")
    (cos_S, cos_J), (sin_S, sin_J) = cos.shape, sin.shape
    if cos_S != sin_S or cos_J != sin_J:  # symbols have no hash
        shapes = f"{list(cos.shape)} and {list(sin.shape)}"
        raise ValueError(f"{op}: cos and sin must have one shape, got {shapes}")


def _validate_offset(op: str, x: Tensor, offset: int | Tensor) -> int:
    """Return how many rows the tables need at least."""
    if not isinstance(offset, Tensor):
        if offset < 0:
            raise ValueError(f"{op}: offset must be at least 0, got {offset}")
        return offset + x.shape[-3]
    kind = "integer" if not (offset.is_floating_point() or offset.is_complex()) else offset.dtype
    expected = (x.shape[:-3], x.device, "integer")
    if (offset.shape, offset.device, kind) != expected or offset.dtype == torch.bool:
        raise ValueError(
            f"{op}: offset must be integers {list(x.shape[:-3])} on {x.device}, "
            f"got {offset.dtype} {list(offset.shape)} on {offset.device}"
        )
    return 0


def _validate_inplace(x: Tensor) -> None:
    sizes = zip(x.shape, x.stride(), strict=True)
    if x.numel() and any(stride == 0 and size > 1 for size, stride in sizes):
        raise ValueError("rope: an expanded x cannot be overwritten; pass x.contiguous()")
    owner = x if x._base is None else x._base
    if torch.is_grad_enabled() and owner.is_leaf and owner.requires_grad:
        raise ValueError(
            "rope: inplace=True must not overwrite a leaf that requires a gradient; "
            "pass what was computed from it, or inplace=False"
        )
