"""Loss, statistics and gradient of rows of logits, for cross_entropy and linear_cross_entropy.

The formulas are in cross_entropy.py, the statistics in _cross_entropy_options.py. One program
processes one row of T: a first pass over its V classes keeps a running maximum and sums for every
few lanes of a thread, so that its loop has no barrier; a second pass writes the gradient, over the
logits themselves if asked. Options that a call does not use are not compiled into its kernel.

A row's columns are counted from a multiple of 16 elements of memory, from which 128-bit accesses
are possible for any V: column h is its first class, 0 <= h < 16. Three parts, of which a short row
has only the bulk, and a row whose V and stride are multiples of 16 no edges:

    edges  [h, LEAD) and [cut, h + V): fewer than 32 columns, one by one
    bulk   [LEAD, cut): from one multiple of 16 to another, in blocks, the last one masked

Where both passes run, the first KEPT blocks of the bulk may stay in registers for the second pass
(`_packed_rows.py`), which reads what is left backwards; if WHOLE, that is one masked block that
stays, too.

LEAD is 16 where rows begin anywhere, and all that is as long as a row begins alike; else h and LEAD
are 0.

Names in the kernel, with m the running maximum and s the sum of exp(z_V - m):

    hit      weight of the target class: (1 - label_smoothing) · w_t; 1 - label_smoothing if SOFT
    uniform  label_smoothing / n_classes
    mass     sum of a_V, the weight that every class has apart from `hit`
    dot      sum of a_V · z_V
    spread   sum of exp(z_V - m) · (z_V - m), from which the entropy follows
    best     index of the first maximum
    total    mass + hit + 2 · z_loss · w_t · lse: the factor of p_V in the gradient
    give     incoming gradient · logit_scale, times the scale of a mean
"""

import triton
import triton.language as tl

from tritium.kernels._cross_entropy_options import LOWEST, LOWEST_GAP, Row
from tritium.kernels._packed_rows import packed_load, packed_offsets, unpacked

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
LOWEST, LOWEST_GAP = tl.constexpr(LOWEST), tl.constexpr(LOWEST_GAP)
NOWHERE = tl.constexpr(0x7FFFFFFF)  # beyond every class of a row
MAXIMUM, SUM, MASS, DOT, TARGET, SPREAD = (tl.constexpr(int(row)) for row in Row)


@triton.jit
def _capped(x, logit_scale, softcap, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, ACC: tl.constexpr):
    if SCALE:
        x *= logit_scale
    if SOFTCAP:
        # tanh(u) by exp2 of a non-positive number, which cannot overflow; near 0, where 1 - e
        # cancels, by its series.
        inverse = tl.full((), 1.0, ACC) / softcap
        u = tl.abs(x) * inverse
        e = tl.exp2(u * -LOG2_E * 2)
        u2 = u * u
        series = 1 - u2 * (1 / 3 - u2 * (2 / 15 - u2 * (17 / 315 - u2 * (62 / 2835))))
        near = u < (0.25 if ACC is tl.float32 else 0.001)
        z = softcap * tl.where(near, u * series, (1 - e) / (1 + e))
        x = tl.where(x < 0, -z, z)
    return x


@triton.jit
def _read(x_ptr, offs_V, own_V, MASKED: tl.constexpr, KEEP: tl.constexpr):
    if MASKED:
        return tl.load(x_ptr + offs_V, mask=own_V, other=0.0, eviction_policy=KEEP)
    else:
        return tl.load(x_ptr + offs_V, eviction_policy=KEEP)


@triton.jit
def _logits(
    x_V, own_V, logit_scale, softcap,
    MASKED: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    z_V = _capped(x_V.to(ACC), logit_scale, softcap, SCALE, SOFTCAP, ACC)
    if MASKED:
        # Mask after the cap: a padded lane would otherwise come out as -softcap and be summed.
        z_V = tl.where(own_V, z_V, float("-inf"))
    return z_V


@triton.jit
def _masses(
    q_ptr, w_ptr, offs_V, own_V, hit, uniform,
    MASKED: tl.constexpr, SOFT: tl.constexpr, WEIGHT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    # a_V: the weight of each class, except `hit` of a hard target; 0 on padding.
    a_V = tl.where(own_V, uniform, 0.0) if MASKED else tl.zeros(offs_V.shape, ACC) + uniform
    if SOFT:
        if MASKED:
            a_V += hit * tl.load(q_ptr + offs_V, mask=own_V, other=0.0).to(ACC)
        else:
            a_V += hit * tl.load(q_ptr + offs_V).to(ACC)
    if WEIGHT:
        if MASKED:
            a_V *= tl.load(w_ptr + offs_V, mask=own_V, other=0.0).to(ACC)
        else:
            a_V *= tl.load(w_ptr + offs_V).to(ACC)
    return a_V


@triton.jit
def _accumulate(
    m, s, dot, mass, spread, best, x_V, q_ptr, w_ptr, offs_V, own_V, start, hit, uniform,
    logit_scale, softcap,
    MASKED: tl.constexpr, SOFT: tl.constexpr, WEIGHT: tl.constexpr, SMOOTHING: tl.constexpr,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, STATS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    z_V = _logits(x_V, own_V, logit_scale, softcap, MASKED, SCALE, SOFTCAP, ACC)
    new_m = tl.maximum(m, tl.max(z_V, axis=1))
    gap_V = z_V - new_m[:, None]
    e_V = tl.exp2(gap_V * LOG2_E)
    shrink = tl.exp2((m - new_m) * LOG2_E)
    if STATS:
        # Where exp is 0 a gap of -inf would make the product nan.
        spread = shrink * (spread + s * tl.maximum(m - new_m, LOWEST_GAP))
        spread += tl.sum(e_V * tl.maximum(gap_V, LOWEST_GAP), axis=1)
        # Among the lanes: their numbers are constants, where columns would take registers.
        LANES: tl.constexpr = z_V.shape[1]
        lanes = tl.arange(0, LANES)[None, :]
        lane = tl.min(tl.where(z_V == new_m[:, None], lanes, LANES), axis=1)
        at = tl.where(lane < LANES, start + tl.min(offs_V, axis=1) + lane, NOWHERE)
        best = tl.where(new_m > m, at, tl.minimum(at, best))
    s = s * shrink + tl.sum(e_V, axis=1)
    if SOFT or SMOOTHING:
        a_V = _masses(q_ptr, w_ptr, offs_V, own_V, hit, uniform, MASKED, SOFT, WEIGHT, ACC)
        if MASKED:
            z_V = tl.where(own_V, z_V, 0.0)
        dot += tl.sum(a_V * z_V, axis=1)
        if SOFT:
            mass += tl.sum(a_V, axis=1)
    return new_m, s, dot, mass, spread, best


@triton.jit
def _store_gradient(
    dx_ptr, x_V, q_ptr, w_ptr, offs_V, own_V, m, scale, hit, uniform, logit_scale, softcap,
    MASKED: tl.constexpr, SOFT: tl.constexpr, WEIGHT: tl.constexpr, SMOOTHING: tl.constexpr,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    z_V = _logits(x_V, own_V, logit_scale, softcap, MASKED, SCALE, SOFTCAP, ACC)
    dz_V = scale * tl.exp2((z_V - m) * LOG2_E)
    if SOFT or SMOOTHING:
        dz_V -= _masses(q_ptr, w_ptr, offs_V, own_V, hit, uniform, MASKED, SOFT, WEIGHT, ACC)
    if SOFTCAP:
        u_V = z_V * (tl.full((), 1.0, ACC) / softcap)
        dz_V *= 1 - u_V * u_V
    if MASKED:
        tl.store(dx_ptr + offs_V, dz_V.to(dx_ptr.dtype.element_ty), mask=own_V)
    else:
        tl.store(dx_ptr + offs_V, dz_V.to(dx_ptr.dtype.element_ty))


@triton.jit
def _origin(t, stride, LEAD: tl.constexpr):
    # Where the columns of row t are counted from.
    return t * stride // 16 * 16 if LEAD else t * stride


@triton.jit
def _cross_entropy_kernel(
    x_ptr, target_ptr, w_ptr, w_sum_ptr, dloss_ptr, mean_ptr, loss_ptr, values_ptr, argmax_ptr,
    dx_ptr, V, first, n_classes, stride_xT, stride_qT, stride_dxT, stride_dlossT, stride_valuesR,
    ignore_index, label_smoothing: tl.float64, z_loss: tl.float64, softcap: tl.float64,
    logit_scale: tl.float64,
    LOSS: tl.constexpr, GRADIENT: tl.constexpr, INCOMING: tl.constexpr, MEAN: tl.constexpr,
    ALL_VALUES: tl.constexpr, SOFT: tl.constexpr, WEIGHT: tl.constexpr, SMOOTHING: tl.constexpr,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, STATS: tl.constexpr, ACC: tl.constexpr,
    EDGES: tl.constexpr, LEAD: tl.constexpr, BLOCK_V: tl.constexpr, LANES: tl.constexpr,
    KEPT: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    # LOSS computes the row's statistics (else they are read), GRADIENT uses them; both together
    # may overwrite the logits. Soft targets are `[T, V]`, where target_ptr is otherwise `[T]`.
    # A float without a type arrives as float32.
    label_smoothing, z_loss = tl.full((), label_smoothing, ACC), tl.full((), z_loss, ACC)
    softcap, logit_scale = tl.full((), softcap, ACC), tl.full((), logit_scale, ACC)
    t = tl.program_id(0).to(tl.int64)
    h = (t * stride_xT - _origin(t, stride_xT, LEAD)).to(tl.int32) if LEAD else 0
    x_ptr += _origin(t, stride_xT, LEAD)
    dx_ptr += _origin(t, stride_dxT, LEAD)
    values_ptr += t
    q_ptr = target_ptr + _origin(t, stride_qT, LEAD)
    offs_V = tl.arange(0, BLOCK_V // LANES)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    cut = V
    if EDGES:
        cut = tl.maximum((h + V) // 16 * 16, LEAD)
        offs_E = tl.arange(0, BLOCK_V // LANES)[:, None]  # one column for each sum of pass 1
        edge_V = tl.where(offs_E < LEAD, offs_E, offs_E - LEAD + cut)
        on_edge_V = (edge_V >= h) & (edge_V < h + V) & (offs_E < 16 + LEAD)
    full = LEAD + (KEPT if WHOLE else (cut - LEAD) // BLOCK_V) * BLOCK_V
    if KEPT or WHOLE:
        offs_P = packed_offsets(BLOCK_V, LANES)
        hidden_0 = tl.program_id(1)
    # A multiple of 16 where there are edges: a mask that changes elsewhere is read one by one.
    left = (cut - full) // 16 * 16 if EDGES else cut - full
    tail_V = offs_V < left
    if SOFT:
        counts = True
    else:
        target = tl.load(target_ptr + t)
        counts = target != ignore_index

    if counts:
        uniform = label_smoothing / n_classes
        hit = 1 - label_smoothing
        w_t = tl.full((), 1.0, ACC)
        mass = tl.full((), 0.0, ACC)
        if not SOFT:
            # A target outside [0, n_classes) makes the row's loss and gradient nan; one of another
            # rank's classes has its logit on that rank.
            known = (target >= 0) & (target < n_classes)
            local = target - first + h
            owned = (local >= h) & (local < h + V) & known
            x_t = tl.load(x_ptr + local, mask=owned, other=0.0).to(ACC)
            z_t = _capped(x_t, logit_scale, softcap, SCALE, SOFTCAP, ACC)
            if WEIGHT:
                w_t = tl.load(w_ptr + target, mask=known, other=0.0).to(ACC)
            w_t = tl.where(known, w_t, float("nan"))
            hit *= w_t
            if SMOOTHING:
                mass += label_smoothing
                if WEIGHT:
                    mass = uniform * tl.load(w_sum_ptr).to(ACC)
        w_ptr += first - h

        if LOSS:
            # Pass 1: running maximum and sums of every lane. What pass 2 reads stays in the cache.
            KEEP: tl.constexpr = "evict_last" if GRADIENT else "evict_first"
            m = tl.full((BLOCK_V // LANES,), LOWEST, ACC)
            s = tl.zeros((BLOCK_V // LANES,), ACC)
            dot = tl.zeros((BLOCK_V // LANES,), ACC)
            masses = tl.zeros((BLOCK_V // LANES,), ACC)
            spread = tl.zeros((BLOCK_V // LANES,), ACC)
            best = tl.full((BLOCK_V // LANES,), NOWHERE, tl.int32)
            # The tail first: sums that enter the loop as constants crash the compiler (3.6, 3.7).
            if EDGES:
                x_edge_V = _read(x_ptr, edge_V, on_edge_V, True, KEEP)
                m, s, dot, masses, spread, best = _accumulate(
                    m, s, dot, masses, spread, best, x_edge_V, q_ptr, w_ptr,
                    edge_V, on_edge_V, -h, hit, uniform, logit_scale, softcap,
                    True, SOFT, WEIGHT, SMOOTHING, SCALE, SOFTCAP, STATS, ACC,
                )  # fmt: skip
            if WHOLE:
                tail = packed_load(x_ptr, full, offs_P, left)
                m, s, dot, masses, spread, best = _accumulate(
                    m, s, dot, masses, spread, best, unpacked(tail, 0, x_ptr), q_ptr, w_ptr,
                    offs_V, tail_V, full - h, hit, uniform, logit_scale, softcap,
                    True, SOFT, WEIGHT, SMOOTHING, SCALE, SOFTCAP, STATS, ACC,
                )  # fmt: skip
            elif full < cut:
                x_V = _read(x_ptr + full, offs_V, tail_V, True, KEEP)
                m, s, dot, masses, spread, best = _accumulate(
                    m, s, dot, masses, spread, best, x_V, q_ptr + full, w_ptr + full,
                    offs_V, tail_V, full - h, hit, uniform, logit_scale, softcap,
                    True, SOFT, WEIGHT, SMOOTHING, SCALE, SOFTCAP, STATS, ACC,
                )  # fmt: skip
            kept = ()
            for i in tl.static_range(KEPT):
                word_P = packed_load(x_ptr, LEAD + i * BLOCK_V, offs_P, None)
                kept = kept + (word_P,)  # noqa: RUF005 (Triton unpacks no tuples)
                m, s, dot, masses, spread, best = _accumulate(
                    m, s, dot, masses, spread, best, unpacked(word_P, 0, x_ptr), q_ptr, w_ptr,
                    offs_V, tail_V, LEAD + i * BLOCK_V - h, hit, uniform, logit_scale, softcap,
                    False, SOFT, WEIGHT, SMOOTHING, SCALE, SOFTCAP, STATS, ACC,
                )  # fmt: skip
            if not WHOLE:
                for v in range(LEAD + KEPT * BLOCK_V, full, BLOCK_V):
                    x_V = _read(x_ptr + v, offs_V, tail_V, False, KEEP)
                    m, s, dot, masses, spread, best = _accumulate(
                        m, s, dot, masses, spread, best, x_V, q_ptr + v, w_ptr + v,
                        offs_V, tail_V, v - h, hit, uniform, logit_scale, softcap,
                        False, SOFT, WEIGHT, SMOOTHING, SCALE, SOFTCAP, STATS, ACC,
                    )  # fmt: skip
            # Merge the lanes.
            row_m = tl.max(m, axis=0)
            row_s = tl.sum(s * tl.exp2((m - row_m) * LOG2_E), axis=0)
            row_dot = tl.sum(dot, axis=0)
            # Loss of the row.
            log_s = tl.log2(row_s) * LN_2
            lse = row_m + log_s
            loss = z_loss * w_t * lse * lse
            if SOFT:
                mass = tl.sum(masses, axis=0)
            else:
                loss += hit * ((row_m - z_t) + log_s)
            if SOFT or SMOOTHING:
                loss += mass * lse - row_dot
            tl.store(loss_ptr + t, loss)
            tl.store(values_ptr + MAXIMUM * stride_valuesR, row_m)
            tl.store(values_ptr + SUM * stride_valuesR, row_s)
            if SOFT or ALL_VALUES:
                tl.store(values_ptr + MASS * stride_valuesR, mass)
            if ALL_VALUES:
                tl.store(values_ptr + DOT * stride_valuesR, row_dot)
                if SOFT:
                    tl.store(values_ptr + TARGET * stride_valuesR, 0.0)
                else:
                    own_z_t = tl.where(owned, z_t, tl.where(known, 0.0, float("nan")))
                    tl.store(values_ptr + TARGET * stride_valuesR, own_z_t)
                gap = tl.maximum(m - row_m, LOWEST_GAP)
                row_spread = tl.sum((spread + s * gap) * tl.exp2(gap * LOG2_E), axis=0)
                tl.store(values_ptr + SPREAD * stride_valuesR, row_spread)
            if STATS:
                row_best = tl.min(tl.where(m == row_m, best, NOWHERE), axis=0)
                row_best = tl.where(row_best == NOWHERE, -1, row_best.to(tl.int64) + first)
                tl.store(argmax_ptr + t, row_best)
        else:
            row_m = tl.load(values_ptr + MAXIMUM * stride_valuesR)
            row_s = tl.load(values_ptr + SUM * stride_valuesR)
            if SOFT:
                mass = tl.load(values_ptr + MASS * stride_valuesR)

        if GRADIENT:
            # Pass 2: gradient, p_V · total - a_V, times `give`.
            lse = row_m + tl.log2(row_s) * LN_2
            total = mass + 2 * z_loss * w_t * lse
            if not SOFT:
                total += hit
            give = tl.full((), 1.0, ACC)
            if INCOMING:
                give = tl.load(dloss_ptr + t * stride_dlossT).to(ACC)
            if MEAN:
                give *= tl.load(mean_ptr).to(ACC)
            if SCALE:
                give *= logit_scale
            scale = give * total / row_s
            tl.debug_barrier()  # z_t is read before anything overwrites it
            if EDGES:
                x_edge_V = _read(x_ptr, edge_V, on_edge_V, True, "evict_first")
                _store_gradient(
                    dx_ptr, x_edge_V, q_ptr, w_ptr, edge_V, on_edge_V, row_m, scale,
                    give * hit, give * uniform, logit_scale, softcap,
                    True, SOFT, WEIGHT, SMOOTHING, SCALE, SOFTCAP, ACC,
                )  # fmt: skip
            if WHOLE:
                _store_gradient(
                    dx_ptr + full, unpacked(tail, hidden_0, x_ptr), q_ptr, w_ptr, offs_V, tail_V,
                    row_m, scale, give * hit, give * uniform, logit_scale, softcap,
                    True, SOFT, WEIGHT, SMOOTHING, SCALE, SOFTCAP, ACC,
                )  # fmt: skip
            elif full < cut:
                x_V = _read(x_ptr + full, offs_V, tail_V, True, "evict_first")
                _store_gradient(
                    dx_ptr + full, x_V, q_ptr + full, w_ptr + full, offs_V, tail_V, row_m, scale,
                    give * hit, give * uniform, logit_scale, softcap,
                    True, SOFT, WEIGHT, SMOOTHING, SCALE, SOFTCAP, ACC,
                )  # fmt: skip
            if not WHOLE:
                # Backwards: what pass 1 read last is what the cache holds most surely.
                for back in range(LEAD + KEPT * BLOCK_V, full, BLOCK_V):
                    v = LEAD + KEPT * BLOCK_V + full - BLOCK_V - back
                    x_V = _read(x_ptr + v, offs_V, tail_V, False, "evict_first")
                    _store_gradient(
                        dx_ptr + v, x_V, q_ptr + v, w_ptr + v, offs_V, tail_V, row_m, scale,
                        give * hit, give * uniform, logit_scale, softcap,
                        False, SOFT, WEIGHT, SMOOTHING, SCALE, SOFTCAP, ACC,
                    )  # fmt: skip
            for i in tl.static_range(KEPT):
                v = LEAD + i * BLOCK_V
                _store_gradient(
                    dx_ptr + v, unpacked(kept[i], hidden_0, x_ptr), q_ptr, w_ptr, offs_V, tail_V,
                    row_m, scale, give * hit, give * uniform, logit_scale, softcap,
                    False, SOFT, WEIGHT, SMOOTHING, SCALE, SOFTCAP, ACC,
                )  # fmt: skip
            if not SOFT:
                # The target's element, in float32: p - 1 in bfloat16 would lose all of it where p
                # is near 1. One store, not a comparison per element.
                tl.debug_barrier()
                p_t = tl.exp2((z_t - row_m) * LOG2_E) / row_s
                dz_t = hit * (p_t - 1) + (total - hit) * p_t
                if SMOOTHING:
                    dz_t -= uniform * w_t
                if SOFTCAP:
                    dz_t *= 1 - (z_t / softcap) * (z_t / softcap)
                tl.store(dx_ptr + local, (give * dz_t).to(dx_ptr.dtype.element_ty), mask=owned)
    else:
        # Ignored row.
        if LOSS:
            tl.store(loss_ptr + t, 0.0)
            tl.store(values_ptr + MAXIMUM * stride_valuesR, 0.0)
            tl.store(values_ptr + SUM * stride_valuesR, 1.0)
            if ALL_VALUES:
                for row in range(MASS, SPREAD + 1):
                    tl.store(values_ptr + row * stride_valuesR, 0.0)
            if STATS:
                tl.store(argmax_ptr + t, -1)
        if GRADIENT:  # zeros, whatever the logits hold
            zero_V = tl.zeros(offs_V.shape, dx_ptr.dtype.element_ty)
            for i in tl.static_range(KEPT):
                tl.store(dx_ptr + LEAD + i * BLOCK_V + offs_V, zero_V)
            if not WHOLE:
                for v in range(LEAD + KEPT * BLOCK_V, full, BLOCK_V):
                    tl.store(dx_ptr + v + offs_V, zero_V)
            tl.store(dx_ptr + full + offs_V, zero_V, mask=tail_V)
            if EDGES:
                zero_E = tl.zeros(offs_E.shape, dx_ptr.dtype.element_ty)
                tl.store(dx_ptr + edge_V, zero_E, mask=on_edge_V)
