"""Arguments of `rms_norm` and `layer_norm`: the axes to normalise, and checks."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Shape = int | Sequence[int]
"""The last axes of an input, over which a norm is taken: sizes, or one of them."""


def as_sizes(normalized_shape: Shape) -> tuple[int, ...]:
    """Return `normalized_shape` as a tuple, empty where it is none."""
    if isinstance(normalized_shape, tuple):
        return normalized_shape
    if isinstance(normalized_shape, int | torch.SymInt):
        return (normalized_shape,)
    listed = isinstance(normalized_shape, Sequence) and not isinstance(normalized_shape, str)
    return tuple(normalized_shape) if listed else ()


def shape_of(
    op: str, x: Tensor, normalized_shape: Shape | Tensor, weight: Tensor | None
) -> tuple[tuple[int, ...], Tensor | None]:
    """Return the sizes of the axes to normalise, and the weight; a ValueError if they do not fit.

    A tensor as `normalized_shape` is the weight, and its shape is meant.
    """
    if type(normalized_shape) is not tuple and isinstance(normalized_shape, Tensor):
        if weight is not None:
            raise ValueError(
                f"{op}: normalized_shape must be sizes where a third argument follows, "
                f"got a tensor; call {op}(input, weight.shape, weight)"
            )
        normalized_shape, weight = normalized_shape.shape, normalized_shape
    sizes = as_sizes(normalized_shape)
    if not sizes or x.shape[-len(sizes) :] != sizes:
        raise ValueError(
            f"{op}: normalized_shape must be the sizes of the last axes of input, which is "
            f"{list(x.shape)}, got {normalized_shape!r}"
        )
    return sizes, weight


def rows_of(
    op: str, x: Tensor, normalized_shape: Shape | Tensor, weight: Tensor | None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Return `x`, weight and bias with the axes to normalise made one, after checking them.

    Raises:
        ValueError: in the name of `op`, where they do not fit together.
    """
    shape = normalized_shape
    if (
        type(shape) is torch.Size and len(shape) == 1 and x.ndim and x.shape[-1] == shape[0]
        and x.is_floating_point() and (weight is None or _fits(weight, shape, x.device))
        and (bias is None or _fits(bias, shape, x.device))
    ):  # fmt: skip
        return x, weight, bias
    sizes, weight = shape_of(op, x, normalized_shape, weight)
    validate(op, x, None, weight, bias, sizes)
    if len(sizes) == 1:
        return x, weight, bias
    rows = x.reshape(*x.shape[: x.ndim - len(sizes)], math.prod(sizes))
    weight, bias = (None if v is None else v.reshape(rows.shape[-1]) for v in (weight, bias))
    return rows, weight, bias


def validate(
    op: str,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    sizes: tuple[int, ...] | None = None,
) -> None:
    """Raise a ValueError in the name of `op` unless the inputs fit together.

    `sizes` are those of the axes to normalise: without them, of the last one.
    """
    sizes = x.shape[-1:] if sizes is None else sizes
    if (
        x.ndim and x.is_floating_point()
        and (weight is None or _fits(weight, sizes, x.device))
        and (bias is None or _fits(bias, sizes, x.device))
        and (residual is None or _fits(residual, x.shape, x.device))
    ):  # fmt: skip
        return
    own = "input" if residual is None else "x"
    if x.ndim == 0:
        raise ValueError(f"{op}: {own} must have at least one axis, got a scalar")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(
            f"{op}: residual must have shape {list(x.shape)}, got {list(residual.shape)}"
        )
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None and vector.shape != sizes:
            raise ValueError(
                f"{op}: {name} must have shape {list(sizes)}, got {list(vector.shape)}"
            )
    for name, given in ((own, x), ("residual", residual), ("weight", weight), ("bias", bias)):
        if given is None:
            continue
        if given.device != x.device:
            raise ValueError(f"{op}: {name} must be on {x.device}, got {given.device}; move it")
        if not given.is_floating_point():
            raise ValueError(f"{op}: {name} must be floating point, got {given.dtype}; convert it")


def _fits(given: Tensor, shape: tuple[int, ...], device: torch.device) -> bool:
    return given.shape == shape and given.device == device and given.is_floating_point()
