"""Lion: the sign of a momentum, with decoupled weight decay.

For gradient g (negated to maximise; times the clip coefficient of grad_norm.py):

    u := sign(m + (1 - beta1) · (g - m))
    p := p - lr · decay · p - lr · u
    m := m + (1 - beta2) · (g - m)

Chen et al., "Symbolic Discovery of Optimization Algorithms", 2023. https://arxiv.org/abs/2302.06675
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ._optimizer import MultiTensorOptimizer
from ._update import HYPER, LR, Rule

# Columns of the table of parameter groups.
WEIGHT_DECAY = tl.constexpr(HYPER.value)
ONE_MINUS_BETA1 = tl.constexpr(HYPER.value + 1)
ONE_MINUS_BETA2 = tl.constexpr(HYPER.value + 2)


def lion_reference(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
) -> None:
    """The update rule in plain PyTorch, for one tensor: `p` and `m` change in place."""
    beta1, beta2 = betas
    u = m.lerp(g, 1 - beta1).sign_()
    p.mul_(1 - lr * weight_decay).add_(u, alpha=-lr)
    m.lerp_(g, 1 - beta2)


@triton.jit
def _lion_prepare(hyper_ptr_N, t_N):
    lr_N = tl.load(hyper_ptr_N + LR)
    decay_N = lr_N * tl.load(hyper_ptr_N + WEIGHT_DECAY)
    weight1_N = tl.load(hyper_ptr_N + ONE_MINUS_BETA1)
    return decay_N, weight1_N, tl.load(hyper_ptr_N + ONE_MINUS_BETA2), lr_N


@triton.jit
def _lion_update(g, p, state, coefs, HELD: tl.constexpr):
    decay, weight1, weight2, lr = coefs
    m = state[0]
    u = m + weight1 * (g - m)
    # Zero moves nothing, and nor does NaN, as with torch.sign.
    step = tl.where(u > 0, lr, tl.where(u < 0, -lr, 0.0))
    return p - (decay * p + step), (m + weight2 * (g - m),)


class Lion(MultiTensorOptimizer):
    """Update every parameter by Lion in one launch, clipping the global gradient norm on the way.

    PyTorch has no Lion. Arguments and state are those of its authors' class for PyTorch; what
    `AdamW` says of launches, clipping and skipped steps holds here too.

    Args:
        params: parameters or groups, as for `AdamW`.
        lr: step size; a float, or a 0-dim tensor, which may change on the device.
        betas: decay rates of the momentum that a step sees and of the one that is kept, in [0, 1).
        weight_decay: decay of a parameter per step, in units of `lr`.
        maximize: climb instead of descending.
        max_grad_norm: the largest global norm an update sees; None does not compute the norm.

    Attributes:
        grad_norm, skipped: as in `AdamW`.

    Raises:
        TypeError, ValueError: as `AdamW`.
    """

    rule = Rule(_lion_prepare, _lion_update, coefs=4)
    states = ("exp_avg",)

    def __init__(
        self,
        params,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        max_grad_norm: float | None = None,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"maximize": maximize}, max_grad_norm)

    def _names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return self.states

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        self._check_betas(group)
        self._check_not_negative(group, ("weight_decay",))

    def _hyper_row(self, group: dict[str, Any]) -> tuple[float, ...]:
        beta1, beta2 = group["betas"]
        return group["weight_decay"], 1 - beta1, 1 - beta2

    def _update_reference(
        self, group: dict[str, Any], p: Tensor, g: Tensor, state: dict[str, Any]
    ) -> None:
        lion_reference(
            p, g, state["exp_avg"],
            lr=float(group["lr"]), betas=group["betas"], weight_decay=group["weight_decay"],
        )  # fmt: skip
