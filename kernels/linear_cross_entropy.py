"""Cross-entropy of a linear layer's output, without ever storing all of its logits.

    logits_TV = hidden_TD · weight_VDᵀ + bias_V
    loss_T    = as in `cross_entropy`

and, with dlogits_TV its gradient there,

    dhidden_TD = dlogits_TV · weight_VD     dweight_VD = dlogits_TVᵀ · hidden_TD
    dbias_V    = sum_T(dlogits_TV)

T tokens, D features, V classes, C rows of a chunk. Only C·V logits exist at a time, in one buffer,
where the gradient overwrites them: three matrix products in all. Loss and gradients are computed
together in the forward pass, for an incoming gradient of 1; the backward pass multiplies by the one
that came, where it is another. With reduction "none" that is one number per row, so there
the backward pass recomputes the logits (a fourth product).
"""

from typing import Literal, overload

import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from tritium.kernels._cross_entropy_options import LossOptions, TokenStats, check_options
from tritium.kernels._cross_entropy_ranks import Classes, check_plain, is_distributed, local_layer
from tritium.kernels._linear_cross_entropy import chunk_rows as chunk_rows
from tritium.kernels._linear_cross_entropy import linear_loss
from tritium.kernels.cross_entropy import cross_entropy_reference


def linear_cross_entropy_reference(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    """Compute `linear_cross_entropy` on `[T, D]` from all logits in plain PyTorch."""
    return cross_entropy_reference(
        F.linear(input, linear_weight, linear_bias), target, weight=weight,
        ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing,
        z_loss=z_loss, softcap=softcap, logit_scale=logit_scale,
    )  # fmt: skip


@overload
def linear_cross_entropy(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, linear_bias: Tensor | None = None,
    weight: Tensor | None = None, reduction: str = "mean", ignore_index: int | None = None,
    label_smoothing: float = 0.0, options: None = None, z_loss: float = 0.0,
    softcap: float | None = None, logit_scale: float = 1.0, chunk_bytes: int | None = None,
    linear_weight_grad: Tensor | None = None,
    return_stats: Literal[False] = False, group: ProcessGroup | None = None,
) -> Tensor: ...  # fmt: skip


@overload
def linear_cross_entropy(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, linear_bias: Tensor | None = None,
    weight: Tensor | None = None, reduction: str = "mean", ignore_index: int | None = None,
    label_smoothing: float = 0.0, options: None = None, z_loss: float = 0.0,
    softcap: float | None = None, logit_scale: float = 1.0, chunk_bytes: int | None = None,
    linear_weight_grad: Tensor | None = None,
    return_stats: Literal[True], group: ProcessGroup | None = None,
) -> tuple[Tensor, TokenStats]: ...  # fmt: skip


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: None = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_bytes: int | None = None,
    linear_weight_grad: Tensor | None = None,
    return_stats: bool = False,
    group: ProcessGroup | None = None,
) -> Tensor | tuple[Tensor, TokenStats]:
    """Compute the cross-entropy of a linear layer's output against classes or probabilities.

    Equal to `cross_entropy(linear(input, linear_weight, linear_bias), target, weight, ...)`, and
    a call of `torch.nn.functional.linear_cross_entropy` means the same here, but about
    `chunk_bytes` of logits exist at a time. The products run in the dtype of `input`, or of
    autocast where that is on; the gradients of weight and bias are summed in float32 over all
    chunks. Between forward and backward it keeps those gradients, not the logits. Deterministic.
    The last backward pass of a graph hands them over as they are where the incoming gradient is 1.
    An input that requires no gradient costs no product. The loss, the statistics and the gradient
    of `input` do not depend on the number of chunks, except where the library of products sums in
    another order for another number of rows; the gradients of weight and bias are sums over chunks
    and differ by the rounding of float32.
    Targets outside [0, V) are treated as `cross_entropy` treats them. Inside torch.func, where
    torch.export traces, where probabilities want a gradient and with TRITIUM_REFERENCE=1 all logits
    exist at once.

    Args:
        input: `[..., D]`; float32, float16, bfloat16 or float64.
        linear_weight: `[V, D]`, any of these dtypes.
        target: class indices, `[...]`, the leading axes of `input`, any integer dtype; or
            probabilities `[..., V]`, floating point.
        linear_bias: `[V]` or None.
        weight: `[V]`, the weight of each class, or None for ones. It gets no gradient.
        reduction: "mean" (by class weight; per token for probabilities), "sum" or "none"; "none"
            costs a fourth product.
        ignore_index: targets of this value count neither in the loss nor in the mean; None for
            -100. Refused with probabilities.
        label_smoothing: ε in [0, 1].
        options: PyTorch's way to set chunks, refused here: `chunk_bytes` sets them.
        z_loss: factor of lse², at least 0.
        softcap: bound of the logits, softcap · tanh(logits / softcap), above 0; None for no bound.
            It bounds a logit of -inf too, whose class gets the logit -softcap.
        logit_scale: factor of the logits, before the softcap.
        chunk_bytes: budget of the logits buffer in bytes; None for 1 GiB on a GPU, 4 MiB on a CPU.
            Exceeded only where one chunk costs no more memory than several: `plan`.
        linear_weight_grad: `[V, D]` float32 (or float64), to which the backward pass adds the
            gradient of the weight, unrounded, instead of handing it to autograd:
            `linear_weight.grad` stays as it is and hooks of the weight do not run. Not under
            torch.compile.
        return_stats: return `(loss, TokenStats)`, as in `cross_entropy`.
        group: the ranks over which the classes are split, as in `cross_entropy`: rank r of R holds
            rows r·V to (r + 1)·V - 1 of weight and bias, and every rank all of `input`, whose
            gradient is summed over the ranks.

    Weight and bias may be DTensors. Where `fully_shard` has sharded them and each rank has tokens
    of its own, they are gathered for the call, and their gradients averaged over the ranks. Rows
    that are split over `group`, a dimension of their mesh, stay so: logits are gathered nowhere.
    An input that is a DTensor itself, replicated over the same mesh, needs no group. Target, class
    weight and loss are plain tensors.

    Returns:
        The loss in nats: a scalar, or with reduction "none" the leading axes of `input`; float32
        (float64 for float64 `input`). With `return_stats` a pair.

    Raises:
        ValueError: an argument has another shape, dtype, range or placement than documented above.
    """
    op = "linear_cross_entropy"
    check_options(op, reduction, label_smoothing, z_loss, softcap, logit_scale)
    if options is not None:
        raise ValueError(f"{op}: options sets the chunks of PyTorch's loss; pass chunk_bytes here")
    if target.is_floating_point() and ignore_index is not None:
        raise ValueError(
            f"{op}: ignore_index is for class indices, got {ignore_index} with probabilities; "
            "leave it out"
        )
    check_plain(op, target=target, weight=weight)
    split: ProcessGroup | Classes | None = group
    if any(map(is_distributed, (input, linear_weight, linear_bias))):
        input, linear_weight, linear_bias, split = local_layer(
            op, input, linear_weight, linear_bias, group, linear_weight_grad
        )
    chosen = LossOptions(
        -100 if ignore_index is None else ignore_index, label_smoothing, z_loss, softcap or 0.0,
        logit_scale, return_stats,
    )  # fmt: skip
    return linear_loss(
        op, input, linear_weight, target, linear_bias, weight, None, chosen, reduction,
        chunk_bytes, linear_weight_grad, split,
    )  # fmt: skip
