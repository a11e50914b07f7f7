"""RMSprop, plain or centered, with momentum and weight decay inside the gradient (L2).

For gradient g (negated to maximise; times the clip coefficient of grad_norm.py):

    g := g + decay · p
    v := alpha · v + (1 - alpha) · g²
    a := a + (1 - alpha) · (g - a)                                  if centered, else a = 0
    u := g / (sqrt(max(v - a², 0)) + eps)
    b := momentum · b + u,  p := p - lr · b                         with momentum
    p := p - lr · u                                                 without

Rounding can make v - a² negative, where gradients hardly change: torch.optim returns NaN there.

Tieleman & Hinton, "Lecture 6.5: RMSProp", 2012.
Graves, "Generating Sequences With Recurrent Neural Networks", 2013. https://arxiv.org/abs/1308.0850
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ._optimizer import MultiTensorOptimizer
from ._update import HYPER, LR, Rule

# Columns of the table of parameter groups.
WEIGHT_DECAY = tl.constexpr(HYPER.value)
EPS = tl.constexpr(HYPER.value + 1)
MOMENTUM = tl.constexpr(HYPER.value + 2)
ALPHA = tl.constexpr(HYPER.value + 3)
ONE_MINUS_ALPHA = tl.constexpr(HYPER.value + 4)


def rmsprop_reference(
    p: Tensor,
    g: Tensor,
    v: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    *,
    lr: float,
    alpha: float,
    eps: float,
    weight_decay: float,
    momentum: float,
) -> None:
    """The update rule in plain PyTorch, for one tensor: all but `g` change in place."""
    g = g.add(p, alpha=weight_decay) if weight_decay else g
    v.mul_(alpha).addcmul_(g, g, value=1 - alpha)
    variance = v
    if a is not None:
        a.lerp_(g, 1 - alpha)
        variance = v.addcmul(a, a, value=-1).clamp_(min=0.0)
    root = variance.sqrt().add_(eps)
    if b is None:
        p.addcdiv_(g, root, value=-lr)
    else:
        p.add_(b.mul_(momentum).addcdiv_(g, root), alpha=-lr)


@triton.jit
def _rmsprop_prepare(hyper_ptr_N, t_N):
    decay_N = tl.load(hyper_ptr_N + WEIGHT_DECAY)
    eps_N = tl.load(hyper_ptr_N + EPS)
    momentum_N = tl.load(hyper_ptr_N + MOMENTUM)
    alpha_N = tl.load(hyper_ptr_N + ALPHA)
    weight_N = tl.load(hyper_ptr_N + ONE_MINUS_ALPHA)
    return decay_N, alpha_N, weight_N, eps_N, momentum_N, tl.load(hyper_ptr_N + LR)


@triton.jit
def _rmsprop_update(g, p, state, coefs, HELD: tl.constexpr):
    decay, alpha, weight, eps, momentum, lr = coefs
    v, a, b = state
    g += decay * p
    v = alpha * v + weight * g * g
    variance = v
    # Bits of HELD by the order of `RMSprop.states`: a is kept if centered, b with momentum.
    if HELD >> 1 & 1:
        a += weight * (g - a)
        variance = v - a * a
        variance = tl.where(variance < 0, 0.0, variance)
    u = g / (tl.sqrt(variance) + eps)
    if HELD >> 2 & 1:
        b = momentum * b + u
        u = b
    return p - lr * u, (v, a, b)


class RMSprop(MultiTensorOptimizer):
    """Update every parameter by RMSprop in one launch, clipping the global gradient norm too.

    Arguments, groups and state are those of `torch.optim.RMSprop`, and each loads the other's
    `state_dict`; what `AdamW` says of launches, clipping and skipped steps holds here too. Groups
    that differ in their kinds of state take a launch each.

    Args:
        params: parameters or groups, as for `AdamW`.
        lr: step size; a float, or a 0-dim tensor, which may change on the device.
        alpha: decay rate of the moments, at least 0.
        eps: added to the root of the second moment.
        weight_decay: how much of a parameter is added to its gradient.
        momentum: decay rate of the running sum of updates; 0 keeps none.
        centered: divide by the root of the variance of gradients, not of their second moment.
        maximize: climb instead of descending.
        max_grad_norm: the largest global norm an update sees; None does not compute the norm.

    Attributes:
        grad_norm, skipped: as in `AdamW`.

    Raises:
        TypeError, ValueError: as `AdamW`.
    """

    rule = Rule(_rmsprop_prepare, _rmsprop_update, coefs=6)
    states = ("square_avg", "grad_avg", "momentum_buffer")

    def __init__(
        self,
        params,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
        *,
        maximize: bool = False,
        max_grad_norm: float | None = None,
    ) -> None:
        defaults = {
            "lr": lr, "momentum": momentum, "alpha": alpha, "eps": eps, "centered": centered,
            "weight_decay": weight_decay, "maximize": maximize,
        }  # fmt: skip
        super().__init__(params, defaults, max_grad_norm)

    def _names(self, group: dict[str, Any]) -> tuple[str, ...]:
        centered = ("grad_avg",) if group["centered"] else ()
        momentum = ("momentum_buffer",) if group["momentum"] else ()
        return ("step", "square_avg", *centered, *momentum)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        self._check_not_negative(group, ("alpha", "eps", "weight_decay", "momentum"))

    def _hyper_row(self, group: dict[str, Any]) -> tuple[float, ...]:
        alpha = group["alpha"]
        return group["weight_decay"], group["eps"], group["momentum"], alpha, 1 - alpha

    def _update_reference(
        self, group: dict[str, Any], p: Tensor, g: Tensor, state: dict[str, Any]
    ) -> None:
        rmsprop_reference(
            p, g, state["square_avg"], state["grad_avg"] if group["centered"] else None,
            state["momentum_buffer"] if group["momentum"] else None,
            lr=float(group["lr"]), alpha=group["alpha"], eps=group["eps"],
            weight_decay=group["weight_decay"], momentum=group["momentum"],
        )  # fmt: skip
