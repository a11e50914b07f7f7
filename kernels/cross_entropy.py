"""Cross-entropy of logits against class indices or class probabilities.

With z_TV = logit_scale · logits, or softcap · tanh(logit_scale · logits / softcap), target class t,
class weights w_V (ones if absent) and ε the label smoothing:

    lse_T  = log(sum_V(exp(z_TV)))
    loss_T = (1 - ε) · w_t · (lse - z_t) + ε/V · sum_V(w_V · (lse - z_V)) + z_loss · w_t · lse²

and 0 where the target is `ignore_index`. "mean" divides the sum of loss_T by the sum of w_t over
the targets that count. For soft targets q_TV the first term is (1 - ε) · sum_V(q_V · w_V · (lse -
z_V)), and w_t is 1. Backward, with p_TV = exp(z_TV - lse_T) and with hit_T and a_TV the weights of
_cross_entropy_options.py:

    dz_TV = p_TV · (hit_T + sum_V(a_TV) + 2 · z_loss · w_t · lse_T) - a_TV - [V = t] · hit_T
    dlogits_TV = dloss_T · logit_scale · dz_TV · (1 - (z_TV / softcap)²)
    dq_TV = dloss_T · (1 - ε) · w_V · (lse_T - z_TV)

T tokens, V classes. The kernel is in _cross_entropy_rows.py.

Milakov & Gimelshein, "Online normalizer calculation for softmax", 2018.
https://arxiv.org/abs/1805.02867; the z-loss: de Brébisson & Vincent, "The Z-loss", 2016,
https://arxiv.org/abs/1604.08859; classes split over ranks: Shoeybi et al., "Megatron-LM", 2019,
https://arxiv.org/abs/1909.08053.
"""

from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from tritium.kernels._cross_entropy_launch import empty_results, launch_gradient, rows
from tritium.kernels._cross_entropy_options import (
    SCHEMA,
    LossOptions,
    TokenStats,
    check_class_weight,
    check_options,
    check_reduction,
    check_target,
    final_logits,
    reduce_loss,
    rows_reference,
    shape_stats,
    soft_target_gradient,
    stats_reference,
    token_stats,
    token_weights,
)
from tritium.kernels._cross_entropy_ranks import shard
from tritium.kernels._mean_loss import reduced, scale_of_mean
from tritium.kernels._scale_gradient import scale_gradient_
from tritium.kernels.runtime import (
    apply,
    once_differentiable,
    operator,
    sees_through,
    unit_stride,
    uses_triton,
)

ONCE = (
    "cross_entropy: with inplace=True the gradient can be taken once; "
    "pass inplace=False to call backward again"
)


def cross_entropy_reference(
    input: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    """Compute `cross_entropy` on `[T, V]` in plain PyTorch, in float32 (float64 for float64)."""
    z_TV = final_logits(input, softcap, logit_scale)
    target = target.to(z_TV) if target.is_floating_point() else target
    w_V = None if weight is None else weight.to(z_TV)
    loss_T = F.cross_entropy(
        z_TV, target, w_V, ignore_index=ignore_index, reduction="none",
        label_smoothing=label_smoothing,
    )  # fmt: skip
    if z_loss:
        w_T = token_weights(target, w_V, ignore_index, z_TV.dtype)
        loss_T = loss_T + z_loss * w_T * z_TV.logsumexp(-1).square()
    return reduce_loss(loss_T, target, w_V, ignore_index, reduction)


Reduced = tuple[Tensor, Tensor | None, Tensor, Tensor | None]
"""The loss, reduced; the scale of a mean; statistics and argmax of `Results`."""


def _launch_forward(
    x_TV: Tensor, target_T: Tensor, w_V: Tensor | None, reduction: str, options: LossOptions
) -> Reduced:
    loss_T, values_RT, argmax_T = rows(x_TV, target_T, w_V, None, options, gradient=False)
    loss, scale = reduced(loss_T, target_T, w_V, options.ignore_index, reduction)
    return loss, scale, values_RT, argmax_T


def _launch_backward(
    dloss_T: Tensor, x_TV: Tensor, target_T: Tensor, w_V: Tensor | None, values_RT: Tensor,
    scale: Tensor | None, options: LossOptions,
) -> Tensor:  # fmt: skip
    if x_TV.is_contiguous():
        dx_TV = torch.empty_like(x_TV)
    else:
        dx_TV = torch.empty_like(x_TV, memory_format=torch.contiguous_format)
    _write_gradient(dx_TV, dloss_T, x_TV, target_T, w_V, values_RT, scale, options)
    return dx_TV


def _write_gradient(
    dx_TV: Tensor, dloss_T: Tensor, x_TV: Tensor, target_T: Tensor, w_V: Tensor | None,
    values_RT: Tensor, scale: Tensor | None, options: LossOptions,
) -> None:  # fmt: skip
    """Write dloss_T · dx_TV, maybe over `x_TV` itself; `dloss_T` may be one for all rows.

    With `scale`, times it.
    """
    if uses_triton(x_TV, "cross_entropy"):
        launch_gradient(x_TV, target_T, w_V, options, values_RT, dx_TV, dloss_T, scale)
    else:
        dloss_T = (dloss_T if scale is None else dloss_T * scale).expand(x_TV.shape[0])
        rows_reference(dx_TV.copy_(x_TV), target_T, w_V, dloss_T, options, gradient=True)


def _launch_inplace(
    x_TV: Tensor, target_T: Tensor, w_V: Tensor | None, reduction: str, options: LossOptions
) -> Reduced:
    scale = None
    if reduction == "mean":
        wide = torch.promote_types(x_TV.dtype, torch.float32)
        scale = scale_of_mean(target_T, w_V, options.ignore_index, wide)
    loss_T, values_RT, argmax_T = rows(x_TV, target_T, w_V, scale, options, gradient=True)
    loss, _ = reduced(loss_T, target_T, w_V, options.ignore_index, reduction)
    return loss, scale, values_RT, argmax_T


def _fake_forward(x, target, weight, reduction, options) -> Reduced:
    loss_T, values_RT, argmax_T = empty_results(x, target.is_floating_point(), options)
    loss = loss_T if reduction == "none" else loss_T.new_empty(())
    scale = torch.empty_like(loss) if reduction == "mean" else None
    return loss, scale, values_RT, argmax_T


_forward = operator(
    f"cross_entropy_forward(Tensor x, Tensor target, Tensor? weight, str reduction, {SCHEMA})"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _launch_forward,
    _fake_forward,
    incoming=3,
    options=LossOptions,
)
_backward = operator(
    "cross_entropy_backward(Tensor dloss, Tensor x, Tensor target, Tensor? weight, Tensor values,"
    f" Tensor? scale, {SCHEMA}) -> Tensor",
    _launch_backward,
    lambda dloss, x, *_: x.new_empty(x.shape),
    incoming=1,
    options=LossOptions,
)
_inplace = operator(
    "cross_entropy_inplace(Tensor(a!) x, Tensor target, Tensor? weight, str reduction,"
    f" {SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor)",
    _launch_inplace,
    _fake_forward,
    options=LossOptions,
)


class _CrossEntropy(torch.autograd.Function):
    """The loss, reduced; with `overwrite`, backward writes the gradient over the logits."""

    @staticmethod
    def forward(
        ctx, x_TV: Tensor, target_T: Tensor, w_V: Tensor | None, options: LossOptions,
        overwrite: bool, reduction: str,
    ):  # fmt: skip
        loss, scale, values_RT, argmax_T = _forward(x_TV, target_T, w_V, reduction, options)
        # Dispatched, an operator returns a scale of nothing where there is none.
        scale = scale if reduction == "mean" else None
        ctx.save_for_backward(x_TV, target_T, w_V, values_RT, scale)
        ctx.how = options, overwrite
        ctx.spent = False
        if not options.stats:
            return loss
        ctx.mark_non_differentiable(values_RT, argmax_T)
        ctx.set_materialize_grads(False)
        return loss, values_RT, argmax_T

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss: Tensor | None, *_):
        if dloss is None:
            return (None,) * 6
        x_TV, target_T, w_V, values_RT, scale = ctx.saved_tensors
        options, overwrite = ctx.how
        if not overwrite:
            dx_TV = _backward(dloss, x_TV, target_T, w_V, values_RT, scale, options)
            dq_TV = None
            if ctx.needs_input_grad[1]:
                dloss_T = (dloss if scale is None else dloss * scale).expand(x_TV.shape[0])
                dq_TV = soft_target_gradient(dloss_T, x_TV, target_T, w_V, values_RT, options)
            return dx_TV, dq_TV, None, None, None, None
        if ctx.spent:
            raise RuntimeError(ONCE)
        dx_TV, ctx.spent = x_TV.detach(), True
        _write_gradient(dx_TV, dloss, dx_TV, target_T, w_V, values_RT, scale, options)
        torch.autograd.graph.increment_version(x_TV)
        return dx_TV, None, None, None, None, None


class _CrossEntropyInPlace(torch.autograd.Function):
    """The loss of all rows, summed or their mean; forward leaves the gradient in the logits."""

    @staticmethod
    def forward(
        ctx, x_TV: Tensor, target_T: Tensor, w_V: Tensor | None, options: LossOptions,
        reduction: str,
    ):  # fmt: skip
        loss, _, values_RT, argmax_T = _inplace(x_TV, target_T, w_V, reduction, options)
        torch.autograd.graph.increment_version(x_TV)
        ctx.mark_non_differentiable(values_RT, argmax_T)
        ctx.set_materialize_grads(False)
        ctx.dx_TV = x_TV.detach()
        return loss, values_RT, argmax_T

    @staticmethod
    @once_differentiable(made_in_forward=True)
    def backward(ctx, dloss: Tensor | None, *_):
        if dloss is None:
            return None, None, None, None, None
        if ctx.dx_TV is None:
            raise RuntimeError(ONCE)
        scale_gradient_(ctx.dx_TV, dloss)
        dx_TV, ctx.dx_TV = ctx.dx_TV, None
        return dx_TV, None, None, None, None


@overload
def cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None = None, size_average: bool | None = None,
    ignore_index: int = -100, reduce: bool | None = None, reduction: str = "mean",
    label_smoothing: float = 0.0, *, z_loss: float = 0.0, softcap: float | None = None,
    logit_scale: float = 1.0, inplace: bool = False,
    return_stats: Literal[False] = False, group: ProcessGroup | None = None,
) -> Tensor: ...  # fmt: skip


@overload
def cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None = None, size_average: bool | None = None,
    ignore_index: int = -100, reduce: bool | None = None, reduction: str = "mean",
    label_smoothing: float = 0.0, *, z_loss: float = 0.0, softcap: float | None = None,
    logit_scale: float = 1.0, inplace: bool = False,
    return_stats: Literal[True], group: ProcessGroup | None = None,
) -> tuple[Tensor, TokenStats]: ...  # fmt: skip


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    inplace: bool = False,
    return_stats: bool = False,
    group: ProcessGroup | None = None,
) -> Tensor | tuple[Tensor, TokenStats]:
    """Compute the cross-entropy loss between logits and class indices or probabilities.

    A call of `torch.nn.functional.cross_entropy` means the same here. Nothing is read back to the
    host. A target outside [0, V) other than `ignore_index` raises an IndexError where the reference
    runs (CPU) and makes its loss and gradient nan on a GPU. A mean over no target at all is nan,
    its gradient 0, as in PyTorch.

    Args:
        input: the logits, `[T, V]`, `[V]`, or `[N, V, ...]`; float32, float16, bfloat16 or
            float64. Copied unless its last axis is contiguous.
        target: class indices, `[T]`, `[]` or `[N, ...]`, any integer dtype; or probabilities in
            the shape of `input`, floating point, each row of which should sum to 1. They may want
            a gradient.
        weight: `[V]`, the weight of each class, or None for ones. It gets no gradient.
        size_average, reduce: deprecated in PyTorch, refused here: `reduction` says it.
        ignore_index: targets of this value count neither in the loss nor in the mean. With
            probabilities no class can be ignored: a value of 0 or more raises.
        reduction: "mean" (by class weight; per token for probabilities), "sum" or "none".
        label_smoothing: ε in [0, 1].
        z_loss: factor of lse², at least 0.
        softcap: bound of the logits, softcap · tanh(logits / softcap), above 0; None for no bound.
            It bounds a logit of -inf too, whose class gets the logit -softcap.
        logit_scale: factor of the logits, before the softcap.
        inplace: allow the logits to be overwritten, by their gradient: a third less memory traffic
            and no second buffer. They must be contiguous rows and not a leaf. With reduction
            "none", on the CPU and where `target` wants a gradient nothing is overwritten. In
            float16 the backward pass overwrites, at no less traffic: a gradient stored before the
            loss scale has come would be 0.
        return_stats: return `(loss, TokenStats)`: lse, entropy, argmax, target log-probability and
            accuracy, from the pass that computes the loss. They get no gradient.
        group: the ranks over which the classes are split. Rank r of R holds the logits (and the
            probabilities) of classes r·V to (r + 1)·V - 1; indices, `weight` and the loss are those
            of all R·V classes, the same on every rank. Two all-reduces of numbers per token, a
            third with `return_stats`.

    Returns:
        The loss in nats: a scalar, or with reduction "none" the shape of the tokens; float32
        (float64 for float64 logits). With `return_stats` a pair.

    Raises:
        ValueError: an argument has another shape, dtype or range than documented above.
    """
    op = "cross_entropy"
    if size_average is not None or reduce is not None:
        check_reduction(op, reduction, size_average, reduce)
    check_options(op, reduction, label_smoothing, z_loss, softcap, logit_scale)
    x_TV, target_T, shape = _rows(input, target)
    if ignore_index >= 0 and target_T.is_floating_point():
        raise ValueError(
            f"{op}: ignore_index is for class indices, got {ignore_index} with probabilities; "
            "leave it out"
        )
    first_class, n_classes, name = shard(group, x_TV.shape[1])
    w_V = check_class_weight(op, "weight", weight, n_classes or x_TV.shape[1], input)
    options = LossOptions(
        ignore_index, label_smoothing, z_loss, softcap or 0.0, logit_scale, return_stats,
        first_class, n_classes, name,
    )  # fmt: skip
    overwrite = inplace and input.requires_grad and torch.is_grad_enabled()
    if overwrite:
        _check_inplace(input, x_TV)
    if group and sees_through():
        raise ValueError(f"{op}: group works neither inside torch.func nor in torch.export")
    launches = uses_triton(input, op)
    if not (launches or group):
        loss = cross_entropy_reference(
            x_TV, target_T, weight=w_V, ignore_index=ignore_index, reduction=reduction,
            label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap,
            logit_scale=logit_scale,
        )  # fmt: skip
        loss = loss.view(shape) if reduction == "none" else loss
        if not return_stats:
            return loss
        z_TV = final_logits(x_TV.detach(), softcap, logit_scale)
        return loss, shape_stats(stats_reference(z_TV, target_T, ignore_index), shape)
    overwrite = overwrite and launches and reduction != "none" and not target_T.requires_grad
    late = input.dtype == torch.float16  # its range is too narrow for a gradient over N
    if overwrite and not late:
        results = apply(_CrossEntropyInPlace, x_TV, target_T, w_V, options, reduction)
    else:
        overwrite = overwrite and not torch.compiler.is_compiling()
        results = apply(_CrossEntropy, x_TV, target_T, w_V, options, overwrite, reduction)
    loss = results[0] if isinstance(results, tuple) else results
    loss = loss.view(shape) if reduction == "none" else loss
    if not return_stats:
        return loss
    return loss, token_stats(*results[1:], target_T, ignore_index, shape)


def _rows(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor, torch.Size]:
    """View or copy the logits as `[T, V]` with contiguous rows; the targets; the tokens' shape."""
    if input.dim() == 0 or not input.is_floating_point() or 0 in input.shape[1:2]:
        raise ValueError(
            "cross_entropy: input must be floating point [T, V], [V] or [N, V, ...] with V >= 1, "
            f"got {input.dtype} {list(input.shape)}"
        )
    x = input.movedim(1, -1) if input.dim() > 2 else input
    if target.is_floating_point() and target.dim() > 2:
        target = target.movedim(1, -1)
    shape, V = x.shape[:-1], x.shape[-1]
    target_T = check_target("cross_entropy", target, shape, V, input)
    return unit_stride(x if x.ndim == 2 else x.reshape(-1, V)), target_T, shape


def _check_inplace(input: Tensor, x_TV: Tensor) -> None:
    if input.is_leaf:
        raise ValueError("cross_entropy: inplace would overwrite a leaf; pass inplace=False")
    if not x_TV.is_contiguous() or x_TV.data_ptr() != input.data_ptr():
        raise ValueError("cross_entropy: inplace needs contiguous rows; pass inplace=False")
