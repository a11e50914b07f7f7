"""Lion: the sign of a momentum, with decoupled weight decay.

For gradient g, in which clipping is already:

    u  = lr · sign(m + (1 - beta1) · (g - m))
    p := p - lr · decay · p - u
    m := m + (1 - beta2) · (g - m)

Chen et al., "Symbolic Discovery of Optimization Algorithms", 2023. https://arxiv.org/abs/2302.06675
"""

from typing import Any, Unpack

import triton
import triton.language as tl
from torch import Tensor

from tritium.kernels.optimizers._base import MultiTensorOptimizer
from tritium.kernels.optimizers._options import StepOptions
from tritium.kernels.optimizers._step_kernels import HYPER, Rule
from tritium.kernels.optimizers._step_reference import Move

# Columns of the table of parameter groups.
ONE_MINUS_BETA1 = tl.constexpr(HYPER.value)
ONE_MINUS_BETA2 = tl.constexpr(HYPER.value + 1)


def lion_reference(g: Tensor, m: Tensor, *, lr: float, betas: tuple[float, float]) -> Move:
    """Apply the update rule in plain PyTorch; `m` changes in place."""
    beta1, beta2 = betas
    u = m.lerp(g, 1 - beta1).sign_()
    m.lerp_(g, 1 - beta2)
    return Move(lr, u)


@triton.jit
def _lion_prepare(lr_N, hyper_ptr_N, t_N):
    return tl.load(hyper_ptr_N + ONE_MINUS_BETA1), tl.load(hyper_ptr_N + ONE_MINUS_BETA2), lr_N


@triton.jit
def _lion_update(g, state, coefs, FORMAT: tl.constexpr):
    weight1, weight2, lr = coefs
    m = state[0]
    u = m + weight1 * (g - m)
    # Zero moves nothing, and nor does NaN, as with torch.sign.
    return tl.where(u > 0, lr, tl.where(u < 0, -lr, 0.0)), (m + weight2 * (g - m),)


class Lion(MultiTensorOptimizer):
    """Update every parameter by Lion in one launch, clipping the global gradient norm on the way.

    PyTorch has no Lion. Arguments and state are those of its authors' class for PyTorch; what
    `AdamW` says of launches, clipping and skipped steps applies here too.

    Args:
        params: parameters or groups, as for `AdamW`.
        lr: step size; a float, or a tensor of one element, which may change on the device.
        betas: decay rates of the momentum that a step sees and of the one that is kept, in [0, 1).
        weight_decay: decay of a parameter per step, in units of `lr`.

    Attributes:
        grad_norm, skipped: as in `AdamW`.

    Raises:
        TypeError, ValueError: as `AdamW`.
    """

    rule = Rule(_lion_prepare, _lion_update, coefs=3)
    states = ("exp_avg",)

    def __init__(
        self,
        params,
        lr: float | Tensor = 1e-4,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = True,
        **options: Unpack[StepOptions],
    ) -> None:
        defaults = {
            "lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize,
            "foreach": foreach, "capturable": capturable, "differentiable": differentiable,
            "fused": fused, "decoupled_weight_decay": decoupled_weight_decay,
        }  # fmt: skip
        super().__init__(params, defaults, options)

    def _names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return self.states

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        self._check_betas(group)

    def _hyper_row(self, group: dict[str, Any]) -> tuple[float, ...]:
        beta1, beta2 = map(float, group["betas"])
        return 1 - beta1, 1 - beta2

    def _rule_reference(
        self, group: dict[str, Any], t: float, g: Tensor, states: list[Any]
    ) -> Move:
        beta1, beta2 = map(float, group["betas"])
        return lion_reference(g, states[0], lr=group["lr"], betas=(beta1, beta2))
