"""Layer normalisation over the last axis, alone or behind the addition of a residual stream.

    s_TD = x_TD                                      layer_norm
    s_TD = x_TD + residual_TD, rounded to residual   add_layer_norm, which returns s_TD too
    z_TD = s_TD - mean_D(s_TD)
    r_T  = 1 / sqrt(mean_D(z_TD²) + eps)
    y_TD = z_TD · r_T · w_D + b_D

Backward, with g_TD = dy_TD · w_D, and ds_TD the gradient that reached s_TD by other ways:

    dx_TD = ds_TD + r_T · (g_TD - z_TD · r_T² · mean_D(g_TD · z_TD) - mean_D(g_TD))
    dw_D  = sum_T(dy_TD · z_TD · r_T)
    db_D  = sum_T(dy_TD)

dx_TD, rounded to each one's dtype, is the gradient of x and of the residual. The variance is the
mean of squared deviations, never mean(s²) - mean(s)², which cancels where the mean is large.

T tokens (every leading axis, flattened), D features. The kernels are those of `_norm.py`.

Ba, Kiros & Hinton, "Layer Normalization", 2016. https://arxiv.org/abs/1607.06450
"""

import torch
from torch import Tensor

from ._norm import add_norm, norm, validate
from ._runtime import uses_triton


def layer_norm_reference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """The definition of `layer_norm` in plain PyTorch, in float32 or the wider dtype of `x`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    w, b = (None if vector is None else vector.to(wide) for vector in (weight, bias))
    return torch.nn.functional.layer_norm(x.to(wide), x.shape[-1:], w, b, eps).to(x.dtype)


def add_layer_norm_reference(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """The definition of `add_layer_norm` in plain PyTorch."""
    s = (x + residual).to(residual.dtype)
    wide = torch.promote_types(s.dtype, torch.float32)
    return layer_norm_reference(s.to(wide), weight, bias, eps).to(x.dtype), s


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """Shift each row of `x` to mean zero, scale it to unit variance, then by `weight`, add `bias`.

    The gradients of `weight` and `bias` are summed in a fixed order: bitwise the same on every run.

    Args:
        x: `[..., D]`; float32, float16, bfloat16 or float64. Copied only if its last axis is not
            contiguous or the others do not flatten into one.
        weight: `[D]`; any of the same dtypes, on the device of `x`. None scales by nothing.
        bias: `[D]`, as `weight`. None adds nothing.
        eps: added to the variance before the root, in units of `x`².

    Returns:
        `[..., D]`, contiguous, in the dtype of `x`, also under autocast. Computed in float32
        (float64 for float64) and rounded once.

    Raises:
        ValueError: `weight` or `bias` is not `[D]` or on another device, `x` is a scalar, or an
            input is not floating point.
    """
    validate("layer_norm", x, None, weight, bias)
    if not uses_triton(x, "layer_norm"):
        return layer_norm_reference(x, weight, bias, eps)
    return norm(x, weight, bias, eps, offset=0.0, centred=True)


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Add `x` to the residual stream and normalise the sum, in one pass over memory.

    Equal to `residual_out = residual + x; normed = layer_norm(residual_out, weight, bias, eps)`.
    Backward adds the gradient of `residual_out` in the same pass.

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
