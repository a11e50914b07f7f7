"""Mean of a loss over the tokens that count, in one launch.

    total = sum_T(w_t)        w_t of `token_weights`: 0 where the target is ignored
    mean  = sum_T(loss_T) / total
    scale = 1 / total         the gradient of mean for each loss_T

A total of 0 is nan, as a mean over no target is in PyTorch, where smoothing leaves something to
divide, too. T tokens. One program sums BLOCK of them; of more, P programs' sums are summed by a
second launch: P depends on T alone, so the mean is the same bits on every card.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritium.kernels._cross_entropy_options import token_weights
from tritium.kernels.launcher import Launcher, Plan, dtype_of, planned
from tritium.kernels.runtime import accumulator, cdiv, operator, power_of_2, uses_triton

BLOCK = 16384  # tokens of a step: 16 a thread
P_MAX = 256  # programs, which share the blocks

Dtypes = tuple[torch.dtype | None, torch.dtype, torch.dtype | None]


@triton.jit
def _mean_loss_kernel(
    loss_ptr, target_ptr, w_ptr, mean_ptr, scale_ptr,
    T, n_classes, ignore_index,
    LOSS: tl.constexpr, COUNTED: tl.constexpr, LAST: tl.constexpr, BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    # COUNTED: what is summed for the total: "targets" that count, the class "weights" of these,
    # "rows", or the "sums" of an earlier launch, to which target_ptr then points. That one, not the
    # LAST, stores sums of losses and of weights.
    p, P = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    offs_T = tl.arange(0, BLOCK)
    loss_T = tl.zeros((BLOCK,), ACC)
    w_T = tl.zeros((BLOCK,), tl.int32 if COUNTED == "targets" else ACC)
    for start in range(p * BLOCK, T, P * BLOCK):
        mask_T = offs_T < T - start
        if LOSS:
            loss_T += tl.load(loss_ptr + start + offs_T, mask=mask_T, other=0.0).to(ACC)
        if COUNTED == "sums":
            w_T += tl.load(target_ptr + start + offs_T, mask=mask_T, other=0.0).to(ACC)
        elif COUNTED == "rows":
            w_T += tl.where(mask_T, 1.0, 0.0)
        else:
            target_T = tl.load(target_ptr + start + offs_T, mask=mask_T, other=ignore_index)
            counts_T = target_T != ignore_index
            if COUNTED == "targets":
                w_T += counts_T.to(tl.int32)
            else:
                counts_T &= (target_T >= 0) & (target_T < n_classes)
                w_T += tl.load(w_ptr + target_T, mask=counts_T, other=0.0).to(ACC)
    loss, total = tl.sum(loss_T, axis=0), tl.sum(w_T, axis=0).to(ACC)
    scale = total
    if LAST:
        total = tl.where(total == 0.0, float("nan"), total)
        one = tl.full((), 1.0, ACC)
        loss = tl.div_rn(loss, total) if ACC is tl.float32 else loss / total
        scale = tl.div_rn(one, total) if ACC is tl.float32 else one / total
    if LOSS:
        tl.store(mean_ptr + p, loss)
    tl.store(scale_ptr + p, scale)


_launch = Launcher(_mean_loss_kernel)


@planned
def _plan(
    T: int, dtypes: Dtypes, acc: torch.dtype, n_classes: int, ignore_index: int, most: int,
    p_max: int,
) -> tuple[Plan, Plan | None]:  # fmt: skip
    """Plan the launch for a loss, targets and class weights of these dtypes, and the second."""
    loss_dtype, target_dtype, w_dtype = dtypes
    block = min(max(32, power_of_2(T)), most)  # a warp at least
    P = max(1, min(cdiv(T, block), p_max))
    counted = "rows" if target_dtype.is_floating_point else "weights" if w_dtype else "targets"
    loss, wide, warps = loss_dtype is not None, accumulator(acc), max(1, block // 512)
    numbers = T, n_classes, ignore_index
    first = Plan((P,), numbers, (loss, counted, P == 1, block, wide), num_warps=warps)
    if P == 1:
        return first, None
    return first, Plan((1,), (P, 0, 0), (loss, "sums", True, power_of_2(P), wide), num_warps=4)


def _reduce(
    loss_T: Tensor | None, target_T: Tensor, w_V: Tensor | None, ignore_index: int,
    dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor]:  # fmt: skip
    """Return the mean of `loss_T`, where there is one, and the scale, both `[]` of `dtype`."""
    dtypes = dtype_of(loss_T), target_T.dtype, dtype_of(w_V)
    n_classes = 0 if w_V is None else w_V.shape[0]
    first, second = _plan(
        target_T.shape[0], dtypes, dtype, n_classes, ignore_index, BLOCK, P_MAX
    )  # fmt: skip
    mean, scale = None, target_T.new_empty((), dtype=dtype)
    if loss_T is not None:
        mean = loss_T.new_empty(())
    if second is None:
        _launch.launch(first, loss_T, target_T, w_V, mean, scale)
        return mean, scale
    sums_P = target_T.new_empty(2, first.grid[0], dtype=dtype)
    partial = None if loss_T is None else sums_P[0]
    _launch.launch(first, loss_T, target_T, w_V, partial, sums_P[1])
    _launch.launch(second, partial, sums_P[1], None, mean, scale)
    return mean, scale


def reduced(
    loss_T: Tensor, target_T: Tensor, w_V: Tensor | None, ignore_index: int, reduction: str
) -> tuple[Tensor, Tensor | None]:
    """Return the loss reduced: its mean, with the scale that this gives each row, its sum, or all.

    `target_T` is int64 `[T]`, or `[T, V]` of soft targets; `w_V` is contiguous.
    """
    if reduction == "none":
        return loss_T, None
    if reduction == "sum":
        return loss_T.sum(), None
    if uses_triton(loss_T, "cross_entropy"):
        mean, scale = _reduce(loss_T, target_T, w_V, ignore_index, loss_T.dtype)
        assert mean is not None
        return mean, scale
    total = _total(target_T, w_V, ignore_index, loss_T.dtype)
    return loss_T.sum() / total, total.reciprocal()


def _launch_scale(
    target_T: Tensor, w_V: Tensor | None, ignore_index: int, dtype: torch.dtype
) -> Tensor:
    if uses_triton(target_T, "cross_entropy"):
        return _reduce(None, target_T, w_V, ignore_index, dtype)[1]
    return _total(target_T, w_V, ignore_index, dtype).reciprocal()


def _total(target_T: Tensor, w_V: Tensor | None, ignore_index: int, dtype: torch.dtype) -> Tensor:
    if w_V is None and not target_T.is_floating_point():
        # On a CPU a third quicker than a sum.
        total = torch.count_nonzero(target_T != ignore_index).to(dtype)
    else:
        total = token_weights(target_T, w_V, ignore_index, dtype).sum()
    return torch.where(total == 0, torch.nan, total)


scale_of_mean = operator(
    "scale_of_mean(Tensor target, Tensor? weight, int ignore_index, ScalarType dtype) -> Tensor",
    _launch_scale,
    lambda target, weight, ignore_index, dtype: target.new_empty((), dtype=dtype),
    incoming=2,
)
"""Return the scale of a mean alone, in `dtype`; the arguments are those of `reduced`."""
