"""Stochastic gradient descent, with momentum.

For gradient g, in which clipping and L2 decay are already:

    b := momentum · b + (1 - dampening) · g,  in the first step b := g
    u  = lr · b,  or with Nesterov's momentum  u = lr · (g + momentum · b)

and the parameter moves down by u. Without momentum there is no b, and u = lr · g.

Sutskever et al., "On the importance of initialization and momentum in deep learning", 2013.
"""

from typing import Any, Unpack

import triton
import triton.language as tl
from torch import Tensor

from tritium.kernels.optimizers._base import MultiTensorOptimizer
from tritium.kernels.optimizers._options import StepOptions, is_number
from tritium.kernels.optimizers._step_kernels import HYPER, Rule
from tritium.kernels.optimizers._step_reference import Move
from tritium.kernels.optimizers._storage import has_state

# Columns of the table of parameter groups.
MOMENTUM = tl.constexpr(HYPER.value)
DAMPENING = tl.constexpr(HYPER.value + 1)
NESTEROV = tl.constexpr(HYPER.value + 2)


def sgd_reference(
    g: Tensor,
    b: Tensor | None,
    t: float,
    *,
    lr: float,
    momentum: float,
    dampening: float,
    nesterov: bool,
) -> Move:
    """Apply the update rule in plain PyTorch; `b` changes in place."""
    if b is not None:
        b.mul_(momentum).add_(g, alpha=1 - dampening if t > 1 else 1.0)
        g = g.add(b, alpha=momentum) if nesterov else b
    return Move(lr, g)


@triton.jit
def _sgd_prepare(lr_N, hyper_ptr_N, t_N):
    weight_N = tl.where(t_N > 1, 1 - tl.load(hyper_ptr_N + DAMPENING), 1.0)
    momentum_N = tl.load(hyper_ptr_N + MOMENTUM)
    nesterov_N = tl.load(hyper_ptr_N + NESTEROV)
    return momentum_N, weight_N, nesterov_N, tl.where(nesterov_N != 0, momentum_N, 1.0), lr_N


@triton.jit
def _sgd_update(g, state, coefs, FORMAT: tl.constexpr):
    momentum, weight, nesterov, ahead, lr = coefs
    b = state[0]
    if has_state(FORMAT, 0):
        b = momentum * b + weight * g
        g = nesterov * g + ahead * b
    return lr * g, (b,)


class SGD(MultiTensorOptimizer):
    """Update every parameter by SGD in one launch, clipping the global gradient norm on the way.

    Arguments, groups and state are those of `torch.optim.SGD`, and each loads the other's
    `state_dict`; what `AdamW` says of launches, clipping and skipped steps applies here too.

    Args:
        params: parameters or groups, as for `AdamW`.
        lr: step size; a float, or a tensor of one element, which may change on the device.
        momentum: decay rate of the running sum of gradients, in [0, 1); 0 keeps none.
        dampening: fraction of the gradient withheld from the momentum buffer, except the first.
        weight_decay: how much of a parameter is added to its gradient.
        nesterov: use Nesterov momentum.

    Attributes:
        grad_norm, skipped: as in `AdamW`.

    Raises:
        TypeError, ValueError: as `AdamW`, and nesterov "must have momentum and
            no dampening".
    """

    rule = Rule(_sgd_prepare, _sgd_update, coefs=5)
    states = ("momentum_buffer",)

    def __init__(
        self,
        params,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float | Tensor = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        **options: Unpack[StepOptions],
    ) -> None:
        defaults = {
            "lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay,
            "nesterov": nesterov, "maximize": maximize, "foreach": foreach,
            "differentiable": differentiable, "fused": fused,
            "decoupled_weight_decay": decoupled_weight_decay,
        }  # fmt: skip
        # Which step is the first, where that matters. Torch's state holds no count, and a state
        # that is saved must hold what `state` does, by parameter, or it cannot be loaded.
        self._counts: dict[Tensor, Tensor] = {}
        super().__init__(params, defaults, options)

    def state_dict(self) -> dict[str, Any]:
        """Return what `torch.optim.SGD.state_dict` returns; it waits for the device.

        Momentum that no step has reached yet, all of them skipped, is None. Steps are counted only
        where random bits depend on them.
        """
        saved = super().state_dict()
        groups = ((p, group) for group in self.param_groups for p in group["params"])
        for number, (p, group) in enumerate(groups):
            if (state := saved["state"].get(number)) is None or not self._names(group):
                continue
            count = self._counts.get(p, state.get("step"))
            if "momentum_buffer" not in state or (count is not None and not count):
                saved["state"][number] = state | {"momentum_buffer": None}
        return saved

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_counts": self._counts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._counts = {}  # of a state that is loaded; a copy of the optimizer has its own
        super().__setstate__(state)
        for group in self.param_groups:
            for p in group["params"]:
                self._set_aside(p, group)

    def _start(self, p: Tensor, group: dict[str, Any]) -> None:
        begun = "momentum_buffer" in self.state.get(p, {})
        super()._start(p, group)
        if begun and p not in self._counts and "step" in self.state[p]:
            self.state[p]["step"].clamp_(min=1)  # momentum that began without dampening
        self._set_aside(p, group)

    def _set_aside(self, p: Tensor, group: dict[str, Any]) -> None:
        """Move the count of `p` out of its state, where no random bits depend on it."""
        state = self.state.get(p, {})
        if "step" in state and not self._storage.draws(p, self._names(group)):
            self._counts.setdefault(p, state.pop("step"))

    def _states(self) -> dict[Tensor, dict[str, Any]]:
        if not self._counts:
            return self.state
        counts = {p: {"step": count} for p, count in self._counts.items()}
        return {p: counts.get(p, {}) | state for p, state in self.state.items()}

    def _adopted(self, p: Tensor, group: dict[str, Any], state: dict[str, Any]) -> dict[str, Any]:
        # Torch counts no steps. All that matters here is whether there was one.
        if state.get("momentum_buffer") is None:
            state = {name: x for name, x in state.items() if name != "momentum_buffer"}
            return self._storage.adopted(self._op, p, (), state)
        return super()._adopted(p, group, {"step": 1.0} | state)

    def _names(self, group: dict[str, Any]) -> tuple[str, ...]:
        if not group["momentum"]:
            return ()
        # Without dampening the first step is as all others: b = 0 · momentum + g.
        return ("step", *self.states) if group["dampening"] else self.states

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        self._check_not_negative(group, ("momentum",))
        if not is_number(group["dampening"]):
            raise ValueError(f"SGD: dampening must be a number, got {group['dampening']!r}")
        if group["nesterov"] and (not group["momentum"] or group["dampening"]):
            raise ValueError(
                "SGD: nesterov must have momentum and no dampening, got "
                f"{group['momentum']} and {group['dampening']}; turn it off"
            )

    def _hyper_row(self, group: dict[str, Any]) -> tuple[float, ...]:
        return group["momentum"], group["dampening"], group["nesterov"]

    def _rule_reference(
        self, group: dict[str, Any], t: float, g: Tensor, states: list[Any]
    ) -> Move:
        return sgd_reference(
            g, states[0], t, lr=group["lr"], momentum=group["momentum"],
            dampening=group["dampening"], nesterov=group["nesterov"],
        )  # fmt: skip
