"""SwiGLU: the gated activation of a feed-forward block.

    h = silu(gate) · up,  silu(a) = a · σ(a),  σ(a) = 1 / (1 + exp(-a))

Backward saves only gate and up and computes σ = σ(gate) again:

    dgate = dh · up · σ · (1 + gate · (1 - σ))
    dup   = dh · gate · σ

The kernels are those of `_activation`, for every activation.

Shazeer, "GLU Variants Improve Transformer", 2020. https://arxiv.org/abs/2002.05202
"""

import torch
from torch import Tensor
from torch.nn.functional import silu

from tritium.kernels._activation import (
    activate,
    activate_packed,
    validate_packed,
    validate_pair,
)
from tritium.kernels._cpu_backward import differentiate, uses_cpu_backward
from tritium.kernels.runtime import refuse_batched, uses_triton, widen


def swiglu_reference(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """Compute `swiglu` in plain PyTorch, in float32 (float64 for float64 `gate`)."""
    if up is None:
        gate, up = gate.chunk(2, -1)
    return (silu(widen(gate)) * widen(up)).to(gate.dtype)


class _CpuBackward(torch.autograd.Function):
    """Backward pass on a CPU, of gate and up or of both packed; gradients come as inputs do."""

    @staticmethod
    def forward(ctx, *parts: Tensor) -> Tensor:
        ctx.save_for_backward(*parts)
        gate, up = _pair(parts)
        return silu(widen(gate)).mul_(up).to(gate.dtype)

    @staticmethod
    def backward(ctx, dh: Tensor):
        refuse_batched(dh)
        parts = ctx.saved_tensors
        if torch.is_grad_enabled():
            return (*differentiate(swiglu_reference, parts, ctx.needs_input_grad, dh),)
        dparts = tuple(map(torch.empty_like, parts))
        (gate, up), (dgate, dup) = _pair(parts), _pair(dparts)
        wide = widen(gate)
        torch.mul(silu(wide), dh, out=dup)
        dgate.copy_(torch.ops.aten.silu_backward(torch.mul(widen(dh), up), wide))
        return dparts


def _pair(parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return parts[0].chunk(2, -1) if len(parts) == 1 else parts


def swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """Multiply `up` by the SiLU of `gate`, element by element.

    Args:
        gate: `[..., F]`; float32, float16, bfloat16 or float64. The two halves of a packed
            projection are read where they are; a tensor is copied only if its last axis is not
            contiguous or the others do not flatten into one.
        up: the shape, dtype and device of `gate`. None: `gate` is a packed projection `[..., 2F]`,
            the gate first; its gradient comes in one tensor.

    Returns:
        `[..., F]`, contiguous, in the dtype of `gate`, also under autocast. Computed in float32
        (float64 for float64) and rounded once.

    Raises:
        ValueError: `gate` and `up` differ in shape, dtype or device, or are not floating point; or
            without `up` the last axis of `gate` is odd.
    """
    if up is None:
        validate_packed("swiglu", gate)
        if uses_triton(gate, "swiglu"):
            return activate_packed("silu", gate)
        return (_CpuBackward.apply if uses_cpu_backward(gate) else swiglu_reference)(gate)
    validate_pair("swiglu", gate, up)
    if not uses_triton(gate, "swiglu"):
        define = _CpuBackward.apply if uses_cpu_backward(gate, up) else swiglu_reference
        return define(gate, up)
    return activate("silu", gate, up)
