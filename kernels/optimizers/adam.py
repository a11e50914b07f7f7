"""Adam.

For step t and gradient g, in which clipping and L2 decay are already:

    m := m + (1 - beta1) · (g - m)
    v := beta2 · v + (1 - beta2) · g²
    u  = lr · (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

and the parameter moves down by u. With amsgrad the largest v so far is in the place of v in u.

Kingma & Ba, "Adam", 2014. https://arxiv.org/abs/1412.6980
Reddi, Kale & Kumar, "On the Convergence of Adam and Beyond", 2018.
https://openreview.net/forum?id=ryQu7f-RZ
"""

from math import inf, log2
from typing import Any, Unpack

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.optim.adam import adam

from tritium.kernels.optimizers._base import MultiTensorOptimizer
from tritium.kernels.optimizers._options import StepOptions
from tritium.kernels.optimizers._step_kernels import HYPER, Rule, divide
from tritium.kernels.optimizers._step_reference import Move
from tritium.kernels.optimizers._storage import has_state

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
    largest: Tensor | None,
    t: float,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
) -> Move:
    """Apply the update rule in plain PyTorch; `m`, `v` and `largest` change in place."""
    beta1, beta2 = betas
    m.lerp_(g, 1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    if largest is not None:
        v = torch.maximum(largest, v, out=largest)
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
    m, v, largest = state
    weight1, weight2, beta2, eps, step_size, rsqrt = coefs
    m += weight1 * (g - m)
    v = beta2 * v + weight2 * g * g
    square = v
    # In the order of `Adam.states`: the largest v is a state with amsgrad.
    if has_state(FORMAT, 2):
        largest = tl.maximum(largest, v, propagate_nan=tl.PropagateNan.ALL)
        square = largest
    return divide(step_size * m, tl.sqrt(square) * rsqrt + eps), (m, v, largest)


def _adam_fused(
    group: dict[str, Any], ps: list[Tensor], gs: list[Tensor], states: list[list[Tensor]],
    steps: list[Tensor],
) -> None:  # fmt: skip
    (beta1, beta2), (ms, vs, *largest) = map(float, group["betas"]), states
    adam(
        ps, gs, ms, vs, largest[0] if largest else [], steps, fused=True,
        amsgrad=group["amsgrad"], beta1=beta1, beta2=beta2,
        lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
        maximize=group["maximize"], decoupled_weight_decay=group["decoupled_weight_decay"],
    )  # fmt: skip


def adam_row(betas: tuple[float | Tensor, float | Tensor], eps: float) -> tuple[float, ...]:
    """Return the columns of Adam in the table of parameter groups."""
    beta1, beta2 = map(float, betas)
    return (
        eps,
        beta2,
        1 - beta1,
        1 - beta2,
        log2(beta1) if beta1 else -inf,
        log2(beta2) if beta2 else -inf,
    )


class Adam(MultiTensorOptimizer):
    """Update every parameter by Adam in one launch, clipping the global gradient norm on the way.

    Arguments, groups and state are those of `torch.optim.Adam`, and each loads the other's
    `state_dict`; what `AdamW` says of launches, clipping and skipped steps applies here too.

    Args:
        params: parameters or groups, as for `AdamW`.
        lr: step size; a float, or a tensor of one element, which may change on the device.
        betas: decay rates of the two moments, in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: how much of a parameter is added to its gradient.
        amsgrad: divide by the root of the largest second moment so far; not with 8-bit state.

    Attributes:
        grad_norm, skipped: as in `AdamW`.

    Raises:
        TypeError, ValueError: as `AdamW`.
    """

    rule = Rule(_adam_prepare, _adam_update, coefs=6)
    states = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    squares = ("exp_avg_sq", "max_exp_avg_sq")
    fused = staticmethod(_adam_fused)

    def __init__(
        self,
        params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        **options: Unpack[StepOptions],
    ) -> None:
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay,
            "amsgrad": amsgrad, "maximize": maximize, "foreach": foreach,
            "capturable": capturable, "differentiable": differentiable, "fused": fused,
            "decoupled_weight_decay": decoupled_weight_decay,
        }  # fmt: skip
        super().__init__(params, defaults, options)

    def _names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("step", *self.states[: 3 if group["amsgrad"] else 2])

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        self._check_betas(group)
        self._check_not_negative(group, ("eps",))
        read = [x for x in (group["lr"], *group["betas"]) if isinstance(x, Tensor)]
        if read and group["foreach"] and not group["capturable"]:
            raise ValueError(
                f"{self._op}: lr and betas must be floats with foreach=True and capturable=False, "
                "as in torch.optim, got a tensor; leave foreach out"
            )
        if group["amsgrad"] and self._options["state_dtype"] == torch.uint8:
            raise ValueError(
                f"{self._op}: amsgrad must be off with state_dtype=torch.uint8, got both; rounding "
                "of 8 bits in every step leaves no maximum"
            )

    def _hyper_row(self, group: dict[str, Any]) -> tuple[float, ...]:
        return adam_row(group["betas"], group["eps"])

    def _rule_reference(
        self, group: dict[str, Any], t: float, g: Tensor, states: list[Any]
    ) -> Move:
        beta1, beta2 = map(float, group["betas"])
        return adam_reference(g, *states, t, lr=group["lr"], betas=(beta1, beta2), eps=group["eps"])
