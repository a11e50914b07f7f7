"""RMSprop, plain or centered, with momentum.

For gradient g, in which clipping and L2 decay are already:

    v := alpha · v + (1 - alpha) · g²
    a := a + (1 - alpha) · (g - a)                                  if centered, else a = 0
    d  = g / (sqrt(max(v - a², 0)) + eps)
    b := momentum · b + d                                           with momentum, else b = d
    u  = lr · b

and the parameter moves down by u.

Rounding can make v - a² negative, where gradients hardly change: torch.optim returns NaN there.

Tieleman & Hinton, "Lecture 6.5: RMSProp", 2012.
Graves, "Generating Sequences With Recurrent Neural Networks", 2013. https://arxiv.org/abs/1308.0850
"""

from typing import Any, Unpack

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritium.kernels.optimizers._base import MultiTensorOptimizer
from tritium.kernels.optimizers._options import StepOptions
from tritium.kernels.optimizers._step_kernels import HYPER, Rule, divide
from tritium.kernels.optimizers._step_reference import Move
from tritium.kernels.optimizers._storage import has_state

# Columns of the table of parameter groups.
EPS = tl.constexpr(HYPER.value)
MOMENTUM = tl.constexpr(HYPER.value + 1)
ALPHA = tl.constexpr(HYPER.value + 2)
ONE_MINUS_ALPHA = tl.constexpr(HYPER.value + 3)


def rmsprop_reference(
    g: Tensor,
    v: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    *,
    lr: float,
    alpha: float,
    eps: float,
    momentum: float,
) -> Move:
    """Apply the update rule in plain PyTorch; `v`, `a` and `b` change in place."""
    v.mul_(alpha).addcmul_(g, g, value=1 - alpha)
    variance = v
    if a is not None:
        a.lerp_(g, 1 - alpha)
        variance = v.addcmul(a, a, value=-1).clamp_(min=0.0)
    root = variance.sqrt().add_(eps)
    if b is None:
        return Move(lr, g, root)
    return Move(lr, b.mul_(momentum).addcdiv_(g, root))


@triton.jit
def _rmsprop_prepare(lr_N, hyper_ptr_N, t_N):
    eps_N = tl.load(hyper_ptr_N + EPS)
    momentum_N = tl.load(hyper_ptr_N + MOMENTUM)
    alpha_N = tl.load(hyper_ptr_N + ALPHA)
    return alpha_N, tl.load(hyper_ptr_N + ONE_MINUS_ALPHA), eps_N, momentum_N, lr_N


@triton.jit
def _rmsprop_update(g, state, coefs, FORMAT: tl.constexpr):
    alpha, weight, eps, momentum, lr = coefs
    v, a, b = state
    v = alpha * v + weight * g * g
    variance = v
    # In the order of `RMSprop.states`: a is a state if centered, b with momentum.
    if has_state(FORMAT, 1):
        a += weight * (g - a)
        variance = v - a * a
        variance = tl.where(variance < 0, 0.0, variance)
    u = divide(g, tl.sqrt(variance) + eps)
    if has_state(FORMAT, 2):
        b = momentum * b + u
        u = b
    return lr * u, (v, a, b)


class RMSprop(MultiTensorOptimizer):
    """Update every parameter by RMSprop in one launch, clipping the global gradient norm too.

    Arguments, groups and state are those of `torch.optim.RMSprop`, and each loads the other's
    `state_dict`; what `AdamW` says of launches, clipping and skipped steps applies here too.

    Args:
        params: parameters or groups, as for `AdamW`.
        lr: step size; a float, or a tensor of one element, which may change on the device.
        alpha: decay rate of the moments, at least 0.
        eps: added to the root of the second moment.
        weight_decay: how much of a parameter is added to its gradient.
        momentum: decay rate of the running sum of updates; 0 keeps none.
        centered: divide by the root of the variance of gradients, not of their second moment.

    Attributes:
        grad_norm, skipped: as in `AdamW`.

    Raises:
        TypeError, ValueError: as `AdamW`.
    """

    rule = Rule(_rmsprop_prepare, _rmsprop_update, coefs=5)
    states = ("square_avg", "grad_avg", "momentum_buffer")
    squares = ("square_avg",)

    def __init__(
        self,
        params,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        *,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        **options: Unpack[StepOptions],
    ) -> None:
        defaults = {
            "lr": lr, "momentum": momentum, "alpha": alpha, "eps": eps, "centered": centered,
            "weight_decay": weight_decay, "capturable": capturable, "foreach": foreach,
            "maximize": maximize, "differentiable": differentiable, "fused": fused,
            "decoupled_weight_decay": decoupled_weight_decay,
        }  # fmt: skip
        super().__init__(params, defaults, options)

    def _names(self, group: dict[str, Any]) -> tuple[str, ...]:
        centered = ("grad_avg",) if group["centered"] else ()
        momentum = ("momentum_buffer",) if group["momentum"] else ()
        return ("step", "square_avg", *centered, *momentum)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        self._check_not_negative(group, ("alpha", "eps", "momentum"))
        if group["centered"] and self._options["state_dtype"] == torch.uint8:
            raise ValueError(
                "RMSprop: centered must be off with state_dtype=torch.uint8, got both; the "
                "variance is a difference, and 8 bits are too few for it"
            )

    def _hyper_row(self, group: dict[str, Any]) -> tuple[float, ...]:
        alpha = group["alpha"]
        return group["eps"], group["momentum"], alpha, 1 - alpha

    def _rule_reference(
        self, group: dict[str, Any], t: float, g: Tensor, states: list[Any]
    ) -> Move:
        v, a, b = states
        return rmsprop_reference(
            g, v, a, b, lr=group["lr"], alpha=group["alpha"], eps=group["eps"],
            momentum=group["momentum"],
        )  # fmt: skip
