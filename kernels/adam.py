"""Adam, with weight decay inside the gradient (L2).

For step t, gradient g (negated to maximise; times the clip coefficient of grad_norm.py):

    g := g + decay · p
    m := m + (1 - beta1) · (g - m)
    v := beta2 · v + (1 - beta2) · g²
    p := p - lr · (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

Kingma & Ba, "Adam", 2014. https://arxiv.org/abs/1412.6980
"""

from math import inf, log2
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ._optimizer import MultiTensorOptimizer
from ._update import HYPER, LR, Rule

# Columns of the table of parameter groups.
WEIGHT_DECAY = tl.constexpr(HYPER.value)
EPS = tl.constexpr(HYPER.value + 1)
BETA2 = tl.constexpr(HYPER.value + 2)
ONE_MINUS_BETA1 = tl.constexpr(HYPER.value + 3)
ONE_MINUS_BETA2 = tl.constexpr(HYPER.value + 4)
LOG2_BETA1 = tl.constexpr(HYPER.value + 5)
LOG2_BETA2 = tl.constexpr(HYPER.value + 6)


def adam_reference(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    t: float,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """The update rule in plain PyTorch, for one tensor: `p`, `m` and `v` change in place."""
    beta1, beta2 = betas
    g = g.add(p, alpha=weight_decay) if weight_decay else g
    m.lerp_(g, 1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    root = (v / (1 - beta2**t)).sqrt_().add_(eps)
    p.addcdiv_(m, root, value=-lr / (1 - beta1**t))


@triton.jit
def _adam_prepare(hyper_ptr_N, t_N):
    return adam_coefs(hyper_ptr_N, t_N, tl.load(hyper_ptr_N + WEIGHT_DECAY))


@triton.jit
def adam_coefs(hyper_ptr_N, t_N, decay_N):
    """The coefficients of `_adam_update`, with `decay_N` as its decay."""
    correction1_N = 1 - tl.exp2(t_N * tl.load(hyper_ptr_N + LOG2_BETA1))
    correction2_N = 1 - tl.exp2(t_N * tl.load(hyper_ptr_N + LOG2_BETA2))
    step_size_N = tl.load(hyper_ptr_N + LR) / correction1_N
    weight1_N = tl.load(hyper_ptr_N + ONE_MINUS_BETA1)
    weight2_N = tl.load(hyper_ptr_N + ONE_MINUS_BETA2)
    beta2_N = tl.load(hyper_ptr_N + BETA2)
    eps_N = tl.load(hyper_ptr_N + EPS)
    return decay_N, weight1_N, weight2_N, beta2_N, eps_N, step_size_N, 1 / tl.sqrt(correction2_N)


@triton.jit
def _adam_update(g, p, state, coefs, HELD: tl.constexpr):
    g += coefs[0] * p
    step, state = adam_step(g, state, coefs)
    return p - step, state


@triton.jit
def adam_step(g, state, coefs):
    """How far Adam moves a parameter down, and its new moments."""
    m, v = state
    _decay, weight1, weight2, beta2, eps, step_size, rsqrt = coefs
    m += weight1 * (g - m)
    v = beta2 * v + weight2 * g * g
    return step_size * m / (tl.sqrt(v) * rsqrt + eps), (m, v)


class Adam(MultiTensorOptimizer):
    """Update every parameter by Adam in one launch, clipping the global gradient norm on the way.

    Arguments, groups and state are those of `torch.optim.Adam`, and each loads the other's
    `state_dict`; what `AdamW` says of launches, clipping and skipped steps holds here too.

    Args:
        params: parameters or groups, as for `AdamW`.
        lr: step size; a float, or a 0-dim tensor, which may change on the device.
        betas: decay rates of the two moments, in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: how much of a parameter is added to its gradient.
        maximize: climb instead of descending.
        max_grad_norm: the largest global norm an update sees; None does not compute the norm.

    Attributes:
        grad_norm, skipped: as in `AdamW`.

    Raises:
        TypeError, ValueError: as `AdamW`.
    """

    rule = Rule(_adam_prepare, _adam_update, coefs=7)
    states = ("exp_avg", "exp_avg_sq")
    refused = ("amsgrad", "decoupled_weight_decay")

    def __init__(
        self,
        params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        max_grad_norm: float | None = None,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"maximize": maximize}, max_grad_norm)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        self._check_betas(group)
        self._check_not_negative(group, ("eps", "weight_decay"))

    def _hyper_row(self, group: dict[str, Any]) -> tuple[float, ...]:
        beta1, beta2 = group["betas"]
        return (
            group["weight_decay"],
            group["eps"],
            beta2,
            1 - beta1,
            1 - beta2,
            log2(beta1) if beta1 else -inf,
            log2(beta2) if beta2 else -inf,
        )

    def _update_reference(
        self, group: dict[str, Any], p: Tensor, g: Tensor, state: dict[str, Any]
    ) -> None:
        adam_reference(
            p, g, state["exp_avg"], state["exp_avg_sq"], state["step"].item(),
            lr=float(group["lr"]), betas=group["betas"], eps=group["eps"],
            weight_decay=group["weight_decay"],
        )  # fmt: skip
