"""Layer normalisation over the last axis, alone or after the addition of a residual stream.

    s_TD = x_TD                                      layer_norm
    s_TD = x_TD + residual_TD, rounded to residual   add_layer_norm, which returns s_TD too
    z_TD = s_TD - mean_D(s_TD)
    r_T  = 1 / sqrt(mean_D(z_TD²) + eps)
    y_TD = z_TD · r_T · w_D + b_D

Backward, with g_TD = dy_TD · w_D, and ds_TD the gradient of s_TD from its other uses:

    dx_TD = ds_TD + r_T · (g_TD - z_TD · r_T² · mean_D(g_TD · z_TD) - mean_D(g_TD))
    dw_D  = sum_T(dy_TD · z_TD · r_T)
    db_D  = sum_T(dy_TD)

dx_TD, rounded to each one's dtype, is the gradient of x and of the residual. The variance is the
mean of squared deviations, never mean(s²) - mean(s)², which cancels where the mean is large.

T tokens (every leading axis, flattened), D features. The kernels are in `_norm_kernels.py`.

Ba, Kiros & Hinton, "Layer Normalization", 2016. https://arxiv.org/abs/1607.06450
"""

import torch
from torch import Tensor

from tritium.kernels._norm_arguments import Shape, as_sizes, rows_of, validate
from tritium.kernels._norm_launch import add_norm, norm
from tritium.kernels.runtime import uses_triton, widen


def layer_norm_reference(
    input: Tensor,
    normalized_shape: Shape,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Compute `layer_norm` in plain PyTorch, in float32 (float64 for float64 `input`)."""
    x = widen(input)
    w, b = (None if vector is None else vector.to(x.dtype) for vector in (weight, bias))
    y = torch.nn.functional.layer_norm(x, as_sizes(normalized_shape), w, b, eps)
    return y.to(input.dtype)


def add_layer_norm_reference(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Compute `add_layer_norm` in plain PyTorch."""
    s = (x + residual).to(residual.dtype)
    return layer_norm_reference(widen(s), s.shape[-1:], weight, bias, eps).to(x.dtype), s


def layer_norm(
    input: Tensor,
    normalized_shape: Shape | Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Shift each row to mean zero, scale it to unit variance, then by `weight`, and add `bias`.

    As `torch.nn.functional.layer_norm`. The gradients of `weight` and `bias` are summed in a fixed
    order: bitwise the same on every run.

    Args:
        input: `[..., *normalized_shape]`; float32, float16, bfloat16 or float64. Copied only if its
            last axis is not contiguous or the others do not flatten into one.
        normalized_shape: D or `(D,)`, or the sizes of several last axes, which make one row. The
            weight itself says both: `layer_norm(x, weight)` is
            `layer_norm(x, weight.shape, weight)`.
        weight: `normalized_shape`; any of the same dtypes, on the device of `input`. None scales
            by nothing.
        bias: as `weight`. None adds nothing.
        eps: added to the variance before the root, in units of `input`².

    Returns:
        The shape of `input`, contiguous, in its dtype, also under autocast. Computed in float32
        (float64 for float64) and rounded once.

    Raises:
        ValueError: `normalized_shape` is not the sizes of the last axes of `input`, `weight` or
            `bias` is of another shape or device, `input` is a scalar, or an input is not floating
            point.
    """
    x, w, b = rows_of("layer_norm", input, normalized_shape, weight, bias)
    if not uses_triton(x, "layer_norm"):
        return layer_norm_reference(x, x.shape[-1:], w, b, eps).view(input.shape)
    y = norm(x, w, b, eps, offset=0.0, centred=True)
    return y if x is input else y.view(input.shape)


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Add `x` to the residual stream and normalise the sum, in one pass over memory.

    Equal to `residual_out = residual + x` and
    `normed = layer_norm(residual_out, weight.shape, weight, bias, eps)`. Backward adds the gradient
    of `residual_out` in the same pass.

    Args:
        x: `[..., D]`: the output of a block; as for `layer_norm`.
        residual: the shape and device of `x`, in its own dtype: a bfloat16 branch may feed a
            float32 stream.
        weight: `[D]` or None; as for `layer_norm`.
        bias: `[D]` or None; as for `layer_norm`.
        eps: added to the variance before the root, in units of `residual`².

    Returns:
        `normed`, in the dtype of `x`, and `residual_out`, the sum rounded to the dtype of
        `residual`; both `[..., D]` and contiguous. The norm is that of the rounded sum.

    Raises:
        ValueError: `residual` differs from `x` in shape or device; else as `layer_norm`.
    """
    validate("add_layer_norm", x, residual, weight, bias)
    if not uses_triton(x, "add_layer_norm"):
        return add_layer_norm_reference(x, residual, weight, bias, eps)
    return add_norm(x, residual, weight, bias, eps, offset=0.0, centred=True)
