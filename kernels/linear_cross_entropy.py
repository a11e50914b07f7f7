"""Cross-entropy of a linear layer's output, without ever storing its logits whole.

    logits_TV = hidden_TD · weight_VDᵀ + bias_V
    loss_T    = as in `cross_entropy`

and, with dlogits_TV its gradient there,

    dhidden_TD = dlogits_TV · weight_VD     dweight_VD = dlogits_TVᵀ · hidden_TD
    dbias_V    = sum_T(dlogits_TV)

T tokens, D features, V classes, C rows of a chunk. Only C·V logits exist at a time, in one buffer,
where the gradient overwrites them: three matrix products in all. Loss and gradients are computed
together in the forward pass, for a gradient of 1 with respect to each row's loss; the backward
pass multiplies by the incoming scalar. With reduction "none" that is one number per row, so there
the backward pass starts from the logits again (a fourth product).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._runtime import once_differentiable, operator, uses_triton
from ._token_loss import (
    SCHEMA,
    Options,
    check_class_weight,
    check_options,
    check_target,
    token_weights,
)
from .cross_entropy import _forward as _rows_forward
from .cross_entropy import _inplace as _rows_inplace
from .cross_entropy import cross_entropy_reference

# A chunk's rows must outnumber what the float32 sum of dweight costs (about 230 rows' worth on an
# H200, computed), so the budget is large; on a CPU a chunk should stay in the cache: 88 ms against
# 181 ms for whole logits at T = 2048, D = 256, V = 4096 on 2 cores.
CHUNK_BYTES_CUDA = 1 << 30
CHUNK_BYTES_CPU = 1 << 22


def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    """The definition of `linear_cross_entropy` on `[T, D]`: whole logits, plain PyTorch."""
    return cross_entropy_reference(
        F.linear(hidden, weight, bias), target, weight=class_weight, ignore_index=ignore_index,
        reduction=reduction, label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap,
    )  # fmt: skip


def _rows_gradient_reference(
    x_TV: Tensor, target_T: Tensor, w_V: Tensor | None, dloss_T: Tensor | None, options: Options
) -> Tensor:
    """Return loss_T of the logits and overwrite them with their gradient, in plain PyTorch."""
    ignore_index, smoothing, z_loss, softcap = options
    V = x_TV.shape[1]
    z_TV = x_TV.to(torch.promote_types(x_TV.dtype, torch.float32))
    if softcap:
        z_TV = z_TV.div_(softcap).tanh_().mul_(softcap)
        slope_TV = 1 - (z_TV / softcap).square_()
    counts_T = target_T != ignore_index
    t_T1 = torch.where(counts_T, target_T, 0)[:, None]
    if ((t_T1 < 0) | (t_T1 >= V)).any():
        raise IndexError(f"linear_cross_entropy: a target lies outside [0, {V})")
    w_T = token_weights(target_T, w_V, ignore_index, z_TV.dtype)
    class_V = z_TV.new_ones(V) if w_V is None else w_V.to(z_TV)
    uniform = smoothing / V
    z_t_T = z_TV.gather(1, t_T1)[:, 0]
    q_T = z_TV @ class_V if smoothing else 0.0
    m_T = z_TV.amax(1)
    e_TV = z_TV.sub_(m_T[:, None]).exp_()
    s_T = e_TV.sum(1)
    log_s_T = s_T.log()
    lse_T = m_T + log_s_T
    loss_T = (1 - smoothing) * w_T * (m_T - z_t_T + log_s_T) + z_loss * w_T * lse_T.square()
    total_T = (1 - smoothing) * w_T + 2 * z_loss * w_T * lse_T
    if smoothing:
        loss_T += uniform * (class_V.sum() * lse_T - q_T)
        total_T += uniform * class_V.sum()
    dx_TV = e_TV.mul_((total_T / s_T)[:, None])
    if smoothing:
        dx_TV.sub_(uniform * class_V)
    dx_TV.scatter_add_(1, t_T1, (-(1 - smoothing) * w_T)[:, None])
    if softcap:
        dx_TV.mul_(slope_TV)
    if dloss_T is not None:
        dx_TV.mul_(dloss_T[:, None])
    ignored_T = (~counts_T).nonzero()[:, 0]
    dx_TV[ignored_T] = 0
    if dx_TV is not x_TV:
        x_TV.copy_(dx_TV)
    return loss_T.index_fill_(0, ignored_T, 0)


def _rows_loss(x_TV: Tensor, target_T: Tensor, w_V: Tensor | None, options: Options) -> Tensor:
    if uses_triton(x_TV):
        return _rows_forward(x_TV, target_T, w_V, *options)[0]
    ignore_index, smoothing, z_loss, softcap = options
    return cross_entropy_reference(
        x_TV, target_T, weight=w_V, ignore_index=ignore_index, reduction="none",
        label_smoothing=smoothing, z_loss=z_loss, softcap=softcap,
    )  # fmt: skip


def _rows_gradient(
    x_TV: Tensor, target_T: Tensor, w_V: Tensor | None, dloss_T: Tensor | None, options: Options
) -> Tensor:
    if uses_triton(x_TV):
        return _rows_inplace(x_TV, target_T, w_V, dloss_T, *options)
    return _rows_gradient_reference(x_TV, target_T, w_V, dloss_T, options)


def _launch(
    hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, target_T: Tensor,
    class_weight_V: Tensor | None, dloss_T: Tensor | None, chunk_rows: int,
    want_hidden: bool, want_weight: bool, want_bias: bool, *options,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return loss_T and the gradients asked for (empty tensors in place of the others)."""
    outputs = _fake(
        hidden_TD, weight_VD, bias_V, target_T, class_weight_V, dloss_T, chunk_rows,
        want_hidden, want_weight, want_bias,
    )  # fmt: skip
    loss_T, dhidden_TD, dweight_VD, dbias_V = outputs
    dweight_VD.zero_()
    dbias_V.zero_()
    T, V = hidden_TD.shape[0], weight_VD.shape[0]
    stride = -(-V // 64) * 64  # rows that start on 128 bytes, so that every V has wide accesses
    buffer_CV = hidden_TD.new_empty(min(chunk_rows, T), stride)[:, :V]
    for start in range(0, T, chunk_rows):
        rows = slice(start, start + chunk_rows)
        h_CD, t_C = hidden_TD[rows], target_T[rows]
        x_CV = buffer_CV[: h_CD.shape[0]]
        if bias_V is None:
            torch.mm(h_CD, weight_VD.T, out=x_CV)
        else:
            torch.addmm(bias_V, h_CD, weight_VD.T, out=x_CV)
        if not (want_hidden or want_weight or want_bias):
            loss_T[rows] = _rows_loss(x_CV, t_C, class_weight_V, Options(*options))
            continue
        dloss_C = None if dloss_T is None else dloss_T[rows]
        loss_T[rows] = _rows_gradient(x_CV, t_C, class_weight_V, dloss_C, Options(*options))
        if want_hidden:
            torch.mm(x_CV, weight_VD, out=dhidden_TD[rows])
        if want_weight:
            _add_product(dweight_VD, x_CV.T, h_CD)
        if want_bias:
            dbias_V += x_CV.sum(0, dtype=dbias_V.dtype)
    return outputs


def _add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a · b to `out`, whose dtype may be wider, without rounding the product in between."""
    if a.dtype == out.dtype:
        out.addmm_(a, b)
    elif out.is_cuda:
        torch.ops.aten.addmm.dtype_out(out, a, b, out.dtype, out=out)
    else:
        out.addmm_(a.to(out.dtype), b.to(out.dtype))


def _fake(
    hidden, weight, bias, target, class_weight, dloss, chunk_rows,
    want_hidden, want_weight, want_bias, *options,
):  # fmt: skip
    acc = torch.promote_types(hidden.dtype, torch.float32)
    return (
        hidden.new_empty(hidden.shape[0], dtype=acc),
        hidden.new_empty(hidden.shape if want_hidden else 0),
        weight.new_empty(weight.shape if want_weight else 0, dtype=acc),
        weight.new_empty(weight.shape[0] if want_bias else 0, dtype=acc),
    )


_operator = operator(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor? bias, Tensor target,"
    " Tensor? class_weight, Tensor? dloss, int chunk_rows, bool want_hidden, bool want_weight,"
    f" bool want_bias, {SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor)",
    _launch,
    _fake,
)


class _Settings(NamedTuple):
    """What a call fixes besides its tensors."""

    dtype: torch.dtype  # of the matrix products
    chunk_rows: int
    options: Options


class _LinearCrossEntropy(torch.autograd.Function):
    """The summed loss of all rows, its gradients made in the forward pass."""

    @staticmethod
    def forward(ctx, hidden_TD, weight_VD, bias_V, target_T, class_weight_V, wants, settings):
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden_TD, weight_VD, bias_V)]
        loss_T, *grads = _call(
            hidden_TD, weight_VD, bias_V, target_T, class_weight_V, None, wants, settings
        )
        ctx.wants = wants
        ctx.save_for_backward(*grads)
        return loss_T.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss: Tensor):
        grads = zip(ctx.saved_tensors, ctx.wants, ctx.dtypes, strict=True)
        # In float32: a bfloat16 tensor times a 0-dim one would round that one to bfloat16 first.
        scaled = [
            (g.to(dloss.dtype) * dloss).to(dtype) if want else None for g, want, dtype in grads
        ]
        return *scaled, None, None, None, None


class _LinearCrossEntropyRows(torch.autograd.Function):
    """The loss of each row; the backward pass computes the logits again."""

    @staticmethod
    def forward(ctx, hidden_TD, weight_VD, bias_V, target_T, class_weight_V, wants, settings):
        inputs = hidden_TD, weight_VD, bias_V, target_T, class_weight_V
        ctx.save_for_backward(*inputs)
        ctx.wants, ctx.settings = wants, settings
        return _call(*inputs, None, (False, False, False), settings)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss_T: Tensor):
        _, *grads = _call(*ctx.saved_tensors, dloss_T, ctx.wants, ctx.settings)
        pairs = zip(grads, ctx.saved_tensors[:3], ctx.wants, strict=True)
        return *(g.to(x.dtype) if want else None for g, x, want in pairs), None, None, None, None


def _call(hidden_TD, weight_VD, bias_V, target_T, class_weight_V, dloss_T, wants, settings):
    h, w, b = (None if x is None else x.to(settings.dtype) for x in (hidden_TD, weight_VD, bias_V))
    with torch.autocast(hidden_TD.device.type, enabled=False):
        return _operator(
            h, w, b, target_T, class_weight_V, dloss_T, settings.chunk_rows, *wants,
            *settings.options,
        )  # fmt: skip


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    chunk_bytes: int | None = None,
) -> Tensor:
    """Compute the cross-entropy of `hidden @ weight.T + bias` against class indices.

    Equal to `cross_entropy(torch.nn.functional.linear(hidden, weight, bias), target, ...)`, but at
    most `chunk_bytes` of logits exist at a time. The products run in the dtype of `hidden`, or of
    autocast where that is on; the gradients of weight and bias are summed in float32 over all
    chunks. Between forward and backward it keeps those gradients, not the logits. Deterministic.
    Targets outside [0, V) are treated as `cross_entropy` treats them.

    Args:
        hidden: `[..., D]`; float32, float16, bfloat16 or float64.
        weight: `[V, D]`, any of these dtypes.
        target: `[...]`, the leading axes of `hidden`; any integer dtype.
        bias: `[V]` or None.
        class_weight: `[V]`, the weight of each class, or None for ones. It gets no gradient.
        ignore_index: targets of this value count neither in the loss nor in the mean.
        reduction: "mean" (by class weight), "sum" or "none"; "none" costs a fourth product.
        label_smoothing: ε in [0, 1].
        z_loss: factor of lse², at least 0.
        softcap: bound of the logits, softcap · tanh(logits / softcap), above 0; None for no bound.
        chunk_bytes: budget of the logits buffer in bytes; None for 1 GiB on a GPU, 4 MiB on a CPU.

    Returns:
        The loss in nats: a scalar, or with reduction "none" the shape of `target`; float32
        (float64 for float64 `hidden`).

    Raises:
        ValueError: a shape, dtype or option is outside what stands above.
    """
    op = "linear_cross_entropy"
    target_T = check_target(op, target, hidden.shape[:-1], hidden)
    check_options(op, reduction, label_smoothing, z_loss, softcap)
    _check_layer(hidden, weight, bias)
    V, D = weight.shape
    class_weight_V = check_class_weight(op, "class_weight", class_weight, V, hidden)
    device = hidden.device.type
    settings = _Settings(
        torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype,
        _chunk_rows(chunk_bytes, V, hidden),
        Options(ignore_index, label_smoothing, z_loss, softcap or 0.0),
    )
    grad = torch.is_grad_enabled()
    wants = tuple(grad and x is not None and x.requires_grad for x in (hidden, weight, bias))
    tensors = hidden.reshape(-1, D), weight, bias, target_T, class_weight_V
    if reduction == "none":
        return _LinearCrossEntropyRows.apply(*tensors, wants, settings).view(target.shape)
    loss = _LinearCrossEntropy.apply(*tensors, wants, settings)
    if reduction == "sum":
        return loss
    total = token_weights(target_T, class_weight_V, ignore_index, loss.dtype).sum()
    # Where no target counts the mean is nan, but its gradient 0, as in PyTorch.
    divisor = torch.where(total == 0, float("inf"), total)
    return loss / divisor + torch.where(total == 0, float("nan"), 0.0)


def _check_layer(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    op = "linear_cross_entropy"
    D = hidden.shape[-1]
    if not hidden.is_floating_point():
        raise ValueError(f"{op}: hidden must be floating point, got {hidden.dtype}")
    if weight.dim() != 2 or weight.shape[1] != D or weight.shape[0] == 0:
        raise ValueError(f"{op}: weight must have shape [V, {D}], got {list(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{op}: bias must have shape [{weight.shape[0]}], got {list(bias.shape)}")
    for name, x in (("weight", weight), ("bias", bias)):
        if x is not None and x.device != hidden.device:
            raise ValueError(f"{op}: {name} is on {x.device}; move it to {hidden.device}")


def _chunk_rows(chunk_bytes: int | None, V: int, hidden: Tensor) -> int:
    if chunk_bytes is None:
        chunk_bytes = CHUNK_BYTES_CUDA if hidden.is_cuda else CHUNK_BYTES_CPU
    if chunk_bytes < 1:
        raise ValueError(f"linear_cross_entropy: chunk_bytes must be positive, got {chunk_bytes}")
    rows = max(1, chunk_bytes // (V * hidden.element_size()))
    return rows // 128 * 128 if rows > 128 else rows  # whole tiles of the matrix products
