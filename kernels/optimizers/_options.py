"""Optimizer options beyond torch.optim's, and the norms that a step reports."""

from collections.abc import Iterable
from numbers import Real
from textwrap import fill
from typing import Any, Literal, NamedTuple, TypedDict

import torch
from torch import Tensor


class StepOptions(TypedDict, total=False):
    """Options of every optimizer beyond torch.optim's arguments; documented in `EXPLAINED`.

    The first is an option of a parameter group too, the others are of the optimizer alone.
    """

    l1: float
    cautious_decay: bool
    max_grad_norm: float | None
    master: Literal["float32", "split"] | None
    state_dtype: torch.dtype
    seed: int
    ema_decay: float | None
    zero_grads: bool
    record_norms: bool


EXPLAINED = {
    "maximize": "climb instead of descending.",
    "foreach": """taken because torch's has it, and changes nothing: a step is of all parameters at
        once anyway.""",
    "capturable": """taken because torch's has it, and changes nothing: a CUDA graph may capture any
        step after the first.""",
    "differentiable": "must be False: a step here is not recorded for a backward.",
    "fused": "taken because torch's has it, and changes nothing: a step is fused anyway.",
    "decoupled_weight_decay": """shrink parameters by `lr · weight_decay`, and leave the gradient
        alone, as AdamW does; otherwise `weight_decay · p` is added to the gradient.""",
    "l1": """penalty on the absolute value of a parameter: `l1 · sign(p)` is added to its gradient.
        0, the default, adds none. May differ by group.""",
    "cautious_decay": """apply decoupled weight decay only to elements that the step does not push
        away from 0 (Chen et al., "Cautious Weight Decay", 2025). False by default.""",
    "max_grad_norm": """the largest global norm that an update sees: larger gradients are scaled
        down to it. None, the default, does not compute the norm.""",
    "master": """storage for the bits of a parameter that bfloat16 loses: "float32" (the default),
        a copy in the state; "split", 16 more bits in the state, which with the
        parameter's own make the same float32; None, nothing: updates round stochastically.""",
    "state_dtype": """dtype of the moments: torch.float32 (the default); torch.bfloat16, rounded
        stochastically; or torch.uint8, codes of 8 bits with a float32 scale for every 128
        elements, except that parameters of fewer than 4,096 elements keep float32.""",
    "seed": "seed of stochastic rounding: equal seeds give equal bits. 0 by default.",
    "ema_decay": """keep `state[p]["ema"]`, a float32 moving average of the parameter, with this
        decay, in [0, 1). None, the default, keeps none.""",
    "zero_grads": """zero gradients as they are read, also in a step that is skipped. False by
        default.""",
    "record_norms": """record what `norms()` returns; `optimizer.records_norms = False` pauses it.
        False by default.""",
}
"""Texts of the arguments that all optimizers share, for their docstrings."""

LABELS = frozenset({
    "params", "param_names", "name", "initial_lr", "max_lr", "min_lr", "swa_lr", "lr_scale",
    "max_momentum", "base_momentum",
})  # fmt: skip
"""Keys of a group that are no options: names, and keys of torch's schedulers."""


def explained(doc: str | None, names: Iterable[str]) -> str | None:
    """Return the docstring of an optimizer, with those of its arguments `names` that all share."""
    if doc is None:
        return None
    texts = [f"{name}: {' '.join(EXPLAINED[name].split())}" for name in names if name in EXPLAINED]
    lines = [fill(text, 100, initial_indent=" " * 8, subsequent_indent=" " * 12) for text in texts]
    before, attributes, after = doc.partition("\n    Attributes:\n")
    return before + "".join(f"{line}\n" for line in lines) + attributes + after


def check_keys(op: str, group: dict[str, Any], known: Iterable[str]) -> None:
    """Raise unless every key of a parameter group is an option of groups, or a label.

    Raises:
        TypeError: there is another key.
    """
    if wide := sorted((_DEFAULTS.keys() - {*known}) & group.keys()):
        raise TypeError(
            f"{op}: options of the optimizer must be passed to it, got {wide} in a group; pass "
            f"them to {op}(...)"
        )
    if unknown := sorted(map(str, group.keys() - LABELS - {*known})):
        raise TypeError(
            f"{op}: options of a group must be among {sorted(known)}, got {unknown}; leave them "
            "out, and set a label of your own in `param_groups` once the optimizer is made"
        )


def is_number(x: Any) -> bool:
    """Return whether `x` is a real number, numpy's too, or a tensor, whose element may be one."""
    return isinstance(x, (Real, Tensor))


def check_betas(op: str, betas: Any) -> None:
    """Raise a ValueError unless `betas` are two numbers in [0, 1), or two tensors of one each."""
    pair = tuple(betas) if isinstance(betas, Iterable) else ()
    tensors = [x for x in pair if isinstance(x, Tensor)]
    one = any(x.numel() != 1 for x in tensors)
    if len(pair) != 2 or len(tensors) == 1 or one or not all(map(is_number, pair)):
        raise ValueError(
            f"{op}: betas must be two floats, or two tensors of one element, got {betas!r}"
        )
    if not all(0 <= beta < 1 for beta in pair):
        raise ValueError(f"{op}: betas must be in [0, 1), got {betas}")


def check_flags(op: str, group: dict[str, Any]) -> None:
    """Raise if torch's flags ask for something unsupported, or contradict each other.

    Raises:
        ValueError: `differentiable` is on.
        RuntimeError: `foreach` and `fused` are both on, as in torch.optim.
    """
    if group["differentiable"]:
        raise ValueError(
            f"{op}: differentiable must be False, got {group['differentiable']}; a step here is "
            "not recorded for a backward, one of torch.optim can be"
        )
    if group["foreach"] and group["fused"]:
        raise RuntimeError(
            f"{op}: foreach and fused must not be True together, got both; leave one out"
        )


class Norms(NamedTuple):
    """Norms of the last step by parameter: float32 tensors `[N]` on the device."""

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
    """Return all options, those left out by their defaults.

    Raises:
        TypeError: there is no such option.
        ValueError: one is out of range.
    """
    if unknown := sorted(options.keys() - _DEFAULTS.keys()):
        raise TypeError(f"{op}: options must be among {sorted(_DEFAULTS)}, got {unknown}")
    every: dict[str, Any] = _DEFAULTS | dict(options)
    norm, ema_decay, seed = (every[name] for name in ("max_grad_norm", "ema_decay", "seed"))
    if norm is not None and not (is_number(norm) and norm > 0):
        raise ValueError(f"{op}: max_grad_norm must be positive, got {norm!r}; None does not clip")
    if ema_decay is not None and not (is_number(ema_decay) and 0 <= ema_decay < 1):
        raise ValueError(
            f"{op}: ema_decay must be in [0, 1), got {ema_decay!r}; None keeps no mean"
        )
    if not (is_number(seed) and 0 <= seed < 1 << 32 and seed % 1 == 0):
        raise ValueError(f"{op}: seed must be in [0, 2^32), got {seed!r}")
    for name, choices in _CHOICES.items():
        if every[name] not in choices:
            raise ValueError(f"{op}: {name} must be one of {choices}, got {every[name]!r}")
    return every


_DEFAULTS: dict[str, Any] = {
    "l1": 0.0,
    "cautious_decay": False,
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
