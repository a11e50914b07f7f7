"""Embedding: the row of a table for each token.

    y_TD  = weight_VD[tokens_T]
    dw_VD = sum of dy_TD over the t with tokens_t = v, without the tokens equal to padding_idx

Backward sorts the tokens, stably, and cuts the sorted positions into blocks of S. A program walks
through one block and adds the gradients of equal tokens: a token whose run is inside the block
is finished there. A run that crosses borders leaves in each block a partial, float32: a tail where
it begins, a head in every later block. A second kernel adds these, tail first, then the heads in
order. All orders are fixed, so the result is bitwise the same on every run, and nothing is atomic.
Each row of dw is written by one program, once: so it may as well be added to.

T tokens (every leading axis, flattened), D features, V rows, B blocks of S sorted positions.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.compiler import is_compiling

from tritium.kernels.launcher import Launcher, Plan, planned
from tritium.kernels.runtime import (
    accumulator,
    apply,
    cdiv,
    once_differentiable,
    operator,
    power_of_2,
    sees_through,
    unit_stride,
    uses_triton,
    widen,
)

TILE = 2048  # elements per program of the forward: 16 a thread
S = 32  # sorted positions per block
UNROLL = tl.constexpr(4)  # rows being loaded at a time
BLOCK_D = 256  # features per program of the backward, which is one warp: 8 a thread
BLOCK_B = 32  # partials that are added at a time
INT32_MAX = (1 << 31) - 1


def embedding_reference(
    input: Tensor, weight: Tensor, padding_idx: int | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """Compute `embedding` in plain PyTorch; gradients add up in float32 or wider."""
    return F.embedding(input, widen(weight), padding_idx).to(dtype or weight.dtype)


@triton.jit
def _embedding_forward_kernel(
    tokens_ptr, w_ptr, y_ptr, T, D, V, stride_wV, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    n_D = tl.cdiv(D, BLOCK_D)
    tile = tl.program_id(0).to(tl.int64)
    offs_T = tile // n_D * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    offs_D = tile % n_D * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    tokens_T = tl.load(tokens_ptr + offs_T, mask=offs_T < T, other=0).to(tl.int64)
    known_T = (tokens_T >= 0) & (tokens_T < V)
    w_ptrs = w_ptr + tokens_T * stride_wV + offs_D
    y_TD = tl.load(w_ptrs, mask=known_T & (offs_D < D), other=float("nan"))
    if w_ptr.dtype.element_ty is tl.float64 and y_ptr.dtype.element_ty is not tl.float64:
        y_TD = y_TD.to(tl.float32)  # as PyTorch rounds it, in two steps
    tl.store(y_ptr + offs_T * D + offs_D, y_TD, mask=(offs_T < T) & (offs_D < D))


@triton.jit
def _embedding_blocks_kernel(
    sorted_ptr, order_ptr, dy_ptr, dw_ptr, partials_ptr, T, D, V, stride_dyT,
    S: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    n_D = tl.cdiv(D, BLOCK_D)
    b = tl.program_id(0).to(tl.int64) // n_D
    offs_D = tl.program_id(0) % n_D * BLOCK_D + tl.arange(0, BLOCK_D)
    head_ptrs = partials_ptr + 2 * b * D + offs_D
    before = tl.load(sorted_ptr + b * S - 1, mask=b > 0, other=-1)
    dw_D = tl.zeros((BLOCK_D,), ACC)
    for start in range(0, S, UNROLL):
        t = b * S + start
        # All loads before any store, which the compiler would not move them across.
        rows = (
            _row(sorted_ptr, order_ptr, dy_ptr, dw_ptr, t, T, D, V, stride_dyT, offs_D, ADD),
            _row(sorted_ptr, order_ptr, dy_ptr, dw_ptr, t + 1, T, D, V, stride_dyT, offs_D, ADD),
            _row(sorted_ptr, order_ptr, dy_ptr, dw_ptr, t + 2, T, D, V, stride_dyT, offs_D, ADD),
            _row(sorted_ptr, order_ptr, dy_ptr, dw_ptr, t + 3, T, D, V, stride_dyT, offs_D, ADD),
        )
        for k in tl.static_range(UNROLL):
            token, following, dy_D = rows[k][0], rows[k][1], rows[k][2]
            dw_D += dy_D.to(ACC)
            # No branch: `width` columns of the sum go to each of three places, all or none.
            begins, ends = token != before, token != following
            border = start + k == S - 1
            width = tl.where((token < V) & begins & ends, D, 0)
            total_D = rows[k][3] + dw_D if ADD else dw_D
            tl.store(dw_ptr + token.to(tl.int64) * D + offs_D, total_D, mask=offs_D < width)
            width = tl.where((token == before) & (ends | border), D, 0)
            tl.store(head_ptrs, dw_D, mask=offs_D < width)
            width = tl.where((token == following) & begins & border, D, 0)
            tl.store(head_ptrs + D, dw_D, mask=offs_D < width)
            dw_D = tl.where(ends, 0.0, dw_D)


@triton.jit
def _row(sorted_ptr, order_ptr, dy_ptr, dw_ptr, t, T, D, V, stride_dyT, offs_D, ADD: tl.constexpr):
    """Return the token at sorted position t (V: none), the one after it, its gradient, and what the
    sum of its gradients is to be added to."""
    token = tl.load(sorted_ptr + t, mask=t < T, other=V)
    following = tl.load(sorted_ptr + t + 1, mask=t + 1 < T, other=-1)
    row = tl.load(order_ptr + t, mask=t < T, other=0)
    width = tl.where(token < V, D, 0)
    dy_D = tl.load(dy_ptr + row * stride_dyT + offs_D, mask=offs_D < width, other=0.0)
    old_D = dy_D
    if ADD:
        width = tl.where(token == following, 0, width)
        old_D = tl.load(dw_ptr + token.to(tl.int64) * D + offs_D, mask=offs_D < width, other=0.0)
    return token, following, dy_D, old_D


@triton.jit
def _embedding_runs_kernel(
    sorted_ptr, partials_ptr, dw_ptr, T, D, V,
    S: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    n_D = tl.cdiv(D, BLOCK_D)
    b = tl.program_id(0).to(tl.int64) // n_D
    next_t = (b + 1) * S
    before = tl.load(sorted_ptr + b * S - 1, mask=b > 0, other=-1)
    token = tl.load(sorted_ptr + next_t - 1, mask=next_t < T, other=V)
    following = tl.load(sorted_ptr + next_t, mask=next_t < T, other=-1)
    if (token < V) & (token == following) & (token != before):  # a run begins, and continues
        # Loops of two kinds: a `while` that carries tiles crashes the compiler (3.7).
        end = b + 1
        while tl.load(sorted_ptr + end * S, mask=end * S < T, other=-1) == token:
            end += BLOCK_B
        offs_D = tl.program_id(0) % n_D * BLOCK_D + tl.arange(0, BLOCK_D)
        heads_BD = tl.zeros((BLOCK_B, BLOCK_D), partials_ptr.dtype.element_ty)
        for first in range(b + 1, end, BLOCK_B):
            offs_B = tl.arange(0, BLOCK_B)  # of 32 bits, as registers are scarce
            left = tl.cdiv(T, S) - first
            head_B = tl.load(sorted_ptr + first * S + offs_B * S, mask=offs_B < left, other=-1)
            head_ptrs = partials_ptr + 2 * first * D + (2 * offs_B[:, None] * D + offs_D[None, :])
            mask_BD = (head_B == token)[:, None] & (offs_D < D)[None, :]
            heads_BD += tl.load(head_ptrs, mask=mask_BD, other=0.0)
        # Read last: the sums leave no register to keep it in.
        tail_ptrs = partials_ptr + (2 * b + 1) * D + offs_D
        tail_D = tl.load(tail_ptrs, mask=offs_D < D, other=0.0)
        dw_D = tail_D + tl.sum(heads_BD, axis=0)
        dw_ptrs = dw_ptr + token.to(tl.int64) * D + offs_D
        if ADD:
            dw_D = tl.load(dw_ptrs, mask=offs_D < D, other=0.0) + dw_D
        tl.store(dw_ptrs, dw_D, mask=offs_D < D)


@planned
def _plan_forward(
    T: int, shape: torch.Size, stride: int, dtypes: tuple[torch.dtype, ...], tile: int
) -> Plan:
    V, D = shape
    block_D = min(power_of_2(D), tile)
    block_T = tile // block_D
    return Plan(
        (cdiv(T, block_T) * cdiv(D, block_D),), (T, D, V, stride), (block_T, block_D)
    )  # fmt: skip


def _launch_forward(tokens_T: Tensor, w_VD: Tensor, dtype: torch.dtype) -> Tensor:
    T, shape = tokens_T.shape[0], w_VD.shape
    y_TD = w_VD.new_empty(T, shape[1], dtype=dtype)
    dtypes = tokens_T.dtype, w_VD.dtype, dtype
    plan = _plan_forward(T, shape, w_VD.stride(0), dtypes, TILE)
    _look_up.launch(plan, tokens_T, w_VD, y_TD)
    return y_TD


def _launch_backward(
    dy_TD: Tensor, tokens_T: Tensor, V: int, padding_idx: int, dtype: torch.dtype
) -> Tensor:
    dw_VD = dy_TD.new_zeros(V, dy_TD.shape[1], dtype=dtype)
    _launch_sums(dy_TD, tokens_T, dw_VD, padding_idx, add=False)
    return dw_VD


class _SumsPlan(NamedTuple):
    n_blocks: int
    """B, of S sorted tokens each."""
    acc: torch.dtype
    """Dtype of the partial sums."""
    blocks: Plan
    runs: Plan


@planned
def _plan_sums(
    T: int, shape: torch.Size, stride: int, dtypes: tuple[torch.dtype, ...], add: bool,
    size: int, block_D: int, block_B: int,
) -> _SumsPlan:  # fmt: skip
    (V, D), B, acc = shape, cdiv(T, size), torch.promote_types(dtypes[0], torch.float32)
    block_D = min(power_of_2(D), block_D)
    grid = (B * cdiv(D, block_D),)
    blocks = Plan(
        grid, (T, D, V, stride), (size, block_D, accumulator(acc), add), num_warps=1
    )  # fmt: skip
    return _SumsPlan(B, acc, blocks, Plan(grid, (T, D, V), (size, block_B, block_D, add)))


def _launch_sums(
    dy_TD: Tensor, tokens_T: Tensor, dw_VD: Tensor, padding_idx: int, add: bool = True
) -> None:
    """Write the sum of each token's gradients to its row, or add it."""
    T, (V, D) = dy_TD.shape[0], dw_VD.shape
    dtypes = dy_TD.dtype, dw_VD.dtype
    plan = _plan_sums(T, dw_VD.shape, dy_TD.stride(0), dtypes, add, S, BLOCK_D, BLOCK_B)
    # What gets no gradient becomes V, and sorts last: the remainder of -1 is V.
    tokens_T = tokens_T if V < INT32_MAX else tokens_T.long()
    keys_T = tokens_T.clamp(-1, V).remainder_(V + 1)
    if padding_idx >= 0:
        keys_T.masked_fill_(keys_T == padding_idx, V)
    sorted_T, order_T = keys_T.int().sort(stable=True)  # half as many passes of the sort
    partials_B2D = dy_TD.new_empty(plan.n_blocks, 2, D, dtype=plan.acc)
    _add_blocks.launch(plan.blocks, sorted_T, order_T, dy_TD, dw_VD, partials_B2D)
    _add_runs.launch(plan.runs, sorted_T, partials_B2D, dw_VD)


_look_up = Launcher(_embedding_forward_kernel)
_add_blocks = Launcher(_embedding_blocks_kernel)
_add_runs = Launcher(_embedding_runs_kernel)


_forward = operator(
    "embedding_forward(Tensor tokens, Tensor weight, ScalarType dtype) -> Tensor",
    _launch_forward,
    lambda tokens, weight, dtype: weight.new_empty(*tokens.shape, weight.shape[1], dtype=dtype),
)
_backward = operator(
    "embedding_backward(Tensor dy, Tensor tokens, SymInt V, SymInt padding_idx, ScalarType dtype)"
    " -> Tensor",
    _launch_backward,
    lambda dy, tokens, V, padding_idx, dtype: dy.new_empty(V, dy.shape[1], dtype=dtype),
)


_backward_into = operator(
    "embedding_backward_into(Tensor dy, Tensor tokens, Tensor(a!) dw, SymInt padding_idx) -> ()",
    _launch_sums,
    lambda dy, tokens, dw, padding_idx: None,
)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, tokens_T: Tensor, w_VD: Tensor, padding_idx: int, dtype: torch.dtype,
        parameter: Tensor | None,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(tokens_T)
        ctx.V, ctx.padding_idx, ctx.dtype = w_VD.shape[0], padding_idx, w_VD.dtype
        ctx.parameter = parameter
        return _forward(tokens_T, w_VD, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_TD: Tensor):
        dy_TD, (tokens_T,), parameter = unit_stride(dy_TD), ctx.saved_tensors, ctx.parameter
        if parameter is not None and parameter.grad is not None:
            _backward_into(dy_TD, tokens_T, parameter.grad, ctx.padding_idx)
            return (None,) * 5
        dw_VD = _backward(dy_TD, tokens_T, ctx.V, ctx.padding_idx, ctx.dtype)
        if parameter is None:
            return None, dw_VD, None, None, None
        parameter.grad = dw_VD
        return (None,) * 5


def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
    *,
    dtype: torch.dtype | None = None,
    into_grad: bool = False,
) -> Tensor:
    """Look up the rows of `weight` that `input` names.

    As `torch.nn.functional.embedding`. Each gradient is summed in float32 in a fixed order,
    bitwise the same on every run, and rounded once; the gradient is dense. Backward saves only
    the tokens. Nothing is read back to the host. A token outside [0, V) raises an IndexError
    where the reference runs (CPU); on a GPU its row is nan, and backward leaves it out.

    Args:
        input: tokens, any shape, int64 or int32.
        weight: `[V, D]`, V below 2³¹; float32, float16, bfloat16 or float64, on the device of
            `input`. Copied only if its last axis is not contiguous.
        padding_idx: a row that gets no gradient, negative to count from the end; None for none.
        max_norm: None: no row is scaled to a norm.
        norm_type: not used, as there is no `max_norm`.
        scale_grad_by_freq: False: gradients are not divided by how often a token occurs.
        sparse: False: the gradient is dense.
        dtype: of the result, to which each element is rounded; that of `weight` if None. The
            gradient is summed from gradients in this dtype.
        into_grad: the backward pass adds the sums to the rows of `weight.grad` that they belong to,
            unrounded where it is float32, instead of handing a gradient of V rows to autograd:
            hooks of the weight do not run. Where there is no `weight.grad` it is made. Not where
            the reference runs, and not under torch.compile, whose gradient is autograd's.

    Returns:
        `[*input.shape, D]`, contiguous, in `dtype`, also under autocast.

    Raises:
        ValueError: `input` is of another dtype or device, `weight` is not `[V, D]` or not floating
            point, `padding_idx` is not a row, `dtype` is not floating point, `into_grad` without a
            weight that is a leaf, requires a gradient and has a contiguous `grad` or none, or one
            of the others is not as above.
    """
    if max_norm is not None or scale_grad_by_freq is not False or sparse is not False:
        _refuse(max_norm=max_norm, scale_grad_by_freq=scale_grad_by_freq, sparse=sparse)
    _validate(input, weight, padding_idx, dtype, into_grad)
    if not uses_triton(weight, "embedding"):
        return embedding_reference(input, weight, padding_idx, dtype)
    V, D = weight.shape
    excluded = -1 if padding_idx is None else padding_idx % V
    tokens_T, w_VD, parameter = input.reshape(-1).contiguous(), unit_stride(weight), None
    if into_grad and torch.is_grad_enabled() and not (is_compiling() or sees_through()):
        parameter = weight  # the result is made to require a gradient by the weight, as ever
    y_TD = apply(_Embedding, tokens_T, w_VD, excluded, dtype or weight.dtype, parameter)
    return y_TD.view(*input.shape, D)


def _refuse(**given: object) -> None:
    for name, value in given.items():
        if value is not None and value is not False:
            raise ValueError(
                f"embedding: {name} must be left out, got {value!r}; there is no kernel that "
                "honours it: call torch.nn.functional.embedding"
            )


def _validate(
    input: Tensor, weight: Tensor, padding_idx: int | None, dtype: torch.dtype | None,
    into_grad: bool,
) -> None:  # fmt: skip
    if weight.ndim != 2 or not weight.is_floating_point() or weight.shape[0] >= 1 << 31:
        raise ValueError(
            "embedding: weight must be floating point [V, D] with V below 2**31, "
            f"got {weight.dtype} {list(weight.shape)}"
        )
    if input.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"embedding: input must be int64 or int32, got {input.dtype}")
    if input.device != weight.device:
        raise ValueError(f"embedding: input is on {input.device}; move it to {weight.device}")
    V = weight.shape[0]
    if padding_idx is not None and not -V <= padding_idx < V:
        raise ValueError(f"embedding: padding_idx must be in [{-V}, {V}), got {padding_idx}")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"embedding: dtype must be a floating-point torch.dtype, got {dtype!r}")
    if not into_grad:
        return
    grad = weight.grad if weight.is_leaf else None
    if not (weight.is_leaf and weight.requires_grad and (grad is None or grad.is_contiguous())):
        raise ValueError(
            "embedding: into_grad adds to weight.grad; weight must be a leaf that requires a "
            "gradient, and its grad contiguous where there is one"
        )
