"""Launches of the kernel of _cross_entropy_rows.py, for cross_entropy and linear_cross_entropy."""

import torch
from torch import Tensor

from tritium.kernels import _packed_rows as packed
from tritium.kernels._cross_entropy_options import (
    LossOptions,
    Results,
    Row,
    clear_ignored,
    combine,
    loss_of,
    rows_reference,
    token_weights,
)
from tritium.kernels._cross_entropy_rows import _cross_entropy_kernel
from tritium.kernels.launcher import Launcher, Plan, dtype_of, planned
from tritium.kernels.runtime import accumulator, power_of_2, uses_triton

_launch = Launcher(_cross_entropy_kernel)


Dtypes = tuple[torch.dtype, torch.dtype, torch.dtype | None, torch.dtype | None]


@planned
def _plan(
    shape: torch.Size, row_strides: tuple[int | None, ...], strides: tuple[int, int], rows: int,
    dtypes: Dtypes, loss: bool, mean: bool, keeps: bool, options: LossOptions,
) -> Plan:  # fmt: skip
    """Plan a launch on `[T, V]` logits, of which `rows` statistics are stored or read.

    `row_strides` are those of the logits, their gradient and soft targets, where there are any,
    `strides` those of the incoming gradient and of the statistics; `dtypes` those of logits,
    targets, class weights and incoming gradient. `mean` tells whether the gradient has the scale of
    a mean, `keeps` whether rows may stay in registers.
    """
    (T, V), (x_dtype, target_dtype, w_dtype, dloss_dtype) = shape, dtypes
    stride_xT, stride_dxT, stride_qT = row_strides
    soft, gradient = target_dtype.is_floating_point, stride_dxT is not None
    smoothing = options.label_smoothing > 0
    # How far what is as long as a row begins from a multiple of 16 elements.
    starts = {stride % 16 for stride in row_strides if stride is not None} if T > 1 else {0}
    alike = starts != {0} and len(starts) == 1
    # If both passes run, few programs of many warps: the rows in flight stay in the L2 cache for
    # the second pass (132 · 2 rows of 100 KB on an H100, whose cache has 50 MB).
    # The entropy's sums need more registers than 32 warps leave to a thread; with edges, whose
    # addresses do too, a multiprocessor would hold one program, idle between its passes.
    warps = (16 if options.stats or alike else 32) if loss and gradient else 8
    block, lanes = max(64, min(512 * warps, power_of_2(V))), 16 // x_dtype.itemsize
    warps, kept, whole = max(1, block // 512), 0, False
    # What the gradient needs stays in registers, where it needs no more than the logits.
    plain = not (soft or smoothing or options.stats) and w_dtype is None
    if keeps and plain and (alike or starts == {0}):
        kept, whole = packed.kept_blocks(V, 16 if alike else 0)
    if kept or whole:
        block, warps = packed.BLOCK, packed.WARPS
    # A short row has no edges: they need a sum of pass 1 for each of their 32 columns.
    edges = block // lanes >= 32 and (V % 16 != 0 or alike)
    lead = 16 if edges and alike else 0
    return Plan(
        (T,),
        (
            V, options.first_class, options.n_classes or V, stride_xT, stride_qT or 0,
            stride_dxT or 0, *strides, options.ignore_index, *map(float, options[1:5]),
        ),
        (
            loss, gradient, dloss_dtype is not None, mean,
            loss and rows == len(Row), soft, w_dtype is not None,
            smoothing, options.logit_scale != 1, options.softcap > 0,
            loss and options.stats, accumulator(x_dtype), edges, lead,
            block, lanes, kept, whole,
        ),
        num_warps=warps,
    )  # fmt: skip


def launch_rows(
    x_TV: Tensor, target_T: Tensor, w_V: Tensor | None, options: LossOptions, *,
    dx_TV: Tensor | None = None, dloss_T: Tensor | None = None,
) -> Results:  # fmt: skip
    """Compute loss and statistics, and dx_TV where it is given."""
    results = empty_results(x_TV, target_T.is_floating_point(), options)
    _launch_passes(x_TV, target_T, w_V, options, *results, dx_TV, dloss_T, None, True)
    return results


def launch_gradient(
    x_TV: Tensor, target_T: Tensor, w_V: Tensor | None, options: LossOptions, values_RT: Tensor,
    dx_TV: Tensor, dloss_T: Tensor | None, scale: Tensor | None,
) -> None:  # fmt: skip
    """Compute dx_TV from the statistics of a launch before; `dloss_T` may be one for all rows."""
    # The statistics stand in for the results, which the kernel does not write.
    unused = values_RT
    _launch_passes(
        x_TV, target_T, w_V, options, unused, values_RT, None, dx_TV, dloss_T, scale, False
    )  # fmt: skip


def _launch_passes(
    x_TV: Tensor, target_T: Tensor, w_V: Tensor | None, options: LossOptions, loss_T: Tensor,
    values_RT: Tensor, argmax_T: Tensor | None, dx_TV: Tensor | None, dloss_T: Tensor | None,
    scale: Tensor | None, loss: bool,
) -> None:  # fmt: skip
    if x_TV.shape[0] == 0:
        return
    soft = target_T.is_floating_point()
    plan = _plan(
        x_TV.shape,
        (
            x_TV.stride(0), None if dx_TV is None else dx_TV.stride(0),
            target_T.stride(0) if soft else None,
        ),
        (dloss_T.stride(0) if dloss_T is not None and dloss_T.ndim else 0, values_RT.stride(0)),
        values_RT.shape[0], (x_TV.dtype, target_T.dtype, dtype_of(w_V), dtype_of(dloss_T)),
        loss, scale is not None, loss and dx_TV is not None and packed.keeps_rows(x_TV), options,
    )  # fmt: skip
    unused = loss_T  # stands in for a pointer that the kernel moves and does not follow
    summed = None
    if w_V is not None and options.label_smoothing > 0 and not soft:
        summed = w_V.sum(dtype=values_RT.dtype)
    _launch.launch(
        plan, x_TV, target_T, unused if w_V is None else w_V, summed, dloss_T, scale, loss_T,
        values_RT, argmax_T, unused if dx_TV is None else dx_TV,
    )  # fmt: skip


def empty_results(x_TV: Tensor, soft: bool, options: LossOptions) -> Results:
    """Return empty results for `rows`, with the statistics that the options need."""
    acc, T = torch.float64 if x_TV.dtype == torch.float64 else torch.float32, x_TV.shape[0]
    rows = len(Row) if options.stats or options.group else Row.MASS + soft
    return (
        x_TV.new_empty(T, dtype=acc),
        x_TV.new_empty(rows, T, dtype=acc),
        x_TV.new_empty(T, dtype=torch.int64) if options.stats else None,
    )


def rows(
    x_TV: Tensor, target_T: Tensor, w_V: Tensor | None, dloss_T: Tensor | None,
    options: LossOptions, gradient: bool,
) -> Results:  # fmt: skip
    """Compute loss and statistics of rows; with `gradient`, dloss_T · dx_TV replaces `x_TV`.

    `dloss_T` may be one for all rows.
    """
    if not uses_triton(x_TV, "cross_entropy"):
        dloss_T = None if dloss_T is None else dloss_T.expand(x_TV.shape[0])
        return rows_reference(x_TV, target_T, w_V, dloss_T, options, gradient)
    dx_TV = x_TV if gradient else None
    if not options.group:
        return launch_rows(x_TV, target_T, w_V, options, dx_TV=dx_TV, dloss_T=dloss_T)
    soft = target_T.is_floating_point()
    _, values_RT, argmax_T = launch_rows(x_TV, target_T, w_V, options)
    values_RT, argmax_T = combine(values_RT, argmax_T, options.group, soft)
    if gradient:
        launch_gradient(x_TV, target_T, w_V, options, values_RT, x_TV, dloss_T, None)
    w_T = token_weights(target_T, w_V, options.ignore_index, values_RT.dtype)
    loss_T = loss_of(values_RT, w_T, options, soft)
    return clear_ignored((loss_T, values_RT, argmax_T), target_T, options)
