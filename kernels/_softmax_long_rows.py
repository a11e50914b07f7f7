"""Softmax of rows too long for registers: read twice, by one program or by several.

A row's columns are counted from a multiple of 16 elements of memory, from which 128-bit accesses
are possible for any N: column h is the row's first, 0 <= h < 16. Three parts:

    edges  [h, LEAD) and [cut, h + N): fewer than 32 columns, one by one
    bulk   [LEAD, cut): from one multiple of 16 to another, in blocks, shared among the programs

LEAD is 16 where rows begin anywhere and input and output begin alike; else h and LEAD are 0.

Several programs per row: the first launch writes the maximum and the sum of every share (backward:
its two sums) to memory, the second combines them, in order, and writes. Shares depend on N and h
alone, so results repeat bit for bit and are the same on every GPU. Where LEAD is 16, equal rows may
differ by a rounding: their blocks begin at other columns.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritium.kernels.launcher import Launcher
from tritium.kernels.runtime import accumulator, cdiv, power_of_2

BLOCK = 4096  # columns per step: 16 a thread, of float32 half as many
# Split a row over several programs if there are fewer than 264 rows (2 per SM of an H100) and the
# row has 8 blocks or more. Estimated, not measured.
FEW_ROWS = 264
LONG_ROW = 8 * BLOCK
SHARES = 64  # most programs per row
LOG2E = tl.constexpr(math.log2(math.e))


@triton.jit
def softmax_visible(m, N, Lq, CAUSAL: tl.constexpr):
    # Leading columns visible to row m.
    return N - Lq + 1 + m % Lq if CAUSAL else m * 0 + N


@triton.jit
def softmax_norm(total, LOG: tl.constexpr):
    return tl.log(total) if LOG else 1.0 / total


@triton.jit
def softmax_normalise(z, norm, LOG: tl.constexpr):
    # z is already less the row's maximum.
    return z - norm if LOG else tl.exp2(z * LOG2E) * norm


@triton.jit
def softmax_lse(top, total):
    return tl.where(top == float("inf"), top, top + tl.log(total))


@triton.jit
def softmax_gradient(y, dy, total, scale, LOG: tl.constexpr):
    # total: sum(dy) for the logarithm, sum(dy · y) / sum(y) - dlse otherwise.
    return scale * (dy - tl.exp2(y * LOG2E) * total) if LOG else scale * y * (dy - total)


@triton.jit
def _softmax_online(top_B, total_B, z_BL):
    # Each thread keeps the maximum of its own lanes: the loop has no barrier. The maximum
    # starts finite, so lanes that are all -inf so far give exp2(-inf) = 0 and not -inf - -inf.
    new_B = tl.maximum(top_B, tl.max(z_BL, axis=1, keep_dims=True))
    exp_BL = tl.exp2((z_BL - new_B) * LOG2E)
    total_B = total_B * tl.exp2((top_B - new_B) * LOG2E) + tl.sum(exp_BL, axis=1, keep_dims=True)
    return new_B, total_B


@triton.jit
def _softmax_row(m, N, LEAD: tl.constexpr):
    # Origin of the columns of row m, its first column, and the end of the bulk.
    row = m * N // 16 * 16 if LEAD else m * N
    h = m * N - row
    return row, h, tl.maximum((h + N) // 16 * 16, LEAD)


@triton.jit
def _softmax_edges(h, N, cut, share, LEAD: tl.constexpr):
    # The edges' columns, and which of them are the row's: they belong to the first share.
    offs_E = tl.arange(0, 16 + LEAD)
    c_E = tl.where(offs_E < LEAD, offs_E, offs_E - LEAD + cut)
    return c_E, (c_E >= h) & (c_E < tl.where(share == 0, h + N, 0))


@triton.jit
def _softmax_bulk(end, cut, share, width, LEAD: tl.constexpr, BLOCK: tl.constexpr):
    # The share's first column, where its last visible block begins, its visible end and its end.
    first = LEAD + share * width
    last = tl.maximum(tl.minimum(first + width, cut), first)
    seen = tl.maximum(tl.minimum(end, last), first)
    return first, first + (seen - first) // BLOCK * BLOCK, seen, last


@triton.jit
def _softmax_forward_loop_kernel(
    x_ptr, y_ptr, lse_ptr, part_ptr, N, Lq, stride_xM, scale: tl.float64, width,
    CAUSAL: tl.constexpr, LOG: tl.constexpr, MEASURE: tl.constexpr, WRITE: tl.constexpr,
    LEAD: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr, SHARES: tl.constexpr,
    LOWEST: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    scale = tl.full((), scale, ACC)  # a float without a type arrives as float32
    m = tl.program_id(0).to(tl.int64)
    share = tl.program_id(1).to(tl.int64)
    row, h, cut = _softmax_row(m, N, LEAD)
    end = h + softmax_visible(m, N, Lq, CAUSAL)
    c_E, own_E = _softmax_edges(h, N, cut, share, LEAD)
    first, tail, seen, last = _softmax_bulk(end, cut, share, width, LEAD, BLOCK)
    x_ptr += row if LEAD else m * stride_xM
    y_ptr += row
    part_ptrs_S = m * 2 * SHARES + tl.arange(0, SHARES)
    offs_BL = tl.arange(0, BLOCK // LANES)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    # Tails are peeled off: one mask in a loop would cost it its 16-byte accesses. And their reads
    # stop at a multiple of 16 columns: a mask that changes elsewhere is read one by one.
    left = (seen - tail).to(tl.int32)
    read_BL = offs_BL < (left + 15) // 16 * 16
    seen_BL = offs_BL < left

    if MEASURE:  # its reads stay in the cache for those that follow, which leave it
        top_B = tl.full((BLOCK // LANES, 1), LOWEST, dtype=ACC)
        total_B = tl.zeros((BLOCK // LANES, 1), dtype=ACC)
        for start in range(first, tail, BLOCK):
            x_BL = tl.load(x_ptr + start + offs_BL, eviction_policy="evict_last").to(ACC)
            top_B, total_B = _softmax_online(top_B, total_B, x_BL * scale)
        x_BL = tl.load(x_ptr + tail + offs_BL, mask=read_BL, other=0.0).to(ACC)
        z_BL = tl.where(seen_BL, x_BL * scale, -float("inf"))
        top_B, total_B = _softmax_online(top_B, total_B, z_BL)
        x_E = tl.load(x_ptr + c_E, mask=own_E, other=0.0).to(ACC)
        z_E = tl.where(own_E & (c_E < end), x_E * scale, -float("inf"))
        top = tl.maximum(tl.max(top_B), tl.max(z_E))
        total = tl.sum(total_B * tl.exp2((top_B - top) * LOG2E))
        total += tl.sum(tl.exp2((z_E - top) * LOG2E))
    else:
        mask_S = tl.arange(0, SHARES) < tl.num_programs(1)
        top_S = tl.load(part_ptr + part_ptrs_S, mask=mask_S, other=LOWEST)
        total_S = tl.load(part_ptr + part_ptrs_S + SHARES, mask=mask_S, other=0.0)
        top = tl.max(top_S)
        total = tl.sum(total_S * tl.exp2((top_S - top) * LOG2E))

    if WRITE:
        norm = softmax_norm(total, LOG)
        hidden = -float("inf") if LOG else 0.0
        # Read again rather than kept: registers kept across the loop spill.
        x_E = tl.load(x_ptr + c_E, mask=own_E, other=0.0).to(ACC)
        y_E = tl.where(c_E < end, softmax_normalise(x_E * scale - top, norm, LOG), hidden)
        tl.store(y_ptr + c_E, y_E, mask=own_E)
        x_BL = tl.load(x_ptr + tail + offs_BL, mask=read_BL, other=0.0).to(ACC)
        y_BL = tl.where(seen_BL, softmax_normalise(x_BL * scale - top, norm, LOG), hidden)
        tl.store(y_ptr + tail + offs_BL, y_BL, mask=offs_BL < last - tail)
        # Backwards: what was read last is what the cache holds most surely.
        for back in range(first, tail, BLOCK):
            start = first + tail - BLOCK - back
            x_BL = tl.load(x_ptr + start + offs_BL, eviction_policy="evict_first").to(ACC)
            tl.store(y_ptr + start + offs_BL, softmax_normalise(x_BL * scale - top, norm, LOG))
        if CAUSAL:
            for start in range(tail + BLOCK, last, BLOCK):
                hidden_BL = tl.full((BLOCK // LANES, LANES), hidden, dtype=ACC)
                tl.store(y_ptr + start + offs_BL, hidden_BL, mask=start + offs_BL < last)
        if lse_ptr is not None:
            tl.store(lse_ptr + m, softmax_lse(top, total), mask=share == 0)
    else:
        tl.store(part_ptr + m * 2 * SHARES + share, top)
        tl.store(part_ptr + (m * 2 + 1) * SHARES + share, total)


@triton.jit
def _softmax_backward_loop_kernel(
    dy_ptr, y_ptr, dlse_ptr, dx_ptr, part_ptr, N, Lq, stride_dyM, stride_dlseM,
    scale: tl.float64, width,
    CAUSAL: tl.constexpr, LOG: tl.constexpr, MEASURE: tl.constexpr, WRITE: tl.constexpr,
    LEAD: tl.constexpr, BLOCK: tl.constexpr, SHARES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    scale = tl.full((), scale, ACC)  # a float without a type arrives as float32
    m = tl.program_id(0).to(tl.int64)
    share = tl.program_id(1).to(tl.int64)
    row, h, cut = _softmax_row(m, N, LEAD)
    end = h + softmax_visible(m, N, Lq, CAUSAL)
    c_E, own_E = _softmax_edges(h, N, cut, share, LEAD)
    first, tail, seen, last = _softmax_bulk(end, cut, share, width, LEAD, BLOCK)
    dy_ptr += row if LEAD else m * stride_dyM
    y_ptr += row
    dx_ptr += row
    part_ptrs_S = m * 2 * SHARES + tl.arange(0, SHARES)
    offs_B = tl.arange(0, BLOCK)
    left = (seen - tail).to(tl.int32)
    read_B = offs_B < (left + 15) // 16 * 16
    seen_B = offs_B < left

    seen_E = own_E & (c_E < end)
    dy_E = tl.load(dy_ptr + c_E, mask=seen_E, other=0.0).to(ACC)
    y_E = tl.load(y_ptr + c_E, mask=seen_E, other=0.0).to(ACC)
    if MEASURE:
        dy_B = tl.load(dy_ptr + tail + offs_B, mask=read_B, other=0.0).to(ACC)
        y_B = tl.load(y_ptr + tail + offs_B, mask=read_B, other=0.0).to(ACC)
        total_B = tl.where(seen_B, dy_B if LOG else dy_B * y_B, 0.0)
        mass_B = tl.where(seen_B, y_B, 0.0)
        for start in range(first, tail, BLOCK):
            dy_B = tl.load(dy_ptr + start + offs_B, eviction_policy="evict_last").to(ACC)
            if LOG:
                total_B += dy_B
            else:
                y_B = tl.load(y_ptr + start + offs_B, eviction_policy="evict_last").to(ACC)
                mass_B += y_B
                total_B += dy_B * y_B
        total = tl.sum(total_B) + tl.sum(dy_E if LOG else dy_E * y_E)
        mass = tl.sum(mass_B) + tl.sum(y_E)
    else:
        mask_S = tl.arange(0, SHARES) < tl.num_programs(1)
        total = tl.sum(tl.load(part_ptr + part_ptrs_S, mask=mask_S, other=0.0))
        mass = tl.sum(tl.load(part_ptr + part_ptrs_S + SHARES, mask=mask_S, other=0.0))

    if WRITE:
        total = total if LOG else total / mass
        if dlse_ptr is not None:
            total -= tl.load(dlse_ptr + m * stride_dlseM)
        dx_E = tl.where(seen_E, softmax_gradient(y_E, dy_E, total, scale, LOG), 0.0)
        tl.store(dx_ptr + c_E, dx_E, mask=own_E)
        # Read again rather than kept: registers kept across the loop spill.
        dy_B = tl.load(dy_ptr + tail + offs_B, mask=read_B, other=0.0).to(ACC)
        y_B = tl.load(y_ptr + tail + offs_B, mask=read_B, other=0.0).to(ACC)
        dx_B = tl.where(seen_B, softmax_gradient(y_B, dy_B, total, scale, LOG), 0.0)
        tl.store(dx_ptr + tail + offs_B, dx_B, mask=offs_B < last - tail)
        for back in range(first, tail, BLOCK):
            start = first + tail - BLOCK - back
            dy_B = tl.load(dy_ptr + start + offs_B, eviction_policy="evict_first").to(ACC)
            y_B = tl.load(y_ptr + start + offs_B, eviction_policy="evict_first").to(ACC)
            tl.store(dx_ptr + start + offs_B, softmax_gradient(y_B, dy_B, total, scale, LOG))
        if CAUSAL:
            for start in range(tail + BLOCK, last, BLOCK):
                zeros_B = tl.zeros((BLOCK,), dtype=ACC)
                tl.store(dx_ptr + start + offs_B, zeros_B, mask=start + offs_B < last)
    else:
        tl.store(part_ptr + m * 2 * SHARES + share, total)
        tl.store(part_ptr + (m * 2 + 1) * SHARES + share, mass)


_forward_loop = Launcher(_softmax_forward_loop_kernel)
_backward_loop = Launcher(_softmax_backward_loop_kernel)


def _launch(
    launch: Launcher, tensors: tuple[Tensor | None, ...], in_MN: Tensor, row: tuple[float, ...],
    kind: tuple[bool, bool], constants: tuple,
) -> None:  # fmt: skip
    """Launch a kernel over rows that are read from `in_MN`: once, or twice if split."""
    M, N = in_MN.shape
    alike = M == 1 or in_MN.stride(0) == N
    block = BLOCK if in_MN.element_size() < 4 else BLOCK // 2
    constants = (16 if alike and N % 16 else 0, block, *constants)
    if M >= FEW_ROWS or N < LONG_ROW:
        # 16 warps for 16 bits, and not 8: half as many rows are in flight, and those stay in the L2
        # cache until they are read again (backward, V = 50304: 26 MB, of an H100's 50). Of float32
        # they would spill on sm_80.
        lead, block, *others = constants
        more = 2 if in_MN.element_size() < 4 else 1
        width = cdiv(N, 2 * BLOCK) * 2 * BLOCK
        launch(
            (M, 1), (*tensors, None), (N, *row, width),
            (*kind, True, True, lead, more * block, *others), num_warps=8 * more,
        )  # fmt: skip
        return
    width = max(BLOCK, power_of_2(cdiv(N, SHARES)))
    part_M2S = in_MN.new_empty(M, 2, SHARES, dtype=torch.promote_types(in_MN.dtype, torch.float32))
    for measure in (True, False):
        launch(
            (M, cdiv(N, width)), (*tensors, part_M2S), (N, *row, width),
            (*kind, measure, not measure, *constants), num_warps=8,
        )  # fmt: skip


def launch_forward(
    x_MN: Tensor, y_MN: Tensor, lse_M: Tensor | None, Lq: int, scale: float, log: bool
) -> None:
    """Write the (log-)softmax of `x_MN`, and its lse where one is given."""
    acc = torch.promote_types(x_MN.dtype, torch.float32)
    constants = 16 // x_MN.element_size(), SHARES, torch.finfo(acc).min, accumulator(x_MN.dtype)
    row = Lq, x_MN.stride(0), float(scale)
    _launch(_forward_loop, (x_MN, y_MN, lse_M), x_MN, row, (Lq > 0, log), constants)


def launch_backward(
    dy_MN: Tensor, y_MN: Tensor, dlse_M: Tensor | None, dx_MN: Tensor,
    Lq: int, scale: float, log: bool,
) -> None:  # fmt: skip
    """Write the gradient of the (log-)softmax `y_MN`."""
    row = Lq, dy_MN.stride(0), 0 if dlse_M is None else dlse_M.stride(0), float(scale)
    tensors = (dy_MN, y_MN, dlse_M, dx_MN)
    _launch(_backward_loop, tensors, dy_MN, row, (Lq > 0, log), (SHARES, accumulator(y_MN.dtype)))
