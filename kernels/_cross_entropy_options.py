"""Options, checks, row statistics and reduction shared by the losses over classes.

A row's loss is a function of a few numbers, the `Statistics` of its logits z_V. With class weights
w_V (ones if absent), target class t or soft targets q_V, and ε the label smoothing:

    hit  = (1 - ε) · w_t, 0 for soft targets        a_V = w_V · ((1 - ε) · q_V + ε/V), q_V = 0 for t
    loss = hit · (lse - z_t) + sum(a_V) · lse - sum(a_V · z_V) + z_loss · w_t · lse²

where w_t is 1 for soft targets. Where the classes are split over a process group, each rank
computes the numbers of its own classes, and two all-reduces combine them.
"""

import math
from enum import IntEnum
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import (
    _resolve_process_group,  # pyright: ignore[reportPrivateImportUsage]
)

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
LOWEST = -3.4028234663852886e38  # a maximum that is never -inf, so m - m is never nan
LOWEST_GAP = -1e4  # exp of it is 0; bounds a difference of logits that would otherwise be -inf

Results = tuple[Tensor, Tensor, Tensor | None]  # loss_T, the statistics values_RT, argmax_T


class LossOptions(NamedTuple):
    """Non-tensor options of a classification loss."""

    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float  # 0: none
    logit_scale: float
    stats: bool = False  # compute entropy and argmax
    first_class: int = 0  # of this rank
    n_classes: int = 0  # of all ranks; 0: as many as there are logits
    group: str = ""  # name of the process group over which the classes are split


SCHEMA = (
    "int ignore_index, float label_smoothing, float z_loss, float softcap, float logit_scale,"
    " bool stats, SymInt first_class, SymInt n_classes, str group"
)


class Row(IntEnum):
    """The rows of `Statistics.values`. The first two are always there, MASS with soft targets."""

    MAXIMUM = 0  # of z_V
    SUM = 1  # of exp(z_V - maximum); stored apart: lse itself would round p away
    MASS = 2  # sum(a_V)
    DOT = 3  # sum(a_V · z_V)
    TARGET = 4  # z_t
    SPREAD = 5  # sum(exp(z_V - maximum) · (z_V - maximum))


class TokenStats(NamedTuple):
    """Per token, in the shape of `target`; of ignored tokens 0, and -1 for the argmax."""

    lse: Tensor
    """log(sum(exp(z))), in nats."""
    entropy: Tensor
    """Entropy of softmax(z), in nats."""
    argmax: Tensor
    """The most likely class, the first of equals, int64; -1 in a row without any number."""
    target_log_probability: Tensor | None
    """log(softmax(z)) of the target class, in nats; None with soft targets."""
    accuracy: Tensor | None
    """Scalar: the share of counted tokens whose argmax is the target; None with soft targets."""


def token_weights(
    target_T: Tensor, w_V: Tensor | None, ignore_index: int, dtype: torch.dtype
) -> Tensor:
    """Return the weight of each token's loss: that of its class, or 0 where the target is ignored.

    Soft targets, which are floating point, weigh 1 each.
    """
    if target_T.is_floating_point():
        return target_T.new_ones(target_T.shape[0], dtype=dtype)
    counts_T = target_T != ignore_index
    if w_V is None:
        return counts_T.to(dtype)
    known_T = target_T.clamp(0, w_V.shape[0] - 1)
    return torch.where(counts_T, w_V.to(dtype)[known_T], 0)


def reduce_loss(
    loss_T: Tensor, target_T: Tensor, w_V: Tensor | None, ignore_index: int, reduction: str
) -> Tensor:
    """Return `loss_T`, its sum, or its mean by `token_weights` (nan where no target counts)."""
    if reduction == "none":
        return loss_T
    if reduction == "sum":
        return loss_T.sum()
    return loss_T.sum() * mean_scale(token_weights(target_T, w_V, ignore_index, loss_T.dtype))


def mean_scale(w_T: Tensor) -> Tensor:
    """Return the factor from sum to mean; nan where all weights are 0, as in PyTorch."""
    total = w_T.sum()
    return (total != 0) / total


def loss_of(values_RT: Tensor, w_T: Tensor, options: LossOptions, soft: bool) -> Tensor:
    """Return the loss of each row from its statistics, all of them; `w_T` as of `token_weights`."""
    log_s_T = values_RT[Row.SUM].log()
    lse_T = values_RT[Row.MAXIMUM] + log_s_T
    loss_T = values_RT[Row.MASS] * lse_T - values_RT[Row.DOT] + options.z_loss * w_T * lse_T**2
    if soft:
        return loss_T
    hit_T = (1 - options.label_smoothing) * w_T
    return loss_T + hit_T * ((values_RT[Row.MAXIMUM] - values_RT[Row.TARGET]) + log_s_T)


def combine(
    values_RT: Tensor, argmax_T: Tensor | None, group: str, soft: bool
) -> tuple[Tensor, Tensor | None]:
    """Combine the statistics of each rank's classes into those of complete rows.

    Two all-reduces, and a third where an argmax is wanted.
    """
    m_T = all_reduce(values_RT[Row.MAXIMUM], group, "max")
    gap_T = (values_RT[Row.MAXIMUM] - m_T).clamp_min(LOWEST_GAP)
    combined_RT = values_RT.clone()
    combined_RT[Row.MAXIMUM] = m_T
    combined_RT[Row.SPREAD] += values_RT[Row.SUM] * gap_T
    combined_RT[[Row.SUM, Row.SPREAD]] *= gap_T.exp()
    summed = [Row.SUM, Row.DOT, Row.TARGET, Row.SPREAD, *([Row.MASS] if soft else [])]
    combined_RT[summed] = all_reduce(combined_RT[summed], group, "sum")
    if argmax_T is not None:
        largest = torch.iinfo(argmax_T.dtype).max
        found_T = (gap_T == 0) & (argmax_T >= 0)
        argmax_T = all_reduce(torch.where(found_T, argmax_T, largest), group, "min")
        argmax_T = torch.where(argmax_T == largest, -1, argmax_T)
    return combined_RT, argmax_T


def all_reduce(x: Tensor, group: str, how: str) -> Tensor:
    """Reduce `x` over the ranks of `group`: "max", "min" or "sum"."""
    x = x.clone()
    op = {"max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN, "sum": dist.ReduceOp.SUM}[how]
    dist.all_reduce(x, op, _resolve_process_group(group))
    return x


def token_stats(
    values_RT: Tensor, argmax_T: Tensor, target_T: Tensor, ignore_index: int, shape: torch.Size
) -> TokenStats:
    """Give the statistics of each token their names and the `shape` of the targets."""
    m_T, s_T, z_t_T, u_T = (values_RT[i] for i in (Row.MAXIMUM, Row.SUM, Row.TARGET, Row.SPREAD))
    log_s_T = s_T.log()
    lse_T, entropy_T = m_T + log_s_T, log_s_T - u_T / s_T
    if target_T.is_floating_point():
        return shape_stats(TokenStats(lse_T, entropy_T, argmax_T, None, None), shape)
    log_p_T = (z_t_T - m_T) - log_s_T
    counts_T = target_T != ignore_index
    accuracy = ((argmax_T == target_T) & counts_T).sum() / counts_T.sum()
    return shape_stats(TokenStats(lse_T, entropy_T, argmax_T, log_p_T, accuracy), shape)


def shape_stats(stats: TokenStats, shape: torch.Size) -> TokenStats:
    """Return `stats`, one number per token, in the `shape` of the targets."""
    *rows, accuracy = stats
    return TokenStats(*(None if x is None else x.view(shape) for x in rows), accuracy)


def stats_reference(z_TV: Tensor, target_T: Tensor, ignore_index: int) -> TokenStats:
    """Return `TokenStats` of the final logits, without a gradient, in plain PyTorch."""
    z_TV = z_TV.detach()
    log_p_TV = z_TV.log_softmax(-1)
    lse_T, argmax_T = z_TV.logsumexp(-1), z_TV.argmax(-1)
    entropy_T = -(log_p_TV.exp() * log_p_TV.clamp_min(LOWEST_GAP)).sum(-1)
    if target_T.is_floating_point():
        return TokenStats(lse_T, entropy_T, argmax_T, None, None)
    ignored_T = target_T == ignore_index
    log_p_T = log_p_TV.gather(-1, target_T.masked_fill(ignored_T, 0)[:, None])[:, 0]
    lse_T, entropy_T, log_p_T = (x.masked_fill(ignored_T, 0) for x in (lse_T, entropy_T, log_p_T))
    argmax_T = argmax_T.masked_fill(ignored_T, -1)
    accuracy = ((argmax_T == target_T) & ~ignored_T).sum() / (~ignored_T).sum()
    return TokenStats(lse_T, entropy_T, argmax_T, log_p_T, accuracy)


def final_logits(x_TV: Tensor, softcap: float | None, logit_scale: float) -> Tensor:
    """Return the logits scaled and capped, in float32 or their wider dtype."""
    z_TV = x_TV.to(torch.promote_types(x_TV.dtype, torch.float32)) * logit_scale
    return softcap * torch.tanh(z_TV / softcap) if softcap else z_TV


def soft_target_gradient(
    dloss_T: Tensor, x_TV: Tensor, q_TV: Tensor, w_V: Tensor | None, values_RT: Tensor,
    options: LossOptions,
) -> Tensor:  # fmt: skip
    """Compute dq_TV in plain PyTorch; few want it, and it is as large as the logits."""
    z_TV = final_logits(x_TV, options.softcap, options.logit_scale)
    log_s_T = values_RT[Row.SUM].log()
    dq_TV = (values_RT[Row.MAXIMUM][:, None] - z_TV) + log_s_T[:, None]
    dq_TV *= ((1 - options.label_smoothing) * dloss_T)[:, None]
    if w_V is not None:
        dq_TV *= w_V[options.first_class : options.first_class + x_TV.shape[1]]
    return dq_TV.to(q_TV.dtype)


def rows_reference(
    x_TV: Tensor, target_T: Tensor, w_V: Tensor | None, dloss_T: Tensor | None,
    options: LossOptions, gradient: bool,
) -> Results:  # fmt: skip
    """Compute `rows` in plain PyTorch; with `gradient`, dloss_T · dx_TV replaces `x_TV`."""
    soft = target_T.is_floating_point()
    z_TV = x_TV.to(torch.promote_types(x_TV.dtype, torch.float32), copy=not gradient)
    if options.logit_scale != 1:
        z_TV.mul_(options.logit_scale)
    if options.softcap:
        z_TV.div_(options.softcap).tanh_().mul_(options.softcap)
        slope_TV = 1 - (z_TV / options.softcap).square_()
    w_T = token_weights(target_T, w_V, options.ignore_index, z_TV.dtype)
    a_TV, total = _masses_reference(z_TV, target_T, w_V, options)
    t_T1, owned_T = _owned_reference(target_T, x_TV.shape[1], options)

    values_RT = z_TV.new_zeros(len(Row), x_TV.shape[0])
    values_RT[Row.MASS] = total
    if a_TV is not None:
        values_RT[Row.DOT] = (a_TV * z_TV).sum(1) if soft else z_TV @ a_TV[0]
    values_RT[Row.TARGET] = torch.where(owned_T, z_TV.gather(1, t_T1)[:, 0], 0)
    argmax_T = z_TV.argmax(1) + options.first_class if options.stats else None
    m_T = z_TV.amax(1).clamp_min(LOWEST)
    gap_TV = z_TV.sub_(m_T[:, None])
    e_TV = gap_TV.exp() if options.stats else gap_TV.exp_()
    values_RT[Row.MAXIMUM], values_RT[Row.SUM] = m_T, e_TV.sum(1)
    if options.stats:
        values_RT[Row.SPREAD] = (e_TV * gap_TV.clamp_min_(LOWEST_GAP)).sum(1)
    if options.group:
        values_RT, argmax_T = combine(values_RT, argmax_T, options.group, soft)
    loss_T = loss_of(values_RT, w_T, options, soft)

    if gradient:
        hit_T = torch.zeros_like(w_T) if soft else (1 - options.label_smoothing) * w_T
        lse_T = values_RT[Row.MAXIMUM] + values_RT[Row.SUM].log()
        rate_T = (m_T - values_RT[Row.MAXIMUM]).exp() / values_RT[Row.SUM]
        rate_T *= hit_T + values_RT[Row.MASS] + 2 * options.z_loss * w_T * lse_T
        dx_TV = e_TV.mul_(rate_T[:, None])
        if a_TV is not None:
            dx_TV.sub_(a_TV)
        dx_TV.scatter_add_(1, t_T1, torch.where(owned_T, -hit_T, 0)[:, None])
        if options.softcap:
            dx_TV.mul_(slope_TV)
        if options.logit_scale != 1:
            dx_TV.mul_(options.logit_scale)
        if dloss_T is not None:
            dx_TV.mul_(dloss_T[:, None])
        if not soft:
            dx_TV[(target_T == options.ignore_index).nonzero()[:, 0]] = 0
        if dx_TV is not x_TV:
            x_TV.copy_(dx_TV)
    return clear_ignored((loss_T, values_RT, argmax_T), target_T, options)


def _masses_reference(
    z_TV: Tensor, target_T: Tensor, w_V: Tensor | None, options: LossOptions
) -> tuple[Tensor | None, Tensor | float]:
    """Return a_V of every row, or of all rows, `[1, V]`, or None; and its sum.

    With hard targets that is the sum over all ranks' classes, which every rank knows.
    """
    V = z_TV.shape[1]
    n_classes = options.n_classes or V
    mine = slice(options.first_class, options.first_class + V)
    uniform = options.label_smoothing / n_classes
    if target_T.is_floating_point():
        a_TV = (1 - options.label_smoothing) * target_T.to(z_TV) + uniform
        a_TV = a_TV if w_V is None else a_TV * w_V.to(z_TV)[mine]
        return a_TV, a_TV.sum(1)
    if not uniform:
        return None, 0.0
    a_V = uniform * (z_TV.new_ones(n_classes) if w_V is None else w_V.to(z_TV))
    return a_V[None, mine], a_V.sum()


def _owned_reference(target_T: Tensor, V: int, options: LossOptions) -> tuple[Tensor, Tensor]:
    """Return the targets as local classes, `[T, 1]`, and which count and belong to this rank."""
    n_classes = options.n_classes or V
    if target_T.is_floating_point():
        nothing_T = target_T.new_zeros(target_T.shape[0], dtype=torch.int64)
        return nothing_T[:, None], nothing_T > 0
    counts_T = target_T != options.ignore_index
    if (counts_T & ((target_T < 0) | (target_T >= n_classes))).any():
        raise IndexError(f"cross_entropy: a target is outside [0, {n_classes})")
    local_T = target_T - options.first_class
    owned_T = counts_T & (local_T >= 0) & (local_T < V)
    return torch.where(owned_T, local_T, 0)[:, None], owned_T


def clear_ignored(results: Results, target_T: Tensor, options: LossOptions) -> Results:
    """Set the rows of ignored targets to the kernel's values for them, whatever their logits."""
    if target_T.is_floating_point():
        return results
    loss_T, values_RT, argmax_T = results
    ignored_T = target_T == options.ignore_index
    values_RT = values_RT.masked_fill(ignored_T, 0)
    values_RT[Row.SUM].masked_fill_(ignored_T, 1)
    argmax_T = None if argmax_T is None else argmax_T.masked_fill(ignored_T, -1)
    return loss_T.masked_fill(ignored_T, 0), values_RT, argmax_T


def check_options(
    op: str,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    logit_scale: float,
) -> None:
    """Raise ValueError, in the name of `op`, for an option outside its range."""
    check_reduction(op, reduction)
    check_number(op, "label_smoothing", label_smoothing)
    check_number(op, "z_loss", z_loss)
    check_number(op, "softcap", softcap)
    check_number(op, "logit_scale", logit_scale)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{op}: label_smoothing must be in [0, 1], got {label_smoothing}")
    if not 0 <= z_loss < math.inf:
        raise ValueError(f"{op}: z_loss must be at least 0, got {z_loss}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"{op}: softcap must be above 0, or None for no cap, got {softcap}")
    if not -math.inf < logit_scale < math.inf:  # torch.compile does not trace math.isfinite
        raise ValueError(f"{op}: logit_scale must be finite, got {logit_scale}")


def check_number(op: str, name: str, value: float | None) -> None:
    """Raise ValueError for a tensor, whose gradient a kernel would drop."""
    if isinstance(value, Tensor):
        raise ValueError(
            f"{op}: {name} must be a number, got a tensor, which would get no gradient; "
            "pass its item(), or apply it outside"
        )


def check_reduction(
    op: str, reduction: str, size_average: bool | None = None, reduce: bool | None = None
) -> None:
    """Raise ValueError for another `reduction`, or for what PyTorch had before it."""
    if size_average is not None or reduce is not None:
        instead = "none" if reduce is False else "sum" if size_average is False else "mean"
        raise ValueError(
            f"{op}: size_average and reduce are deprecated in PyTorch and not taken here; "
            f'pass reduction="{instead}"'
        )
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f'{op}: reduction must be "none", "mean" or "sum", got {reduction!r}')


def check_target(op: str, target: Tensor, shape: torch.Size, V: int, x: Tensor) -> Tensor:
    """Return `target` as int64 `[T]`, or soft targets as `[T, V]` with contiguous rows.

    Raises:
        ValueError: it does not fit the rows' `shape`, the V classes or the device of `x`.
    """
    if target.device != x.device:
        raise ValueError(f"{op}: target is on {target.device}; move it to {x.device}")
    if target.is_floating_point():
        if target.shape != (*shape, V):
            raise ValueError(
                f"{op}: soft targets must have shape {[*shape, V]}, got {list(target.shape)}"
            )
        q_TV = target.reshape(-1, V)
        return q_TV if q_TV.stride(1) == 1 else q_TV.contiguous()
    if target.dtype not in INTEGERS:
        raise ValueError(
            f"{op}: target must hold class indices (int64) or probabilities, got {target.dtype}"
        )
    if target.shape != shape:
        raise ValueError(f"{op}: target must have shape {list(shape)}, got {list(target.shape)}")
    flat = target if target.ndim == 1 else target.reshape(-1)
    return flat if flat.dtype == torch.int64 and flat.is_contiguous() else flat.long().contiguous()


def check_class_weight(op: str, name: str, w_V: Tensor | None, V: int, x: Tensor) -> Tensor | None:
    """Return contiguous class weights, or raise ValueError if they do not fit V and `x`."""
    if w_V is None:
        return None
    if w_V.shape != (V,):
        raise ValueError(f"{op}: {name} must have shape [{V}], got {list(w_V.shape)}")
    if w_V.device != x.device:
        raise ValueError(f"{op}: {name} is on {w_V.device}; move it to {x.device}")
    if w_V.requires_grad:
        raise ValueError(f"{op}: {name} gets no gradient; pass {name}.detach()")
    return w_V.contiguous()
