"""Linear cross-entropy in chunks: operator and gradients, shared with info_nce.

The formulas are in linear_cross_entropy.py.
"""

import math
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from tritium.kernels import runtime
from tritium.kernels._cross_entropy_launch import empty_results
from tritium.kernels._cross_entropy_launch import rows as loss_rows
from tritium.kernels._cross_entropy_options import (
    SCHEMA,
    LossOptions,
    TokenStats,
    all_reduce,
    check_class_weight,
    check_target,
    final_logits,
    shape_stats,
    stats_reference,
    token_stats,
)
from tritium.kernels._cross_entropy_ranks import Classes, shard
from tritium.kernels._mean_loss import scale_of_mean
from tritium.kernels._scale_gradient import scaled
from tritium.kernels.cross_entropy import cross_entropy_reference
from tritium.kernels.runtime import apply, once_differentiable, operator, sees_through

# A chunk's rows must outnumber what the float32 sum of dweight costs (about 230 rows' worth on an
# H200, computed), so the budget is large; on a CPU a chunk should stay in the cache: 95 ms against
# 129 ms for all logits at once at T = 2048, D = 256, V = 4096 on 2 cores.
CHUNK_BYTES_CUDA = 1 << 30
CHUNK_BYTES_CPU = 1 << 22


class ChunkPlan(NamedTuple):
    """Chunk size and dtypes of the products."""

    dtype: torch.dtype
    chunk_rows: int
    single_bf16_chunk: bool  # dweight in the weight's dtype: it is one product, and no sum


def chunk_rows(
    op: str, hidden_TD: Tensor, V: int, dtype: torch.dtype, single_chunk_saves_memory: bool,
    chunk_bytes: int | None,
) -> int:  # fmt: skip
    """Return the rows of a chunk: as many as `chunk_bytes` of logits hold.

    By default all rows are one chunk where that costs no more memory. `single_chunk_saves_memory`
    where the weight is bfloat16 and wants a gradient: one chunk then needs no float32 sum of
    dweight, only the product itself. The sum takes 4·V·D bytes, and 2·V·D more when it is rounded:
    as much as the logits of D more rows than a chunk has, or of 2·D rows in all.
    """
    T, D = hidden_TD.shape
    budget = CHUNK_BYTES_CUDA if hidden_TD.is_cuda else CHUNK_BYTES_CPU
    budget = budget if chunk_bytes is None else chunk_bytes
    if budget < 1:
        raise ValueError(f"{op}: chunk_bytes must be positive, got {chunk_bytes}")
    rows = max(1, budget // (V * dtype.itemsize))
    rows = rows // 128 * 128 if rows > 128 else rows  # complete tiles of the matrix products
    single = chunk_bytes is None and single_chunk_saves_memory and max(rows, D) + D >= T
    return max(rows, T) if single else rows


def _launch(
    hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, target_T: Tensor,
    class_weight_V: Tensor | None, excluded_TV: Tensor | None, dloss_T: Tensor | None,
    chunk_rows: int, single_bf16_chunk: bool, want_hidden: bool, want_weight: bool,
    want_bias: bool, options: LossOptions,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return loss_T, its statistics and the gradients asked for (empty in place of the others)."""
    outputs = _fake(
        hidden_TD, weight_VD, bias_V, target_T, class_weight_V, excluded_TV, dloss_T, chunk_rows,
        single_bf16_chunk, want_hidden, want_weight, want_bias, options,
    )  # fmt: skip
    loss_T, values_RT, argmax_T, dhidden_TD, dweight_VD, dbias_V = outputs
    dbias_V.zero_()
    gradient = want_hidden or want_weight or want_bias
    T, V = hidden_TD.shape[0], weight_VD.shape[0]
    if T == 0:  # no chunk writes it
        dweight_VD.zero_()
    stride = -(-V // 64) * 64  # rows start on 128 bytes: 16-byte accesses for every V
    padded_CV = hidden_TD.new_empty(min(chunk_rows, T), stride)
    padded_CV[:, V:] = 0  # a product may read what it multiplies by 0: oneDNN does, on AMX
    buffer_CV = padded_CV[:, :V]
    for start in range(0, T, chunk_rows):
        chunk = slice(start, start + chunk_rows)
        h_CD = hidden_TD[chunk]
        x_CV = buffer_CV[: h_CD.shape[0]]
        if bias_V is None:
            torch.mm(h_CD, weight_VD.T, out=x_CV)
        else:
            torch.addmm(bias_V, h_CD, weight_VD.T, out=x_CV)
        if excluded_TV is not None:
            x_CV.masked_fill_(excluded_TV[chunk], -torch.inf)
        dloss_C = None if dloss_T is None else dloss_T[chunk]
        loss_C, values_RC, argmax_C = loss_rows(
            x_CV, target_T[chunk], class_weight_V, dloss_C, options, gradient
        )
        loss_T[chunk] = loss_C
        if options.stats:
            values_RT[:, chunk], argmax_T[chunk] = values_RC, argmax_C
        if want_hidden:
            _product(x_CV, weight_VD, dhidden_TD[chunk])
        if want_weight:
            _product(x_CV.T, h_CD, dweight_VD, add=start > 0)
        if want_bias:
            dbias_V += x_CV.sum(0, dtype=dbias_V.dtype)
    if options.group and want_hidden:  # each rank's classes give a part of it
        dhidden_TD.copy_(all_reduce(dhidden_TD.to(loss_T.dtype), options.group, "sum"))
    return outputs


def _product(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> None:
    """Write a · b to `out`, or add it, unrounded before where `out` is more precise.

    On a CPU a product of bfloat16 is rounded to it before it is added, as `torch.nn.Linear` rounds
    its own gradients: PyTorch has no other there, and by products of float32 the whole operation
    takes a third longer.
    """
    if a.dtype != out.dtype and out.is_cuda:
        if add:
            torch.ops.aten.addmm.dtype_out(out, a, b, out.dtype, out=out)
        else:
            torch.ops.aten.mm.dtype_out(a, b, out.dtype, out=out)
        return
    if a.dtype == torch.bfloat16 and out.dtype == torch.float32:
        product = a @ b
        out.add_(product) if add else out.copy_(product)
        return
    a, b = a.to(out.dtype), b.to(out.dtype)
    if add:
        out.addmm_(a, b)
    else:
        torch.mm(a, b, out=out)


def _fake(
    hidden, weight, bias, target, class_weight, excluded, dloss, chunk_rows,
    single_bf16_chunk, want_hidden, want_weight, want_bias, options,
):  # fmt: skip
    loss, values, argmax = empty_results(hidden, target.is_floating_point(), options)
    argmax = loss.new_empty(0, dtype=torch.int64) if argmax is None else argmax
    half = hidden.dtype == torch.float16  # see `_row_scale`
    return (
        loss,
        values if options.stats else values.new_empty(0),
        argmax,
        hidden.new_empty(hidden.shape if want_hidden else 0, dtype=loss.dtype if half else None),
        weight.new_empty(
            weight.shape if want_weight else 0,
            dtype=weight.dtype if single_bf16_chunk else loss.dtype,
        ),
        weight.new_empty(weight.shape[0] if want_bias else 0, dtype=loss.dtype),
    )


_operator = operator(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor? bias, Tensor target,"
    " Tensor? class_weight, Tensor? excluded, Tensor? dloss, SymInt chunk_rows,"
    " bool single_bf16_chunk, bool want_hidden, bool want_weight, bool want_bias,"
    f" {SCHEMA})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _launch,
    _fake,
    options=LossOptions,
)


class Inputs(NamedTuple):
    """The tensors of a call; the first three may get gradients."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    target: Tensor
    class_weight: Tensor | None
    excluded: Tensor | None  # True: this class does not count for this token


def _call(inputs: Inputs, dloss_T, plan: ChunkPlan, wants, options: LossOptions):
    h, w, b = (None if x is None else x.to(plan.dtype) for x in inputs[:3])
    with torch.autocast(inputs.hidden.device.type, enabled=False):
        return _operator(
            h, w, b, *inputs[3:], dloss_T, plan.chunk_rows, plan.single_bf16_chunk, *wants, options
        )  # fmt: skip


class _LinearCrossEntropy(torch.autograd.Function):
    """The summed loss of all rows times `scale`, its gradients made in the forward pass."""

    @staticmethod
    def forward(
        ctx, hidden_TD, weight_VD, bias_V, target_T, class_weight_V, excluded_TV, scale,
        weight_grad_VD, plan, wants, options,
    ):  # fmt: skip
        inputs = Inputs(hidden_TD, weight_VD, bias_V, target_T, class_weight_V, excluded_TV)
        # The rows are scaled by `first` where their gradient is made, the sums by the rest, which
        # is 1 but in float16. As in PyTorch, an empty mean is nan, and so is the gradient of what
        # counts with weight 0, but ignored rows get 0, whatever `first` is.
        first, rest = scale, None
        if plan.dtype == torch.float16:
            first = torch.where(scale.isnan(), torch.nan, _row_scale(inputs, options).to(scale))
            rest = torch.where(scale.isnan(), 1.0, scale / first)
        dloss_T = first.expand(inputs.hidden.shape[0])
        loss_T, values_RT, argmax_T, *grads = _call(inputs, dloss_T, plan, wants, options)
        ctx.save_for_backward(*grads, rest)
        ctx.dtypes = [None if x is None else x.dtype for x in inputs[:3]]
        ctx.wants, ctx.weight_grad_VD = wants, weight_grad_VD
        ctx.mark_non_differentiable(values_RT, argmax_T)
        ctx.set_materialize_grads(False)
        return loss_T.sum() * scale, values_RT, argmax_T

    @staticmethod
    @once_differentiable(made_in_forward=True)
    def backward(ctx, dloss: Tensor | None, *_):
        if dloss is None:
            return (None,) * 11
        *grads, rest = ctx.saved_tensors
        grads = _hand_over(ctx, grads, ctx.dtypes, dloss if rest is None else dloss * rest)
        return *grads, None, None, None, None, None, None, None, None


def _row_scale(inputs: Inputs, options: LossOptions) -> Tensor:
    """Return the factor of the rows' gradients while they exist in float16.

    There a gradient below 6e-8 would be 0 before it meets a loss scale. Its largest possible
    magnitude is known: the factor raises that bound to 2¹⁴.
    """
    one = inputs.hidden.new_ones((), dtype=torch.float32)
    slope = abs(options.logit_scale)
    largest = options.softcap or 65504 * slope
    V = options.n_classes or inputs.weight.shape[0]
    bound = slope * (2 + 2 * options.z_loss * (largest + math.log(V)))
    w_V = inputs.class_weight
    most = one if w_V is None else w_V.abs().amax().to(one).clamp_min(1e-30)
    return one if bound == 0 else 2**14 / (bound * most)


class _LinearCrossEntropyRows(torch.autograd.Function):
    """The loss of each row; the backward pass recomputes the logits."""

    @staticmethod
    def forward(
        ctx, hidden_TD, weight_VD, bias_V, target_T, class_weight_V, excluded_TV,
        weight_grad_VD, plan, wants, options,
    ):  # fmt: skip
        inputs = Inputs(hidden_TD, weight_VD, bias_V, target_T, class_weight_V, excluded_TV)
        ctx.save_for_backward(*inputs)
        ctx.weight_grad_VD, ctx.plan, ctx.wants, ctx.options = weight_grad_VD, plan, wants, options
        results = _call(inputs, None, plan, (False, False, False), options)[:3]
        ctx.mark_non_differentiable(*results[1:])
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss_T: Tensor | None, *_):
        if dloss_T is None:
            return (None,) * 10
        inputs = Inputs(*ctx.saved_tensors)
        options = ctx.options._replace(stats=False)
        grads = _call(inputs, dloss_T, ctx.plan, ctx.wants, options)[3:]
        dtypes = [None if x is None else x.dtype for x in inputs[:3]]
        grads = _hand_over(ctx, grads, dtypes, None)
        return *grads, None, None, None, None, None, None, None


def _hand_over(ctx, grads, dtypes, factor: Tensor | None) -> list[Tensor | None]:
    """Return the gradients times `factor`; add the weight's to its own buffer, if there is one."""
    wants = list(ctx.wants)
    if ctx.weight_grad_VD is not None:
        if factor is None:
            ctx.weight_grad_VD.add_(grads[1])
        else:
            ctx.weight_grad_VD.addcmul_(grads[1], factor)
        wants[1] = False
    return [
        scaled(g, factor, dtype) if want else None
        for g, dtype, want in zip(grads, dtypes, wants, strict=True)
    ]


def linear_loss(
    op: str, hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None,
    class_weight: Tensor | None, excluded: Tensor | None, options: LossOptions, reduction: str,
    chunk_bytes: int | None, weight_grad: Tensor | None, group: ProcessGroup | Classes | None,
) -> Tensor | tuple[Tensor, TokenStats]:  # fmt: skip
    """Compute `linear_cross_entropy`; `op` names the caller in errors, `excluded` masks classes."""
    check_layer(op, hidden, weight, bias, weight_grad)
    V, D = weight.shape
    shape = hidden.shape[:-1]
    target_T = check_target(op, target, shape, V, hidden)
    first_class, n_classes, name = shard(group, V)
    class_weight_V = check_class_weight(op, "weight", class_weight, n_classes or V, hidden)
    options = options._replace(first_class=first_class, n_classes=n_classes, group=name)
    dtype = _products_dtype(hidden)
    hidden_TD = hidden.reshape(-1, D)
    grad = torch.is_grad_enabled()
    wants = tuple(grad and x is not None and x.requires_grad for x in (hidden, weight, bias))
    narrow = dtype == weight.dtype == torch.bfloat16 and wants[1] and weight_grad is None
    rows = chunk_rows(op, hidden_TD, V, dtype, narrow, chunk_bytes)
    plan = ChunkPlan(dtype, rows, narrow and rows >= hidden_TD.shape[0])
    inputs = Inputs(hidden_TD, weight, bias, target_T, class_weight_V, excluded)
    alone = group is None and weight_grad is None
    if not alone and sees_through():
        raise ValueError(
            f"{op}: group and linear_weight_grad work neither inside torch.func nor in torch.export"
        )
    if not alone and target_T.requires_grad:
        raise ValueError(
            f"{op}: soft targets get no gradient with group or linear_weight_grad; "
            "pass target.detach()"
        )
    all_logits = sees_through() or target_T.requires_grad  # as large as the targets' gradient
    if alone and (runtime.REFERENCE or all_logits or hidden.is_meta):
        return _whole(inputs, dtype, options, reduction, shape)
    how = weight_grad, plan, wants, options
    if reduction == "none":
        loss, values_RT, argmax_T = apply(_LinearCrossEntropyRows, *inputs, *how)
        loss = loss.view(shape)
    else:
        wide = torch.promote_types(dtype, torch.float32)
        if reduction == "mean":
            scale = scale_of_mean(target_T, class_weight_V, options.ignore_index, wide)
        else:
            scale = hidden.new_ones((), dtype=wide)
        loss, values_RT, argmax_T = apply(_LinearCrossEntropy, *inputs, scale, *how)
    if not options.stats:
        return loss
    stats = token_stats(values_RT, argmax_T, target_T, options.ignore_index, shape)
    return loss, stats


def _products_dtype(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    if hidden.is_meta or not torch.is_autocast_enabled(device):
        return hidden.dtype
    return torch.get_autocast_dtype(device)


def _whole(
    inputs: Inputs, dtype: torch.dtype, options: LossOptions, reduction: str, shape: torch.Size
) -> Tensor | tuple[Tensor, TokenStats]:
    """Compute the loss from all logits in plain PyTorch, which every transform supports."""
    h, w, b = (None if x is None else x.to(dtype) for x in inputs[:3])
    device = inputs.hidden.device.type
    with nullcontext() if device == "meta" else torch.autocast(device, enabled=False):
        x_TV = F.linear(h, w, b)
    if inputs.excluded is not None:
        x_TV = x_TV.masked_fill(inputs.excluded, -torch.inf)
    shaping = options.softcap or None, options.logit_scale
    loss = cross_entropy_reference(
        x_TV, inputs.target, weight=inputs.class_weight, ignore_index=options.ignore_index,
        reduction=reduction, label_smoothing=options.label_smoothing, z_loss=options.z_loss,
        softcap=shaping[0], logit_scale=shaping[1],
    )  # fmt: skip
    loss = loss.view(shape) if reduction == "none" else loss
    if not options.stats:
        return loss
    z_TV = final_logits(x_TV.detach(), *shaping)
    return loss, shape_stats(stats_reference(z_TV, inputs.target, options.ignore_index), shape)


def check_layer(
    op: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, weight_grad: Tensor | None
) -> None:
    """Raise ValueError if a linear layer and its buffer do not fit `hidden` and each other."""
    D = hidden.shape[-1]
    if not hidden.is_floating_point():
        raise ValueError(f"{op}: input must be floating point, got {hidden.dtype}")
    if weight.dim() != 2 or weight.shape[1] != D or weight.shape[0] == 0:
        raise ValueError(f"{op}: linear_weight must have shape [V, {D}], got {list(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{op}: linear_bias must have shape [{weight.shape[0]}], got {list(bias.shape)}"
        )
    named = zip(("weight", "bias", "weight_grad"), (weight, bias, weight_grad), strict=True)
    for name, x in ((f"linear_{name}", x) for name, x in named):
        if x is not None and x.device != hidden.device:
            raise ValueError(f"{op}: {name} is on {x.device}; move it to {hidden.device}")
    if weight_grad is None:
        return
    if weight_grad.shape != weight.shape or weight_grad.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"{op}: linear_weight_grad must be float32 {list(weight.shape)}, "
            f"got {weight_grad.dtype} {list(weight_grad.shape)}"
        )
    if not weight.requires_grad:
        raise ValueError(
            f"{op}: linear_weight_grad is given, but linear_weight.requires_grad is False; set it"
        )
