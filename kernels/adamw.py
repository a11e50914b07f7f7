"""AdamW: Adam with decoupled weight decay, and global-norm clipping inside the update.

For step t, gradient g (negated to maximise; times the clip coefficient of grad_norm.py):

    m := m + (1 - beta1) · (g - m)
    v := beta2 · v + (1 - beta2) · g²
    p := p - lr · decay · p - lr · (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

One launch turns the counts t, which live on the device, into coefficients per tensor; the next
updates the whole model (_update.py). A norm that is not finite makes both of them leave everything
as it was. Nothing is read back to the host.

Kingma & Ba, "Adam", 2014. https://arxiv.org/abs/1412.6980
Loshchilov & Hutter, "Decoupled Weight Decay Regularization", 2017. https://arxiv.org/abs/1711.05101
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ._update import LR, Rule
from .adam import WEIGHT_DECAY, Adam, adam_coefs, adam_step


def adamw_reference(
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
    m.lerp_(g, 1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    root = (v / (1 - beta2**t)).sqrt_().add_(eps)
    p.mul_(1 - lr * weight_decay).addcdiv_(m, root, value=-lr / (1 - beta1**t))


@triton.jit
def _adamw_prepare(hyper_ptr_N, t_N):
    decay_N = tl.load(hyper_ptr_N + LR) * tl.load(hyper_ptr_N + WEIGHT_DECAY)
    return adam_coefs(hyper_ptr_N, t_N, decay_N)


@triton.jit
def _adamw_update(g, p, state, coefs, HELD: tl.constexpr):
    step, state = adam_step(g, state, coefs)
    return p - (coefs[0] * p + step), state


class AdamW(Adam):
    """Update every parameter by AdamW in one launch, clipping the global gradient norm on the way.

    Arguments, groups and state are those of `torch.optim.AdamW`, and each loads the other's
    `state_dict`; bias corrections come from step counts on the device. A step takes two launches,
    three with `max_grad_norm`, and never reads back to the host.

    With `max_grad_norm` the gradients of all groups are scaled, where the update reads them, by
    `min(1, max_grad_norm / (norm + 1e-6))`; `.grad` itself is left as it is. If the norm is not
    finite (in float32: up to 1.8e19), parameters, moments and step counts stay untouched, and the
    step counts as skipped.

    Args:
        params: parameters or groups, float32, dense in memory, on one device. A gradient whose
            strides are not its parameter's is copied first.
        lr: step size; a float, or a 0-dim tensor, which may change on the device.
        betas: decay rates of the two moments, in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: decay of a parameter per step, in units of `lr`.
        maximize: climb instead of descending.
        max_grad_norm: the largest global norm an update sees; None does not compute the norm.

    Attributes:
        grad_norm: norm of all gradients in the last step, before clipping, 0-dim float32; a new
            tensor every step. None before the first, and always without `max_grad_norm`.
        skipped: steps skipped so far, 0-dim int64, on the device of the parameters once one step
            is taken. Pickled and copied with the optimizer, but not in `state_dict`.

    Raises:
        TypeError: parameters "must be float32".
        ValueError: a hyper-parameter "must be at least 0" or the like, a parameter "must appear
            once", or parameters "must be dense" or "must hold their own memory".
    """

    rule = Rule(_adamw_prepare, _adamw_update, coefs=7)
    refused = ("amsgrad",)

    def __init__(
        self,
        params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        maximize: bool = False,
        max_grad_norm: float | None = None,
    ) -> None:
        super().__init__(
            params, lr, betas, eps, weight_decay, maximize=maximize, max_grad_norm=max_grad_norm
        )

    def _update_reference(
        self, group: dict[str, Any], p: Tensor, g: Tensor, state: dict[str, Any]
    ) -> None:
        adamw_reference(
            p, g, state["exp_avg"], state["exp_avg_sq"], state["step"].item(),
            lr=float(group["lr"]), betas=group["betas"], eps=group["eps"],
            weight_decay=group["weight_decay"],
        )  # fmt: skip
