"""Dropout followed by a residual addition, with a mask that is computed and never stored.

    keep_i = r_i >= n,  n = p · 2³² rounded                r_i: 32 random bits of element i
    y_i    = residual_i + keep_i · x_i · 2³² / (2³² - n)

Backward computes keep_i again: dx_i = keep_i · dy_i · 2³² / (2³² - n), dresidual_i = dy_i.

r_i depends on the seed and on i alone, not on how elements are shared among programs. Philox, keyed
with the 64 bits of the seed, turns a 64-bit counter into four words, and the counters are laid out
so that no thread has to pass words on to another: in each slab of 4 · S consecutive elements,
S = 1024, element k · S + s takes word k of counter slab · S + s.

Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011; with the 7 rounds that it finds
enough to pass BigCrush. https://doi.org/10.1145/2063384.2063405
Srivastava et al., "Dropout", 2014. https://jmlr.org/papers/v15/srivastava14a.html
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritium.kernels.launcher import Launcher, Plan, dtype_of, planned
from tritium.kernels.runtime import (
    accumulator,
    apply,
    cdiv,
    once_differentiable,
    operator,
    uses_triton,
)

S = tl.constexpr(1024)  # part of the formula: another S is another mask
ROUNDS = tl.constexpr(7)
WORDS = 1 << 32  # number of different words


def dropout_add_reference(
    x: Tensor,
    residual: Tensor,
    p: float = 0.1,
    *,
    training: bool = True,
    seed: int | Tensor | None = None,
) -> Tensor:
    """Compute `dropout_add` in plain PyTorch; the same seed keeps the same elements."""
    wide = torch.promote_types(residual.dtype, torch.float32)
    n = _threshold(p) if training else 0
    if n == 0:
        kept = x.to(wide)
    else:
        keep = _random_words(x.numel(), _seed(seed, x)).view(x.shape) >= n
        kept = torch.where(keep, x.to(wide) * (WORDS / max(WORDS - n, 1)), 0)
    return (residual.to(wide) + kept).to(residual.dtype)


def _random_words(count: int, seed: Tensor) -> Tensor:
    """Return r_i of the first `count` elements, as int64."""
    slabs = triton.cdiv(count, 4 * S.value) + 1  # never 1, which torch.export would make a constant
    words = _philox(torch.arange(slabs * S.value, device=seed.device), seed)
    return words.view(4, slabs, S.value).transpose(0, 1).flatten()[:count]


def _philox(counter: Tensor, seed: Tensor) -> Tensor:
    """Compute Philox-4x32: the four words of each counter, `[4, ...]`."""
    low = WORDS - 1
    c0, c1 = counter & low, counter >> 32
    c2, c3 = torch.zeros_like(counter), torch.zeros_like(counter)
    k0, k1 = seed & low, seed >> 32 & low
    for _ in range(ROUNDS.value):
        high_a, low_a = _multiply(c0, 0xD2511F53)
        high_b, low_b = _multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = k0 + 0x9E3779B9 & low, k1 + 0xBB67AE85 & low
    return torch.stack([c0, c1, c2, c3])


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """Return the high and low word of the product of two words, which an int64 does not hold."""
    low = (a & 0xFFFF) * b
    high = (a >> 16) * b + (low >> 16)
    return high >> 16, (high & 0xFFFF) << 16 | low & 0xFFFF


@triton.jit
def _dropout_add_kernel(
    x_ptr, residual_ptr, seed_ptr, y_ptr, N, threshold, LANES: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    # One program per slab. Without a residual it computes dx from dy.
    slab = tl.program_id(0).to(tl.int64)
    # A thread computes the words of LANES neighbours, which are the elements it loads at once.
    offs_S = tl.arange(0, LANES)[:, None] + tl.arange(0, S // LANES)[None, :] * LANES
    words = tl.randint4x(tl.load(seed_ptr), slab * S + offs_S, ROUNDS)
    n = tl.cast(threshold, tl.uint32)
    scale = 4294967296.0 / (4294967296 - tl.cast(threshold, tl.int64)).to(ACC)
    for k in tl.static_range(4):
        offs = (slab * 4 + k) * S + offs_S
        x = tl.load(x_ptr + offs, mask=offs < N, other=0.0).to(ACC)
        y = tl.where(words[k] >= n, x * scale, 0.0)
        if residual_ptr is not None:
            y += tl.load(residual_ptr + offs, mask=offs < N, other=0.0).to(ACC)
        tl.store(y_ptr + offs, y, mask=offs < N)


@planned
def _plan(
    N: int, threshold: int, x_dtype: torch.dtype, residual_dtype: torch.dtype | None,
    y_dtype: torch.dtype,
) -> Plan:  # fmt: skip
    lanes = 16 // min(x_dtype.itemsize, y_dtype.itemsize)
    acc = accumulator(torch.promote_types(x_dtype, y_dtype))
    return Plan((cdiv(N, 4 * S.value),), (N, threshold), (lanes, acc))


def _launch(
    x: Tensor, residual: Tensor | None, seed: Tensor, threshold: int, dtype: torch.dtype
) -> Tensor:
    y = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    plan = _plan(x.numel(), threshold, x.dtype, dtype_of(residual), dtype)
    _drop.launch(plan, x, residual, seed, y)
    return y


_drop = Launcher(_dropout_add_kernel)


def _launch_forward(x: Tensor, residual: Tensor, seed: Tensor, threshold: int) -> Tensor:
    return _launch(x, residual, seed, threshold, residual.dtype)


def _launch_backward(dy: Tensor, seed: Tensor, threshold: int, dtype: torch.dtype) -> Tensor:
    return _launch(dy, None, seed, threshold, dtype)


_forward = operator(
    "dropout_add_forward(Tensor x, Tensor residual, Tensor seed, int threshold) -> Tensor",
    _launch_forward,
    lambda x, residual, seed, threshold: residual.new_empty(x.shape),
)
_backward = operator(
    "dropout_add_backward(Tensor dy, Tensor seed, int threshold, ScalarType dtype) -> Tensor",
    _launch_backward,
    lambda dy, seed, threshold, dtype: dy.new_empty(dy.shape, dtype=dtype),
    incoming=1,
)


class _DropoutAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, residual: Tensor, seed: Tensor, threshold: int) -> Tensor:
        ctx.save_for_backward(seed)
        ctx.threshold, ctx.dtype = threshold, x.dtype
        return _forward(x, residual, seed, threshold)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        dx = None
        if ctx.needs_input_grad[0]:
            dx = _backward(dy.contiguous(), *ctx.saved_tensors, ctx.threshold, ctx.dtype)
        return dx, dy, None, None


def dropout_add(
    x: Tensor,
    residual: Tensor,
    p: float = 0.1,
    *,
    training: bool = True,
    seed: int | Tensor | None = None,
) -> Tensor:
    """Zero elements of `x` with probability `p`, scale the others by 1/(1-p), add `residual`.

    Backward saves only the seed and recomputes the mask. The mask is a function of the seed
    and of each element's place in `x`, whatever the strides: the same on every device.

    Args:
        x: float32, float16, bfloat16 or float64, any shape. Copied only if it is not contiguous.
        residual: the shape and device of `x`, in its dtype or a more precise one, such as float32.
            Copied only if it is not contiguous.
        p: probability in [0, 1], rounded to a multiple of 2⁻³². A dropped element counts as 0 even
            if it is NaN.
        training: if False, nothing is dropped: `residual + x`.
        seed: 64 bits: an int, or an int64 tensor of no axes on the device of `x`, which must stay
            unchanged until backward. None draws it from PyTorch's generator of that device, which
            `torch.manual_seed` repeats and a CUDA graph advances; nothing is read back to the host.

    Returns:
        The shape of `x` in the dtype of `residual`, also under autocast. Computed in float32
        (float64 for float64) and rounded once.

    Raises:
        ValueError: `residual` differs from `x` in shape or device, or has a less precise dtype; `x`
            is not floating point; `p` is not in [0, 1]; `seed` is not as above.
    """
    _validate(x, residual, p, seed)
    n = _threshold(p) if training else 0
    if n == 0:
        return residual + x
    if n == WORDS:  # where, because the gradient of x must be 0, and NaN · 0 is not
        return residual + torch.where(x.new_zeros((), dtype=torch.bool), x, 0)
    if not uses_triton(x, "dropout_add"):
        return dropout_add_reference(x, residual, p, seed=seed)
    return apply(_DropoutAdd, x.contiguous(), residual.contiguous(), _seed(seed, x), n)


def _threshold(p: float) -> int:
    return round(p * WORDS)


def _seed(seed: int | Tensor | None, x: Tensor) -> Tensor:
    if seed is None:
        return torch.randint((1 << 63) - 1, (), device=x.device)
    if isinstance(seed, int):
        return torch.full((), seed, dtype=torch.int64, device=x.device)
    return seed


def _validate(x: Tensor, residual: Tensor, p: float, seed: int | Tensor | None) -> None:
    for what in ("shape", "device"):
        a, b = getattr(x, what), getattr(residual, what)
        if a != b:
            raise ValueError(f"dropout_add: x and residual must have one {what}, got {a} and {b}")
    if not x.is_floating_point():
        raise ValueError(f"dropout_add: x must be floating point, got {x.dtype}; convert it")
    if torch.promote_types(x.dtype, residual.dtype) != residual.dtype:
        raise ValueError(
            f"dropout_add: residual must be {x.dtype} as x, or more precise, got {residual.dtype}"
        )
    if not 0 <= p <= 1:
        raise ValueError(f"dropout_add: p must be in [0, 1], got {p}")
    if isinstance(seed, Tensor):
        if (seed.dtype, seed.shape, seed.device) != (torch.int64, (), x.device):
            raise ValueError(
                f"dropout_add: seed must be int64 of no axes on {x.device}, "
                f"got {seed.dtype} {list(seed.shape)} on {seed.device}"
            )
    elif seed is not None and not -(1 << 63) <= seed < 1 << 63:
        raise ValueError(f"dropout_add: seed must fit 64 bits with a sign, got {seed}")
