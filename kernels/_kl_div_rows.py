"""Rows of the divergence of two distributions over classes, from the logits of both.

    `rows`: student's and teacher's logits -> loss, and its gradient over the student's logits

The formulas are in linear_kl_div.py; rows are padded (_padded_rows.py).
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritium.kernels._cross_entropy_options import LOWEST, LOWEST_GAP, final_logits
from tritium.kernels._cross_entropy_rows import LN_2, LOG2_E, _capped
from tritium.kernels._padded_rows import load_logits, store_gradient, store_zeros
from tritium.kernels.launcher import Launcher
from tritium.kernels.runtime import accumulator, power_of_2, uses_triton

OP = "linear_kl_div"
LOWEST_X, LEAST = tl.constexpr(LOWEST), tl.constexpr(LOWEST_GAP)


class Divergence(NamedTuple):
    """Numbers that define the divergence."""

    beta: float
    temperature: float
    softcap: float  # 0: none
    teacher_softcap: float


def log_softmax(x_TV: Tensor, temperature: float, softcap: float | None) -> Tensor:
    """Return the logarithms of probabilities, none below `LOWEST_GAP`."""
    return scores(x_TV, temperature, softcap).log_softmax(-1).clamp_min(LOWEST_GAP)


def scores(x_TV: Tensor, temperature: float, softcap: float | None) -> Tensor:
    """Return the logits capped and tempered; a class of -inf stays excluded."""
    z_TV = final_logits(x_TV, softcap, 1.0) / temperature
    return z_TV.masked_fill(x_TV == -torch.inf, -torch.inf) if softcap else z_TV


def divergence(log_p_TV: Tensor, log_q_TV: Tensor, beta: float) -> Tensor:
    """Return the divergence of each row."""
    if beta == 0:
        return (log_p_TV.exp() * (log_p_TV - log_q_TV)).sum(-1)
    if beta == 1:
        return (log_q_TV.exp() * (log_q_TV - log_p_TV)).sum(-1)
    log_m_TV = torch.logaddexp(log_p_TV + math.log(beta), log_q_TV + math.log(1 - beta))
    of_p_T = (log_p_TV.exp() * (log_p_TV - log_m_TV)).sum(-1)
    return beta * of_p_T + (1 - beta) * (log_q_TV.exp() * (log_q_TV - log_m_TV)).sum(-1)


@triton.jit
def _scores(
    x_ptr, offs_V, V, W, inverse, softcap,
    MASKED: tl.constexpr, SOFTCAP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    x_V = load_logits(x_ptr, offs_V, W, MASKED, ACC)
    z_V = _capped(x_V, 1.0, softcap, False, SOFTCAP, ACC) * inverse
    if SOFTCAP:
        z_V = tl.where(x_V == float("-inf"), x_V, z_V)
    return tl.where(offs_V < V, z_V, float("-inf")) if MASKED else z_V


@triton.jit
def _sums(
    m, s, x_ptr, offs_V, V, W, inverse, softcap,
    MASKED: tl.constexpr, SOFTCAP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    # The running maximum, and the sum of exponentials, of every lane.
    z_V = _scores(x_ptr, offs_V, V, W, inverse, softcap, MASKED, SOFTCAP, ACC)
    new_m = tl.maximum(m, tl.max(z_V, axis=1))
    s = s * tl.exp2((m - new_m) * LOG2_E)
    return new_m, s + tl.sum(tl.exp2((z_V - new_m[:, None]) * LOG2_E), axis=1)


@triton.jit
def _merged(m, s):
    # The maximum of a row's lanes, and the logarithm of their sum.
    row_m = tl.max(m, axis=0)
    return row_m, tl.log2(tl.sum(s * tl.exp2((m - row_m) * LOG2_E), axis=0)) * LN_2


@triton.jit
def _terms(log_q_V, log_p_V, row_of_q, beta, KIND: tl.constexpr):
    # The gradient over the student's logits, and the terms of the losses of p and of q.
    q_V, p_V = tl.exp2(log_q_V * LOG2_E), tl.exp2(log_p_V * LOG2_E)
    ratio_V = log_q_V - log_p_V
    q_to_m_V = ratio_V
    if KIND == "forward":
        dz_V = q_V - p_V
        terms_p_V = p_V * -ratio_V
    else:
        if KIND == "between":
            # m divided by the larger of p and q: nothing overflows.
            shrunk_V = tl.exp2(-tl.abs(ratio_V) * LOG2_E)
            larger_q = ratio_V > 0
            log_m_V = LN_2 * tl.log2(
                tl.where(larger_q, beta * shrunk_V + (1 - beta), beta + (1 - beta) * shrunk_V)
            )
            q_to_m_V = tl.where(larger_q, 0.0, ratio_V) - log_m_V
        dz_V = q_V * (q_to_m_V - row_of_q)
        if KIND == "between":
            dz_V *= 1 - beta
        terms_p_V = p_V * (q_to_m_V - ratio_V)
    return dz_V, terms_p_V, q_V * q_to_m_V


@triton.jit
def _through_cap(dz_V, z_V, inverse, softcap):
    # A class of -inf is excluded, and has no gradient.
    u_V = z_V / (inverse * softcap)
    return tl.where(z_V == float("-inf"), 0.0, dz_V * (1 - u_V * u_V))


@triton.jit
def _diverge(
    of_p, of_q, x_ptr, y_ptr, offs_V, V, W, m_x, log_s_x, m_y, log_s_y, row_of_q, give,
    beta, inverse, softcap, teacher_softcap,
    MASKED: tl.constexpr, KIND: tl.constexpr, LOSS: tl.constexpr, GRADIENT: tl.constexpr,
    SOFTCAP: tl.constexpr, TEACHER_SOFTCAP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    # LOSS adds the terms of p and of q; GRADIENT overwrites the student's logits.
    x_V = _scores(x_ptr, offs_V, V, W, inverse, softcap, MASKED, SOFTCAP, ACC)
    y_V = _scores(y_ptr, offs_V, V, W, inverse, teacher_softcap, MASKED, TEACHER_SOFTCAP, ACC)
    log_q_V = tl.maximum((x_V - m_x) - log_s_x, LEAST)
    log_p_V = tl.maximum((y_V - m_y) - log_s_y, LEAST)
    dz_V, terms_p_V, terms_q_V = _terms(log_q_V, log_p_V, row_of_q, beta, KIND)
    if LOSS:
        if KIND != "reverse":
            of_p += tl.sum(terms_p_V, axis=1)
        if KIND != "forward":
            of_q += tl.sum(terms_q_V, axis=1)
    if GRADIENT:
        dz_V *= give
        if SOFTCAP:
            dz_V = _through_cap(dz_V, x_V, inverse, softcap)
        store_gradient(x_ptr, offs_V, V, W, dz_V, MASKED)
    return of_p, of_q


@triton.jit
def _linear_kl_div_kernel(
    x_ptr, y_ptr, counts_ptr, dloss_ptr, loss_ptr,
    V, W, stride_xC, stride_dlossC, beta: tl.float64, temperature: tl.float64,
    softcap: tl.float64, teacher_softcap: tl.float64,
    KIND: tl.constexpr, GRADIENT: tl.constexpr, COUNTS: tl.constexpr, SOFTCAP: tl.constexpr,
    TEACHER_SOFTCAP: tl.constexpr, ACC: tl.constexpr, BLOCK_V: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    beta = tl.full((), beta, ACC)
    inverse = 1 / tl.full((), temperature, ACC)
    softcap, teacher_softcap = tl.full((), softcap, ACC), tl.full((), teacher_softcap, ACC)
    t = tl.program_id(0).to(tl.int64)
    x_ptr += t * stride_xC
    y_ptr += t * stride_xC
    offs_V = tl.arange(0, BLOCK_V // LANES)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    full = V // BLOCK_V * BLOCK_V
    counts = True
    if COUNTS:
        counts = tl.load(counts_ptr + t) != 0
    if counts:
        # Pass 1: the normalisers of both rows. Tails first: sums that enter a loop as constants
        # crash the compiler (3.6, 3.7).
        m_x = tl.full((BLOCK_V // LANES,), LOWEST_X, ACC)
        m_y = tl.full((BLOCK_V // LANES,), LOWEST_X, ACC)
        s_x = tl.zeros((BLOCK_V // LANES,), ACC)
        s_y = tl.zeros((BLOCK_V // LANES,), ACC)
        of_p = tl.zeros((BLOCK_V // LANES,), ACC)
        of_q = tl.zeros((BLOCK_V // LANES,), ACC)
        if full < V:
            m_x, s_x = _sums(
                m_x, s_x, x_ptr + full, offs_V, V - full, W - full, inverse, softcap,
                True, SOFTCAP, ACC,
            )  # fmt: skip
            m_y, s_y = _sums(
                m_y, s_y, y_ptr + full, offs_V, V - full, W - full, inverse, teacher_softcap,
                True, TEACHER_SOFTCAP, ACC,
            )  # fmt: skip
        for v in range(0, full, BLOCK_V):
            m_x, s_x = _sums(
                m_x, s_x, x_ptr + v, offs_V, V, W, inverse, softcap, False, SOFTCAP, ACC
            )  # fmt: skip
            m_y, s_y = _sums(
                m_y, s_y, y_ptr + v, offs_V, V, W, inverse, teacher_softcap,
                False, TEACHER_SOFTCAP, ACC,
            )  # fmt: skip
        row_m_x, log_s_x = _merged(m_x, s_x)
        row_m_y, log_s_y = _merged(m_y, s_y)
        give = tl.full((), 1.0, ACC)
        if GRADIENT:
            give = inverse * tl.load(dloss_ptr + t * stride_dlossC).to(ACC)
            tl.debug_barrier()  # all of the row is read before anything overwrites it
        # Pass 2: the loss; the gradient too, where it needs no sum of this pass.
        AT_ONCE: tl.constexpr = GRADIENT and KIND == "forward"
        zero = tl.full((), 0.0, ACC)
        if full < V:
            of_p, of_q = _diverge(
                of_p, of_q, x_ptr + full, y_ptr + full, offs_V, V - full, W - full,
                row_m_x, log_s_x, row_m_y, log_s_y, zero, give,
                beta, inverse, softcap, teacher_softcap,
                True, KIND, True, AT_ONCE, SOFTCAP, TEACHER_SOFTCAP, ACC,
            )  # fmt: skip
        for v in range(0, full, BLOCK_V):
            of_p, of_q = _diverge(
                of_p, of_q, x_ptr + v, y_ptr + v, offs_V, V, W,
                row_m_x, log_s_x, row_m_y, log_s_y, zero, give,
                beta, inverse, softcap, teacher_softcap,
                False, KIND, True, AT_ONCE, SOFTCAP, TEACHER_SOFTCAP, ACC,
            )  # fmt: skip
        row_of_p, row_of_q = tl.sum(of_p, axis=0), tl.sum(of_q, axis=0)
        if KIND == "between":
            tl.store(loss_ptr + t, beta * row_of_p + (1 - beta) * row_of_q)
        else:
            tl.store(loss_ptr + t, row_of_p + row_of_q)  # one of them is 0
        if GRADIENT and not AT_ONCE:
            # Pass 3: the gradient, which needs the divergence of q.
            tl.debug_barrier()
            for v in range(0, full, BLOCK_V):
                _diverge(
                    of_p, of_q, x_ptr + v, y_ptr + v, offs_V, V, W,
                    row_m_x, log_s_x, row_m_y, log_s_y, row_of_q, give,
                    beta, inverse, softcap, teacher_softcap,
                    False, KIND, False, True, SOFTCAP, TEACHER_SOFTCAP, ACC,
                )  # fmt: skip
            if full < V:
                _diverge(
                    of_p, of_q, x_ptr + full, y_ptr + full, offs_V, V - full, W - full,
                    row_m_x, log_s_x, row_m_y, log_s_y, row_of_q, give,
                    beta, inverse, softcap, teacher_softcap,
                    True, KIND, False, True, SOFTCAP, TEACHER_SOFTCAP, ACC,
                )  # fmt: skip
    else:
        tl.store(loss_ptr + t, 0.0)
        if GRADIENT:
            store_zeros(x_ptr, offs_V, full, W, BLOCK_V)


_launch_rows = Launcher(_linear_kl_div_kernel)


def rows(
    x_CW: Tensor, y_CW: Tensor, V: int, counts_C: Tensor | None, dloss_C: Tensor | None,
    loss_C: Tensor, options: Divergence,
) -> None:  # fmt: skip
    """Write the loss of each row; with `dloss_C`, the gradient over the student's logits, too.

    The logits are the first V columns of `x_CW` and `y_CW`, teacher's the latter.
    """
    if not uses_triton(x_CW, OP):
        _rows_reference(x_CW[:, :V], y_CW[:, :V], counts_C, dloss_C, loss_C, options)
        return
    C, W = x_CW.shape
    kind = {0.0: "forward", 1.0: "reverse"}.get(options.beta, "between")
    each = 8 if kind == "between" else 16  # elements of a thread: with 16 its logarithms spill
    block, lanes = max(64, min(256 * each, power_of_2(V))), 16 // x_CW.element_size()
    _launch_rows(
        (C,),
        (x_CW, y_CW, counts_C, dloss_C, loss_C),
        (
            V, W, x_CW.stride(0), 0 if dloss_C is None else dloss_C.stride(0),
            *map(float, options),
        ),
        (
            kind, dloss_C is not None, counts_C is not None, options.softcap > 0,
            options.teacher_softcap > 0, accumulator(x_CW.dtype), block, lanes,
        ),
        num_warps=max(1, block // (32 * each)),
    )  # fmt: skip


def _rows_reference(
    x_CV: Tensor, y_CV: Tensor, counts_C: Tensor | None, dloss_C: Tensor | None, loss_C: Tensor,
    options: Divergence,
) -> None:  # fmt: skip
    beta, temperature, *softcaps = options
    log_q_CV = log_softmax(x_CV, temperature, softcaps[0])
    log_p_CV = log_softmax(y_CV, temperature, softcaps[1])
    ignored_C = None if counts_C is None else ~counts_C
    loss_C.copy_(divergence(log_p_CV, log_q_CV, beta))
    if ignored_C is not None:
        loss_C.masked_fill_(ignored_C, 0)
    if dloss_C is None:
        return
    dz_CV = gradient_reference(log_p_CV, log_q_CV, beta).mul_(dloss_C[:, None] / temperature)
    if softcaps[0]:
        dz_CV *= 1 - (final_logits(x_CV, softcaps[0], 1.0) / softcaps[0]).square_()
    x_CV.copy_(dz_CV if ignored_C is None else dz_CV.masked_fill_(ignored_C[:, None], 0))


def gradient_reference(log_p_CV: Tensor, log_q_CV: Tensor, beta: float) -> Tensor:
    """Return the gradient of `divergence` over the logits that `log_q_CV` is the softmax of."""
    q_CV = log_q_CV.exp()
    if beta == 0:
        return q_CV - log_p_CV.exp()
    log_m_CV = log_p_CV
    if beta < 1:
        log_m_CV = torch.logaddexp(log_p_CV + math.log(beta), log_q_CV + math.log(1 - beta))
    gap_CV = log_q_CV - log_m_CV
    dz_CV = q_CV * (gap_CV - (q_CV * gap_CV).sum(1, keepdim=True))
    return dz_CV if beta == 1 else dz_CV.mul_(1 - beta)
