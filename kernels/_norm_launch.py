"""Launches, operators and gradient of the kernels of `rms_norm` and `layer_norm`.

The formulas are in `_norm_kernels.py`. T tokens (every leading axis, flattened), D features, P
programs that share the rows in backward.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tritium.kernels._norm_kernels import (
    _norm_backward_loop_kernel,
    _norm_backward_tile_kernel,
    _norm_columns_kernel,
    _norm_forward_loop_kernel,
    _norm_forward_tile_kernel,
    _norm_partials_kernel,
)
from tritium.kernels.launcher import Launcher, Plan, planned
from tritium.kernels.runtime import (
    accumulator,
    apply,
    cdiv,
    once_differentiable,
    operator,
    power_of_2,
    unit_stride,
)

TILE = 2048  # elements per program where rows are short: 16 a thread
BACKWARD_TILE = TILE  # the same in backward
MAX_TILE = 8192  # the longest row whose dw and db fit in registers beside it
LOOP_BLOCK = 4096  # features per step over a longer row
# Programs of backward: not the number of multiprocessors, so dw is the same sum on every GPU. Two
# thirds as many for rows of more than 1,024 features, half beyond TILE: bench/LOG.md has the times.
P_MAX = 768
STAGES = 1  # tiles of backward on their way to shared memory; 1: none before its turn
MOST_PARTIALS = 1024  # of a column that are summed at a time: all, where rows are short
P_LOOP_MAX = 64  # the same where the columns of long rows are distributed


def _is_short(D: int, max_tile: int) -> bool:
    # An unaligned row takes an address per element, hence twice the registers.
    return (max_tile if D % 16 == 0 else max_tile // 2) >= D


def _tile(D: int, crowded: bool = False, tile: int = TILE) -> tuple[tuple[int, int], int]:
    """Return BLOCK_T, BLOCK_D and the warps: several rows per program where they are short."""
    block_D = power_of_2(D)
    num_warps = block_D // (1024 if crowded else 512)  # the fewer, the more registers for each
    num_warps = max(num_warps, 4 if D % 16 == 0 or block_D < 2048 else 8)
    return (max(tile // block_D, 1), block_D), num_warps


def _most_programs(block_D: int, p_max: int) -> int:
    if block_D <= 1024:
        return p_max
    return cdiv(2 * p_max, 3) if block_D <= TILE else cdiv(p_max, 2)


@planned
def _plan_forward(
    shape: torch.Size, strides: tuple[int, int], biased: bool, r_dtype: torch.dtype,
    eps: float, offset: float, centred: bool, max_tile: int, loop_block: int,
) -> tuple[Launcher, Plan]:  # fmt: skip
    T, D = _flattened(shape)
    constants, acc = (float(eps), float(offset), centred), accumulator(r_dtype)
    if not _is_short(D, max_tile):
        return _forward_loop, Plan((T,), (D, *strides), (*constants, loop_block, acc), num_warps=8)
    tile, num_warps = _tile(D, crowded=biased and D > 4096)  # with 16 warps it spills on sm_80
    grid = (cdiv(T, tile[0]),)
    return _forward_tile, Plan(grid, (T, D, *strides), (*constants, *tile, acc), num_warps)


def _launch_forward(
    x: Tensor, residual: Tensor | None, w_D: Tensor | None, b_D: Tensor | None,
    eps: float, offset: float, centred: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:  # fmt: skip
    y, s, m_T, r_T = _empty_forward(x, residual, w_D, b_D, eps, offset, centred)
    strides = _row_stride(x), 0 if residual is None else _row_stride(residual)
    launcher, plan = _plan_forward(
        x.shape, strides, b_D is not None, r_T.dtype, eps, offset, centred, MAX_TILE, LOOP_BLOCK
    )
    launcher.launch(plan, x, residual, w_D, b_D, y, s, m_T, r_T)
    return y, s, m_T, r_T


class _BackwardPlan(NamedTuple):
    P: int
    rows: Plan
    columns: Plan | None
    """Launch of the sums over T, where `rows` does not make them on its way."""
    partials: Plan
    """Launch of the sums over P."""


@planned
def _plan_backward(
    shape: torch.Size, strides: tuple[int, int, int], branched: bool, centred: bool,
    r_dtype: torch.dtype, offset: float, sums: int, max_tile: int, loop_block: int,
    p_max: int, p_loop_max: int, most_partials: int,
) -> _BackwardPlan:  # fmt: skip
    (T, D), acc = _flattened(shape), accumulator(r_dtype)
    if _is_short(D, max_tile):
        # A second sum, a second layout: crowded.
        tile, num_warps = _tile(D, centred and branched, BACKWARD_TILE)
        P = min(cdiv(T, tile[0]), _most_programs(tile[1], p_max))
        constants = float(offset), *tile, acc, STAGES
        rows, columns = Plan((P,), (T, D, *strides), constants, num_warps), None
    else:
        tile = 4, TILE // 4
        P = min(cdiv(T, tile[0]), p_loop_max)
        rows = Plan((T,), (D, *strides), (float(offset), loop_block, acc), num_warps=8)
        columns = Plan((cdiv(D, tile[1]), P), (T, D, strides[0], strides[2]), (*tile, acc))
    block_P = most_partials if columns is None else min(power_of_2(p_loop_max), most_partials)
    partials = Plan((cdiv(D, 8), sums), (P, D), (block_P, 8), num_warps=8)
    return _BackwardPlan(P, rows, columns, partials)


def _launch_backward(
    dy: Tensor, ds: Tensor | None, s: Tensor, w_D: Tensor | None, m_T: Tensor | None,
    r_T: Tensor, offset: float, dw_dtype: torch.dtype | None, db_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    dx, dbranch, dw_D, db_D = _empty_backward(dy, ds, s, w_D, m_T, r_T, offset, dw_dtype, db_dtype)
    strides = _row_stride(dy), 0 if ds is None else _row_stride(ds), _row_stride(s)
    plan = _plan_backward(
        s.shape, strides, dbranch is not None, m_T is not None, r_T.dtype, offset,
        (dw_D is not None) + (db_D is not None), MAX_TILE, LOOP_BLOCK, P_MAX, P_LOOP_MAX,
        MOST_PARTIALS,
    )  # fmt: skip
    dw_PD = None if dw_D is None else r_T.new_empty(plan.P, s.shape[-1])
    db_PD = None if db_D is None else r_T.new_empty(plan.P, s.shape[-1])
    rows = dy, ds, s, w_D, m_T, r_T, dx, dbranch
    if plan.columns is None:
        _backward_tile.launch(plan.rows, *rows, dw_PD, db_PD)
    else:
        _backward_loop.launch(plan.rows, *rows)
        if dw_PD is not None or db_PD is not None:
            _columns.launch(plan.columns, dy, s, m_T, r_T, dw_PD, db_PD)
    if dw_PD is not None or db_PD is not None:
        _partials.launch(plan.partials, dw_PD, dw_D, db_PD, db_D)
    return dx, dbranch, dw_D, db_D


_forward_tile = Launcher(_norm_forward_tile_kernel)
_forward_loop = Launcher(_norm_forward_loop_kernel)
_backward_tile = Launcher(_norm_backward_tile_kernel)
_backward_loop = Launcher(_norm_backward_loop_kernel)
_columns = Launcher(_norm_columns_kernel)
_partials = Launcher(_norm_partials_kernel)


def _flattened(shape: torch.Size) -> tuple[int, int]:
    """Return the number of rows and their width."""
    *leading, D = shape
    return leading[0] if len(leading) == 1 else math.prod(leading), D


def _row_stride(x: Tensor) -> int:
    """Return the stride of the rows of `x`, which is a matrix or contiguous."""
    return x.stride(0) if x.ndim == 2 else x.shape[-1]


# Those that are not needed are None.
def _empty_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    eps: float, offset: float, centred: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:  # fmt: skip
    s = None if residual is None else _empty_like(residual)
    wide = _wide(x.dtype, x.dtype if residual is None else residual.dtype)
    r = x.new_empty(_flattened(x.shape)[0], dtype=wide)
    return _empty_like(x), s, torch.empty_like(r) if centred else None, r


def _empty_backward(
    dy: Tensor, ds: Tensor | None, s: Tensor, weight: Tensor | None, m: Tensor | None,
    r: Tensor, offset: float, dw_dtype: torch.dtype | None, db_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    D = s.shape[-1]
    dbranch = None if dy.dtype == s.dtype else _empty_like(s, dy.dtype)
    dw = None if dw_dtype is None else s.new_empty(D, dtype=dw_dtype)
    db = None if db_dtype is None else s.new_empty(D, dtype=db_dtype)
    return _empty_like(s), dbranch, dw, db


def _empty_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    if dtype is None and x.is_contiguous():
        return torch.empty_like(x)
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


_forward = operator(
    "norm_forward(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps,"
    " float offset, bool centred) -> (Tensor, Tensor, Tensor, Tensor)",
    _launch_forward,
    _empty_forward,
)
_backward = operator(
    "norm_backward(Tensor dy, Tensor? ds, Tensor s, Tensor? weight, Tensor? m, Tensor r,"
    " float offset, ScalarType? dw_dtype, ScalarType? db_dtype)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _launch_backward,
    _empty_backward,
)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x: Tensor, residual: Tensor | None, w_D: Tensor | None, b_D: Tensor | None,
        eps: float, offset: float, centred: bool,
    ):  # fmt: skip
        ctx.set_materialize_grads(False)  # no zeros for an unused residual
        y, s, m_T, r_T = _forward(x, residual, w_D, b_D, eps, offset, centred)
        ctx.save_for_backward(x if residual is None else s, w_D, m_T if centred else None, r_T)
        ctx.offset, ctx.residual_dtype, ctx.b_dtype = offset, None, None
        if b_D is not None:
            ctx.b_dtype = b_D.dtype
        if residual is None:
            return y
        ctx.residual_dtype, ctx.x_dtype = residual.dtype, x.dtype
        return y, s

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor | None, ds: Tensor | None = None):
        if dy is None:
            return None if ds is None else ds.to(ctx.x_dtype), ds, *[None] * 5
        _, _, needs_w, needs_b, *_ = ctx.needs_input_grad
        s, w_D, m_T, r_T = ctx.saved_tensors
        dx, dbranch, dw_D, db_D = _backward(
            _flat(dy), None if ds is None else _flat(ds), s, w_D, m_T, r_T, ctx.offset,
            w_D.dtype if needs_w else None, ctx.b_dtype if needs_b else None,
        )  # fmt: skip
        dresidual = None
        if ctx.residual_dtype is not None:
            dresidual = dx
            dx = dx if ctx.residual_dtype == ctx.x_dtype else dbranch
        return (
            dx, dresidual, dw_D if needs_w else None, db_D if needs_b else None, None, None, None
        )  # fmt: skip


def norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, offset: float, centred: bool
) -> Tensor:
    """Normalise the rows of `x`, checked by `validate`."""
    if not _is_flat(x):
        return norm(_matrix(x), weight, bias, eps, offset, centred).view(x.shape)
    return apply(_Norm, x, None, *_vectors(weight, bias), eps, offset, centred)


def add_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None,
    eps: float, offset: float, centred: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Add `x` to `residual` and normalise the rows of the sum, which is returned second."""
    if not (_is_flat(x) and _is_flat(residual)):
        pair = add_norm(_matrix(x), _matrix(residual), weight, bias, eps, offset, centred)
        y, s = (each.view(x.shape) for each in pair)
        return y, s
    return apply(_Norm, x, residual, *_vectors(weight, bias), eps, offset, centred)


def _is_flat(x: Tensor) -> bool:
    """Return whether `_rows` describes `x`."""
    return x.is_contiguous() or (x.ndim == 2 and x.stride(1) == 1)


def _flat(x: Tensor) -> Tensor:
    return x if _is_flat(x) else _matrix(x)


Shape = int | Sequence[int]
"""The last axes of an input, over which a norm is taken: sizes, or one of them."""


def as_sizes(normalized_shape: Shape) -> tuple[int, ...]:
    """Return `normalized_shape` as a tuple, empty where it is none."""
    if isinstance(normalized_shape, tuple):
        return normalized_shape
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
    if type(normalized_shape) is not tuple and isinstance(normalized_shape, Tensor):
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
    sizes = x.shape[-1:] if sizes is None else sizes
    if (
        x.ndim and x.is_floating_point()
        and (weight is None or _fits(weight, sizes, x.device))
        and (bias is None or _fits(bias, sizes, x.device))
        and (residual is None or _fits(residual, x.shape, x.device))
    ):  # fmt: skip
        return
    own = "input" if residual is None else "x"
    if x.ndim == 0:
        raise ValueError(f"{op}: {own} must have at least one axis, got a scalar")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(
            f"{op}: residual must have shape {list(x.shape)}, got {list(residual.shape)}"
        )
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


def _fits(given: Tensor, shape: tuple[int, ...], device: torch.device) -> bool:
    return given.shape == shape and given.device == device and given.is_floating_point()


def _matrix(x: Tensor) -> Tensor:
    return unit_stride(x.reshape(math.prod(x.shape[:-1]), x.shape[-1]))


def _vectors(weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    return (
        None if weight is None else weight.contiguous(),
        None if bias is None else bias.contiguous(),
    )


def _wide(a: torch.dtype, b: torch.dtype) -> torch.dtype:
    return torch.float64 if torch.float64 in (a, b) else torch.float32
