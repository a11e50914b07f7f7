"""Squared ReLU: the activation of a feed-forward block without a gate.

    h = max(x, 0)²,  dx = dh · 2 · max(x, 0)

Backward saves only x. The kernels are those of `_activation`, for every activation.

So et al., "Primer: Searching for Efficient Transformers for Language Modeling", 2021.
https://arxiv.org/abs/2109.08668
"""

import torch
from torch import Tensor
from torch.nn.functional import relu

from tritium.kernels._activation import activate
from tritium.kernels.runtime import uses_triton


def relu_squared_reference(x: Tensor) -> Tensor:
    """Compute `relu_squared` in plain PyTorch, in float32 (float64 for float64 `x`)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return relu(x.to(wide)).square().to(x.dtype)


def relu_squared(x: Tensor) -> Tensor:
    """Square the positive elements of `x`, and set the others to zero.

    Args:
        x: any shape; float32, float16, bfloat16 or float64. Rows cut out of a wider tensor are read
            where they are: `x` is copied only if its last axis is not contiguous or the others do
            not flatten into one.

    Returns:
        The shape of `x`, contiguous, in its dtype, also under autocast. Computed in float32
        (float64 for float64) and rounded once.

    Raises:
        ValueError: `x` is not floating point.
    """
    if not x.is_floating_point():
        raise ValueError(f"relu_squared: x must be floating point, got {x.dtype}; convert it")
    if not uses_triton(x, "relu_squared"):
        return relu_squared_reference(x)
    return activate("relu_squared", x)
