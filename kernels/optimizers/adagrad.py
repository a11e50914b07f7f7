"""Adagrad.

For step t and gradient g, in which clipping and L2 decay are already:

    s := s + g²
    u  = lr / (1 + (t - 1) · lr_decay) · g / (sqrt(s) + eps)

and the parameter moves down by u.

Duchi, Hazan & Singer, "Adaptive Subgradient Methods", 2011. https://jmlr.org/papers/v12/duchi11a
"""

from typing import Any, Unpack

import triton
import triton.language as tl
from torch import Tensor

from tritium.kernels.optimizers._base import MultiTensorOptimizer
from tritium.kernels.optimizers._options import StepOptions
from tritium.kernels.optimizers._step_kernels import HYPER, Rule, divide
from tritium.kernels.optimizers._step_reference import Move

# Columns of the table of parameter groups.
EPS = tl.constexpr(HYPER.value)
LR_DECAY = tl.constexpr(HYPER.value + 1)


def adagrad_reference(
    g: Tensor, s: Tensor, t: float, *, lr: float, lr_decay: float, eps: float
) -> Move:
    """Apply the update rule in plain PyTorch; `s` changes in place."""
    s.addcmul_(g, g)
    return Move(lr / (1 + (t - 1) * lr_decay), g, s.sqrt().add_(eps))


@triton.jit
def _adagrad_prepare(lr_N, hyper_ptr_N, t_N):
    step_size_N = lr_N / (1 + (t_N - 1) * tl.load(hyper_ptr_N + LR_DECAY))
    return tl.load(hyper_ptr_N + EPS), step_size_N


@triton.jit
def _adagrad_update(g, state, coefs, FORMAT: tl.constexpr):
    eps, step_size = coefs
    s = state[0] + g * g
    return divide(step_size * g, tl.sqrt(s) + eps), (s,)


class Adagrad(MultiTensorOptimizer):
    """Update every parameter by Adagrad in one launch, clipping the global gradient norm too.

    Arguments, groups and state are those of `torch.optim.Adagrad`, and each loads the other's
    `state_dict`; what `AdamW` says of launches, clipping and skipped steps applies here too. The
    state is made with the optimizer, hence on the device of the parameters at that time.

    Args:
        params: parameters or groups, as for `AdamW`.
        lr: step size; a float, or a tensor of one element, which may change on the device.
        lr_decay: how fast the step size falls with the count of steps.
        weight_decay: how much of a parameter is added to its gradient.
        initial_accumulator_value: initial sum of squares; unlike torch's it may differ by group.
        eps: added to the root of the sum of squares.

    Attributes:
        grad_norm, skipped: as in `AdamW`.

    Raises:
        TypeError, ValueError: as `AdamW`.
    """

    rule = Rule(_adagrad_prepare, _adagrad_update, coefs=2)
    states = ("sum",)
    squares = ("sum",)

    def __init__(
        self,
        params,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        **options: Unpack[StepOptions],
    ) -> None:
        defaults = {
            "lr": lr, "lr_decay": lr_decay, "eps": eps, "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value, "foreach": foreach,
            "maximize": maximize, "differentiable": differentiable, "fused": fused,
            "decoupled_weight_decay": decoupled_weight_decay,
        }  # fmt: skip
        super().__init__(params, defaults, options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as `torch.optim.Optimizer.add_param_group` does, and make its state."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for p in group["params"]:
            self._start(p, group)

    def share_memory(self) -> None:
        """Move the state into memory that processes share, as `torch.optim.Adagrad` does."""
        for state in self.state.values():
            for x in state.values():
                x.share_memory_()

    def _initial(self, group: dict[str, Any]) -> float:
        return group["initial_accumulator_value"]

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        names = ("lr_decay", "initial_accumulator_value", "eps")
        self._check_not_negative(group, names)

    def _hyper_row(self, group: dict[str, Any]) -> tuple[float, ...]:
        return group["eps"], group["lr_decay"]

    def _rule_reference(
        self, group: dict[str, Any], t: float, g: Tensor, states: list[Any]
    ) -> Move:
        return adagrad_reference(
            g, states[0], t, lr=group["lr"], lr_decay=group["lr_decay"], eps=group["eps"]
        )
