"""The kernels of `qk_norm_rope`; its docstring has the formulas.

A program has a tile of positions and heads, all of them queries, keys or values. Pairs and the
features behind them are tiles of their own, so that any share of a head may turn.
"""

import triton
import triton.language as tl

from tritium.kernels.rope import _load_pairs, _store_pairs


@triton.jit
def _angles(
    cos_ptr, sin_ptr, offset_ptr, b, offs_L, L, J, S, BLOCK_J: tl.constexpr, ACC: tl.constexpr
):
    """Cosines and sines, `[L, 1, J]`: 0 beyond the last position, NaN sines outside the tables."""
    offs_J = tl.arange(0, BLOCK_J)[None, None, :]
    row_L = offs_L
    if offset_ptr is not None:
        row_L += tl.load(offset_ptr + b).to(tl.int64)
    inside_L = (row_L >= 0) & (row_L < S)
    mask_LJ = inside_L & (offs_L < L) & (offs_J < J)
    cos_LJ = tl.load(cos_ptr + row_L * J + offs_J, mask=mask_LJ, other=0.0).to(ACC)
    sin_LJ = tl.load(sin_ptr + row_L * J + offs_J, mask=mask_LJ, other=0.0).to(ACC)
    if offset_ptr is not None:
        # One NaN is enough: both members of a pair are multiplied by the sine.
        sin_LJ = tl.where(inside_L | (offs_L >= L), sin_LJ, float("nan"))
    return cos_LJ, sin_LJ


@triton.jit
def _load_features(
    ptrs, J, K, mask, INTERLEAVED: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_R: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Both members of each pair, and the features behind the pairs (one 0 where there are none)."""
    x1, x2 = _load_pairs(ptrs, J, mask, INTERLEAVED, BLOCK_J)
    rest = tl.zeros((1, 1, 1), ACC)
    if BLOCK_R > 0:
        # 2J + offs_R, kept over the loop of backward, was a register too many (Triton 3.9).
        offs_R = tl.arange(0, BLOCK_R)[None, None, :]
        rest = tl.load(ptrs + 2 * J + offs_R, mask=mask & (offs_R < K - 2 * J), other=0.0).to(ACC)
    return x1.to(ACC), x2.to(ACC), rest


@triton.jit
def _store_features(
    ptrs, y1, y2, rest, J, K, mask,
    INTERLEAVED: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    dtype = ptrs.dtype.element_ty
    _store_pairs(ptrs, y1.to(dtype), y2.to(dtype), J, mask, INTERLEAVED, BLOCK_J)
    if BLOCK_R > 0:
        offs_K = 2 * J + tl.arange(0, BLOCK_R)[None, None, :]
        tl.store(ptrs + offs_K, rest, mask=mask & (offs_K < K))


@triton.jit
def _sum_of_features(x1, x2, rest):
    """Return `[L, N, 1]`."""
    return tl.sum(x1 + x2, axis=2, keep_dims=True) + tl.sum(rest, axis=2, keep_dims=True)


@triton.jit
def _qk_norm_rope_forward_kernel(
    qkv_ptr, cos_ptr, sin_ptr, offset_ptr, q_weight_ptr, k_weight_ptr, q_ptr, k_ptr,
    L, H, G, J, K, S, stride_xB, stride_xL, stride_xN, eps: tl.constexpr,
    INTERLEAVED: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_J: tl.constexpr, BLOCK_R: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    # Neighbouring programs walk along the heads of a position first.
    q_tiles = tl.cdiv(H, BLOCK_N)
    tiles = q_tiles + tl.cdiv(G, BLOCK_N)
    n_L = tl.cdiv(L, BLOCK_L)
    tile = tl.program_id(0).to(tl.int64)
    n, b = tile % tiles, tile // tiles // n_L
    offs_L = tile // tiles % n_L * BLOCK_L + tl.arange(0, BLOCK_L)[:, None, None]
    heads, first, start_N, y_ptr, w_ptr = H, 0, n * BLOCK_N, q_ptr, q_weight_ptr
    if n >= q_tiles:
        heads, first, start_N, y_ptr, w_ptr = G, H, (n - q_tiles) * BLOCK_N, k_ptr, k_weight_ptr
    offs_N = start_N + tl.arange(0, BLOCK_N)[None, :, None]
    mask_LN = (offs_L < L) & (offs_N < heads)

    x_ptrs = qkv_ptr + b * stride_xB + offs_L * stride_xL + (first + offs_N) * stride_xN
    x1, x2, rest = _load_features(x_ptrs, J, K, mask_LN, INTERLEAVED, BLOCK_J, BLOCK_R, ACC)
    cos_LJ, sin_LJ = _angles(cos_ptr, sin_ptr, offset_ptr, b, offs_L, L, J, S, BLOCK_J, ACC)
    if w_ptr is not None:
        r_LN = 1 / tl.sqrt(_sum_of_features(x1 * x1, x2 * x2, rest * rest) / K + eps)
        w1, w2, w_rest = _load_features(
            w_ptr + tl.zeros((1, 1, 1), tl.int32), J, K, True, INTERLEAVED, BLOCK_J, BLOCK_R, ACC
        )
        x1, x2, rest = x1 * r_LN * w1, x2 * r_LN * w2, rest * r_LN * w_rest
    y1 = x1 * cos_LJ - x2 * sin_LJ
    y2 = x2 * cos_LJ + x1 * sin_LJ
    y_ptrs = y_ptr + ((b * L + offs_L) * heads + offs_N) * K
    _store_features(y_ptrs, y1, y2, rest, J, K, mask_LN, INTERLEAVED, BLOCK_J, BLOCK_R)


@triton.jit
def _qk_norm_rope_backward_kernel(
    dq_ptr, dk_ptr, dv_ptr, qkv_ptr, cos_ptr, sin_ptr, offset_ptr, q_weight_ptr, k_weight_ptr,
    dqkv_ptr, dw_ptr, blocks, L, H, G, J, K, S,
    stride_qB, stride_qL, stride_qN, stride_kB, stride_kL, stride_kN,
    stride_vB, stride_vL, stride_vN, stride_xB, stride_xL, stride_xN, eps: tl.constexpr,
    INTERLEAVED: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_J: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    # Program p owns a few heads at every (P / tiles)-th block of positions, and keeps its share of
    # their weight's gradient in registers: no atomics, so it is the same on every run.
    q_tiles, k_tiles = tl.cdiv(H, BLOCK_N), tl.cdiv(G, BLOCK_N)
    tiles = q_tiles + 2 * k_tiles
    p = tl.program_id(0).to(tl.int64)
    n, share, shares = p % tiles, p // tiles, tl.num_programs(0) // tiles
    n_L, N = tl.cdiv(L, BLOCK_L), H + 2 * G
    heads, first, start_N, dy_ptr, w_ptr = H, 0, n * BLOCK_N, dq_ptr, q_weight_ptr
    stride_B, stride_L, stride_N = stride_qB, stride_qL, stride_qN
    if n >= q_tiles:
        heads, first, start_N, dy_ptr, w_ptr = G, H, (n - q_tiles) * BLOCK_N, dk_ptr, k_weight_ptr
        stride_B, stride_L, stride_N = stride_kB, stride_kL, stride_kN
    if n >= q_tiles + k_tiles:
        first, start_N, dy_ptr = H + G, (n - q_tiles - k_tiles) * BLOCK_N, dv_ptr
        stride_B, stride_L, stride_N = stride_vB, stride_vL, stride_vN
    offs_N = start_N + tl.arange(0, BLOCK_N)[None, :, None]

    if n >= q_tiles + k_tiles:
        offs_K = tl.arange(0, BLOCK_K)[None, None, :]
        for block in tl.range(share, blocks, shares, num_stages=STAGES):
            b, offs_L = block // n_L, block % n_L * BLOCK_L + tl.arange(0, BLOCK_L)[:, None, None]
            mask = (offs_L < L) & (offs_N < heads) & (offs_K < K)
            dy_ptrs = dy_ptr + b * stride_B + offs_L * stride_L + offs_N * stride_N + offs_K
            dx_ptrs = dqkv_ptr + ((b * L + offs_L) * N + first + offs_N) * K + offs_K
            tl.store(dx_ptrs, tl.load(dy_ptrs, mask=mask, other=0.0), mask=mask)
    else:
        if w_ptr is not None:
            w1, w2, w_rest = _load_features(
                w_ptr + tl.zeros((1, 1, 1), tl.int32), J, K, True,
                INTERLEAVED, BLOCK_J, BLOCK_R, ACC,
            )  # fmt: skip
            dw1 = tl.zeros((BLOCK_L, BLOCK_N, BLOCK_J), ACC)
            dw2 = tl.zeros((BLOCK_L, BLOCK_N, BLOCK_J), ACC)
            dw_rest = tl.zeros((BLOCK_L, BLOCK_N, BLOCK_R if BLOCK_R > 0 else 1), ACC)
        for block in tl.range(share, blocks, shares, num_stages=STAGES):
            b, offs_L = block // n_L, block % n_L * BLOCK_L + tl.arange(0, BLOCK_L)[:, None, None]
            mask_LN = (offs_L < L) & (offs_N < heads)
            dy_ptrs = dy_ptr + b * stride_B + offs_L * stride_L + offs_N * stride_N
            dy1, dy2, g_rest = _load_features(
                dy_ptrs, J, K, mask_LN, INTERLEAVED, BLOCK_J, BLOCK_R, ACC
            )
            cos_LJ, sin_LJ = _angles(cos_ptr, sin_ptr, offset_ptr, b, offs_L, L, J, S, BLOCK_J, ACC)
            g1 = dy1 * cos_LJ + dy2 * sin_LJ
            g2 = dy2 * cos_LJ - dy1 * sin_LJ
            if w_ptr is not None:
                x_ptrs = qkv_ptr + b * stride_xB + offs_L * stride_xL + (first + offs_N) * stride_xN
                x1, x2, x_rest = _load_features(
                    x_ptrs, J, K, mask_LN, INTERLEAVED, BLOCK_J, BLOCK_R, ACC
                )
                r_LN = 1 / tl.sqrt(_sum_of_features(x1 * x1, x2 * x2, x_rest * x_rest) / K + eps)
                r_LN = tl.where(mask_LN, r_LN, 0.0)  # without eps it is infinite where x is 0
                gx1, gx2, gx_rest = g1 * x1, g2 * x2, g_rest * x_rest
                dw1 += gx1 * r_LN
                dw2 += gx2 * r_LN
                dw_rest += gx_rest * r_LN
                scale_LN = _sum_of_features(gx1 * w1, gx2 * w2, gx_rest * w_rest) / K * r_LN * r_LN
                g1 = r_LN * (g1 * w1 - x1 * scale_LN)
                g2 = r_LN * (g2 * w2 - x2 * scale_LN)
                g_rest = r_LN * (g_rest * w_rest - x_rest * scale_LN)
            dx_ptrs = dqkv_ptr + ((b * L + offs_L) * N + first + offs_N) * K
            _store_features(dx_ptrs, g1, g2, g_rest, J, K, mask_LN, INTERLEAVED, BLOCK_J, BLOCK_R)
        if dw_ptr is not None:
            _store_features(
                dw_ptr + p * K + tl.zeros((1, 1, 1), tl.int32), _sum_of_heads(dw1),
                _sum_of_heads(dw2), _sum_of_heads(dw_rest), J, K, True,
                INTERLEAVED, BLOCK_J, BLOCK_R,
            )  # fmt: skip


@triton.jit
def _sum_of_heads(x):
    """Return `[1, 1, K]`."""
    return tl.sum(tl.sum(x, axis=0, keep_dims=True), axis=1, keep_dims=True)


@triton.jit
def _qk_norm_rope_weights_kernel(
    partials_ptr, dq_weight_ptr, dk_weight_ptr, P, K, q_tiles, k_tiles,
    BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    offs_K = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    first, last, total_ptr = 0, q_tiles, dq_weight_ptr
    if tl.program_id(1) == 1:
        first, last, total_ptr = q_tiles, q_tiles + k_tiles, dk_weight_ptr
    total_K = tl.zeros((BLOCK_K,), dtype=partials_ptr.dtype.element_ty)
    for p in range(0, P, BLOCK_P):
        offs_P = p + tl.arange(0, BLOCK_P)
        n = offs_P % (q_tiles + 2 * k_tiles)
        mask_PK = ((offs_P < P) & (n >= first) & (n < last))[:, None] & (offs_K < K)[None, :]
        ptrs_PK = partials_ptr + offs_P[:, None] * K + offs_K[None, :]
        total_K += tl.sum(tl.load(ptrs_PK, mask=mask_PK, other=0.0), axis=0)
    tl.store(total_ptr + offs_K, total_K, mask=offs_K < K)
