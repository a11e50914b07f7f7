"""Log-probability of a class, and entropy of all, of a linear layer's output, in chunks.

    z_TV       = logit_scale · (hidden_TD · weight_VDᵀ + bias_V), or softcap · tanh(z_TV / softcap)
    log_p_TV   = z_TV - log(sum_V(exp(z_TV)))
    log_prob_T = log_p_t                        entropy_T = -sum_V(p_TV · log_p_TV)

What policy gradients and distillation from samples are made of. Both have a gradient:

    dz_TV = dlog_prob_T · ([V = t] - p_TV) - dentropy_T · p_TV · (log_p_TV + entropy_T)

and from there on as in linear_cross_entropy.py. T tokens, D features, V classes, C rows of a chunk:
only C·V logits exist at a time. Between forward and backward six numbers per token are kept; the
backward pass recomputes the logits, and their gradient overwrites them: four products in all.
"""

from typing import Literal, overload

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from tritium.kernels import runtime
from tritium.kernels._cross_entropy_options import (
    LOWEST_GAP,
    LossOptions,
    Row,
    check_options,
    check_target,
    final_logits,
    token_stats,
)
from tritium.kernels._cross_entropy_rows import LOG2_E, _capped
from tritium.kernels._linear_cross_entropy import (
    ChunkPlan,
    Inputs,
    _call,
    _product,
    _products_dtype,
    check_layer,
    chunk_rows,
)
from tritium.kernels._padded_rows import load_logits, store_gradient, store_zeros
from tritium.kernels.launcher import Launcher
from tritium.kernels.runtime import (
    accumulator,
    apply,
    once_differentiable,
    operator,
    power_of_2,
    sees_through,
    uses_triton,
)

OP = "linear_log_prob"
LEAST_GAP = tl.constexpr(LOWEST_GAP)


def linear_log_prob_reference(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Compute `linear_log_prob` and the entropy on `[T, D]` from all logits in plain PyTorch."""
    z_TV = final_logits(F.linear(input, linear_weight, linear_bias), softcap, logit_scale)
    log_p_TV, ignored_T = z_TV.log_softmax(-1), target == ignore_index
    t_T1 = target.masked_fill(ignored_T, 0)[:, None]
    entropy_T = -(log_p_TV.exp() * log_p_TV.clamp_min(LOWEST_GAP)).sum(-1)
    log_prob_T = log_p_TV.gather(-1, t_T1)[:, 0]
    return log_prob_T.masked_fill(ignored_T, 0), entropy_T.masked_fill(ignored_T, 0)


@triton.jit
def _store_log_prob_gradient(
    x_ptr, offs_V, V, W, m, log_s, entropy, dlog_prob, dentropy, logit_scale, softcap,
    MASKED: tl.constexpr, ENTROPY: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    x_V = load_logits(x_ptr, offs_V, W, MASKED, ACC)
    z_V = _capped(x_V, logit_scale, softcap, SCALE, SOFTCAP, ACC)
    log_p_V = (z_V - m) - log_s
    p_V = tl.exp2(log_p_V * LOG2_E)
    dz_V = -dlog_prob * p_V
    if ENTROPY:  # where p is 0 its logarithm of -inf would make the product nan
        dz_V -= dentropy * p_V * (tl.maximum(log_p_V, LEAST_GAP) + entropy)
    if SOFTCAP:
        u_V = z_V * (tl.full((), 1.0, ACC) / softcap)
        dz_V *= 1 - u_V * u_V
    if SCALE:
        dz_V *= logit_scale
    store_gradient(x_ptr, offs_V, V, W, dz_V, MASKED)


@triton.jit
def _log_prob_backward_kernel(
    x_ptr, target_ptr, m_ptr, log_s_ptr, entropy_ptr, dlog_prob_ptr, dentropy_ptr,
    V, W, stride_xC, ignore_index, softcap: tl.float64, logit_scale: tl.float64,
    ENTROPY: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, ACC: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    softcap, logit_scale = tl.full((), softcap, ACC), tl.full((), logit_scale, ACC)
    t = tl.program_id(0).to(tl.int64)
    x_ptr += t * stride_xC
    offs_V = tl.arange(0, BLOCK_V)
    target = tl.load(target_ptr + t)
    full = V // BLOCK_V * BLOCK_V
    if target != ignore_index:
        m, log_s = tl.load(m_ptr + t), tl.load(log_s_ptr + t)
        entropy = tl.load(entropy_ptr + t)
        dlog_prob = tl.load(dlog_prob_ptr + t).to(ACC)
        dentropy = tl.load(dentropy_ptr + t).to(ACC)
        known = (target >= 0) & (target < V)  # else the row's gradient is nan, as its log_prob is
        dlog_prob = tl.where(known, dlog_prob, float("nan"))
        x_t = tl.load(x_ptr + target, mask=known, other=0.0).to(ACC)
        tl.debug_barrier()  # x_t is read before anything overwrites it
        for v in range(0, full, BLOCK_V):
            _store_log_prob_gradient(
                x_ptr + v, offs_V, V - v, W - v, m, log_s, entropy, dlog_prob, dentropy,
                logit_scale, softcap, False, ENTROPY, SCALE, SOFTCAP, ACC,
            )  # fmt: skip
        if full < V:
            _store_log_prob_gradient(
                x_ptr + full, offs_V, V - full, W - full, m, log_s, entropy, dlog_prob, dentropy,
                logit_scale, softcap, True, ENTROPY, SCALE, SOFTCAP, ACC,
            )  # fmt: skip
        # The target's element, in float32: 1 - p in bfloat16 would lose it where p is near 1.
        tl.debug_barrier()
        z_t = _capped(x_t, logit_scale, softcap, SCALE, SOFTCAP, ACC)
        log_p_t = (z_t - m) - log_s
        p_t = tl.exp2(log_p_t * LOG2_E)
        dz_t = dlog_prob * (1 - p_t)
        if ENTROPY:
            dz_t -= dentropy * p_t * (tl.maximum(log_p_t, LEAST_GAP) + entropy)
        if SOFTCAP:
            dz_t *= 1 - (z_t / softcap) * (z_t / softcap)
        if SCALE:
            dz_t *= logit_scale
        tl.store(x_ptr + target, dz_t.to(x_ptr.dtype.element_ty), mask=known)
    else:
        store_zeros(x_ptr, offs_V, full, W, BLOCK_V)


_launch_rows = Launcher(_log_prob_backward_kernel)


def _rows_backward(
    x_CW: Tensor, V: int, target_C: Tensor, kept: tuple[Tensor, ...], dlog_prob_C: Tensor,
    dentropy_C: Tensor | None, options: LossOptions,
) -> None:  # fmt: skip
    """Replace the logits, the first V columns of `x_CW`, by their gradient; `kept`: m, log s, H."""
    if not uses_triton(x_CW, "cross_entropy"):
        _rows_backward_reference(x_CW[:, :V], target_C, kept, dlog_prob_C, dentropy_C, options)
        return
    C, W = x_CW.shape
    block = max(64, min(4096, power_of_2(V)))
    _launch_rows(
        (C,),
        (x_CW, target_C, *kept, dlog_prob_C, dlog_prob_C if dentropy_C is None else dentropy_C),
        (
            V, W, x_CW.stride(0), options.ignore_index, float(options.softcap),
            float(options.logit_scale),
        ),
        (
            dentropy_C is not None, options.logit_scale != 1, options.softcap > 0,
            accumulator(x_CW.dtype), block,
        ),
        num_warps=max(1, block // 512),
    )  # fmt: skip


def _rows_backward_reference(
    x_CV: Tensor, target_C: Tensor, kept: tuple[Tensor, ...], dlog_prob_C: Tensor,
    dentropy_C: Tensor | None, options: LossOptions,
) -> None:  # fmt: skip
    m_C1, log_s_C1, entropy_C1 = (x[:, None] for x in kept)
    z_CV = final_logits(x_CV, options.softcap, options.logit_scale)
    log_p_CV = (z_CV - m_C1).sub_(log_s_C1)
    p_CV, ignored_C = log_p_CV.exp(), target_C == options.ignore_index
    dz_CV = -dlog_prob_C[:, None] * p_CV
    dz_CV.scatter_add_(1, target_C.masked_fill(ignored_C, 0)[:, None], dlog_prob_C[:, None])
    if dentropy_C is not None:
        shift_CV = log_p_CV.clamp_min_(LOWEST_GAP).add_(entropy_C1)
        dz_CV -= dentropy_C[:, None] * p_CV.mul_(shift_CV)
    if options.softcap:
        dz_CV *= 1 - (z_CV / options.softcap).square_()
    x_CV.copy_(dz_CV.mul_(options.logit_scale).masked_fill_(ignored_C[:, None], 0))


def _launch_backward(
    hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, target_T: Tensor,
    m_T: Tensor, log_s_T: Tensor, entropy_T: Tensor, dlog_prob_T: Tensor,
    dentropy_T: Tensor | None, chunk_rows: int, want_hidden: bool, want_weight: bool,
    want_bias: bool, ignore_index: int, softcap: float, logit_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    grads = _fake_backward(
        hidden_TD, weight_VD, bias_V, target_T, m_T, log_s_T, entropy_T, dlog_prob_T, dentropy_T,
        chunk_rows, want_hidden, want_weight, want_bias,
    )  # fmt: skip
    dhidden_TD, dweight_VD, dbias_V = grads
    dbias_V.zero_()
    options = LossOptions(ignore_index, 0.0, 0.0, softcap, logit_scale)
    T, V = hidden_TD.shape[0], weight_VD.shape[0]
    if T == 0:
        dweight_VD.zero_()
    padded_CW = hidden_TD.new_empty(min(chunk_rows, T), -(-V // 64) * 64)
    padded_CW[:, V:] = 0
    for start in range(0, T, chunk_rows):
        chunk = slice(start, start + chunk_rows)
        h_CD = hidden_TD[chunk]
        x_CW = padded_CW[: h_CD.shape[0]]
        x_CV = x_CW[:, :V]
        if bias_V is None:
            torch.mm(h_CD, weight_VD.T, out=x_CV)
        else:
            torch.addmm(bias_V, h_CD, weight_VD.T, out=x_CV)
        _rows_backward(
            x_CW, V, target_T[chunk], (m_T[chunk], log_s_T[chunk], entropy_T[chunk]),
            dlog_prob_T[chunk], None if dentropy_T is None else dentropy_T[chunk], options,
        )  # fmt: skip
        if want_hidden:
            _product(x_CV, weight_VD, dhidden_TD[chunk])
        if want_weight:
            _product(x_CV.T, h_CD, dweight_VD, add=start > 0)
        if want_bias:
            dbias_V += x_CV.sum(0, dtype=dbias_V.dtype)
    return grads


def _fake_backward(
    hidden, weight, bias, target, m, log_s, entropy, dlog_prob, dentropy, chunk_rows,
    want_hidden, want_weight, want_bias, *_,
):  # fmt: skip
    half = hidden.dtype == torch.float16  # too narrow for a gradient before its loss scale
    return (
        hidden.new_empty(hidden.shape if want_hidden else 0, dtype=m.dtype if half else None),
        weight.new_empty(weight.shape if want_weight else 0, dtype=m.dtype),
        weight.new_empty(weight.shape[0] if want_bias else 0, dtype=m.dtype),
    )


_backward = operator(
    "linear_log_prob_backward(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor m,"
    " Tensor log_s, Tensor entropy, Tensor dlog_prob, Tensor? dentropy, SymInt chunk_rows,"
    " bool want_hidden, bool want_weight, bool want_bias, int ignore_index, float softcap,"
    " float logit_scale) -> (Tensor, Tensor, Tensor)",
    _launch_backward,
    _fake_backward,
)


class _LinearLogProb(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden_TD, weight_VD, bias_V, target_T, plan: ChunkPlan, wants, options: LossOptions
    ):
        inputs = Inputs(hidden_TD, weight_VD, bias_V, target_T, None, None)
        _, values_RT, argmax_T, *_ = _call(inputs, None, plan, (False, False, False), options)
        stats = token_stats(values_RT, argmax_T, target_T, options.ignore_index, target_T.shape)
        m_T, log_s_T = values_RT[Row.MAXIMUM], values_RT[Row.SUM].log()
        ctx.save_for_backward(*inputs[:4], m_T, log_s_T, stats.entropy)
        ctx.plan, ctx.wants, ctx.options = plan, wants, options
        ctx.set_materialize_grads(False)
        return stats.target_log_probability, stats.entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, dlog_prob_T: Tensor | None, dentropy_T: Tensor | None):
        h, w, b, target_T, *kept = ctx.saved_tensors
        nothing = (None,) * 4
        if dlog_prob_T is None and dentropy_T is None:
            return None, None, None, *nothing
        dlog_prob_T = torch.zeros_like(kept[0]) if dlog_prob_T is None else dlog_prob_T
        low = (None if x is None else x.to(ctx.plan.dtype) for x in (h, w, b))
        options = ctx.options
        with torch.autocast(h.device.type, enabled=False):
            grads = _backward(
                *low, target_T, *kept, dlog_prob_T.contiguous(),
                None if dentropy_T is None else dentropy_T.contiguous(), ctx.plan.chunk_rows,
                *ctx.wants, options.ignore_index, options.softcap, options.logit_scale,
            )  # fmt: skip
        pairs = zip(grads, (h, w, b), ctx.wants, strict=True)
        return *(g.to(x.dtype) if want else None for g, x, want in pairs), *nothing


@overload
def linear_log_prob(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, linear_bias: Tensor | None = None,
    ignore_index: int | None = None, softcap: float | None = None, logit_scale: float = 1.0,
    chunk_bytes: int | None = None, return_entropy: Literal[False] = False,
) -> Tensor: ...  # fmt: skip
@overload
def linear_log_prob(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, linear_bias: Tensor | None = None,
    ignore_index: int | None = None, softcap: float | None = None, logit_scale: float = 1.0,
    chunk_bytes: int | None = None, return_entropy: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def linear_log_prob(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_bytes: int | None = None,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute the log-probability that a linear layer's output gives each target class.

    Equal to `Categorical(logits=linear(input, linear_weight, linear_bias)).log_prob(target)`, and
    its `entropy()`, of `torch.distributions`, but about `chunk_bytes` of logits exist at a time, in
    either pass. Both results have a gradient for input, weight and bias; nothing is computed for
    one that does not require it. The sums over chunks are in float32, products and determinism as
    in `linear_cross_entropy`. With π the policy, a policy-gradient loss with an entropy bonus:

        log_prob, entropy = linear_log_prob(hidden, weight, actions, return_entropy=True)
        ratio = (log_prob - old_log_prob).exp()
        loss = -(ratio * advantage + 0.01 * entropy).mean()

    Inside torch.func, where torch.export traces and with TRITIUM_REFERENCE=1 all logits exist at
    once. The classes cannot be split over ranks.

    Args:
        input: `[..., D]`; float32, float16, bfloat16 or float64.
        linear_weight: `[V, D]`, any of these dtypes.
        target: class indices, `[...]`, the leading axes of `input`, any integer dtype. One outside
            [0, V) other than `ignore_index` is treated as `cross_entropy` treats it.
        linear_bias: `[V]` or None; -inf excludes a class, but not under a softcap.
        ignore_index: targets of this value have log-probability and entropy 0, and no gradient;
            None for -100.
        softcap: bound of the logits, softcap · tanh(logits / softcap), above 0; None for no bound.
            It bounds a logit of -inf too, whose class gets the logit -softcap.
        logit_scale: factor of the logits, before the softcap: 1 / temperature.
        chunk_bytes: budget of the logits buffer in bytes; None for 1 GiB on a GPU, 4 MiB on a CPU.
        return_entropy: return `(log_prob, entropy)`.

    Returns:
        The log-probabilities in nats, `[...]`, float32 (float64 for float64 `input`); with
        `return_entropy` a pair: these, and the entropy of each token's classes, alike.

    Raises:
        ValueError: an argument has another shape, dtype or range than documented above.
    """
    check_options(OP, "none", 0.0, 0.0, softcap, logit_scale)
    check_layer(OP, input, linear_weight, linear_bias, None)
    if target.is_floating_point():
        raise ValueError(
            f"{OP}: target must hold class indices, got {target.dtype}; for probabilities call "
            'linear_cross_entropy with reduction="none"'
        )
    V, D = linear_weight.shape
    shape = input.shape[:-1]
    target_T = check_target(OP, target, shape, V, input)
    ignore_index = -100 if ignore_index is None else ignore_index
    hidden_TD, dtype = input.reshape(-1, D), _products_dtype(input)
    rows = chunk_rows(OP, hidden_TD, V, dtype, False, chunk_bytes)
    if runtime.REFERENCE or sees_through() or input.is_meta:
        pair = linear_log_prob_reference(
            hidden_TD.to(dtype), linear_weight.to(dtype), target_T,
            linear_bias=None if linear_bias is None else linear_bias.to(dtype),
            ignore_index=ignore_index, softcap=softcap, logit_scale=logit_scale,
        )  # fmt: skip
    else:
        options = LossOptions(ignore_index, 0.0, 0.0, softcap or 0.0, logit_scale, stats=True)
        inputs = (hidden_TD, linear_weight, linear_bias)
        wants = tuple(x is not None and x.requires_grad for x in inputs)
        plan = ChunkPlan(dtype, rows, False)
        pair = apply(_LinearLogProb, *inputs, target_T, plan, wants, options)
    log_prob, entropy = (x.view(shape) for x in pair)
    return (log_prob, entropy) if return_entropy else log_prob
