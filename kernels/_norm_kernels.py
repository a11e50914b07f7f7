"""The kernels of `rms_norm` and `layer_norm`.

    s_TD = x_TD, or x_TD + residual_TD rounded to the dtype of the residual
    m_T  = mean_D(s_TD) if CENTRED, else 0
    z_TD = s_TD - m_T
    r_T  = 1 / sqrt(mean_D(z_TD²) + eps)
    y_TD = z_TD · r_T · (offset + w_D) + b_D

Backward, with g_TD = dy_TD · (offset + w_D), and ds_TD the gradient of s_TD from its other uses:

    dx_TD = ds_TD + r_T · (g_TD - z_TD · r_T² · mean_D(g_TD · z_TD) - mean_D(g_TD) if CENTRED)
    dw_D  = sum_T(dy_TD · z_TD · r_T)
    db_D  = sum_T(dy_TD)

T tokens (every leading axis, flattened), D features, P programs that share the rows in backward.

The tile kernels keep a row in registers between its one read and its one write. The loop kernels
read it once for each mean and once more; dw and db are then summed by columns, from another read of
dy and s.
"""

import triton
import triton.language as tl


@triton.jit
def _norm_stream(
    x_ptr, residual_ptr, s_ptr, t, d, mask, D, stride_xT, stride_residualT, ACC: tl.constexpr
):
    s = tl.load(x_ptr + t * stride_xT + d, mask=mask, other=0.0).to(ACC)
    if residual_ptr is not None:
        s += tl.load(residual_ptr + t * stride_residualT + d, mask=mask, other=0.0).to(ACC)
        # Rounded first: backward sees s only as it was stored.
        s = s.to(s_ptr.dtype.element_ty)
        tl.store(s_ptr + t * D + d, s, mask=mask)
        s = s.to(ACC)
    return s


@triton.jit
def _norm_scale(z, w_ptr, d, D, offset: tl.constexpr):
    if w_ptr is not None:
        w = tl.load(w_ptr + d, mask=d < D, other=0.0).to(z.dtype)
        z *= w + offset if offset != 0.0 else w
    return z


@triton.jit
def _norm_dx(dx, ds_ptr, dx_ptr, dbranch_ptr, t, d, mask, D, stride_dsT):
    if ds_ptr is not None:
        dx += tl.load(ds_ptr + t * stride_dsT + d, mask=mask, other=0.0).to(dx.dtype)
    tl.store(dx_ptr + t * D + d, dx, mask=mask)
    if dbranch_ptr is not None:
        tl.store(dbranch_ptr + t * D + d, dx, mask=mask)


@triton.jit
def _norm_forward_tile_kernel(
    x_ptr, residual_ptr, w_ptr, b_ptr, y_ptr, s_ptr, m_ptr, r_ptr,
    T, D, stride_xT, stride_residualT, eps: tl.constexpr, offset: tl.constexpr,
    CENTRED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    offs_T = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    rows_T1, cols_1D = offs_T[:, None], tl.arange(0, BLOCK_D)[None, :]
    mask_TD = (rows_T1 < T) & (cols_1D < D)
    w_1D = _norm_scale(tl.full((1, BLOCK_D), 1.0, ACC), w_ptr, cols_1D, D, offset)
    z_TD = _norm_stream(
        x_ptr, residual_ptr, s_ptr, rows_T1, cols_1D, mask_TD, D, stride_xT, stride_residualT, ACC
    )
    if CENTRED:
        m_T = tl.sum(z_TD, axis=1) / D
        tl.store(m_ptr + offs_T, m_T, mask=offs_T < T)
        z_TD = tl.where(cols_1D < D, z_TD - m_T[:, None], 0.0)
    r_T = 1 / tl.sqrt(tl.sum(z_TD * z_TD, axis=1) / D + eps)
    tl.store(r_ptr + offs_T, r_T, mask=offs_T < T)
    y_TD = z_TD * r_T[:, None] * w_1D
    if b_ptr is not None:
        y_TD += tl.load(b_ptr + cols_1D, mask=cols_1D < D, other=0.0).to(ACC)
    tl.store(y_ptr + rows_T1 * D + cols_1D, y_TD, mask=mask_TD)


@triton.jit
def _norm_forward_loop_kernel(
    x_ptr, residual_ptr, w_ptr, b_ptr, y_ptr, s_ptr, m_ptr, r_ptr,
    D, stride_xT, stride_residualT, eps: tl.constexpr, offset: tl.constexpr,
    CENTRED: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    offs_D = tl.arange(0, BLOCK_D)
    sum_D = tl.zeros((BLOCK_D,), dtype=ACC)
    for start in range(0, D, BLOCK_D):
        d = start + offs_D
        s_D = _norm_stream(
            x_ptr, residual_ptr, s_ptr, t, d, d < D, D, stride_xT, stride_residualT, ACC
        )
        sum_D += s_D if CENTRED else s_D * s_D
    mean = tl.sum(sum_D) / D
    # From here on s is read where this program wrote it.
    if residual_ptr is not None:
        tl.debug_barrier()
        x_ptr, stride_xT = s_ptr, D
    m = 0.0
    if CENTRED:
        m = mean
        tl.store(m_ptr + t, m)
        sum_D = tl.zeros((BLOCK_D,), dtype=ACC)
        for start in range(0, D, BLOCK_D):
            d = start + offs_D
            s_D = tl.load(x_ptr + t * stride_xT + d, mask=d < D, other=0.0).to(ACC)
            z_D = tl.where(d < D, s_D - m, 0.0)
            sum_D += z_D * z_D
        mean = tl.sum(sum_D) / D
    r = 1 / tl.sqrt(mean + eps)
    tl.store(r_ptr + t, r)
    for start in range(0, D, BLOCK_D):
        d = start + offs_D
        s_D = tl.load(x_ptr + t * stride_xT + d, mask=d < D, other=0.0).to(ACC)
        y_D = _norm_scale((s_D - m) * r, w_ptr, d, D, offset)
        if b_ptr is not None:
            y_D += tl.load(b_ptr + d, mask=d < D, other=0.0).to(ACC)
        tl.store(y_ptr + t * D + d, y_D, mask=d < D)


@triton.jit
def _norm_backward_tile_kernel(
    dy_ptr, ds_ptr, s_ptr, w_ptr, m_ptr, r_ptr, dx_ptr, dbranch_ptr, dw_ptr, db_ptr,
    T, D, stride_dyT, stride_dsT, stride_sT, offset: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # Program p owns tiles p, p + P, p + 2P, ... and keeps its share of dw and db in registers: no
    # atomics, so the result is the same on every run.
    p = tl.program_id(0).to(tl.int64)
    offs_D = tl.arange(0, BLOCK_D)
    cols_1D = offs_D[None, :]
    w_1D = _norm_scale(tl.full((1, BLOCK_D), 1.0, ACC), w_ptr, cols_1D, D, offset)
    dw_TD = tl.zeros((BLOCK_T, BLOCK_D), dtype=ACC)
    db_TD = tl.zeros((BLOCK_T, BLOCK_D), dtype=ACC)
    for t in tl.range(p * BLOCK_T, T, tl.num_programs(0) * BLOCK_T, num_stages=STAGES):
        offs_T = (t + tl.arange(0, BLOCK_T)).to(tl.int64)
        rows_T1 = offs_T[:, None]
        mask_TD = (rows_T1 < T) & (cols_1D < D)
        dy_TD = tl.load(dy_ptr + rows_T1 * stride_dyT + cols_1D, mask=mask_TD, other=0.0).to(ACC)
        z_TD = tl.load(s_ptr + rows_T1 * stride_sT + cols_1D, mask=mask_TD, other=0.0).to(ACC)
        r_T1 = tl.load(r_ptr + offs_T, mask=offs_T < T, other=0.0)[:, None]
        if m_ptr is not None:
            z_TD -= tl.load(m_ptr + offs_T, mask=offs_T < T, other=0.0)[:, None]
        # dw and db before the sums over D: dy need not stay in registers beside g.
        dyz_TD = dy_TD * z_TD
        if dw_ptr is not None:
            dw_TD += dyz_TD * r_T1
        if db_ptr is not None:
            db_TD += dy_TD
        g_TD = dy_TD * w_1D
        # Equal by algebra. Each form spills registers in some configuration, so choose by size.
        from_dyz = BLOCK_D >= 4096 if m_ptr is None else BLOCK_D <= 64
        gz_TD = dyz_TD * w_1D if from_dyz else g_TD * z_TD
        scale_T1 = r_T1 * r_T1 * (tl.sum(gz_TD, axis=1) / D)[:, None]
        if m_ptr is not None:
            g_TD -= (tl.sum(g_TD, axis=1) / D)[:, None]
        dx_TD = r_T1 * (g_TD - z_TD * scale_T1)
        _norm_dx(dx_TD, ds_ptr, dx_ptr, dbranch_ptr, rows_T1, cols_1D, mask_TD, D, stride_dsT)
    if dw_ptr is not None:
        tl.store(dw_ptr + p * D + offs_D, tl.sum(dw_TD, axis=0), mask=offs_D < D)
    if db_ptr is not None:
        tl.store(db_ptr + p * D + offs_D, tl.sum(db_TD, axis=0), mask=offs_D < D)


@triton.jit
def _norm_backward_loop_kernel(
    dy_ptr, ds_ptr, s_ptr, w_ptr, m_ptr, r_ptr, dx_ptr, dbranch_ptr,
    D, stride_dyT, stride_dsT, stride_sT, offset: tl.constexpr,
    BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    offs_D = tl.arange(0, BLOCK_D)
    r = tl.load(r_ptr + t)
    m = 0.0 if m_ptr is None else tl.load(m_ptr + t)
    gz_D = tl.zeros((BLOCK_D,), dtype=ACC)
    g_sum_D = tl.zeros((BLOCK_D,), dtype=ACC)
    for start in range(0, D, BLOCK_D):
        d = start + offs_D
        dy_D = tl.load(dy_ptr + t * stride_dyT + d, mask=d < D, other=0.0).to(ACC)
        s_D = tl.load(s_ptr + t * stride_sT + d, mask=d < D, other=0.0).to(ACC)
        g_D = _norm_scale(dy_D, w_ptr, d, D, offset)
        gz_D += g_D * (s_D - m)
        if m_ptr is not None:
            g_sum_D += g_D
    scale = r * r * (tl.sum(gz_D) / D)
    shift = 0.0 if m_ptr is None else tl.sum(g_sum_D) / D
    for start in range(0, D, BLOCK_D):
        d = start + offs_D
        dy_D = tl.load(dy_ptr + t * stride_dyT + d, mask=d < D, other=0.0).to(ACC)
        s_D = tl.load(s_ptr + t * stride_sT + d, mask=d < D, other=0.0).to(ACC)
        g_D = _norm_scale(dy_D, w_ptr, d, D, offset)
        dx_D = r * (g_D - (s_D - m) * scale - shift)
        _norm_dx(dx_D, ds_ptr, dx_ptr, dbranch_ptr, t, d, d < D, D, stride_dsT)


@triton.jit
def _norm_columns_kernel(
    dy_ptr, s_ptr, m_ptr, r_ptr, dw_ptr, db_ptr, T, D, stride_dyT, stride_sT,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    # dw and db of some columns, over the rows of program p, distributed as in the tile kernel.
    p = tl.program_id(1).to(tl.int64)
    offs_D = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    cols_1D = offs_D[None, :]
    dw_TD = tl.zeros((BLOCK_T, BLOCK_D), dtype=ACC)
    db_TD = tl.zeros((BLOCK_T, BLOCK_D), dtype=ACC)
    for t in range(p * BLOCK_T, T, tl.num_programs(1) * BLOCK_T):
        offs_T = (t + tl.arange(0, BLOCK_T)).to(tl.int64)
        rows_T1 = offs_T[:, None]
        mask_TD = (rows_T1 < T) & (cols_1D < D)
        dy_TD = tl.load(dy_ptr + rows_T1 * stride_dyT + cols_1D, mask=mask_TD, other=0.0).to(ACC)
        if db_ptr is not None:
            db_TD += dy_TD
        if dw_ptr is not None:
            # Before z: read after it, it made the store's columns spill (Triton 3.8, 3.9; sm_100).
            r_T1 = tl.load(r_ptr + offs_T, mask=offs_T < T, other=0.0)[:, None]
            z_TD = tl.load(s_ptr + rows_T1 * stride_sT + cols_1D, mask=mask_TD, other=0.0).to(ACC)
            if m_ptr is not None:
                z_TD -= tl.load(m_ptr + offs_T, mask=offs_T < T, other=0.0)[:, None]
            dw_TD += dy_TD * z_TD * r_T1
    if dw_ptr is not None:
        tl.store(dw_ptr + p * D + offs_D, tl.sum(dw_TD, axis=0), mask=offs_D < D)
    if db_ptr is not None:
        tl.store(db_ptr + p * D + offs_D, tl.sum(db_TD, axis=0), mask=offs_D < D)


@triton.jit
def _norm_total(
    partials_PD_ptr, total_D_ptr, P, D, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    offs_D = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    total_D = tl.zeros((BLOCK_D,), dtype=partials_PD_ptr.dtype.element_ty)
    for p in range(0, P, BLOCK_P):
        offs_P = p + tl.arange(0, BLOCK_P)
        mask_PD = (offs_P < P)[:, None] & (offs_D < D)[None, :]
        ptrs_PD = partials_PD_ptr + offs_P[:, None] * D + offs_D[None, :]
        total_D += tl.sum(tl.load(ptrs_PD, mask=mask_PD, other=0.0), axis=0)
    tl.store(total_D_ptr + offs_D, total_D, mask=offs_D < D)


@triton.jit
def _norm_partials_kernel(
    dw_PD_ptr, dw_D_ptr, db_PD_ptr, db_D_ptr, P, D, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr
):
    # Columns as narrow as a sector of memory, 32 bytes: all partials of a column are on their way
    # at once, where a loop would wait for each of its steps. Both sums in one launch.
    if dw_PD_ptr is not None:
        if db_PD_ptr is None or tl.program_id(1) == 0:
            _norm_total(dw_PD_ptr, dw_D_ptr, P, D, BLOCK_P, BLOCK_D)
        else:
            _norm_total(db_PD_ptr, db_D_ptr, P, D, BLOCK_P, BLOCK_D)
    else:
        _norm_total(db_PD_ptr, db_D_ptr, P, D, BLOCK_P, BLOCK_D)
