"""SwiGLU: the gated activation of a feed-forward block.

    h = silu(gate) · up,  silu(a) = a · σ(a),  σ(a) = 1 / (1 + exp(-a))

Backward keeps gate and up alone and computes σ = σ(gate) again:

    dgate = dh · up · σ · (1 + gate · (1 - σ))
    dup   = dh · gate · σ

T tokens (every leading axis, flattened), F features.

Shazeer, "GLU Variants Improve Transformer", 2020. https://arxiv.org/abs/2002.05202
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import silu

from ._runtime import accumulator, once_differentiable, operator, unit_stride, uses_triton

TILE = 2048  # elements per program: 16 a thread


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """The definition of `swiglu` in plain PyTorch, in float32 or the wider dtype of `gate`."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    return (silu(gate.to(wide)) * up.to(wide)).to(gate.dtype)


@triton.jit
def _swiglu_forward_kernel(
    gate_ptr, up_ptr, h_ptr, T, F, stride_gateT, stride_upT,
    BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    # Neighbouring programs walk along F first.
    n_F = tl.cdiv(F, BLOCK_F)
    tile = tl.program_id(0).to(tl.int64)
    offs_T = tile // n_F * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    offs_F = tile % n_F * BLOCK_F + tl.arange(0, BLOCK_F)[None, :]
    mask_TF = (offs_T < T) & (offs_F < F)
    gate_TF = tl.load(gate_ptr + offs_T * stride_gateT + offs_F, mask=mask_TF, other=0.0).to(ACC)
    up_TF = tl.load(up_ptr + offs_T * stride_upT + offs_F, mask=mask_TF, other=0.0).to(ACC)
    h_TF = gate_TF / (1 + tl.exp(-gate_TF)) * up_TF
    tl.store(h_ptr + offs_T * F + offs_F, h_TF, mask=mask_TF)


@triton.jit
def _swiglu_backward_kernel(
    dh_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, T, F, stride_dhT, stride_gateT, stride_upT,
    BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    n_F = tl.cdiv(F, BLOCK_F)
    tile = tl.program_id(0).to(tl.int64)
    offs_T = tile // n_F * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    offs_F = tile % n_F * BLOCK_F + tl.arange(0, BLOCK_F)[None, :]
    mask_TF = (offs_T < T) & (offs_F < F)
    dh_TF = tl.load(dh_ptr + offs_T * stride_dhT + offs_F, mask=mask_TF, other=0.0).to(ACC)
    gate_TF = tl.load(gate_ptr + offs_T * stride_gateT + offs_F, mask=mask_TF, other=0.0).to(ACC)
    up_TF = tl.load(up_ptr + offs_T * stride_upT + offs_F, mask=mask_TF, other=0.0).to(ACC)
    sigma_TF = 1 / (1 + tl.exp(-gate_TF))
    dgate_TF = dh_TF * up_TF * sigma_TF * (1 + gate_TF * (1 - sigma_TF))
    tl.store(dgate_ptr + offs_T * F + offs_F, dgate_TF, mask=mask_TF)
    tl.store(dup_ptr + offs_T * F + offs_F, dh_TF * gate_TF * sigma_TF, mask=mask_TF)


def _launch(kernel, inputs: tuple[Tensor, ...], n_outputs: int) -> list[Tensor]:
    T, F = inputs[0].shape
    block_F = min(triton.next_power_of_2(max(F, 1)), TILE)
    block_T = TILE // block_F
    outputs = [inputs[0].new_empty(T, F) for _ in range(n_outputs)]
    kernel[(triton.cdiv(T, block_T) * triton.cdiv(F, block_F),)](
        *inputs, *outputs, T, F, *(x_TF.stride(0) for x_TF in inputs),
        BLOCK_T=block_T, BLOCK_F=block_F, ACC=accumulator(inputs[0].dtype),
    )  # fmt: skip
    return outputs


def _launch_forward(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    return _launch(_swiglu_forward_kernel, (gate_TF, up_TF), 1)[0]


def _launch_backward(dh_TF: Tensor, gate_TF: Tensor, up_TF: Tensor) -> tuple[Tensor, Tensor]:
    dgate_TF, dup_TF = _launch(_swiglu_backward_kernel, (dh_TF, gate_TF, up_TF), 2)
    return dgate_TF, dup_TF


_forward = operator(
    "swiglu_forward(Tensor gate, Tensor up) -> Tensor",
    _launch_forward,
    lambda gate, up: gate.new_empty(gate.shape),
)
_backward = operator(
    "swiglu_backward(Tensor dh, Tensor gate, Tensor up) -> (Tensor, Tensor)",
    _launch_backward,
    lambda dh, gate, up: (gate.new_empty(gate.shape), gate.new_empty(gate.shape)),
)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_TF: Tensor, up_TF: Tensor) -> Tensor:
        ctx.save_for_backward(gate_TF, up_TF)
        return _forward(gate_TF, up_TF)

    @staticmethod
    @once_differentiable
    def backward(ctx, dh_TF: Tensor):
        return _backward(_matrix(dh_TF, *dh_TF.shape), *ctx.saved_tensors)


def _matrix(x: Tensor, T: int, F: int) -> Tensor:
    return unit_stride(x.reshape(T, F))


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Multiply `up` by the SiLU of `gate`, element by element.

    Args:
        gate: `[..., F]`; float32, float16, bfloat16 or float64. The two halves of a packed
            projection are read where they are; a tensor is copied only if its last axis is not
            contiguous or the others do not flatten into one.
        up: the shape, dtype and device of `gate`.

    Returns:
        `[..., F]`, contiguous, in the dtype of `gate`, also under autocast. Computed in float32
        (float64 for float64) and rounded once.

    Raises:
        ValueError: `gate` and `up` differ in shape, dtype or device, or are not floating point.
    """
    _validate(gate, up)
    if not uses_triton(gate):
        return swiglu_reference(gate, up)
    # One long row where memory allows: its accesses stay 16 bytes wide whatever F is.
    flat = gate.is_contiguous() and up.is_contiguous()
    T, F = (1, gate.numel()) if flat else (math.prod(gate.shape[:-1]), gate.shape[-1])
    return _SwiGLU.apply(_matrix(gate, T, F), _matrix(up, T, F)).view(gate.shape)


def _validate(gate: Tensor, up: Tensor) -> None:
    for what in ("shape", "dtype", "device"):
        a, b = getattr(gate, what), getattr(up, what)
        if a != b:
            raise ValueError(f"swiglu: gate and up must have one {what}, got {a} and {b}")
    if not gate.is_floating_point():
        raise ValueError(f"swiglu: gate must be floating point, got {gate.dtype}; convert it")
