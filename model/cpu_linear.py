"""A linear layer that multiplies float32 in whichever of the CPU's ways is faster.

PyTorch gives products of bfloat16 to oneDNN, but those of float32 to MKL, which on an AMD CPU with
AVX-512 is half as fast: one core of an EPYC (Zen 5) multiplies `[768, 128]` by `[128, 512]` in
0.95 ms with MKL and in 0.43 ms with oneDNN. There, and nowhere else, this layer uses oneDNN.

One row, as a step of generation has it, is another matter: its product is as long as reading the
weight. With the row given twice, behind the weight, MKL takes another routine, which is faster
where the weight comes from memory (`[3072, 576]` times one row: 0.36 ms, not 0.62 ms; with oneDNN
0.51 ms) and slower where a cache holds it (0.36 ms, not 0.15 ms).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

ONEDNN_PRODUCTS = (
    (torch.ops.mkldnn._linear_pointwise.default,) if torch.backends.mkldnn.is_available() else ()
)
"""Operators of its products, in addition to those of `torch.nn.Linear`."""
ROWS = 64  # of fewer, a call of oneDNN costs more: 12 us, not 3 us, for one row times [128, 128]
LARGE = 1 << 19  # elements of a weight beside whose product that cost is little
FROM_MEMORY = 3 << 19  # elements of a weight of which a model has more than a cache holds
FEW = 4  # rows of the routine that reads it faster, which for more computes slower
WIDTHS = range(256, 1025)  # of the rows for which it does


class OutputLinear(nn.Linear):
    """`torch.nn.Linear`, without a bias unless it is asked for: an output layer."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool = False,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ):  # fmt: skip
        super().__init__(in_features, out_features, bias, device, dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Return `input` · weightᵀ, and the bias added if there is one, `[..., out_features]`."""
        multiply = _way(input, self.weight)
        if multiply is None:
            return super().forward(input)
        y = multiply(input.flatten(0, -2), self.weight).unflatten(0, input.shape[:-1])
        return y if self.bias is None else y + self.bias


class Linear(OutputLinear):
    """A layer of a block: the same, with what training makes of several of them at once.

    Attributes:
        splits: rows of the weight that belong to each projection, where one product makes several.
        narrow: a copy of the weight in the dtype of the products, to multiply by in its place, or
            None. Who sets it takes care of the weight's gradient.
    """

    narrow: Tensor | None = None
    splits: tuple[int, ...] | None = None

    def forward(self, input: Tensor) -> Tensor:
        """Return `input` · weightᵀ, and the bias added if there is one, `[..., out_features]`."""
        if self.narrow is None:
            return super().forward(input)
        bias = None if self.bias is None else self.bias.to(self.narrow.dtype)
        return F.linear(input, self.narrow, bias)


class _Product(torch.autograd.Function):
    """a_MK · b_NKᵀ of float32, by oneDNN."""

    @staticmethod
    def forward(ctx, a_MK: Tensor, b_NK: Tensor) -> Tensor:
        ctx.save_for_backward(a_MK, b_NK)
        return _product(a_MK, b_NK)

    @staticmethod
    def backward(ctx, d_MN: Tensor):
        a_MK, b_NK = ctx.saved_tensors
        wants_a, wants_b = ctx.needs_input_grad
        product = _Product.apply if torch.is_grad_enabled() else _product
        return (
            product(d_MN, b_NK.T) if wants_a else None,
            product(d_MN.T, a_MK.T) if wants_b else None,
        )


def _product(a_MK: Tensor, b_NK: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(a_MK, b_NK, None, "none", [], "")


def _behind(a_MK: Tensor, b_NK: Tensor) -> Tensor:
    """Return a · bᵀ of few rows as the columns behind b, at least two of them."""
    M = len(a_MK)
    columns = a_MK.expand(2, -1).contiguous() if M == 1 else a_MK
    return torch.mm(b_NK, columns.T).T[:M].contiguous()


def _way(x: Tensor, weight: Tensor) -> Callable[[Tensor, Tensor], Tensor] | None:
    """Return what multiplies rows of x by the weight, None for PyTorch's own way."""
    if (
        torch.compiler.is_compiling()  # first: its sizes may be symbols, not to be compared
        or not x.dtype == weight.dtype == torch.float32
        or x.device.type != "cpu"
        or x.dim() < 2
    ):
        return None
    rows, size = x.shape[:-1].numel(), weight.numel()
    if not rows or (rows < ROWS and size < LARGE) or not _may_choose():
        return None
    from_memory = size >= FROM_MEMORY and x.shape[-1] in WIDTHS and weight.is_contiguous()
    if rows <= FEW and from_memory and not torch.is_grad_enabled():
        return _behind
    return _Product.apply if rows > 1 or size < LARGE else None


def _may_choose() -> bool:
    return (
        not torch.is_autocast_enabled("cpu")
        and not sees_through()
        and torch.backends.mkldnn.enabled
        and _mkl_is_slow()
    )


def sees_through() -> bool:
    """Whether torch.func or forward-mode differentiation is at work, outside of a compiler.

    Neither can do much with a classic autograd function, saved-tensor hooks or fused attention.
    """
    return not torch.compiler.is_compiling() and (
        torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    )


@functools.cache
def _mkl_is_slow() -> bool:
    """Whether float32 goes to MKL on an AMD CPU with AVX-512."""
    avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    if not (avx512 and torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
