"""Adam.

For step t and gradient g, in which clipping and L2 decay are already:

    m := m + (1 - beta1) · (g - m)
    v := beta2 · v + (1 - beta2) · g²
    u  = lr · (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

and the parameter moves down by u.

Kingma & Ba, "Adam", 2014. https://arxiv.org/abs/1412.6980
"""

from math import inf, log2
from typing import Any, Unpack

import triton
import triton.language as tl
from torch import Tensor
from torch.optim.adam import adam

from ._optimizer import MultiTensorOptimizer
from ._options import StepOptions
from ._update import HYPER, Rule, divide
from ._update_reference import Move

# Columns of the table of parameter groups.
EPS = tl.constexpr(HYPER.value)
BETA2 = tl.constexpr(HYPER.value + 1)
ONE_MINUS_BETA1 = tl.constexpr(HYPER.value + 2)
ONE_MINUS_BETA2 = tl.constexpr(HYPER.value + 3)
LOG2_BETA1 = tl.constexpr(HYPER.value + 4)
LOG2_BETA2 = tl.constexpr(HYPER.value + 5)


def adam_reference(
    g: Tensor,
    m: Tensor,
    v: Tensor,
    t: float,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
) -> Move:
    """The update rule in plain PyTorch; `m` and `v` change in place."""
    beta1, beta2 = betas
    m.lerp_(g, 1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    root = (v / (1 - beta2**t)).sqrt_().add_(eps)
    return Move(lr / (1 - beta1**t), m, root)


@triton.jit
def _adam_prepare(lr_N, hyper_ptr_N, t_N):
    correction1_N = 1 - tl.exp2(t_N * tl.load(hyper_ptr_N + LOG2_BETA1))
    correction2_N = 1 - tl.exp2(t_N * tl.load(hyper_ptr_N + LOG2_BETA2))
    weight1_N = tl.load(hyper_ptr_N + ONE_MINUS_BETA1)
    weight2_N = tl.load(hyper_ptr_N + ONE_MINUS_BETA2)
    beta2_N = tl.load(hyper_ptr_N + BETA2)
    eps_N = tl.load(hyper_ptr_N + EPS)
    return weight1_N, weight2_N, beta2_N, eps_N, lr_N / correction1_N, 1 / tl.sqrt(correction2_N)


@triton.jit
def _adam_update(g, state, coefs, FORMAT: tl.constexpr):
    m, v = state
    weight1, weight2, beta2, eps, step_size, rsqrt = coefs
    m += weight1 * (g - m)
    v = beta2 * v + weight2 * g * g
    return divide(step_size * m, tl.sqrt(v) * rsqrt + eps), (m, v)


def _adam_fused(
    group: dict[str, Any], ps: list[Tensor], gs: list[Tensor], states: list[list[Tensor]],
    steps: list[Tensor],
) -> None:  # fmt: skip
    (beta1, beta2), (ms, vs) = group["betas"], states
    adam(
        ps, gs, ms, vs, [], steps, fused=True, amsgrad=False, beta1=beta1, beta2=beta2,
        lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
        maximize=group["maximize"], decoupled_weight_decay=group["decoupled_weight_decay"],
    )  # fmt: skip


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
        options: those of `StepOptions`, as for `AdamW`.

    Attributes:
        grad_norm, skipped: as in `AdamW`.

    Raises:
        TypeError, ValueError: as `AdamW`.
    """

    rule = Rule(_adam_prepare, _adam_update, coefs=6)
    states = ("exp_avg", "exp_avg_sq")
    squares = ("exp_avg_sq",)
    fused = staticmethod(_adam_fused)
    refused = ("amsgrad",)

    def __init__(
        self,
        params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        **options: Unpack[StepOptions],
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"maximize": maximize}, options)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        self._check_betas(group)
        self._check_not_negative(group, ("eps",))

    def _hyper_row(self, group: dict[str, Any]) -> tuple[float, ...]:
        beta1, beta2 = group["betas"]
        return (
            group["eps"],
            beta2,
            1 - beta1,
            1 - beta2,
            log2(beta1) if beta1 else -inf,
            log2(beta2) if beta2 else -inf,
        )

    def _rule_reference(
        self, group: dict[str, Any], t: float, g: Tensor, states: list[Any]
    ) -> Move:
        m, v = states
        return adam_reference(g, m, v, t, lr=group["lr"], betas=group["betas"], eps=group["eps"])
