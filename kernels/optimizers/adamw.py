"""AdamW: Adam with decoupled weight decay.

For step t and gradient g, in which clipping is already:

    m := m + (1 - beta1) · (g - m)
    v := beta2 · v + (1 - beta2) · g²
    p := p - lr · decay · p - lr · (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

One launch turns the counts t, which live on the device, into coefficients per tensor; the next
updates all parameters, in any storage format (_step_kernels.py, _rounding.py). If the norm is not
finite, both leave everything as it was. Nothing is read back to the host.

Kingma & Ba, "Adam", 2014. https://arxiv.org/abs/1412.6980
Loshchilov & Hutter, "Decoupled Weight Decay Regularization", 2017. https://arxiv.org/abs/1711.05101
"""

from typing import Unpack

from torch import Tensor

from tritium.kernels.optimizers._options import StepOptions
from tritium.kernels.optimizers.adam import Adam


class AdamW(Adam):
    """Update every parameter by AdamW in one launch, clipping the global gradient norm on the way.

    Arguments, groups and state are those of `torch.optim.AdamW`, and each loads the other's
    `state_dict`; bias corrections come from step counts on the device. A step takes two launches,
    three with `max_grad_norm`, and never reads back to the host: after a first one, a CUDA graph
    may capture it.

    Parameters may be float32 or bfloat16, in one model too. A bfloat16 parameter has a float32 copy
    in the state, made in the first step, unless `master` is another; from then on the copy is the
    parameter, and values written to the bfloat16 one are lost. Gradients are float32 or
    bfloat16 whatever the parameter: with `p.grad_dtype = torch.float32` PyTorch accumulates those
    of a bfloat16 parameter in float32.

    With `max_grad_norm` the gradients of all groups are scaled, where the update reads them, by
    `min(1, max_grad_norm / (norm + 1e-6))`; `.grad` itself is left as it is. If the norm is not
    finite (in float32: up to 1.8e19), parameters, moments and step counts stay untouched, and the
    step counts as skipped.

    Args:
        params: parameters or groups, dense in memory, on one device; of distributed tensors, all
            on one mesh, each rank updates its own shards, and the norm is of all ranks. A gradient
            whose strides are not its parameter's is copied first.
        lr: step size; a float, or a tensor of one element, float32 where it lives on the device,
            and read there in every step.
        betas: decay rates of the two moments, in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: decay of a parameter per step, in units of `lr`.
        amsgrad: divide by the root of the largest second moment so far; not with 8-bit state.

    Attributes:
        grad_norm: norm of all gradients in the last step, before clipping, 0-dim float32; a new
            tensor every step. None before the first, and always without `max_grad_norm`.
        skipped: steps skipped so far, 0-dim int64, on the device of the parameters once one step
            is taken. Pickled and copied with the optimizer, but not in `state_dict`.

    Raises:
        TypeError: parameters "must be float32 or bfloat16", or there is no such option.
        ValueError: a hyper-parameter "must be at least 0" or the like, a parameter "must appear
            once", or parameters "must be dense" or "must hold their own memory".
    """

    def __init__(
        self,
        params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = True,
        **options: Unpack[StepOptions],
    ) -> None:
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad, foreach=foreach, maximize=maximize,
            capturable=capturable, differentiable=differentiable, fused=fused,
            decoupled_weight_decay=decoupled_weight_decay, **options,
        )  # fmt: skip
