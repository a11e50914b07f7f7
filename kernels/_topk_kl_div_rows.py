"""Rows of the divergence from a teacher of whom only the likeliest classes are known.

K classes of each row, and all others as one: K + 1 outcomes, whose logits are those of the classes
and the logarithm of the sum of exp over the others. The divergence is of these outcomes; what its
gradient gives to the last one is divided among its classes by their probabilities. The logits of
the K classes are set aside and overwritten by -inf, so that a pass sums over all others exactly.
Rows are padded (_padded_rows.py).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritium.kernels._cross_entropy_options import LOWEST_GAP, final_logits
from tritium.kernels._cross_entropy_rows import LN_2, LOG2_E, _capped
from tritium.kernels._kl_div_rows import (
    LEAST,
    LOWEST_X,
    OP,
    Divergence,
    _merged,
    _scores,
    _sums,
    _terms,
    _through_cap,
    divergence,
    gradient_reference,
    scores,
)
from tritium.kernels._padded_rows import store_gradient, store_zeros
from tritium.kernels.launcher import Launcher
from tritium.kernels.runtime import accumulator, power_of_2, uses_triton


def outcomes_reference(z_TV: Tensor, indices_TK: Tensor) -> Tensor:
    """Return the logarithms of the probabilities of K classes, and of all others together."""
    log_q_TV = z_TV.log_softmax(-1)
    others_TV = log_q_TV.clamp_min(LOWEST_GAP).scatter(1, indices_TK, LOWEST_GAP)
    rest_T1 = others_TV.logsumexp(-1, keepdim=True)
    return torch.cat([log_q_TV.gather(1, indices_TK), rest_T1], 1).clamp_min(LOWEST_GAP)


@triton.jit
def _store_rest(
    x_ptr, offs_V, V, W, m, rate, inverse, softcap,
    MASKED: tl.constexpr, SOFTCAP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    z_V = _scores(x_ptr, offs_V, V, W, inverse, softcap, MASKED, SOFTCAP, ACC)
    dz_V = rate * tl.exp2((z_V - m) * LOG2_E)
    if SOFTCAP:
        dz_V = _through_cap(dz_V, z_V, inverse, softcap)
    store_gradient(x_ptr, offs_V, V, W, dz_V, MASKED)


@triton.jit
def _linear_topk_kl_div_kernel(
    x_ptr, indices_ptr, log_p_ptr, counts_ptr, dloss_ptr, loss_ptr,
    V, W, K, stride_xC, stride_dlossC, beta: tl.float64, temperature: tl.float64,
    softcap: tl.float64,
    KIND: tl.constexpr, GRADIENT: tl.constexpr, COUNTS: tl.constexpr, SOFTCAP: tl.constexpr,
    ACC: tl.constexpr, BLOCK_V: tl.constexpr, LANES: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    beta, softcap = tl.full((), beta, ACC), tl.full((), softcap, ACC)
    inverse = 1 / tl.full((), temperature, ACC)
    t = tl.program_id(0).to(tl.int64)
    x_ptr += t * stride_xC
    offs_V = tl.arange(0, BLOCK_V // LANES)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    full = V // BLOCK_V * BLOCK_V
    counts = True
    if COUNTS:
        counts = tl.load(counts_ptr + t) != 0
    if counts:
        offs_K = tl.arange(0, BLOCK_K)
        class_K = tl.load(indices_ptr + t * K + offs_K, mask=offs_K < K, other=0)
        known_K = (offs_K < K) & (class_K >= 0) & (class_K < V)
        unknown = tl.sum(tl.where((offs_K < K) & (known_K == 0), 1, 0), axis=0)
        x_K = tl.load(x_ptr + class_K, mask=known_K, other=float("-inf")).to(ACC)
        z_K = _capped(x_K, 1.0, softcap, False, SOFTCAP, ACC) * inverse
        if SOFTCAP:
            z_K = tl.where(x_K == float("-inf"), x_K, z_K)
        tl.debug_barrier()  # all are read before they are overwritten
        tl.store(x_ptr + class_K, tl.full((BLOCK_K,), float("-inf"), x_ptr.dtype.element_ty),
                 mask=known_K)  # fmt: skip
        tl.debug_barrier()
        # Pass 1: the sum over all other classes. The tail first, as in `_linear_kl_div_kernel`.
        m = tl.full((BLOCK_V // LANES,), LOWEST_X, ACC)
        s = tl.zeros((BLOCK_V // LANES,), ACC)
        if full < V:
            m, s = _sums(
                m, s, x_ptr + full, offs_V, V - full, W - full, inverse, softcap,
                True, SOFTCAP, ACC,
            )  # fmt: skip
        for v in range(0, full, BLOCK_V):
            m, s = _sums(m, s, x_ptr + v, offs_V, V, W, inverse, softcap, False, SOFTCAP, ACC)
        row_m, log_s = _merged(m, s)
        z_K = tl.where(offs_K == K, row_m + log_s, z_K)
        # The K + 1 outcomes.
        most = tl.maximum(tl.max(z_K, axis=0), LOWEST_X)
        log_sum = tl.log2(tl.sum(tl.exp2((z_K - most) * LOG2_E), axis=0)) * LN_2
        log_q_K = tl.maximum((z_K - most) - log_sum, LEAST)
        log_p_K = tl.load(
            log_p_ptr + t * (K + 1) + offs_K, mask=offs_K <= K, other=float("-inf")
        ).to(ACC)  # fmt: skip
        log_p_K = tl.maximum(log_p_K, LEAST)
        zero = tl.full((), 0.0, ACC)
        dz_K, terms_p_K, terms_q_K = _terms(log_q_K, log_p_K, zero, beta, KIND)
        of_p, of_q = tl.sum(terms_p_K, axis=0), tl.sum(terms_q_K, axis=0)
        if KIND == "forward":
            loss = of_p
        elif KIND == "reverse":
            loss = of_q
        else:
            loss = beta * of_p + (1 - beta) * of_q
        # A class outside [0, V) makes the row's loss and gradient nan.
        tl.store(loss_ptr + t, tl.where(unknown > 0, float("nan"), loss))
        if GRADIENT:
            if KIND != "forward":
                dz_K, terms_p_K, terms_q_K = _terms(log_q_K, log_p_K, of_q, beta, KIND)
            give = inverse * tl.load(dloss_ptr + t * stride_dlossC).to(ACC)
            dz_K *= tl.where(unknown > 0, float("nan"), give)
            rest = tl.sum(tl.where(offs_K == K, dz_K, 0.0), axis=0)
            # Pass 2: the gradient of the other classes, exp(z - row_m) / s of the last outcome's.
            row_s = tl.exp2(log_s * LOG2_E)
            rate = tl.where(row_s > 0, rest / row_s, rest * 0.0)
            for v in range(0, full, BLOCK_V):
                _store_rest(
                    x_ptr + v, offs_V, V, W, row_m, rate, inverse, softcap, False, SOFTCAP, ACC
                )  # fmt: skip
            if full < V:
                _store_rest(
                    x_ptr + full, offs_V, V - full, W - full, row_m, rate, inverse, softcap,
                    True, SOFTCAP, ACC,
                )  # fmt: skip
            if SOFTCAP:
                dz_K = _through_cap(dz_K, z_K, inverse, softcap)
            tl.debug_barrier()
            tl.store(x_ptr + class_K, dz_K.to(x_ptr.dtype.element_ty), mask=known_K)
    else:
        tl.store(loss_ptr + t, 0.0)
        if GRADIENT:
            store_zeros(x_ptr, offs_V, full, W, BLOCK_V)


_launch_rows = Launcher(_linear_topk_kl_div_kernel)


def topk_rows(
    x_CW: Tensor, V: int, indices_CK: Tensor, log_p_CK: Tensor, counts_C: Tensor | None,
    dloss_C: Tensor | None, loss_C: Tensor, options: Divergence,
) -> None:  # fmt: skip
    """Write the loss of each row; with `dloss_C`, the gradient over the logits, too.

    The logits, the first V columns of `x_CW`, are overwritten either way. `log_p_CK` has K + 1
    columns, the last for all other classes.
    """
    if not uses_triton(x_CW, OP):
        _rows_reference(x_CW[:, :V], indices_CK, log_p_CK, counts_C, dloss_C, loss_C, options)
        return
    (C, W), K = x_CW.shape, indices_CK.shape[1]
    block, lanes = max(64, min(4096, power_of_2(V))), 16 // x_CW.element_size()
    kind = {0.0: "forward", 1.0: "reverse"}.get(options.beta, "between")
    _launch_rows(
        (C,),
        (x_CW, indices_CK, log_p_CK, counts_C, dloss_C, loss_C),
        (
            V, W, K, x_CW.stride(0), 0 if dloss_C is None else dloss_C.stride(0),
            *map(float, options[:3]),
        ),
        (
            kind, dloss_C is not None, counts_C is not None, options.softcap > 0,
            accumulator(x_CW.dtype), block, lanes, power_of_2(K + 1),
        ),
        num_warps=max(1, block // 512),
    )  # fmt: skip


def _rows_reference(
    x_CV: Tensor, indices_CK: Tensor, log_p_CK: Tensor, counts_C: Tensor | None,
    dloss_C: Tensor | None, loss_C: Tensor, options: Divergence,
) -> None:  # fmt: skip
    beta, temperature, softcap, _ = options
    z_CV = scores(x_CV, temperature, softcap)
    log_q_CK, log_p_CK = outcomes_reference(z_CV, indices_CK), log_p_CK.clamp_min(LOWEST_GAP)
    loss_C.copy_(divergence(log_p_CK, log_q_CK, beta))
    ignored_C = None if counts_C is None else ~counts_C
    if ignored_C is not None:
        loss_C.masked_fill_(ignored_C, 0)
    if dloss_C is None:
        return
    dz_CK = gradient_reference(log_p_CK, log_q_CK, beta).mul_(dloss_C[:, None] / temperature)
    dz_CV = z_CV.scatter(1, indices_CK, -torch.inf).softmax(-1).nan_to_num_(0).mul_(dz_CK[:, -1:])
    dz_CV.scatter_(1, indices_CK, dz_CK[:, :-1])
    if softcap:
        dz_CV *= 1 - (final_logits(x_CV, softcap, 1.0) / softcap).square_()
    x_CV.copy_(dz_CV if ignored_C is None else dz_CV.masked_fill_(ignored_C[:, None], 0))
