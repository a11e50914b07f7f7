"""Launches, operators and gradient of the kernels of `rms_norm` and `layer_norm`.

The formulas are in `_norm_kernels.py`. T tokens (every leading axis, flattened), D features, P
programs that share the rows in backward.
"""

import math
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
from tritium.kernels.launcher import Launcher, Plan, dtype_of, planned
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
# Tiles of 16 bits, of rows up to TILE, go through shared memory, two on their way while one is
# computed: half as many programs are then faster, three to a multiprocessor of an H100.
STAGES = 3
STAGED_P_MAX = 396
MOST_PARTIALS = 1024  # of a column that are summed at a time: all, where rows are short
P_LOOP_MAX = 64  # the same where the columns of long rows are distributed

Dtypes = tuple[torch.dtype | None, ...]


def _is_short(D: int, max_tile: int) -> bool:
    # An unaligned row takes an address per element, hence twice the registers.
    return (max_tile if D % 16 == 0 else max_tile // 2) >= D


def _tile(D: int, crowded: bool = False, tile: int = TILE) -> tuple[tuple[int, int], int]:
    """Return BLOCK_T, BLOCK_D and the warps: several rows per program where they are short."""
    block_D = power_of_2(D)
    num_warps = block_D // (1024 if crowded else 512)  # the fewer, the more registers for each
    num_warps = max(num_warps, 4 if D % 16 == 0 or block_D < 2048 else 8)
    return (max(tile // block_D, 1), block_D), num_warps


def _is_staged(block_D: int, dtypes: Dtypes) -> bool:
    """Whether tiles of these dtypes go through shared memory.

    Of 128 to 512 features the compiler changes their layout behind it, in up to twice as many
    instructions.
    """
    suits = block_D <= 64 or 1024 <= block_D <= TILE
    return suits and all(x is None or x.itemsize == 2 for x in dtypes)


def _most_programs(block_D: int, p_max: int) -> int:
    if block_D <= 1024:
        return p_max
    return cdiv(2 * p_max, 3) if block_D <= TILE else cdiv(p_max, 2)


class _ForwardPlan(NamedTuple):
    T: int
    wide: torch.dtype
    launcher: Launcher
    rows: Plan


@planned
def _plan_forward(
    shape: torch.Size, strides: tuple[tuple[int, ...], ...], dtypes: Dtypes,
    eps: float, offset: float, centred: bool, max_tile: int, loop_block: int,
) -> _ForwardPlan:  # fmt: skip
    """Plan the launch for x, residual, weight and bias of these dtypes."""
    (T, D), wide = _flattened(shape), _wide(*dtypes[:2])
    constants, acc = (float(eps), float(offset), centred), accumulator(wide)
    row_strides = tuple(_row_stride(shape, stride) for stride in strides)
    if not _is_short(D, max_tile):
        plan = Plan((T,), (D, *row_strides), (*constants, loop_block, acc), num_warps=8)
        return _ForwardPlan(T, wide, _forward_loop, plan)
    crowded = dtypes[3] is not None and D > 4096  # with 16 warps it spills on sm_80
    tile, num_warps = _tile(D, crowded)
    grid = (cdiv(T, tile[0]),)
    plan = Plan(grid, (T, D, *row_strides), (*constants, *tile, acc), num_warps)
    return _ForwardPlan(T, wide, _forward_tile, plan)


def _launch_forward(
    x: Tensor, residual: Tensor | None, w_D: Tensor | None, b_D: Tensor | None,
    eps: float, offset: float, centred: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:  # fmt: skip
    T, wide, launcher, plan = _plan_forward(
        x.shape, (x.stride(), () if residual is None else residual.stride()),
        (x.dtype, dtype_of(residual), dtype_of(w_D), dtype_of(b_D)), eps, offset, centred,
        MAX_TILE, LOOP_BLOCK,
    )  # fmt: skip
    y, r_T = _empty_like(x), x.new_empty(T, dtype=wide)
    s = None if residual is None else _empty_like(residual)
    m_T = torch.empty_like(r_T) if centred else None
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
    shape: torch.Size, strides: tuple[tuple[int, ...], ...], dtypes: Dtypes, centred: bool,
    offset: float, dw_dtype: torch.dtype | None, db_dtype: torch.dtype | None, max_tile: int,
    loop_block: int, p_max: int, p_loop_max: int, most_partials: int,
) -> _BackwardPlan:  # fmt: skip
    """Plan the launches for dy, ds, s, weight and r of these dtypes."""
    (T, D), acc = _flattened(shape), accumulator(_wide(dtypes[-1]))
    row_strides = tuple(_row_stride(shape, stride) for stride in strides)
    sums = (dw_dtype is not None) + (db_dtype is not None)
    if _is_short(D, max_tile):
        # A second sum, a second layout: crowded.
        tile, num_warps = _tile(D, centred and dtypes[0] != dtypes[2], BACKWARD_TILE)
        staged = _is_staged(tile[1], dtypes[:3])
        most = _most_programs(tile[1], min(p_max, STAGED_P_MAX) if staged else p_max)
        P = min(cdiv(T, tile[0]), most)
        constants = float(offset), *tile, acc, STAGES if staged else 1
        rows, columns = Plan((P,), (T, D, *row_strides), constants, num_warps), None
    else:
        tile = 4, TILE // 4
        P = min(cdiv(T, tile[0]), p_loop_max)
        rows = Plan((T,), (D, *row_strides), (float(offset), loop_block, acc), num_warps=8)
        columns = Plan((cdiv(D, tile[1]), P), (T, D, row_strides[0], row_strides[2]), (*tile, acc))
    block_P = most_partials if columns is None else min(power_of_2(p_loop_max), most_partials)
    partials = Plan((cdiv(D, 8), sums), (P, D), (block_P, 8), num_warps=8)
    return _BackwardPlan(P, rows, columns, partials)


def _launch_backward(
    dy: Tensor, ds: Tensor | None, s: Tensor, w_D: Tensor | None, m_T: Tensor | None,
    r_T: Tensor, offset: float, dw_dtype: torch.dtype | None, db_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    dx, dbranch, dw_D, db_D = _empty_backward(dy, ds, s, w_D, m_T, r_T, offset, dw_dtype, db_dtype)
    plan = _plan_backward(
        s.shape, (dy.stride(), () if ds is None else ds.stride(), s.stride()),
        (dy.dtype, dtype_of(ds), s.dtype, dtype_of(w_D), r_T.dtype), m_T is not None, offset,
        dw_dtype, db_dtype, MAX_TILE, LOOP_BLOCK, P_MAX, P_LOOP_MAX, MOST_PARTIALS,
    )  # fmt: skip
    dw_PD = None if dw_D is None else r_T.new_empty(plan.P, s.shape[-1])
    db_PD = None if db_D is None else r_T.new_empty(plan.P, s.shape[-1])
    if plan.columns is None:
        _backward_tile.launch(
            plan.rows, dy, ds, s, w_D, m_T, r_T, dx, dbranch, dw_PD, db_PD
        )  # fmt: skip
    else:
        _backward_loop.launch(plan.rows, dy, ds, s, w_D, m_T, r_T, dx, dbranch)
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


def _row_stride(shape: torch.Size, strides: tuple[int, ...]) -> int:
    """Return the stride of the rows of a matrix or contiguous tensor; 0 if there is none."""
    if len(strides) == 2:
        return strides[0]
    return shape[-1] if strides else 0


# Those that are not needed are None.
def _empty_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    eps: float, offset: float, centred: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:  # fmt: skip
    s = None if residual is None else _empty_like(residual)
    r = x.new_empty(_flattened(x.shape)[0], dtype=_wide(x.dtype, dtype_of(residual)))
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
    incoming=4,
)
_backward = operator(
    "norm_backward(Tensor dy, Tensor? ds, Tensor s, Tensor? weight, Tensor? m, Tensor r,"
    " float offset, ScalarType? dw_dtype, ScalarType? db_dtype)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _launch_backward,
    _empty_backward,
    incoming=2,
)


Options = tuple[float, float, bool]  # eps, offset, centred: fewer arguments cost autograd less


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, w_D: Tensor | None, b_D: Tensor | None, options: Options) -> Tensor:
        y, _, m_T, r_T = _forward(x, None, w_D, b_D, *options)
        ctx.save_for_backward(x, w_D, m_T if options[2] else None, r_T)
        ctx.how = options[1], dtype_of(b_D)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        dx, _, dw_D, db_D = _gradients(ctx, dy, None, ctx.needs_input_grad[1:3])
        return dx, dw_D, db_D, None


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x: Tensor, residual: Tensor, w_D: Tensor | None, b_D: Tensor | None, options: Options
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)  # no zeros for an unused residual
        y, s, m_T, r_T = _forward(x, residual, w_D, b_D, *options)
        ctx.save_for_backward(s, w_D, m_T if options[2] else None, r_T)
        ctx.how, ctx.x_dtype = (options[1], dtype_of(b_D)), x.dtype
        return y, s

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor | None, ds: Tensor | None):
        if dy is None:
            return None if ds is None else ds.to(ctx.x_dtype), ds, None, None, None
        dresidual, dx, dw_D, db_D = _gradients(ctx, dy, ds, ctx.needs_input_grad[2:4])
        return dresidual if dresidual.dtype == ctx.x_dtype else dx, dresidual, dw_D, db_D, None


def _gradients(ctx, dy: Tensor, ds: Tensor | None, needs: tuple[bool, bool]):
    """Return the gradients of s, of s in the dtype of dy, and of weight and bias if needed."""
    s, w_D, m_T, r_T = ctx.saved_tensors
    (offset, b_dtype), (needs_w, needs_b) = ctx.how, needs
    dx, dbranch, dw_D, db_D = _backward(
        dy if dy.is_contiguous() else _flat(dy), None if ds is None else _flat(ds), s, w_D, m_T,
        r_T, offset, w_D.dtype if needs_w else None, b_dtype if needs_b else None,
    )  # fmt: skip
    return dx, dbranch, dw_D if needs_w else None, db_D if needs_b else None


def norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, offset: float, centred: bool
) -> Tensor:
    """Normalise the rows of `x`, checked by `validate`."""
    if not (x.is_contiguous() or _is_flat(x)):
        return norm(_matrix(x), weight, bias, eps, offset, centred).view(x.shape)
    return apply(_Norm, x, *_vectors(weight, bias), (eps, offset, centred))


def add_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None,
    eps: float, offset: float, centred: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Add `x` to `residual` and normalise the rows of the sum, which is returned second."""
    if not (_is_flat(x) and _is_flat(residual)):
        pair = add_norm(_matrix(x), _matrix(residual), weight, bias, eps, offset, centred)
        y, s = (each.view(x.shape) for each in pair)
        return y, s
    return apply(_AddNorm, x, residual, *_vectors(weight, bias), (eps, offset, centred))


def _is_flat(x: Tensor) -> bool:
    """Return whether `_rows` describes `x`."""
    return x.is_contiguous() or (x.ndim == 2 and x.stride(1) == 1)


def _flat(x: Tensor) -> Tensor:
    return x if _is_flat(x) else _matrix(x)


def _matrix(x: Tensor) -> Tensor:
    return unit_stride(x.reshape(math.prod(x.shape[:-1]), x.shape[-1]))


def _vectors(weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    return (
        None if weight is None else weight.contiguous(),
        None if bias is None else bias.contiguous(),
    )


def _wide(*dtypes: torch.dtype | None) -> torch.dtype:
    return torch.float64 if torch.float64 in dtypes else torch.float32
