"""Which parameter gets which update, and the learning rate of each step."""

from __future__ import annotations

from math import cos, pi

from torch import nn

from kernels import AdamW

SCHEDULES = ("linear", "cosine")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Split the parameters for an optimizer: matrices decay; norms, biases and embeddings do not.

    Args:
        model: the model; parameters that are frozen are left out.
        weight_decay: decay of the matrices per step, in units of the learning rate.

    Returns:
        Two groups in `torch.optim`'s form, each parameter in exactly one of them.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    decayed, others = [], []
    for p in model.parameters():
        if p.requires_grad:
            (decayed if p.dim() >= 2 and id(p) not in embeddings else others).append(p)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


def adamw(
    model: nn.Module, *, betas: tuple[float, float], weight_decay: float, max_grad_norm: float
) -> AdamW:
    """Make the optimizer of a model, which decays its matrices and clips as it updates."""
    groups = parameter_groups(model, weight_decay)
    return AdamW(groups, betas=betas, max_grad_norm=max_grad_norm)


def learning_rate(
    step: int, *, peak: float, warmup_steps: int, max_steps: int, schedule: str, final: float
) -> float:
    """Return the learning rate of a step: linear warm-up to `peak`, then decay.

    Args:
        step: counted from 0.
        peak: the highest rate, reached after `warmup_steps`.
        warmup_steps: steps of linear growth.
        max_steps: steps of the whole run.
        schedule: "linear" or "cosine" decay.
        final: rate that the decay ends at, as a fraction of `peak`.

    Raises:
        ValueError: the schedule is unknown.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    left = 1 - progress if schedule == "linear" else (1 + cos(pi * progress)) / 2
    return peak * (final + (1 - final) * left)
