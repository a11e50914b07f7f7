"""Linear divergence in chunks: operator and gradients, of linear_kl_div and linear_topk_kl_div.

The formulas are in linear_kl_div.py.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from tritium.kernels._cross_entropy_options import check_number, mean_scale
from tritium.kernels._kl_div_rows import Divergence, rows
from tritium.kernels._linear_cross_entropy import _product
from tritium.kernels._scale_gradient import scaled
from tritium.kernels._topk_kl_div_rows import topk_rows
from tritium.kernels.runtime import apply, once_differentiable, operator


def scale_of(x_TD: Tensor, mask_T: Tensor | None, reduction: str) -> Tensor:
    """Return the factor from a sum to the reduction, in the dtype of the losses of `x_TD`."""
    dtype = torch.promote_types(x_TD.dtype, torch.float32)
    if reduction == "sum":
        return x_TD.new_ones((), dtype=dtype)
    return mean_scale(x_TD.new_ones(len(x_TD), dtype=dtype) if mask_T is None else mask_T.to(dtype))


def _launch(
    hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None, teacher_bias_V: Tensor | None, indices_TK: Tensor | None,
    log_prob_TK: Tensor | None, counts_T: Tensor | None, dloss_T: Tensor | None, chunk_rows: int,
    want_hidden: bool, want_weight: bool, want_bias: bool, options: Divergence,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return loss_T and the gradients asked for (empty in place of the others)."""
    outputs = _fake(
        hidden_TD, weight_VD, bias_V, teacher_hidden, teacher_weight, teacher_bias_V, indices_TK,
        log_prob_TK, counts_T, dloss_T, chunk_rows, want_hidden, want_weight, want_bias, options,
    )  # fmt: skip
    loss_T, dhidden_TD, dweight_VD, dbias_V = outputs
    dbias_V.zero_()
    T, V = hidden_TD.shape[0], weight_VD.shape[0]
    if T == 0:  # no chunk writes it
        dweight_VD.zero_()
    buffers = hidden_TD.new_empty(
        1 if teacher_weight is None else 2, min(chunk_rows, T), -(-V // 64) * 64
    )
    buffers[:, :, V:] = 0  # a product may read what it multiplies by 0
    for start in range(0, T, chunk_rows):
        chunk = slice(start, start + chunk_rows)
        h_CD = hidden_TD[chunk]
        x_CW, *others = buffers[:, : h_CD.shape[0]]
        x_CV = x_CW[:, :V]
        _logits(h_CD, weight_VD, bias_V, x_CV)
        row = (
            None if counts_T is None else counts_T[chunk],
            None if dloss_T is None else dloss_T[chunk], loss_T[chunk], options,
        )  # fmt: skip
        if teacher_hidden is not None and teacher_weight is not None:
            _logits(teacher_hidden[chunk], teacher_weight, teacher_bias_V, others[0][:, :V])
            rows(x_CW, others[0], V, *row)
        else:
            assert indices_TK is not None
            assert log_prob_TK is not None
            topk_rows(x_CW, V, indices_TK[chunk], log_prob_TK[chunk], *row)
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
    hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, indices, log_prob, counts,
    dloss, chunk_rows, want_hidden, want_weight, want_bias, options,
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
    "linear_kl_div(Tensor hidden, Tensor weight, Tensor? bias, Tensor? teacher_hidden,"
    " Tensor? teacher_weight, Tensor? teacher_bias, Tensor? indices, Tensor? log_prob,"
    " Tensor? counts, Tensor? dloss, SymInt chunk_rows, bool want_hidden, bool want_weight,"
    " bool want_bias, float beta, float temperature, float softcap, float teacher_softcap)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _launch,
    _fake,
    options=Divergence,
)


class Plan(NamedTuple):
    """Dtype and rows of the products, and the gradients that are wanted."""

    dtype: torch.dtype
    chunk_rows: int
    wants: tuple[bool, ...]


class Tensors(NamedTuple):
    """The tensors of a call: the student's layer, then the teacher's, or its likeliest classes."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    teacher_hidden: Tensor | None
    teacher_weight: Tensor | None
    teacher_bias: Tensor | None
    indices: Tensor | None
    log_prob: Tensor | None
    """`[T, K + 1]`; the last of a row is that of all other classes."""
    counts: Tensor | None


def _call(tensors: Tensors, dloss_T: Tensor | None, plan: Plan, options: Divergence):
    low = (None if x is None else x.to(plan.dtype) for x in tensors[:6])
    wants = plan.wants if dloss_T is not None else (False, False, False)
    with torch.autocast(tensors.hidden.device.type, enabled=False):
        return _operator(*low, *tensors[6:], dloss_T, plan.chunk_rows, *wants, options)


class _LinearKLDiv(torch.autograd.Function):
    """The summed loss of all rows times `scale`, its gradients made in the forward pass."""

    @staticmethod
    def forward(ctx, scale, plan: Plan, options: Divergence, *tensors):
        tensors = Tensors(*tensors)
        dloss_T = scale.expand(tensors.hidden.shape[0]) if any(plan.wants) else None
        loss_T, *grads = _call(tensors, dloss_T, plan, options)
        ctx.save_for_backward(*grads)
        ctx.dtypes = [None if x is None else x.dtype for x in tensors[:3]]
        ctx.wants = plan.wants
        return loss_T.sum() * scale

    @staticmethod
    @once_differentiable(made_in_forward=True)
    def backward(ctx, dloss: Tensor):
        given = zip(ctx.saved_tensors, ctx.dtypes, ctx.wants, strict=True)
        grads = [scaled(g, dloss, dtype) if want else None for g, dtype, want in given]
        return None, None, None, *grads, *[None] * 6


class _LinearKLDivRows(torch.autograd.Function):
    """The loss of each row; the backward pass recomputes the logits."""

    @staticmethod
    def forward(ctx, plan: Plan, options: Divergence, *tensors):
        ctx.save_for_backward(*tensors)
        ctx.plan, ctx.options = plan, options
        return _call(Tensors(*tensors), None, plan, options)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss_T: Tensor):
        tensors = Tensors(*ctx.saved_tensors)
        given = _call(tensors, dloss_T, ctx.plan, ctx.options)[1:]
        trios = zip(given, tensors[:3], ctx.plan.wants, strict=True)
        grads = [g.to(x.dtype) if want and x is not None else None for g, x, want in trios]
        return None, None, *grads, *[None] * 6


def chunked(
    tensors: Tensors, dtype: torch.dtype, chunk_rows: int, options: Divergence, reduction: str,
    shape: torch.Size,
) -> Tensor:  # fmt: skip
    """Compute the divergence over chunks of rows; with reduction "none" in the `shape` given."""
    grad, (hidden_TD, *_), mask_T = torch.is_grad_enabled(), tensors, tensors.counts
    wants = tuple(grad and x is not None and x.requires_grad for x in tensors[:3])
    plan = Plan(dtype, chunk_rows, wants)
    # A float16 gradient is too narrow before its loss scale, which the backward pass brings.
    if reduction != "none" and dtype != torch.float16:
        scale = scale_of(hidden_TD, mask_T, reduction)
        return apply(_LinearKLDiv, scale, plan, options, *tensors)
    loss_T = apply(_LinearKLDivRows, plan, options, *tensors)
    if reduction == "none":
        return loss_T.view(shape)
    return loss_T.sum() * scale_of(hidden_TD, mask_T, reduction)


def check_options(
    op: str, reduction: str, beta: float, temperature: float, softcap: float | None,
    teacher_softcap: float | None = None,
) -> None:  # fmt: skip
    """Raise ValueError, in the name of `op`, for an option outside its range."""
    if reduction not in ("none", "batchmean", "sum"):
        why = "; PyTorch's mean divides by the classes too" if reduction == "mean" else ""
        raise ValueError(
            f'{op}: reduction must be "none", "batchmean" or "sum", got {reduction!r}{why}'
        )
    numbers = {"beta": beta, "temperature": temperature, "softcap": softcap}
    for name, number in (numbers | {"teacher_softcap": teacher_softcap}).items():
        check_number(op, name, number)
    if not 0 <= beta <= 1:
        raise ValueError(f"{op}: beta must be in [0, 1], got {beta}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"{op}: temperature must be above 0, got {temperature}")
    for name, cap in (("softcap", softcap), ("teacher_softcap", teacher_softcap)):
        if cap is not None and not 0 < cap < math.inf:
            raise ValueError(f"{op}: {name} must be above 0, or None for no cap, got {cap}")


def check_mask(op: str, mask: Tensor | None, input: Tensor) -> Tensor | None:
    """Return the mask as `[T]`, or raise ValueError if it does not fit `input`."""
    if mask is None:
        return None
    if mask.dtype != torch.bool or mask.shape != input.shape[:-1]:
        raise ValueError(
            f"{op}: mask must be bool {list(input.shape[:-1])}, False where a token does not "
            f"count, got {mask.dtype} {list(mask.shape)}"
        )
    if mask.device != input.device:
        raise ValueError(f"{op}: mask is on {mask.device}; move it to {input.device}")
    return mask.reshape(-1).contiguous()
