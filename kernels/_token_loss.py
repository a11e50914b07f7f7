"""What the losses over class indices share: their options, the checks of these, the reduction."""

from typing import NamedTuple

import torch
from torch import Tensor

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class Options(NamedTuple):
    """The options that act on each row by itself; a softcap of 0 means none."""

    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float


SCHEMA = "int ignore_index, float label_smoothing, float z_loss, float softcap"  # of `Options`


def token_weights(
    target_T: Tensor, w_V: Tensor | None, ignore_index: int, dtype: torch.dtype
) -> Tensor:
    """The weight of each token's loss: that of its class, or 0 where the target is ignored."""
    counts_T = target_T != ignore_index
    if w_V is None:
        return counts_T.to(dtype)
    known_T = target_T.clamp(0, w_V.shape[0] - 1)
    return torch.where(counts_T, w_V.to(dtype)[known_T], 0)


def reduce(
    loss_T: Tensor, target_T: Tensor, w_V: Tensor | None, ignore_index: int, reduction: str
) -> Tensor:
    """`loss_T` itself, its sum, or its mean by `token_weights` (nan where no target counts)."""
    if reduction == "none":
        return loss_T
    if reduction == "sum":
        return loss_T.sum()
    return loss_T.sum() / token_weights(target_T, w_V, ignore_index, loss_T.dtype).sum()


def check_options(
    op: str, reduction: str, label_smoothing: float, z_loss: float, softcap: float | None
) -> None:
    """Raise ValueError, in the name of `op`, for an option outside its range."""
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f'{op}: reduction must be "none", "mean" or "sum", got {reduction!r}')
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{op}: label_smoothing must lie in [0, 1], got {label_smoothing}")
    if not 0 <= z_loss < float("inf"):
        raise ValueError(f"{op}: z_loss must be at least 0, got {z_loss}")
    if softcap is not None and not 0 < softcap < float("inf"):
        raise ValueError(f"{op}: softcap must be above 0, or None for no cap, got {softcap}")


def check_target(op: str, target: Tensor, shape: torch.Size, x: Tensor) -> Tensor:
    """Return `target` as int64 `[T]`, or raise ValueError if it does not fit `shape` and `x`."""
    if target.dtype not in INTEGERS:
        raise ValueError(f"{op}: target must hold class indices (int64), got {target.dtype}")
    if target.shape != shape:
        raise ValueError(f"{op}: target must have shape {list(shape)}, got {list(target.shape)}")
    if target.device != x.device:
        raise ValueError(f"{op}: target is on {target.device}; move it to {x.device}")
    return target.reshape(-1).long().contiguous()


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
