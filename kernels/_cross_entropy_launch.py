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
from tritium.kernels.runtime import Launcher, accumulator, power_of_2, uses_triton

_launch = Launcher(_cross_entropy_kernel)


def launch_rows(
    x_TV: Tensor, target_T: Tensor, w_V: Tensor | None, options: LossOptions, *,
    values_RT: Tensor | None = None, dx_TV: Tensor | None = None, dloss_T: Tensor | None = None,
) -> Results:  # fmt: skip
    """Compute loss and statistics, unless `values_RT` has these, and dx_TV where it is given."""
    T, V = x_TV.shape
    acc = torch.promote_types(x_TV.dtype, torch.float32)
    soft, loss = target_T.is_floating_point(), values_RT is None
    results = empty_results(x_TV, soft, options)
    if T == 0:
        return results
    loss_T, _, argmax_T = results
    values_RT = results[1] if values_RT is None else values_RT
    smoothing = options.label_smoothing > 0
    # How far what is as long as a row begins from a multiple of 16 elements.
    long = (x_TV, dx_TV, target_T if soft else None)
    starts = {x.stride(0) % 16 for x in long if x is not None} if T > 1 else {0}
    alike = starts != {0} and len(starts) == 1
    # If both passes run, few programs of many warps: the rows in flight stay in the L2 cache for
    # the second pass (132 · 2 rows of 100 KB on an H100, whose cache has 50 MB).
    # The entropy's sums need more registers than 32 warps leave to a thread; with edges, whose
    # addresses do too, a multiprocessor would hold one program, idle between its passes.
    both = loss and dx_TV is not None
    warps = (16 if options.stats or alike else 32) if both else 8
    block, lanes = max(64, min(512 * warps, power_of_2(V))), 16 // x_TV.element_size()
    warps, kept, whole = max(1, block // 512), 0, False
    # What the gradient needs stays in registers, where it needs no more than the logits.
    plain = not (soft or smoothing or options.stats) and w_V is None
    if both and plain and (alike or starts == {0}) and packed.keeps_rows(x_TV):
        kept, whole = packed.kept_blocks(V, 16 if alike else 0)
    if kept or whole:
        block, warps = packed.BLOCK, packed.WARPS
    # A short row has no edges: they need a sum of pass 1 for each of their 32 columns.
    edges = block // lanes >= 32 and (V % 16 != 0 or alike)
    lead = 16 if edges and alike else 0
    unused = loss_T  # stands in for a pointer that the kernel does not follow
    _launch(
        (T,),
        (
            x_TV, target_T, unused if w_V is None else w_V,
            w_V.sum(dtype=acc) if w_V is not None and smoothing and not soft else unused,
            unused if dloss_T is None else dloss_T, loss_T, values_RT, argmax_T,
            unused if dx_TV is None else dx_TV,
        ),
        (
            V, options.first_class, options.n_classes or V, x_TV.stride(0),
            target_T.stride(0) if soft else 0, 0 if dx_TV is None else dx_TV.stride(0),
            0 if dloss_T is None else dloss_T.stride(0), values_RT.stride(0),
            options.ignore_index, *map(float, options[1:5]),
        ),
        (
            loss, dx_TV is not None, dloss_T is not None,
            loss and len(values_RT) == len(Row), soft, w_V is not None,
            smoothing, options.logit_scale != 1, options.softcap > 0,
            loss and options.stats, accumulator(x_TV.dtype), edges, lead,
            block, lanes, kept, whole,
        ),
        num_warps=warps,
    )  # fmt: skip
    return results


def empty_results(x_TV: Tensor, soft: bool, options: LossOptions) -> Results:
    """Return empty results for `rows`, with the statistics that the options need."""
    acc, T = torch.promote_types(x_TV.dtype, torch.float32), x_TV.shape[0]
    rows = len(Row) if options.stats or options.group else Row.MASS + soft
    return (
        x_TV.new_empty(T, dtype=acc),
        x_TV.new_empty(rows, T, dtype=acc),
        x_TV.new_empty(T if options.stats else 0, dtype=torch.int64),
    )


def rows(
    x_TV: Tensor, target_T: Tensor, w_V: Tensor | None, dloss_T: Tensor | None,
    options: LossOptions, gradient: bool,
) -> Results:  # fmt: skip
    """Compute loss and statistics of rows; with `gradient`, dloss_T · dx_TV replaces `x_TV`."""
    if not uses_triton(x_TV, "cross_entropy"):
        return rows_reference(x_TV, target_T, w_V, dloss_T, options, gradient)
    dx_TV = x_TV if gradient else None
    if not options.group:
        return launch_rows(x_TV, target_T, w_V, options, dx_TV=dx_TV, dloss_T=dloss_T)
    soft = target_T.is_floating_point()
    _, values_RT, argmax_T = launch_rows(x_TV, target_T, w_V, options)
    values_RT, argmax_T = combine(values_RT, argmax_T, options.group, soft)
    if gradient:
        launch_rows(
            x_TV, target_T, w_V, options, values_RT=values_RT, dx_TV=x_TV, dloss_T=dloss_T
        )  # fmt: skip
    w_T = token_weights(target_T, w_V, options.ignore_index, values_RT.dtype)
    loss_T = loss_of(values_RT, w_T, options, soft)
    return clear_ignored((loss_T, values_RT, argmax_T), target_T, options)
