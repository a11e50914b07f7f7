"""Launches, operators and gradient of the kernels of `rms_norm` and `layer_norm`.

The formulas are in `_norm_kernels.py`. T tokens (every leading axis, flattened), D features, P
programs that share the rows in backward.
"""

import math
from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor

from tritium.kernels._norm_kernels import (
    _norm_backward_loop_kernel,
    _norm_backward_tile_kernel,
    _norm_columns_kernel,
    _norm_forward_loop_kernel,
    _norm_forward_tile_kernel,
    _norm_partials_kernel,
)
from tritium.kernels.runtime import (
    Launcher,
    accumulator,
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
P_LOOP_MAX = 64  # the same where the columns of long rows are distributed


def _is_short(D: int) -> bool:
    # An unaligned row takes an address per element, hence twice the registers.
    return (MAX_TILE if D % 16 == 0 else MAX_TILE // 2) >= D


def _tile(
    D: int, r_dtype: torch.dtype, crowded: bool = False, tile: int = TILE
) -> tuple[tuple[int, int, tl.dtype], int]:
    """Return BLOCK_T, BLOCK_D, ACC and the warps: several rows per program where they are short."""
    block_D = power_of_2(D)
    num_warps = block_D // (1024 if crowded else 512)  # the fewer, the more registers for each
    num_warps = max(num_warps, 4 if D % 16 == 0 or block_D < 2048 else 8)
    return (max(tile // block_D, 1), block_D, accumulator(r_dtype)), num_warps


def _most_programs(block_D: int) -> int:
    if block_D <= 1024:
        return P_MAX
    return cdiv(2 * P_MAX, 3) if block_D <= TILE else cdiv(P_MAX, 2)


def _launch_forward(
    x: Tensor, residual: Tensor | None, w_D: Tensor | None, b_D: Tensor | None,
    eps: float, offset: float, centred: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    T, D, stride_xT = _rows(x)
    y, s, m_T, r_T = _fake_forward(x, residual, w_D, b_D, eps, offset, centred)
    tensors = x, residual, w_D, b_D, y, s, m_T, r_T
    strides = stride_xT, 0 if residual is None else _rows(residual)[2]
    constants = float(eps), float(offset), centred
    if _is_short(D):
        crowded = b_D is not None and D > 4096  # with 16 warps it spills on sm_80
        tile, num_warps = _tile(D, r_T.dtype, crowded)
        _forward_tile(
            (cdiv(T, tile[0]),), tensors, (T, D, *strides), (*constants, *tile), num_warps
        )
    else:
        loop = LOOP_BLOCK, accumulator(r_T.dtype)
        _forward_loop((T,), tensors, (D, *strides), (*constants, *loop), num_warps=8)
    return y, s, m_T, r_T


def _launch_backward(
    dy: Tensor, ds: Tensor | None, s: Tensor, w_D: Tensor | None, m_T: Tensor | None,
    r_T: Tensor, offset: float, dw_dtype: torch.dtype | None, db_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    T, D, stride_sT = _rows(s)
    dx, dbranch, dw_D, db_D = _fake_backward(dy, ds, s, w_D, m_T, r_T, offset, dw_dtype, db_dtype)
    short, acc = _is_short(D), accumulator(r_T.dtype)
    branched = dy.dtype != s.dtype
    crowded = m_T is not None and branched  # a second sum, a second layout
    tile, num_warps = ((4, TILE // 4, acc), 4)
    if short:
        tile, num_warps = _tile(D, r_T.dtype, crowded, BACKWARD_TILE)
    P = min(cdiv(T, tile[0]), _most_programs(tile[1]) if short else P_LOOP_MAX)
    dw_PD = None if dw_dtype is None else r_T.new_empty(P, D)
    db_PD = None if db_dtype is None else r_T.new_empty(P, D)
    rows = dy, ds, s, w_D, m_T, r_T, dx, dbranch if branched else None
    strides = _rows(dy)[2], 0 if ds is None else _rows(ds)[2], stride_sT
    offset = float(offset)
    if short:
        constants = offset, *tile, STAGES
        _backward_tile((P,), (*rows, dw_PD, db_PD), (T, D, *strides), constants, num_warps)
    else:
        _backward_loop((T,), rows, (D, *strides), (offset, LOOP_BLOCK, acc), num_warps=8)
        if dw_PD is not None or db_PD is not None:
            _columns(
                (cdiv(D, tile[1]), P), (dy, s, m_T, r_T, dw_PD, db_PD),
                (T, D, strides[0], strides[2]), tile,
            )  # fmt: skip
    for partials_PD, total_D in ((dw_PD, dw_D), (db_PD, db_D)):
        if partials_PD is not None:
            _partials((cdiv(D, 32),), (partials_PD, total_D), (P, D), (64, 32))
    return dx, dbranch, dw_D, db_D


_forward_tile = Launcher(_norm_forward_tile_kernel)
_forward_loop = Launcher(_norm_forward_loop_kernel)
_backward_tile = Launcher(_norm_backward_tile_kernel)
_backward_loop = Launcher(_norm_backward_loop_kernel)
_columns = Launcher(_norm_columns_kernel)
_partials = Launcher(_norm_partials_kernel)


def _rows(x: Tensor) -> tuple[int, int, int]:
    """Return the rows of `x`, their width and their stride; `x` is a matrix or contiguous."""
    if x.ndim == 2:
        return x.shape[0], x.shape[1], x.stride(0)
    D = x.shape[-1]
    return math.prod(x.shape[:-1]), D, D


# An operator returns a fixed number of tensors: those that are not needed come back empty.
def _fake_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    eps: float, offset: float, centred: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    T = x.shape[0] if x.ndim == 2 else math.prod(x.shape[:-1])
    s = x.new_empty(0) if residual is None else _empty_like(residual)
    r = x.new_empty(T, dtype=_wide(x.dtype, s.dtype))
    return _empty_like(x), s, r.new_empty(T if centred else 0), r


def _fake_backward(
    dy: Tensor, ds: Tensor | None, s: Tensor, weight: Tensor | None, m: Tensor | None,
    r: Tensor, offset: float, dw_dtype: torch.dtype | None, db_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    D = s.shape[-1]
    dbranch = dy.new_empty(0) if dy.dtype == s.dtype else _empty_like(s, dy.dtype)
    dw = s.new_empty(0) if dw_dtype is None else s.new_empty(D, dtype=dw_dtype)
    db = s.new_empty(0) if db_dtype is None else s.new_empty(D, dtype=db_dtype)
    return _empty_like(s), dbranch, dw, db


def _empty_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


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
        ctx, x: Tensor, residual: Tensor | None, w_D: Tensor | None, b_D: Tensor | None,
        eps: float, offset: float, centred: bool,
    ):  # fmt: skip
        ctx.set_materialize_grads(False)  # no zeros for an unused residual
        y, s, m_T, r_T = _forward(x, residual, w_D, b_D, eps, offset, centred)
        ctx.save_for_backward(x if residual is None else s, w_D, m_T if centred else None, r_T)
        ctx.dtypes = (
            x.dtype, None if residual is None else residual.dtype,
            None if w_D is None else w_D.dtype, None if b_D is None else b_D.dtype,
        )  # fmt: skip
        ctx.offset = offset
        return y if residual is None else (y, s)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor | None, ds: Tensor | None = None):
        x_dtype, residual_dtype, w_dtype, b_dtype = ctx.dtypes
        if dy is None:
            return None if ds is None else ds.to(x_dtype), ds, *[None] * 5
        _, _, needs_w, needs_b, *_ = ctx.needs_input_grad
        ds_total, dbranch, dw_D, db_D = _backward(
            _flat(dy), None if ds is None else _flat(ds), *ctx.saved_tensors, ctx.offset,
            w_dtype if needs_w else None, b_dtype if needs_b else None,
        )  # fmt: skip
        dx = dbranch if residual_dtype not in (None, x_dtype) else ds_total
        dresidual = None if residual_dtype is None else ds_total
        return (
            dx, dresidual, dw_D if needs_w else None, db_D if needs_b else None, None, None, None
        )  # fmt: skip


def norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, offset: float, centred: bool
) -> Tensor:
    """Normalise the rows of `x`, checked by `validate`."""
    if not _is_flat(x):
        return norm(_matrix(x), weight, bias, eps, offset, centred).view(x.shape)
    return _Norm.apply(x, None, *_vectors(weight, bias), eps, offset, centred)


def add_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None,
    eps: float, offset: float, centred: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Add `x` to `residual` and normalise the rows of the sum, which is returned second."""
    if not (_is_flat(x) and _is_flat(residual)):
        pair = add_norm(_matrix(x), _matrix(residual), weight, bias, eps, offset, centred)
        y, s = (each.view(x.shape) for each in pair)
        return y, s
    return _Norm.apply(x, residual, *_vectors(weight, bias), eps, offset, centred)


def _is_flat(x: Tensor) -> bool:
    """Return whether `_rows` describes `x`."""
    return x.is_contiguous() or (x.ndim == 2 and x.stride(1) == 1)


def _flat(x: Tensor) -> Tensor:
    return x if _is_flat(x) else _matrix(x)


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


def _vectors(weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    return (
        None if weight is None else weight.contiguous(),
        None if bias is None else bias.contiguous(),
    )


def _wide(a: torch.dtype, b: torch.dtype) -> torch.dtype:
    return torch.float64 if torch.float64 in (a, b) else torch.float32
