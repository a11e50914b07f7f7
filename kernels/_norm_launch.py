"""Launches, operators and gradient of the kernels of `rms_norm` and `layer_norm`.

The formulas are in `_norm_kernels.py`. T tokens (every leading axis, flattened), D features, P
programs that share the rows in backward.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from tritium.kernels._norm_kernels import (
    _norm_backward_loop_kernel,
    _norm_backward_tile_kernel,
    _norm_columns_kernel,
    _norm_forward_loop_kernel,
    _norm_forward_tile_kernel,
    _norm_partials_kernel,
)
from tritium.kernels.runtime import accumulator, once_differentiable, operator, unit_stride

TILE = 2048  # elements per program where rows are short: 16 a thread
BACKWARD_TILE = TILE  # the same in backward
MAX_TILE = 8192  # the longest row whose dw and db fit in registers beside it
LOOP_BLOCK = 4096  # features per step over a longer row
# Programs of backward: not the number of multiprocessors, so dw is the same sum on every GPU. Two
# thirds as many for rows of more than 1,024 features, half beyond TILE: bench/LOG.md has the times.
P_MAX = 768
STAGES = 1  # tiles of backward on their way to shared memory; 1: none before its turn
P_LOOP_MAX = 64  # the same where the columns of long rows are distributed


def _is_short(D: int) -> bool:
    # An unaligned row takes an address per element, hence twice the registers.
    return (MAX_TILE if D % 16 == 0 else MAX_TILE // 2) >= D


def _tile(D: int, r_dtype: torch.dtype, crowded: bool = False, tile: int = TILE) -> dict[str, Any]:
    """Return tile size and warps: several rows per program where they are short, else one."""
    block_D = triton.next_power_of_2(max(D, 1))
    num_warps = block_D // (1024 if crowded else 512)  # the fewer, the more registers for each
    return {
        "BLOCK_T": max(tile // block_D, 1), "BLOCK_D": block_D, "ACC": accumulator(r_dtype),
        "num_warps": max(num_warps, 4 if D % 16 == 0 or block_D < 2048 else 8),
    }  # fmt: skip


def _most_programs(block_D: int) -> int:
    if block_D <= 1024:
        return P_MAX
    return -(-2 * P_MAX // 3) if block_D <= TILE else -(-P_MAX // 2)


def _loop(r_dtype: torch.dtype) -> dict[str, Any]:
    return {"BLOCK_D": LOOP_BLOCK, "ACC": accumulator(r_dtype), "num_warps": 8}


def _columns(r_dtype: torch.dtype) -> dict[str, Any]:
    return {"BLOCK_T": 4, "BLOCK_D": TILE // 4, "ACC": accumulator(r_dtype), "num_warps": 4}


def _launch_forward(
    x_TD: Tensor, residual_TD: Tensor | None, w_D: Tensor | None, b_D: Tensor | None,
    eps: float, offset: float, centred: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    T, D = x_TD.shape
    y_TD, s_TD, m_T, r_T = _fake_forward(x_TD, residual_TD, w_D, b_D, eps, offset, centred)
    tensors = x_TD, residual_TD, w_D, b_D, y_TD, s_TD, m_T, r_T
    strides = x_TD.stride(0), 0 if residual_TD is None else residual_TD.stride(0)
    if _is_short(D):
        crowded = b_D is not None and D > 4096  # with 16 warps it spills on sm_80
        tile = _tile(D, r_T.dtype, crowded)
        _norm_forward_tile_kernel[(triton.cdiv(T, tile["BLOCK_T"]),)](
            *tensors, T, D, *strides, eps, offset, centred, **tile
        )
    else:
        _norm_forward_loop_kernel[(T,)](
            *tensors, D, *strides, eps, offset, centred, **_loop(r_T.dtype)
        )
    return y_TD, s_TD, m_T, r_T


def _launch_backward(
    dy_TD: Tensor, ds_TD: Tensor | None, s_TD: Tensor, w_D: Tensor | None, m_T: Tensor | None,
    r_T: Tensor, offset: float, dw_dtype: torch.dtype | None, db_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    T, D = s_TD.shape
    dx_TD, dbranch_TD, dw_D, db_D = _fake_backward(
        dy_TD, ds_TD, s_TD, w_D, m_T, r_T, offset, dw_dtype, db_dtype
    )
    short = _is_short(D)
    crowded = m_T is not None and len(dbranch_TD) > 0  # a second sum, a second layout
    tile = _tile(D, r_T.dtype, crowded, BACKWARD_TILE) if short else _columns(r_T.dtype)
    P = _most_programs(tile["BLOCK_D"]) if short else P_LOOP_MAX
    P = min(triton.cdiv(T, tile["BLOCK_T"]), P)
    dw_PD, db_PD = (
        None if dtype is None else r_T.new_empty(P, D) for dtype in (dw_dtype, db_dtype)
    )
    rows = dy_TD, ds_TD, s_TD, w_D, m_T, r_T, dx_TD, dbranch_TD if len(dbranch_TD) else None
    strides = dy_TD.stride(0), 0 if ds_TD is None else ds_TD.stride(0), s_TD.stride(0)
    if short:
        _norm_backward_tile_kernel[(P,)](
            *rows, dw_PD, db_PD, T, D, *strides, offset, STAGES=STAGES, **tile
        )
    else:
        _norm_backward_loop_kernel[(T,)](*rows, D, *strides, offset, **_loop(r_T.dtype))
        if dw_PD is not None or db_PD is not None:
            _norm_columns_kernel[(triton.cdiv(D, tile["BLOCK_D"]), P)](
                dy_TD, s_TD, m_T, r_T, dw_PD, db_PD, T, D, strides[0], strides[2], **tile
            )
    block: dict[str, Any] = {"BLOCK_P": 64, "BLOCK_D": 32}
    for partials_PD, total_D in ((dw_PD, dw_D), (db_PD, db_D)):
        if partials_PD is not None:
            grid = (triton.cdiv(D, block["BLOCK_D"]),)
            _norm_partials_kernel[grid](partials_PD, total_D, P, D, **block)
    return dx_TD, dbranch_TD, dw_D, db_D


# An operator returns a fixed number of tensors: those that are not needed come back empty.
def _fake_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    eps: float, offset: float, centred: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    T = x.shape[0]
    s = x.new_empty(0) if residual is None else residual.new_empty(x.shape)
    r = x.new_empty(T, dtype=_wide(x.dtype, s.dtype))
    return x.new_empty(x.shape), s, r.new_empty(T if centred else 0), r


def _fake_backward(
    dy: Tensor, ds: Tensor | None, s: Tensor, weight: Tensor | None, m: Tensor | None,
    r: Tensor, offset: float, dw_dtype: torch.dtype | None, db_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    D = s.shape[1]
    dbranch = dy.new_empty(dy.shape if dy.dtype != s.dtype else 0)
    dw, db = (
        s.new_empty(0) if dtype is None else s.new_empty(D, dtype=dtype)
        for dtype in (dw_dtype, db_dtype)
    )
    return s.new_empty(s.shape), dbranch, dw, db


_forward = operator(
    "norm_forward(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps,"
    " float offset, bool centred) -> (Tensor, Tensor, Tensor, Tensor)",
    _launch_forward,
    _fake_forward,
)
_backward = operator(
    "norm_backward(Tensor dy, Tensor? ds, Tensor s, Tensor? weight, Tensor? m, Tensor r,"
    " float offset, ScalarType? dw_dtype, ScalarType? db_dtype)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _launch_backward,
    _fake_backward,
)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x_TD: Tensor, residual_TD: Tensor | None, w_D: Tensor | None, b_D: Tensor | None,
        eps: float, offset: float, centred: bool,
    ):  # fmt: skip
        ctx.set_materialize_grads(False)  # no zeros for an unused residual
        y_TD, s_TD, m_T, r_T = _forward(x_TD, residual_TD, w_D, b_D, eps, offset, centred)
        saved_TD = x_TD if residual_TD is None else s_TD
        ctx.save_for_backward(saved_TD, w_D, m_T if centred else None, r_T)
        ctx.dtypes = tuple(None if x is None else x.dtype for x in (x_TD, residual_TD, w_D, b_D))
        ctx.offset = offset
        return y_TD if residual_TD is None else (y_TD, s_TD)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_TD: Tensor | None, ds_TD: Tensor | None = None):
        x_dtype, residual_dtype, *dtypes = ctx.dtypes
        if dy_TD is None:
            return None if ds_TD is None else ds_TD.to(x_dtype), ds_TD, *[None] * 5
        ds_TD = None if ds_TD is None else unit_stride(ds_TD)
        needed = ctx.needs_input_grad[2:4]
        wanted = [dtype if needs else None for needs, dtype in zip(needed, dtypes, strict=True)]
        ds_total_TD, dbranch_TD, *sums_D = _backward(
            unit_stride(dy_TD), ds_TD, *ctx.saved_tensors, ctx.offset, *wanted
        )
        dx_TD = dbranch_TD if residual_dtype not in (None, x_dtype) else ds_total_TD
        dresidual_TD = None if residual_dtype is None else ds_total_TD
        sums_D = [x if needs else None for needs, x in zip(needed, sums_D, strict=True)]
        return dx_TD, dresidual_TD, *sums_D, None, None, None


def norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, offset: float, centred: bool
) -> Tensor:
    """Normalise the rows of `x`, checked by `validate`."""
    y_TD = _Norm.apply(_matrix(x), None, *_vectors(weight, bias), eps, offset, centred)
    return y_TD.view(x.shape)


def add_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None,
    eps: float, offset: float, centred: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Add `x` to `residual` and normalise the rows of the sum, which is returned second."""
    y_TD, s_TD = _Norm.apply(
        _matrix(x), _matrix(residual), *_vectors(weight, bias), eps, offset, centred
    )
    return y_TD.view(x.shape), s_TD.view(x.shape)


Shape = int | Sequence[int]
"""The last axes of an input, over which a norm is taken: sizes, or one of them."""


def as_sizes(normalized_shape: Shape) -> tuple[int, ...]:
    """Return `normalized_shape` as a tuple, empty where it is none."""
    if isinstance(normalized_shape, int | torch.SymInt):
        return (normalized_shape,)
    listed = isinstance(normalized_shape, Sequence) and not isinstance(normalized_shape, str)
    return tuple(normalized_shape) if listed else ()


def shape_of(
    op: str, x: Tensor, normalized_shape: Shape | Tensor, weight: Tensor | None
) -> tuple[tuple[int, ...], Tensor | None]:
    """Return the sizes of the axes to normalise, and the weight; a ValueError if they do not fit.

    A tensor as `normalized_shape` is the weight, and its shape is meant.
    """
    if isinstance(normalized_shape, Tensor):
        if weight is not None:
            raise ValueError(
                f"{op}: normalized_shape must be sizes where a third argument follows, "
                f"got a tensor; call {op}(input, weight.shape, weight)"
            )
        normalized_shape, weight = normalized_shape.shape, normalized_shape
    sizes = as_sizes(normalized_shape)
    if not sizes or x.shape[-len(sizes) :] != sizes:
        raise ValueError(
            f"{op}: normalized_shape must be the sizes of the last axes of input, which is "
            f"{list(x.shape)}, got {normalized_shape!r}"
        )
    return sizes, weight


Flat = tuple[Tensor, *tuple[Tensor | None, ...]]


def flat(x: Tensor, sizes: tuple[int, ...], *vectors: Tensor | None) -> Flat:
    """Return `x` and the vectors with the axes to normalise, of `sizes`, made one."""
    if len(sizes) == 1:
        return x, *vectors
    rows = x.reshape(*x.shape[: x.ndim - len(sizes)], math.prod(sizes))
    return rows, *(None if v is None else v.reshape(rows.shape[-1]) for v in vectors)


def validate(
    op: str,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    sizes: tuple[int, ...] | None = None,
) -> None:
    """Raise a ValueError in the name of `op` unless the inputs fit together.

    `sizes` are those of the axes to normalise: without them, of the last one.
    """
    own = "input" if residual is None else "x"
    if x.ndim == 0:
        raise ValueError(f"{op}: {own} must have at least one axis, got a scalar")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(
            f"{op}: residual must have shape {list(x.shape)}, got {list(residual.shape)}"
        )
    sizes = x.shape[-1:] if sizes is None else sizes
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None and vector.shape != sizes:
            raise ValueError(
                f"{op}: {name} must have shape {list(sizes)}, got {list(vector.shape)}"
            )
    for name, given in ((own, x), ("residual", residual), ("weight", weight), ("bias", bias)):
        if given is None:
            continue
        if given.device != x.device:
            raise ValueError(f"{op}: {name} must be on {x.device}, got {given.device}; move it")
        if not given.is_floating_point():
            raise ValueError(f"{op}: {name} must be floating point, got {given.dtype}; convert it")


def _matrix(x: Tensor) -> Tensor:
    return unit_stride(x.reshape(math.prod(x.shape[:-1]), x.shape[-1]))


def _vectors(*vectors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if x_D is None else x_D.contiguous() for x_D in vectors)


def _wide(*dtypes: torch.dtype) -> torch.dtype:
    return functools.reduce(torch.promote_types, dtypes, torch.float32)
