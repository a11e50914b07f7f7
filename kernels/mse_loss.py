"""Mean squared error.

    loss_i = (input_i - target_i)²;  "mean": sum of loss_i / N;  "sum": sum of loss_i

Backward, with dloss_i the incoming gradient, divided by N for "mean":

    dinput_i = 2 · dloss_i · (input_i - target_i) = -dtarget_i

N elements, P programs. Each program sums its tiles in registers, one more adds the P partials: all
in a fixed order, so the loss is bitwise the same on every run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritium.kernels._cross_entropy_options import check_reduction
from tritium.kernels.launcher import Launcher, Plan, dtype_of, planned
from tritium.kernels.runtime import (
    accumulator,
    apply,
    cdiv,
    once_differentiable,
    operator,
    power_of_2,
    uses_triton,
)

TILE = 2048  # elements that a program holds at a time: 16 a thread
P_MAX = 1024  # not the number of multiprocessors: the loss is the same sum on every GPU


Dtypes = tuple[torch.dtype | None, ...]


def mse_loss_reference(input: Tensor, target: Tensor, *, reduction: str = "mean") -> Tensor:
    """Compute `mse_loss` in plain PyTorch, in float32 or the wider of the two dtypes."""
    wide = _wide(input, target)
    loss = (input.to(wide) - target.to(wide)).square()
    return loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()


@triton.jit
def _squares(input_ptr, target_ptr, offs, N, MASKED: tl.constexpr, ACC: tl.constexpr):
    if MASKED:
        input = tl.load(input_ptr + offs, mask=offs < N, other=0.0).to(ACC)
        target = tl.load(target_ptr + offs, mask=offs < N, other=0.0).to(ACC)
    else:
        input = tl.load(input_ptr + offs).to(ACC)
        target = tl.load(target_ptr + offs).to(ACC)
    return (input - target) * (input - target)


@triton.jit
def _mse_loss_elements_kernel(
    input_ptr, target_ptr, loss_ptr, N, TILE: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    offs = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    tl.store(loss_ptr + offs, _squares(input_ptr, target_ptr, offs, N, True, ACC), mask=offs < N)


@triton.jit
def _mse_loss_partials_kernel(
    input_ptr, target_ptr, partials_ptr, N, TILE: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    p = tl.program_id(0).to(tl.int64)
    full = tl.cast(N, tl.int64) // TILE
    offs = tl.arange(0, TILE)
    # The tail, which is program 0's, comes first: a mask inside the loop would narrow its accesses.
    own_N = tl.where(p == 0, N, 0)
    loss = _squares(input_ptr, target_ptr, full * TILE + offs, own_N, True, ACC)
    for tile in range(p, full, tl.num_programs(0)):
        loss += _squares(input_ptr, target_ptr, tile * TILE + offs, N, False, ACC)
    tl.store(partials_ptr + p, tl.sum(loss))


@triton.jit
def _mse_loss_sum_kernel(partials_ptr, loss_ptr, P, divisor, BLOCK_P: tl.constexpr):
    offs_P = tl.arange(0, BLOCK_P)
    loss = tl.sum(tl.load(partials_ptr + offs_P, mask=offs_P < P, other=0.0))
    tl.store(loss_ptr, loss / tl.cast(divisor, loss.dtype))


@triton.jit
def _mse_loss_backward_kernel(
    dloss_ptr, input_ptr, target_ptr, dinput_ptr, dtarget_ptr, N, divisor,
    EACH: tl.constexpr, TILE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    offs = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    input = tl.load(input_ptr + offs, mask=offs < N, other=0.0).to(ACC)
    target = tl.load(target_ptr + offs, mask=offs < N, other=0.0).to(ACC)
    if EACH:
        dloss = tl.load(dloss_ptr + offs, mask=offs < N, other=0.0)
    else:
        dloss = tl.load(dloss_ptr) / tl.cast(divisor, ACC)
    dinput = 2 * dloss * (input - target)
    if dinput_ptr is not None:
        tl.store(dinput_ptr + offs, dinput, mask=offs < N)
    if dtarget_ptr is not None:
        tl.store(dtarget_ptr + offs, -dinput, mask=offs < N)


@planned
def _plan_elements(N: int, dtypes: Dtypes, wide: torch.dtype) -> Plan:
    return Plan((cdiv(N, TILE),), (N,), (TILE, accumulator(wide)))


def _launch_elements(input_N: Tensor, target_N: Tensor) -> Tensor:
    loss_N = _fake_elements(input_N, target_N)
    dtypes = input_N.dtype, target_N.dtype
    _each.launch(_plan_elements(len(input_N), dtypes, loss_N.dtype), input_N, target_N, loss_N)
    return loss_N


@planned
def _plan_forward(
    N: int, dtypes: Dtypes, wide: torch.dtype, divisor: int, p_max: int
) -> tuple[int, Plan, Plan]:
    P = min(cdiv(N, TILE), p_max)
    partials = Plan((P,), (N,), (TILE, accumulator(wide)))
    return P, partials, Plan((1,), (P, divisor), (power_of_2(p_max),))


def _launch_forward(input_N: Tensor, target_N: Tensor, divisor: int) -> Tensor:
    loss = _fake_forward(input_N, target_N, divisor)
    dtypes = input_N.dtype, target_N.dtype
    P, partials, total = _plan_forward(len(input_N), dtypes, loss.dtype, divisor, P_MAX)
    partials_P = loss.new_empty(P)
    _add.launch(partials, input_N, target_N, partials_P)
    _sum.launch(total, partials_P, loss)
    return loss


@planned
def _plan_backward(N: int, dtypes: Dtypes, divisor: int, each: bool) -> Plan:
    return Plan((cdiv(N, TILE),), (N, divisor), (each, TILE, accumulator(dtypes[0])))


def _launch_backward(
    dloss: Tensor, input_N: Tensor, target_N: Tensor, divisor: int, needs_dinput: bool,
    needs_dtarget: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    dinput_N, dtarget_N = grads = _fake_backward(
        dloss, input_N, target_N, divisor, needs_dinput, needs_dtarget
    )
    dtypes = (dloss.dtype, input_N.dtype, target_N.dtype, dtype_of(dinput_N), dtype_of(dtarget_N))
    plan = _plan_backward(len(input_N), dtypes, divisor, dloss.ndim == 1)
    _differ.launch(plan, dloss, input_N, target_N, dinput_N, dtarget_N)
    return grads


_each = Launcher(_mse_loss_elements_kernel)
_add = Launcher(_mse_loss_partials_kernel)
_sum = Launcher(_mse_loss_sum_kernel)
_differ = Launcher(_mse_loss_backward_kernel)


def _fake_elements(input: Tensor, target: Tensor) -> Tensor:
    return input.new_empty(input.shape, dtype=_wide(input, target))


def _fake_forward(input: Tensor, target: Tensor, divisor: int) -> Tensor:
    return input.new_empty((), dtype=_wide(input, target))


def _fake_backward(
    dloss: Tensor, input: Tensor, target: Tensor, divisor: int, needs_dinput: bool,
    needs_dtarget: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    return (
        torch.empty_like(input) if needs_dinput else None,
        torch.empty_like(target) if needs_dtarget else None,
    )


def _wide(input: Tensor, target: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(input.dtype, target.dtype), torch.float32)


_elements = operator(
    "mse_loss_elements(Tensor input, Tensor target) -> Tensor", _launch_elements, _fake_elements
)
_forward = operator(
    "mse_loss_forward(Tensor input, Tensor target, SymInt divisor) -> Tensor",
    _launch_forward,
    _fake_forward,
)
_backward = operator(
    "mse_loss_backward(Tensor dloss, Tensor input, Tensor target, SymInt divisor,"
    " bool needs_dinput, bool needs_dtarget) -> (Tensor, Tensor)",
    _launch_backward,
    _fake_backward,
    incoming=1,
)


class _MSELoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input_N: Tensor, target_N: Tensor, reduction: str) -> Tensor:
        ctx.save_for_backward(input_N, target_N)
        ctx.divisor = input_N.shape[0] if reduction == "mean" else 1
        if reduction == "none":
            return _elements(input_N, target_N)
        return _forward(input_N, target_N, ctx.divisor)

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss: Tensor):
        needs = ctx.needs_input_grad[:2]
        grads = _backward(dloss.contiguous(), *ctx.saved_tensors, ctx.divisor, *needs)
        return *(dx if needed else None for dx, needed in zip(grads, needs, strict=True)), None


def mse_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    """Compute the squared difference between `input` and `target`, and its mean.

    As `torch.nn.functional.mse_loss`, but nothing is broadcast, and the loss is float32. It is
    summed in a fixed order, bitwise the same on every run; backward keeps the inputs alone, and
    nothing is read back to the host.

    Args:
        input: any shape; float32, float16, bfloat16 or float64. Copied only if it is not
            contiguous.
        target: the shape and device of `input`, in any of the same dtypes; likewise. It gets a
            gradient, too, where it requires one.
        size_average, reduce: deprecated in PyTorch, refused here: `reduction` says it.
        reduction: "mean" (nan over no element), "sum" or "none".
        weight: the shape and device of `input`: factors of the elements, whose mean is then
            divided by their sum. With them the loss of each element is stored.

    Returns:
        The loss: a scalar, or with reduction "none" the shape of `input`; float32 (float64 if
        either is), also under autocast.

    Raises:
        ValueError: `input` and `target` differ in shape or device, are not floating point, or
            `reduction` is another.
    """
    check_reduction("mse_loss", reduction, size_average, reduce)
    _validate(input, target, weight)
    if weight is not None:
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        loss = mse_loss(input, target, reduction="none") * wide
        if reduction == "none":
            return loss
        return loss.sum() if reduction == "sum" else loss.sum() / wide.sum()
    if not uses_triton(input, "mse_loss"):
        return mse_loss_reference(input, target, reduction=reduction)
    inputs = input.contiguous().view(-1), target.contiguous().view(-1)
    loss = apply(_MSELoss, *inputs, reduction)
    return loss.view(input.shape) if reduction == "none" else loss


def _validate(input: Tensor, target: Tensor, weight: Tensor | None) -> None:
    if input.shape != target.shape:
        raise ValueError(
            "mse_loss: input and target must have one shape, since nothing is broadcast, "
            f"got {list(input.shape)} and {list(target.shape)}; expand one of them"
        )
    if input.device != target.device:
        raise ValueError(
            "mse_loss: input and target must be on one device, "
            f"got {input.device} and {target.device}"
        )
    if not (input.is_floating_point() and target.is_floating_point()):
        raise ValueError(
            "mse_loss: input and target must be floating point, "
            f"got {input.dtype} and {target.dtype}; convert them"
        )
    if weight is not None and (weight.shape != input.shape or weight.device != input.device):
        raise ValueError(
            f"mse_loss: weight must be {list(input.shape)} on {input.device}, "
            f"got {list(weight.shape)} on {weight.device}; expand it"
        )
