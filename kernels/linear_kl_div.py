"""Divergence of a linear layer's distribution from a teacher's, the logits of neither stored.

    x_TV = hidden_TD · weight_VDᵀ + bias_V, or softcap · tanh of it / softcap
    q_TV = softmax(x_TV / temperature), the student's          p_TV: the teacher's, likewise

    beta 0   KL(p ‖ q) = sum_V(p · (log p - log q)): forward, the one of PyTorch's kl_div
    beta 1   KL(q ‖ p) = sum_V(q · (log q - log p)): reverse
    between  beta · KL(p ‖ m) + (1 - beta) · KL(q ‖ m),  m = beta · p + (1 - beta) · q

the last the generalised Jensen-Shannon divergence of Agarwal et al. 2024 (arXiv 2306.13649, GKD).
With z_TV = x_TV / temperature the gradients are

    beta 0  q - p      beta 1  q · (log q - log p - KL(q ‖ p))
    between (1 - beta) · q · (log q - log m - KL(q ‖ m))

and from there on as in linear_cross_entropy.py. T tokens, D features, V classes, C rows of a chunk:
2·C·V logits exist at a time, and the gradient overwrites the student's. Loss and gradient are
computed together: four products in all, two of the student's logits and the teacher's, two of the
gradients. With reduction "none" or in float16 the backward pass recomputes both logits: six.
"""

import math
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tritium.kernels import runtime
from tritium.kernels._cross_entropy_options import check_number, mean_scale
from tritium.kernels._kl_div_rows import OP, Divergence, divergence, log_softmax, rows
from tritium.kernels._linear_cross_entropy import (
    _product,
    _products_dtype,
    check_layer,
    chunk_rows,
)
from tritium.kernels._scale_gradient import scaled
from tritium.kernels.runtime import once_differentiable, operator, sees_through


def linear_kl_div_reference(
    input: Tensor,
    linear_weight: Tensor,
    teacher_input: Tensor,
    teacher_weight: Tensor,
    *,
    linear_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    mask: Tensor | None = None,
    reduction: str = "batchmean",
    beta: float = 0.0,
    temperature: float = 1.0,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
) -> Tensor:
    """Compute `linear_kl_div` on `[T, D]` from all logits in plain PyTorch."""
    x_TV = F.linear(input, linear_weight, linear_bias)
    y_TV = F.linear(teacher_input, teacher_weight, teacher_bias).detach()
    log_q_TV = log_softmax(x_TV, temperature, softcap)
    loss_T = divergence(log_softmax(y_TV, temperature, teacher_softcap), log_q_TV, beta)
    loss_T = loss_T if mask is None else torch.where(mask, loss_T, 0)
    if reduction == "none":
        return loss_T
    return loss_T.sum() * _scale(input, mask, reduction)


def _scale(x_TD: Tensor, mask_T: Tensor | None, reduction: str) -> Tensor:
    """Return the factor from a sum to the reduction, in the dtype of the losses of `x_TD`."""
    dtype = torch.promote_types(x_TD.dtype, torch.float32)
    if reduction == "sum":
        return x_TD.new_ones((), dtype=dtype)
    return mean_scale(x_TD.new_ones(len(x_TD), dtype=dtype) if mask_T is None else mask_T.to(dtype))


def _launch(
    hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, teacher_hidden: Tensor,
    teacher_weight: Tensor, teacher_bias_V: Tensor | None, counts_T: Tensor | None,
    dloss_T: Tensor | None, chunk_rows: int, want_hidden: bool, want_weight: bool,
    want_bias: bool, *options,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return loss_T and the gradients asked for (empty in place of the others)."""
    outputs = _fake(
        hidden_TD, weight_VD, bias_V, teacher_hidden, teacher_weight, teacher_bias_V, counts_T,
        dloss_T, chunk_rows, want_hidden, want_weight, want_bias,
    )  # fmt: skip
    loss_T, dhidden_TD, dweight_VD, dbias_V = outputs
    dbias_V.zero_()
    T, V = hidden_TD.shape[0], weight_VD.shape[0]
    if T == 0:  # no chunk writes it
        dweight_VD.zero_()
    buffers = hidden_TD.new_empty(2, min(chunk_rows, T), -(-V // 64) * 64)
    buffers[:, :, V:] = 0  # a product may read what it multiplies by 0
    for start in range(0, T, chunk_rows):
        chunk = slice(start, start + chunk_rows)
        h_CD = hidden_TD[chunk]
        x_CW, y_CW = buffers[:, : h_CD.shape[0]]
        x_CV = x_CW[:, :V]
        _logits(h_CD, weight_VD, bias_V, x_CV)
        _logits(teacher_hidden[chunk], teacher_weight, teacher_bias_V, y_CW[:, :V])
        rows(
            x_CW, y_CW, V, None if counts_T is None else counts_T[chunk],
            None if dloss_T is None else dloss_T[chunk], loss_T[chunk], Divergence(*options),
        )  # fmt: skip
        if want_hidden:
            _product(x_CV, weight_VD, dhidden_TD[chunk])
        if want_weight:
            _product(x_CV.T, h_CD, dweight_VD, add=start > 0)
        if want_bias:
            dbias_V += x_CV.sum(0, dtype=dbias_V.dtype)
    return outputs


def _logits(h_CD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, out: Tensor) -> None:
    if bias_V is None:
        torch.mm(h_CD, weight_VD.T, out=out)
    else:
        torch.addmm(bias_V, h_CD, weight_VD.T, out=out)


def _fake(
    hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, counts, dloss, chunk_rows,
    want_hidden, want_weight, want_bias, *_,
):  # fmt: skip
    acc = torch.promote_types(hidden.dtype, torch.float32)
    half = hidden.dtype == torch.float16  # too narrow for a gradient before its loss scale
    return (
        hidden.new_empty(hidden.shape[0], dtype=acc),
        hidden.new_empty(hidden.shape if want_hidden else 0, dtype=acc if half else None),
        weight.new_empty(weight.shape if want_weight else 0, dtype=acc),
        weight.new_empty(weight.shape[0] if want_bias else 0, dtype=acc),
    )


_operator = operator(
    "linear_kl_div(Tensor hidden, Tensor weight, Tensor? bias, Tensor teacher_hidden,"
    " Tensor teacher_weight, Tensor? teacher_bias, Tensor? counts, Tensor? dloss,"
    " SymInt chunk_rows, bool want_hidden, bool want_weight, bool want_bias, float beta,"
    " float temperature, float softcap, float teacher_softcap) -> (Tensor, Tensor, Tensor, Tensor)",
    _launch,
    _fake,
)


class Plan(NamedTuple):
    """What a call's products are made of, and which gradients it wants."""

    dtype: torch.dtype
    chunk_rows: int
    wants: tuple[bool, bool, bool]


def _call(tensors, dloss_T: Tensor | None, plan: Plan, options: Divergence):
    *layers, counts_T = tensors
    low = (None if x is None else x.to(plan.dtype) for x in layers)
    wants = plan.wants if dloss_T is not None else (False, False, False)
    with torch.autocast(layers[0].device.type, enabled=False):
        return _operator(*low, counts_T, dloss_T, plan.chunk_rows, *wants, *options)


class _LinearKLDiv(torch.autograd.Function):
    """The summed loss of all rows times `scale`, its gradients made in the forward pass."""

    @staticmethod
    def forward(ctx, h, w, b, th, tw, tb, counts_T, scale, plan: Plan, options: Divergence):
        dloss_T = scale.expand(h.shape[0]) if any(plan.wants) else None
        loss_T, *grads = _call((h, w, b, th, tw, tb, counts_T), dloss_T, plan, options)
        ctx.save_for_backward(*grads)
        ctx.dtypes, ctx.wants = [None if x is None else x.dtype for x in (h, w, b)], plan.wants
        return loss_T.sum() * scale

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss: Tensor):
        given = zip(ctx.saved_tensors, ctx.dtypes, ctx.wants, strict=True)
        return *(scaled(g, dloss, dtype) if want else None for g, dtype, want in given), *[None] * 7


class _LinearKLDivRows(torch.autograd.Function):
    """The loss of each row; the backward pass recomputes the logits."""

    @staticmethod
    def forward(ctx, h, w, b, th, tw, tb, counts_T, plan: Plan, options: Divergence):
        tensors = (h, w, b, th, tw, tb, counts_T)
        ctx.save_for_backward(*tensors)
        ctx.plan, ctx.options = plan, options
        return _call(tensors, None, plan, options)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss_T: Tensor):
        grads = _call(ctx.saved_tensors, dloss_T, ctx.plan, ctx.options)[1:]
        given = zip(grads, ctx.saved_tensors, ctx.plan.wants, strict=False)
        return *(g.to(x.dtype) if want else None for g, x, want in given), *[None] * 6


def linear_kl_div(
    input: Tensor,
    linear_weight: Tensor,
    teacher_input: Tensor,
    teacher_weight: Tensor,
    *,
    linear_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    mask: Tensor | None = None,
    reduction: str = "batchmean",
    beta: float = 0.0,
    temperature: float = 1.0,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
    chunk_bytes: int | None = None,
) -> Tensor:
    """Compute the divergence of a linear layer's distribution over classes from a teacher's.

    With beta = 0 and log_q, log_p the logarithms of both softmaxes, equal to
    `torch.nn.functional.kl_div(log_q, log_p, log_target=True)` summed over the classes, but about
    `chunk_bytes` of logits exist at a time. Input, weight and bias have a gradient; nothing is
    computed for one that does not require it. The teacher has none. The sums over chunks are in
    float32, products and determinism as in `linear_cross_entropy`. To distil a model into another
    on the tokens that count:

        loss = linear_kl_div(hidden, head.weight, teacher_hidden, teacher_head.weight.detach(),
                             mask=labels != -100, temperature=2.0) * 2.0**2

    Probabilities below exp(-10,000), such as those of classes excluded by a bias of -inf, count as
    that. Inside torch.func, where torch.export traces and with TRITIUM_REFERENCE=1 all logits exist
    at once. The classes cannot be split over ranks.

    Args:
        input: the student's hidden states, `[..., D]`; float32, float16, bfloat16 or float64.
        linear_weight: the student's head, `[V, D]`, any of these dtypes.
        teacher_input: the teacher's hidden states of the same tokens, `[..., E]`; E may differ
            from D. Its products run in the dtype of the student's.
        teacher_weight: the teacher's head, `[V, E]`, over the same classes.
        linear_bias: `[V]` or None.
        teacher_bias: `[V]` or None.
        mask: bool, the leading axes of `input`; False where a token does not count. None: all do.
        reduction: "batchmean": the sum by the number of tokens that count; "sum"; or "none", one
            number per token, which costs two more products.
        beta: 0 for the forward KL divergence, 1 for the reverse, between for the generalised
            Jensen-Shannon divergence.
        temperature: divisor of all logits, behind the softcaps, above 0. The loss is not
            multiplied by its square.
        softcap: bound of the student's logits, softcap · tanh(logits / softcap), above 0; None for
            no bound.
        teacher_softcap: bound of the teacher's.
        chunk_bytes: budget of the two logits buffers in bytes; None for 1 GiB on a GPU, 4 MiB on
            a CPU.

    Returns:
        The divergence in nats: a scalar, or with reduction "none" the leading axes of `input`;
        float32 (float64 for float64 `input`). nan where "batchmean" has no token that counts.

    Raises:
        ValueError: an argument has another shape, dtype or range than documented above.
    """
    _check_options(reduction, beta, temperature, softcap, teacher_softcap)
    check_layer(OP, input, linear_weight, linear_bias, None)
    V, D = linear_weight.shape
    shape = input.shape[:-1]
    _check_teacher(input, V, teacher_input, teacher_weight, teacher_bias)
    mask_T = _check_mask(mask, input)
    hidden_TD, dtype = input.reshape(-1, D), _products_dtype(input)
    teacher_hidden = teacher_input.reshape(-1, teacher_input.shape[-1])
    per_chunk = chunk_rows(OP, hidden_TD, 2 * V, dtype, False, chunk_bytes)
    layers = hidden_TD, linear_weight, linear_bias, teacher_hidden, teacher_weight, teacher_bias
    if runtime.REFERENCE or sees_through() or input.is_meta:
        low = [None if x is None else x.to(dtype) for x in layers]
        with nullcontext() if input.is_meta else torch.autocast(input.device.type, enabled=False):
            loss = linear_kl_div_reference(
                low[0], low[1], low[3], low[4], linear_bias=low[2], teacher_bias=low[5],
                mask=mask_T, reduction=reduction, beta=beta, temperature=temperature,
                softcap=softcap, teacher_softcap=teacher_softcap,
            )  # fmt: skip
        return loss.view(shape) if reduction == "none" else loss
    grad = torch.is_grad_enabled()
    wants = tuple(grad and x is not None and x.requires_grad for x in layers[:3])
    plan = Plan(dtype, per_chunk, wants)
    options = Divergence(beta, temperature, softcap or 0.0, teacher_softcap or 0.0)
    # A float16 gradient is too narrow before its loss scale, which the backward pass brings.
    if reduction != "none" and dtype != torch.float16:
        scale = _scale(hidden_TD, mask_T, reduction)
        return _LinearKLDiv.apply(*layers, mask_T, scale, plan, options)
    loss_T = _LinearKLDivRows.apply(*layers, mask_T, plan, options)
    if reduction == "none":
        return loss_T.view(shape)
    return loss_T.sum() * _scale(hidden_TD, mask_T, reduction)


def _check_options(
    reduction: str, beta: float, temperature: float, softcap: float | None,
    teacher_softcap: float | None,
) -> None:  # fmt: skip
    if reduction not in ("none", "batchmean", "sum"):
        why = "; PyTorch's mean divides by the classes too" if reduction == "mean" else ""
        raise ValueError(
            f'{OP}: reduction must be "none", "batchmean" or "sum", got {reduction!r}{why}'
        )
    numbers = {"beta": beta, "temperature": temperature, "softcap": softcap}
    for name, number in (numbers | {"teacher_softcap": teacher_softcap}).items():
        check_number(OP, name, number)
    if not 0 <= beta <= 1:
        raise ValueError(f"{OP}: beta must be in [0, 1], got {beta}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"{OP}: temperature must be above 0, got {temperature}")
    for name, cap in (("softcap", softcap), ("teacher_softcap", teacher_softcap)):
        if cap is not None and not 0 < cap < math.inf:
            raise ValueError(f"{OP}: {name} must be above 0, or None for no cap, got {cap}")


def _check_teacher(
    input: Tensor, V: int, hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> None:
    E = hidden.shape[-1]
    if not hidden.is_floating_point() or hidden.shape[:-1] != input.shape[:-1]:
        wanted = f"floating point {[*input.shape[:-1], 'E']}".replace("'", "")
        raise ValueError(
            f"{OP}: teacher_input must be {wanted}, got {hidden.dtype} {list(hidden.shape)}"
        )
    if weight.shape != (V, E):
        raise ValueError(
            f"{OP}: teacher_weight must have shape {[V, E]}, one row per class of the student, "
            f"got {list(weight.shape)}"
        )
    if bias is not None and bias.shape != (V,):
        raise ValueError(f"{OP}: teacher_bias must have shape [{V}], got {list(bias.shape)}")
    named = zip(("input", "weight", "bias"), (hidden, weight, bias), strict=True)
    for name, x in ((f"teacher_{name}", x) for name, x in named):
        if x is not None and x.device != input.device:
            raise ValueError(f"{OP}: {name} is on {x.device}; move it to {input.device}")
        if x is not None and x.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{OP}: {name} gets no gradient; pass {name}.detach()")


def _check_mask(mask: Tensor | None, input: Tensor) -> Tensor | None:
    if mask is None:
        return None
    if mask.dtype != torch.bool or mask.shape != input.shape[:-1]:
        raise ValueError(
            f"{OP}: mask must be bool {list(input.shape[:-1])}, False where a token does not "
            f"count, got {mask.dtype} {list(mask.shape)}"
        )
    if mask.device != input.device:
        raise ValueError(f"{OP}: mask is on {mask.device}; move it to {input.device}")
    return mask.reshape(-1).contiguous()
