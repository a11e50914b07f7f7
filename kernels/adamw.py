"""AdamW: Adam with decoupled weight decay, and global-norm clipping inside the update.

For step t, gradient g (negated to maximise; times the clip coefficient of grad_norm.py):

    m := m + (1 - beta1) · (g - m)
    v := beta2 · v + (1 - beta2) · g²
    p := p - lr · decay · p - lr · (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

One launch turns the counts t, which live on the device, into eight coefficients per tensor; the
next updates the whole model. A norm that is not finite makes both of them leave everything as it
was. Nothing is read back to the host.

Kingma & Ba, "Adam", 2014. https://arxiv.org/abs/1412.6980
Loshchilov & Hutter, "Decoupled Weight Decay Regularization", 2017. https://arxiv.org/abs/1711.05101
"""

from math import inf, log2
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _multi_tensor
from ._multi_tensor import GRAD, GROUP, THREADS, Tables, load, locate, store
from ._optimizer import MultiTensorOptimizer
from .grad_norm import P, clip_coefficient, is_finite, total_norm

BLOCK = 1024  # elements of each tensor that a program holds at a time: 16 bytes per thread

# Addresses in the tensor table after GRAD.
PARAM = tl.constexpr(5)
EXP_AVG = tl.constexpr(6)
EXP_AVG_SQ = tl.constexpr(7)
STEP = tl.constexpr(8)

# Columns of the table of parameter groups, float64.
LR = tl.constexpr(0)
WEIGHT_DECAY = tl.constexpr(1)
EPS = tl.constexpr(2)
SIGN = tl.constexpr(3)
BETA2 = tl.constexpr(4)
ONE_MINUS_BETA1 = tl.constexpr(5)
ONE_MINUS_BETA2 = tl.constexpr(6)
LOG2_BETA1 = tl.constexpr(7)
LOG2_BETA2 = tl.constexpr(8)
HYPERS = tl.constexpr(9)


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
def _adamw_prepare_kernel(
    tensors_ptr, hyper_ptr, coefs_ptr, partials_ptr, norm_ptr, skipped_ptr, n_tensors, n_partials,
    COLUMNS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    if partials_ptr is not None:
        norm = total_norm(partials_ptr, n_partials, BLOCK_P)
        tl.store(norm_ptr, norm)
        if not is_finite(norm):
            tl.store(skipped_ptr, tl.load(skipped_ptr) + 1)
            return
    for first in range(0, n_tensors, BLOCK_N):
        offs_N = first + tl.arange(0, BLOCK_N)
        mask_N = offs_N < n_tensors
        row_ptr_N = tensors_ptr + offs_N * COLUMNS
        step_ptr_N = tl.load(row_ptr_N + STEP, mask=mask_N, other=0).to(tl.pointer_type(tl.float32))
        t_N = tl.load(step_ptr_N, mask=mask_N, other=0.0) + 1
        tl.store(step_ptr_N, t_N, mask=mask_N)
        hyper_ptr_N = hyper_ptr + tl.load(row_ptr_N + GROUP, mask=mask_N, other=0) * HYPERS
        # In float64, which one program can afford: in float32 1 - beta^t loses four digits.
        correction1_N = _bias_correction(t_N, tl.load(hyper_ptr_N + LOG2_BETA1))
        correction2_N = _bias_correction(t_N, tl.load(hyper_ptr_N + LOG2_BETA2))
        step_size_N = tl.load(hyper_ptr_N + LR) / correction1_N
        tl.store(coefs_ptr + 2 * offs_N, step_size_N.to(tl.float32), mask=mask_N)
        rsqrt_N = 1 / tl.sqrt(correction2_N)
        tl.store(coefs_ptr + 2 * offs_N + 1, rsqrt_N.to(tl.float32), mask=mask_N)


@triton.jit
def _bias_correction(t_N, log2_beta_N):
    return 1 - tl.exp2(t_N.to(tl.float64) * log2_beta_N)


@triton.jit
def _adamw_update_kernel(
    tensors_ptr, chunks_ptr, hyper_ptr, coefs_ptr, norm_ptr, max_norm,
    COLUMNS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    clip = 1.0
    if norm_ptr is not None:
        norm = tl.load(norm_ptr)
        if not is_finite(norm):
            return
        clip = clip_coefficient(norm, max_norm)
    chunk = tl.program_id(0).to(tl.int64)
    tensor, start, full, end = locate(tensors_ptr, chunks_ptr, chunk, COLUMNS, CHUNK, BLOCK)
    row_ptr = tensors_ptr + tensor * COLUMNS
    coefs = _coefs(hyper_ptr + tl.load(row_ptr + GROUP) * HYPERS, coefs_ptr + tensor * 2, clip)
    addresses = (
        tl.load(row_ptr + GRAD),
        tl.load(row_ptr + PARAM),
        tl.load(row_ptr + EXP_AVG),
        tl.load(row_ptr + EXP_AVG_SQ),
    )
    for first in range(start, full, BLOCK):
        _update(addresses, coefs, first + tl.arange(0, BLOCK), end, True)
    # One element per thread keeps neighbours together where accesses are 4 bytes wide.
    for first in range(full, end, THREADS):
        _update(addresses, coefs, first + tl.arange(0, THREADS), end, False)


@triton.jit
def _coefs(hyper_ptr, coef_ptr, clip):
    scale = clip * tl.load(hyper_ptr + SIGN).to(tl.float32)
    weight1 = tl.load(hyper_ptr + ONE_MINUS_BETA1).to(tl.float32)
    weight2 = tl.load(hyper_ptr + ONE_MINUS_BETA2).to(tl.float32)
    beta2 = tl.load(hyper_ptr + BETA2).to(tl.float32)
    eps = tl.load(hyper_ptr + EPS).to(tl.float32)
    lr = tl.load(hyper_ptr + LR).to(tl.float32)
    decay = lr * tl.load(hyper_ptr + WEIGHT_DECAY).to(tl.float32)
    return scale, weight1, weight2, beta2, eps, decay, tl.load(coef_ptr), tl.load(coef_ptr + 1)


@triton.jit
def _update(addresses, coefs, offs, end, FULL: tl.constexpr):
    g_ptr, p_ptr, m_ptr, v_ptr = addresses
    scale, weight1, weight2, beta2, eps, decay, step_size, rsqrt = coefs
    g = load(g_ptr, offs, end, tl.float32, FULL) * scale
    p = load(p_ptr, offs, end, tl.float32, FULL)
    m = load(m_ptr, offs, end, tl.float32, FULL)
    v = load(v_ptr, offs, end, tl.float32, FULL)
    m += weight1 * (g - m)
    v = beta2 * v + weight2 * g * g
    p -= decay * p + step_size * m / (tl.sqrt(v) * rsqrt + eps)
    store(p_ptr, offs, p, end, tl.float32, FULL)
    store(m_ptr, offs, m, end, tl.float32, FULL)
    store(v_ptr, offs, v, end, tl.float32, FULL)


class AdamW(MultiTensorOptimizer):
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

    moments = ("exp_avg", "exp_avg_sq")

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
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"maximize": maximize}, max_grad_norm)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` of this class or of `torch.optim.AdamW` returned.

        Raises:
            ValueError: it was saved with amsgrad, by another rule, or for other shapes.
        """
        if any(group.get("amsgrad") for group in state_dict["param_groups"]):
            raise ValueError("AdamW: amsgrad must be off, got a state saved with it; start afresh")
        super().load_state_dict(state_dict)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        if not all(0 <= beta < 1 for beta in group["betas"]):
            raise ValueError(f"AdamW: betas must lie in [0, 1), got {group['betas']}")
        for name in ("eps", "weight_decay"):
            if not group[name] >= 0:
                raise ValueError(f"AdamW: {name} must be at least 0, got {group[name]}")

    def _hyper_row(self, group: dict[str, Any]) -> tuple[float, ...]:
        beta1, beta2 = group["betas"]
        return (
            group["weight_decay"],
            group["eps"],
            -1.0 if group["maximize"] else 1.0,
            beta2,
            1 - beta1,
            1 - beta2,
            log2(beta1) if beta1 else -inf,
            log2(beta2) if beta2 else -inf,
        )

    def _update_reference(
        self, group: dict[str, Any], g: Tensor, p: Tensor, *state: Tensor
    ) -> None:
        m, v, step = state
        adamw_reference(
            p, -g if group["maximize"] else g, m, v, step.item(),
            lr=float(group["lr"]), betas=group["betas"], eps=group["eps"],
            weight_decay=group["weight_decay"],
        )  # fmt: skip

    def _update(
        self, tables: Tables, hyper: Tensor, partials_P: Tensor | None, norm: Tensor | None
    ) -> None:
        n_tensors, columns = tables.tensors.shape
        coefs = torch.empty(n_tensors, 2, device=hyper.device)
        n_partials = 0 if partials_P is None else len(partials_P)
        _adamw_prepare_kernel[(1,)](
            tables.tensors, hyper, coefs, partials_P, norm, self.skipped, n_tensors, n_partials,
            COLUMNS=columns, BLOCK_N=128, BLOCK_P=P,
        )  # fmt: skip
        _adamw_update_kernel[(len(tables.chunks),)](
            *tables, hyper, coefs, norm, self.max_grad_norm or 0.0,
            COLUMNS=columns, CHUNK=_multi_tensor.CHUNK, BLOCK=BLOCK, num_warps=THREADS.value // 32,
        )  # fmt: skip
