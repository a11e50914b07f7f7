"""What every optimizer here takes beyond torch.optim's arguments, and what it reports."""

from typing import Any, Literal, NamedTuple, TypedDict

import torch
from torch import Tensor


class StepOptions(TypedDict, total=False):
    """What every optimizer here takes beyond torch.optim's arguments; all of it is off by default.

    The first two are options of a parameter group, the others of the optimizer.
    """

    l1: float
    """Penalty on the absolute value of a parameter: `l1 · sign(p)` is added to its gradient."""
    decoupled_weight_decay: bool
    """Shrink parameters by `lr · weight_decay`, and leave the gradient alone, as AdamW does."""
    max_grad_norm: float | None
    """The largest global norm that an update sees; None does not compute the norm."""
    master: Literal["float32", "split"] | None
    """What keeps the bits of a bfloat16 parameter that bfloat16 cannot: "float32" (the default), a
    copy in the state; "split", 16 more bits in the state, which with the parameter's own make the
    same float32; None, nothing: updates round stochastically."""
    state_dtype: torch.dtype
    """Of the moments: torch.float32 (the default); torch.bfloat16, rounded stochastically; or
    torch.uint8, codes of 8 bits with a float32 scale for every 128 elements, but float32 for
    parameters of fewer than 4,096 elements."""
    seed: int
    """Of stochastic rounding: a run with the same seed repeats bit by bit. 0 by default."""
    ema_decay: float | None
    """Keep `state[p]["ema"]`, a float32 moving average of the parameter, with this decay."""
    zero_grads: bool
    """Zero gradients as they are read, also in a step that is skipped."""
    record_norms: bool
    """Keep what `norms()` returns; `optimizer.records_norms = False` pauses it."""


class Norms(NamedTuple):
    """What the last step did, by parameter: float32 tensors `[N]` on the device."""

    params: list[Tensor]
    """The N parameters that had a gradient."""
    grad: Tensor
    """Norms of the gradients, before clipping."""
    update: Tensor
    """Norms of the changes of the parameters, decay included; 0 in a step that was skipped."""
    weight: Tensor
    """Norms of the parameters after the step; after one that was skipped, as the last one recorded
    that was not left them, or 0 if there was none."""


def checked(op: str, options: StepOptions) -> dict[str, Any]:
    """All options, those left out by their defaults.

    Raises:
        TypeError: there is no such option.
        ValueError: one is out of range.
    """
    if unknown := sorted(options.keys() - _DEFAULTS.keys()):
        raise TypeError(f"{op}: options must be among {sorted(_DEFAULTS)}, got {unknown}")
    every: dict[str, Any] = _DEFAULTS | dict(options)
    norm, ema_decay, seed = (every[name] for name in ("max_grad_norm", "ema_decay", "seed"))
    if norm is not None and not norm > 0:
        raise ValueError(f"{op}: max_grad_norm must be positive, got {norm}; None does not clip")
    if ema_decay is not None and not 0 <= ema_decay < 1:
        raise ValueError(f"{op}: ema_decay must lie in [0, 1), got {ema_decay}; None keeps no mean")
    if not 0 <= seed < 1 << 32:
        raise ValueError(f"{op}: seed must lie in [0, 2^32), got {seed}")
    for name, choices in _CHOICES.items():
        if every[name] not in choices:
            raise ValueError(f"{op}: {name} must be one of {choices}, got {every[name]!r}")
    return every


_DEFAULTS: dict[str, Any] = {
    "l1": 0.0,
    "decoupled_weight_decay": None,
    "max_grad_norm": None,
    "master": "float32",
    "state_dtype": torch.float32,
    "seed": 0,
    "ema_decay": None,
    "zero_grads": False,
    "record_norms": False,
}
_CHOICES = {
    "master": ("float32", "split", None),
    "state_dtype": (torch.float32, torch.bfloat16, torch.uint8),
}
