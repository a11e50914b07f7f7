"""Pointwise activations, alone or as a gate: the kernels of swiglu, geglu and relu_squared.

    h = f(x) · up,  dx = dh · up · f'(x),  dup = dh · f(x)      (without a second input: up = 1)

    silu           f(a) = a · σ(a)                  σ(a) = 1 / (1 + exp(-a))
    gelu           f(a) = a · Φ(a)                  Φ(a) = (1 + erf(a / √2)) / 2
    gelu_tanh      f(a) = a · σ(s(a))               s(a) = √(8/π) · (a + 0.044715 · a³)
    relu_squared   f(a) = max(a, 0)²

The tanh approximation of GELU is written in the logistic function: (1 + tanh(u)) / 2 = σ(2u).
Backward saves only the inputs and computes f and f' again.

T tokens (every leading axis, flattened), F features.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritium.kernels.launcher import Launcher, Plan, planned
from tritium.kernels.runtime import (
    accumulator,
    apply,
    cdiv,
    once_differentiable,
    operator,
    power_of_2,
    unit_stride,
)

TILE = 2048  # elements per program: 16 a thread


@triton.jit
def _value_and_slope(a, ACTIVATION: tl.constexpr):
    """Return f(a) and f'(a); an unused one is not compiled."""
    if ACTIVATION == "relu_squared":
        relu = tl.where(a < 0, 0.0, a)  # a NaN stays one
        return relu * relu, 2 * relu
    elif ACTIVATION == "gelu":
        phi = 0.5 + 0.5 * tl.erf(a * 0.7071067811865476)
        density = 0.3989422804014327 * tl.exp(-0.5 * a * a)
        return a * phi, phi + a * density
    else:
        s, ds = a, 1.0
        if ACTIVATION == "gelu_tanh":
            # Below -9.5 f and f' are less than 1e-30, and above 100 exp(-s) is 0, in float64 too:
            # no power of a overflows, nor 1 - σ = exp(-s) · σ, which keeps its digits where σ ≈ 1.
            a = tl.maximum(a, -9.5, propagate_nan=tl.PropagateNan.ALL)
            square = tl.minimum(a * a, 1e4)
            s = tl.minimum(a, 100.0) * (1.5957691216057308 + 0.07135481627260025 * square)
            ds = 1.5957691216057308 + 0.21406444881780073 * square
        exp = tl.exp(-s)
        sigma = 1 / (1 + exp)
        value = a * sigma
        rest = exp * sigma if ACTIVATION == "gelu_tanh" else 1 - sigma
        return value, sigma + value * rest * ds


@triton.jit
def _tile(T, F, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr):
    # Neighbouring programs are neighbours along F.
    n_F = tl.cdiv(F, BLOCK_F)
    tile = tl.program_id(0).to(tl.int64)
    offs_T = tile // n_F * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    offs_F = tile % n_F * BLOCK_F + tl.arange(0, BLOCK_F)[None, :]
    return offs_T, offs_F, (offs_T < T) & (offs_F < F)


def _named(direction: str):
    """Give profilers the operation's own name."""
    names = {"silu": "swiglu", "gelu": "geglu", "gelu_tanh": "geglu_tanh"}

    def name(specialization) -> str:
        activation = specialization.constants["ACTIVATION"]
        return f"_{names.get(activation, activation)}_{direction}_kernel"

    return name


@triton.jit(repr=_named("forward"))
def _activation_forward_kernel(
    x_ptr, up_ptr, h_ptr, T, F, stride_xT, stride_upT, stride_hT,
    ACTIVATION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    offs_T, offs_F, mask_TF = _tile(T, F, BLOCK_T, BLOCK_F)
    x_TF = tl.load(x_ptr + offs_T * stride_xT + offs_F, mask=mask_TF, other=0.0).to(ACC)
    h_TF, _ = _value_and_slope(x_TF, ACTIVATION)
    if up_ptr is not None:
        h_TF *= tl.load(up_ptr + offs_T * stride_upT + offs_F, mask=mask_TF, other=0.0).to(ACC)
    tl.store(h_ptr + offs_T * stride_hT + offs_F, h_TF, mask=mask_TF)


@triton.jit(repr=_named("backward"))
def _activation_backward_kernel(
    dh_ptr, x_ptr, up_ptr, dx_ptr, dup_ptr, T, F, stride_dhT, stride_xT, stride_upT, stride_dxT,
    ACTIVATION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    offs_T, offs_F, mask_TF = _tile(T, F, BLOCK_T, BLOCK_F)
    dh_TF = tl.load(dh_ptr + offs_T * stride_dhT + offs_F, mask=mask_TF, other=0.0).to(ACC)
    x_TF = tl.load(x_ptr + offs_T * stride_xT + offs_F, mask=mask_TF, other=0.0).to(ACC)
    value_TF, slope_TF = _value_and_slope(x_TF, ACTIVATION)
    dx_TF = dh_TF * slope_TF
    if up_ptr is not None:
        dx_TF *= tl.load(up_ptr + offs_T * stride_upT + offs_F, mask=mask_TF, other=0.0).to(ACC)
        tl.store(dup_ptr + offs_T * stride_dxT + offs_F, dh_TF * value_TF, mask=mask_TF)
    tl.store(dx_ptr + offs_T * stride_dxT + offs_F, dx_TF, mask=mask_TF)


@planned
def _plan(
    shape: torch.Size, strides: tuple[int, ...] | None, activation: str,
    dtypes: tuple[torch.dtype | None, ...],
) -> Plan:  # fmt: skip
    """Plan a launch whose outputs have the dtype of x, the last of `dtypes` except that of up."""
    if strides is None:
        # One long row where memory allows: its accesses stay 16 bytes wide whatever F is.
        T, F = 1, math.prod(shape)
        strides = (F,) * (len(dtypes) + 1)
    else:
        T, F = shape
    block_F = min(power_of_2(F), TILE)
    block_T = TILE // block_F
    grid = (cdiv(T, block_T) * cdiv(F, block_F),)
    return Plan(grid, (T, F, *strides), (activation, block_T, block_F, accumulator(dtypes[-2])))


_launch_value = Launcher(_activation_forward_kernel)
_launch_slope = Launcher(_activation_backward_kernel)


def _launch_forward(x_TF: Tensor, up_TF: Tensor | None, activation: str) -> Tensor:
    h_TF, strides = _empty_like(x_TF), None
    if not (x_TF.is_contiguous() and (up_TF is None or up_TF.is_contiguous())):
        strides = x_TF.stride(0), 0 if up_TF is None else up_TF.stride(0), h_TF.stride(0)
    dtypes = x_TF.dtype, None if up_TF is None else up_TF.dtype
    _launch_value.launch(_plan(x_TF.shape, strides, activation, dtypes), x_TF, up_TF, h_TF)
    return h_TF


def _launch_backward(
    dh_TF: Tensor, x_TF: Tensor, up_TF: Tensor | None, activation: str
) -> list[Tensor]:
    dx_TF = _empty_like(x_TF)
    if up_TF is None:
        _differentiate(dh_TF, x_TF, None, dx_TF, None, activation)
        return [dx_TF]
    dup_TF = _empty_like(x_TF)
    _differentiate(dh_TF, x_TF, up_TF, dx_TF, dup_TF, activation)
    return [dx_TF, dup_TF]


def _launch_packed_backward(dh_TF: Tensor, packed_TF: Tensor, activation: str) -> Tensor:
    dpacked_TF = _empty_like(packed_TF)
    _differentiate(dh_TF, *packed_TF.chunk(2, 1), *dpacked_TF.chunk(2, 1), activation)
    return dpacked_TF


def _differentiate(
    dh_TF: Tensor, x_TF: Tensor, up_TF: Tensor | None, dx_TF: Tensor, dup_TF: Tensor | None,
    activation: str,
) -> None:  # fmt: skip
    """Write the gradients, whose rows are alike."""
    strides = None
    if not (
        x_TF.is_contiguous() and dh_TF.is_contiguous() and dx_TF.is_contiguous()
        and (up_TF is None or up_TF.is_contiguous())
    ):  # fmt: skip
        up_stride = 0 if up_TF is None else up_TF.stride(0)
        strides = dh_TF.stride(0), x_TF.stride(0), up_stride, dx_TF.stride(0)
    dtypes = dh_TF.dtype, x_TF.dtype, None if up_TF is None else up_TF.dtype
    plan = _plan(x_TF.shape, strides, activation, dtypes)
    _launch_slope.launch(plan, dh_TF, x_TF, up_TF, dx_TF, dup_TF)


def _empty_like(x: Tensor) -> Tensor:
    if x.is_contiguous():
        return torch.empty_like(x)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_forward = operator(
    "activation_forward(Tensor x, Tensor? up, str activation) -> Tensor",
    _launch_forward,
    lambda x, up, activation: x.new_empty(x.shape),
    incoming=2,
)
_backward = operator(
    "activation_backward(Tensor dh, Tensor x, Tensor? up, str activation) -> Tensor[]",
    _launch_backward,
    lambda dh, x, up, activation: [x.new_empty(x.shape) for _ in range(1 if up is None else 2)],
    incoming=1,
)
_packed_backward = operator(
    "activation_packed_backward(Tensor dh, Tensor packed, str activation) -> Tensor",
    _launch_packed_backward,
    lambda dh, packed, activation: packed.new_empty(packed.shape),
    incoming=1,
)


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TF: Tensor, up_TF: Tensor | None, activation: str) -> Tensor:
        ctx.save_for_backward(x_TF, up_TF)
        ctx.activation = activation
        return _forward(x_TF, up_TF, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx, dh_TF: Tensor):
        x_TF, up_TF = ctx.saved_tensors
        if not dh_TF.is_contiguous():
            flat = x_TF.is_contiguous() and (up_TF is None or up_TF.is_contiguous())
            dh_TF = dh_TF.contiguous() if flat else unit_stride(dh_TF)
        dx_TF, *dup_TF = _backward(dh_TF, x_TF, up_TF, ctx.activation)
        return dx_TF, dup_TF[0] if dup_TF else None, None


class _PackedActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, packed_TF: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(packed_TF)
        ctx.activation = activation
        return _forward(*packed_TF.chunk(2, 1), activation)

    @staticmethod
    @once_differentiable
    def backward(ctx, dh_TF: Tensor):
        return _packed_backward(unit_stride(dh_TF), *ctx.saved_tensors, ctx.activation), None


def _matrix(x: Tensor, T: int, F: int) -> Tensor:
    return unit_stride(x.reshape(T, F))


def activate(activation: str, x: Tensor, up: Tensor | None = None) -> Tensor:
    """f(`x`), times `up` where there is one, by the kernels. Same shape, dtype and device."""
    if x.is_contiguous() and (up is None or up.is_contiguous()):
        return apply(_Activation, x, up, activation)
    T, F = math.prod(x.shape[:-1]), x.shape[-1]
    up_TF = None if up is None else _matrix(up, T, F)
    return apply(_Activation, _matrix(x, T, F), up_TF, activation).view(x.shape)


def activate_packed(activation: str, packed: Tensor) -> Tensor:
    """f of the first half of the last axis of `packed`, times the second half, by the kernels.

    The gradient of `packed` comes in one tensor.
    """
    packed_TF = _matrix(packed, math.prod(packed.shape[:-1]), packed.shape[-1])
    h_TF = apply(_PackedActivation, packed_TF, activation)
    return h_TF.view(*packed.shape[:-1], packed.shape[-1] // 2)


def validate_packed(op: str, packed: Tensor) -> None:
    """Raise unless the last axis of `packed` holds a gate and what it multiplies."""
    if not packed.ndim or packed.shape[-1] % 2 or not packed.is_floating_point():
        raise ValueError(
            f"{op}: without up, gate must be floating point [..., 2F], gate and up packed, "
            f"got {packed.dtype} {list(packed.shape)}"
        )


def validate_pair(op: str, gate: Tensor, up: Tensor) -> None:
    """Raise unless `gate` and `up` can be multiplied element by element in one floating dtype."""
    if gate.shape != up.shape or gate.dtype != up.dtype or gate.device != up.device:
        for what in ("shape", "dtype", "device"):
            a, b = getattr(gate, what), getattr(up, what)
            if a != b:
                raise ValueError(f"{op}: gate and up must have one {what}, got {a} and {b}")
    if not gate.is_floating_point():
        raise ValueError(f"{op}: gate must be floating point, got {gate.dtype}; convert it")
