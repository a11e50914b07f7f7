"""Adagrad, with weight decay inside the gradient (L2).

For step t, gradient g (negated to maximise; times the clip coefficient of grad_norm.py):

    g := g + decay · p
    s := s + g²
    p := p - lr / (1 + (t - 1) · lr_decay) · g / (sqrt(s) + eps)

Duchi, Hazan & Singer, "Adaptive Subgradient Methods", 2011. https://jmlr.org/papers/v12/duchi11a
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
LR_DECAY = tl.constexpr(HYPER.value + 2)


def adagrad_reference(
    p: Tensor,
    g: Tensor,
    s: Tensor,
    t: float,
    *,
    lr: float,
    lr_decay: float,
    weight_decay: float,
    eps: float,
) -> None:
    """The update rule in plain PyTorch, for one tensor: `p` and `s` change in place."""
    g = g.add(p, alpha=weight_decay) if weight_decay else g
    s.addcmul_(g, g)
    p.addcdiv_(g, s.sqrt().add_(eps), value=-lr / (1 + (t - 1) * lr_decay))


@triton.jit
def _adagrad_prepare(hyper_ptr_N, t_N):
    step_size_N = tl.load(hyper_ptr_N + LR) / (1 + (t_N - 1) * tl.load(hyper_ptr_N + LR_DECAY))
    return tl.load(hyper_ptr_N + WEIGHT_DECAY), tl.load(hyper_ptr_N + EPS), step_size_N


@triton.jit
def _adagrad_update(g, p, state, coefs, HELD: tl.constexpr):
    decay, eps, step_size = coefs
    g += decay * p
    s = state[0] + g * g
    return p - step_size * g / (tl.sqrt(s) + eps), (s,)


class Adagrad(MultiTensorOptimizer):
    """Update every parameter by Adagrad in one launch, clipping the global gradient norm too.

    Arguments, groups and state are those of `torch.optim.Adagrad`, and each loads the other's
    `state_dict`; what `AdamW` says of launches, clipping and skipped steps holds here too. The
    state is made with the optimizer, hence on the device of the parameters at that time.

    Args:
        params: parameters or groups, as for `AdamW`.
        lr: step size; a float, or a 0-dim tensor, which may change on the device.
        lr_decay: how fast the step size falls with the count of steps.
        weight_decay: how much of a parameter is added to its gradient.
        initial_accumulator_value: of the sum of squares; unlike torch's it may differ by group.
        eps: added to the root of the sum of squares.
        maximize: climb instead of descending.
        max_grad_norm: the largest global norm an update sees; None does not compute the norm.

    Attributes:
        grad_norm, skipped: as in `AdamW`.

    Raises:
        TypeError, ValueError: as `AdamW`.
    """

    rule = Rule(_adagrad_prepare, _adagrad_update, coefs=3)
    states = ("sum",)

    def __init__(
        self,
        params,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        *,
        maximize: bool = False,
        max_grad_norm: float | None = None,
    ) -> None:
        defaults = {
            "lr": lr, "lr_decay": lr_decay, "eps": eps, "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value, "maximize": maximize,
        }  # fmt: skip
        super().__init__(params, defaults, max_grad_norm)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as `torch.optim.Optimizer.add_param_group` does, and make its state."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for p in group["params"]:
            self._start(p, group)

    def _initial(self, group: dict[str, Any]) -> float:
        return group["initial_accumulator_value"]

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        names = ("lr_decay", "weight_decay", "initial_accumulator_value", "eps")
        self._check_not_negative(group, names)

    def _hyper_row(self, group: dict[str, Any]) -> tuple[float, ...]:
        return group["weight_decay"], group["eps"], group["lr_decay"]

    def _update_reference(
        self, group: dict[str, Any], p: Tensor, g: Tensor, state: dict[str, Any]
    ) -> None:
        adagrad_reference(
            p, g, state["sum"], state["step"].item(), lr=float(group["lr"]),
            lr_decay=group["lr_decay"], weight_decay=group["weight_decay"], eps=group["eps"],
        )  # fmt: skip
