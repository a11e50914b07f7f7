"""Stochastic gradient descent, with momentum and weight decay inside the gradient (L2).

For gradient g (negated to maximise; times the clip coefficient of grad_norm.py):

    g := g + decay · p
    b := momentum · b + (1 - dampening) · g,  in the first step b := g
    p := p - lr · b,  or with Nesterov's momentum  p := p - lr · (g + momentum · b)

Without momentum there is no b, and p := p - lr · g. Groups with and without it take a launch each.

Sutskever et al., "On the importance of initialization and momentum in deep learning", 2013.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ._optimizer import MultiTensorOptimizer
from ._update import HYPER, LR, Rule

# Columns of the table of parameter groups.
WEIGHT_DECAY = tl.constexpr(HYPER.value)
MOMENTUM = tl.constexpr(HYPER.value + 1)
DAMPENING = tl.constexpr(HYPER.value + 2)
NESTEROV = tl.constexpr(HYPER.value + 3)


def sgd_reference(
    p: Tensor,
    g: Tensor,
    b: Tensor | None,
    t: float,
    *,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
) -> None:
    """The update rule in plain PyTorch, for one tensor: `p` and `b` change in place."""
    g = g.add(p, alpha=weight_decay) if weight_decay else g
    if b is not None:
        b.mul_(momentum).add_(g, alpha=1 - dampening if t > 1 else 1.0)
        g = g.add(b, alpha=momentum) if nesterov else b
    p.add_(g, alpha=-lr)


@triton.jit
def _sgd_prepare(hyper_ptr_N, t_N):
    weight_N = tl.where(t_N > 1, 1 - tl.load(hyper_ptr_N + DAMPENING), 1.0)
    momentum_N = tl.load(hyper_ptr_N + MOMENTUM)
    nesterov_N = tl.load(hyper_ptr_N + NESTEROV)
    ahead_N = tl.where(nesterov_N != 0, momentum_N, 1.0)
    decay_N = tl.load(hyper_ptr_N + WEIGHT_DECAY)
    return decay_N, momentum_N, weight_N, nesterov_N, ahead_N, tl.load(hyper_ptr_N + LR)


@triton.jit
def _sgd_update(g, p, state, coefs, HELD: tl.constexpr):
    decay, momentum, weight, nesterov, ahead, lr = coefs
    b = state[0]
    g += decay * p
    if HELD:
        b = momentum * b + weight * g
        g = nesterov * g + ahead * b
    return p - lr * g, (b,)


class SGD(MultiTensorOptimizer):
    """Update every parameter by SGD in one launch, clipping the global gradient norm on the way.

    Arguments, groups and state are those of `torch.optim.SGD`, and each loads the other's
    `state_dict`; what `AdamW` says of launches, clipping and skipped steps holds here too.

    Args:
        params: parameters or groups, as for `AdamW`.
        lr: step size; a float, or a 0-dim tensor, which may change on the device.
        momentum: decay rate of the running sum of gradients, in [0, 1); 0 keeps none.
        dampening: what part of a gradient stays out of that sum, but for the first.
        weight_decay: how much of a parameter is added to its gradient.
        nesterov: look one step of the momentum ahead.
        maximize: climb instead of descending.
        max_grad_norm: the largest global norm an update sees; None does not compute the norm.

    Attributes:
        grad_norm, skipped: as in `AdamW`.

    Raises:
        TypeError, ValueError: as `AdamW`, and nesterov "must have momentum and
            no dampening".
    """

    rule = Rule(_sgd_prepare, _sgd_update, coefs=6)
    states = ("momentum_buffer",)

    def __init__(
        self,
        params,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        max_grad_norm: float | None = None,
    ) -> None:
        defaults = {
            "lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay,
            "nesterov": nesterov, "maximize": maximize,
        }  # fmt: skip
        super().__init__(params, defaults, max_grad_norm)

    def state_dict(self) -> dict[str, Any]:
        """Return what `torch.optim.SGD.state_dict` returns; it waits for the device.

        Momentum that no step has reached yet, all of them skipped, is None.
        """
        saved = super().state_dict()
        for number, state in saved["state"].items():
            b = state.get("momentum_buffer") if state.get("step") else None
            saved["state"][number] = {"momentum_buffer": b}
        return saved

    def _adopt(self, p: Tensor, names: tuple[str, ...], state: dict[str, Any]) -> None:
        # Torch counts no steps. All that matters here is whether there was one.
        if state.get("momentum_buffer", p) is None:
            state.clear()
            return
        state.setdefault("step", 1.0)
        super()._adopt(p, names, state)

    def _names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("step", "momentum_buffer") if group["momentum"] else ()

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        self._check_not_negative(group, ("momentum", "weight_decay"))
        if group["nesterov"] and (not group["momentum"] or group["dampening"]):
            raise ValueError(
                "SGD: nesterov must have momentum and no dampening, got "
                f"{group['momentum']} and {group['dampening']}; turn it off"
            )

    def _hyper_row(self, group: dict[str, Any]) -> tuple[float, ...]:
        return group["weight_decay"], group["momentum"], group["dampening"], group["nesterov"]

    def _update_reference(
        self, group: dict[str, Any], p: Tensor, g: Tensor, state: dict[str, Any]
    ) -> None:
        held = bool(group["momentum"])
        sgd_reference(
            p, g, state["momentum_buffer"] if held else None, state["step"].item() if held else 0,
            lr=float(group["lr"]), momentum=group["momentum"], dampening=group["dampening"],
            weight_decay=group["weight_decay"], nesterov=group["nesterov"],
        )  # fmt: skip
