"""Operations as modules, for models composed of modules: norms, gates, the loss.

Constructors are those of the modules of `torch.nn` with these names, where it has them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tritium.kernels import (
    add_layer_norm,
    add_rms_norm,
    dropout_add,
    embedding,
    geglu,
    layer_norm,
    linear_cross_entropy,
    relu_squared,
    rms_norm,
    swiglu,
)
from tritium.kernels.runtime import uses_triton


def is_hooked(module: nn.Module) -> bool:
    """Whether calling a module does more than the `forward` of its class: hooks, or another."""
    return bool(
        module._forward_pre_hooks or module._forward_hooks
        or module._backward_pre_hooks or module._backward_hooks
        or "forward" in vars(module)
    )  # fmt: skip


class AddedNorm(nn.Module):
    """A norm of the last axis, alone or fused with the addition to a residual stream.

    With dropout, which in training leaves elements of what is added out, the two are not fused; nor
    where the module has hooks, or a subclass another `forward`.

    Attributes:
        dropout: probability with which `add` leaves an element of `x` out, in training mode.
    """

    dropout: float = 0.0
    _fuses = True

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "_fused" in vars(cls) or "forward" in vars(cls):
            cls._fuses = "_fused" in vars(cls)

    def add(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the normalised sum of `x` and `residual` (None for zeros), and the sum."""
        if residual is None:
            return self(x), x
        if self.dropout and self.training:
            residual = dropout_add(x, residual, self.dropout)
            return self(residual), residual
        if not self._fuses or is_hooked(self):
            residual = (residual + x).to(residual.dtype)
            return self(residual), residual
        return self._fused(x, residual)

    def _fused(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


class RMSNorm(AddedNorm, nn.RMSNorm):
    """`torch.nn.RMSNorm` by `rms_norm`; `add` is `add_rms_norm`."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axes of `x`."""
        return rms_norm(x, self.normalized_shape, self.weight, self.eps)

    def _fused(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        eps = self.eps
        if eps is None:  # that of `forward` for the sum
            eps = torch.finfo(torch.promote_types(residual.dtype, torch.float32)).eps
        return add_rms_norm(x, residual, self.weight, eps)


class Embedding(nn.Embedding):
    """`torch.nn.Embedding` by `embedding` where a kernel runs, without `max_norm` and its like.

    Attributes:
        into_grad: add gradients to those of the weight, as `embedding` does. Who sets it sees to it
            that nothing waits for the weight's gradient.
    """

    into_grad: bool = False

    def forward(self, input: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return the rows of `input`'s ids, `[*input.shape, embedding_dim]`, in `dtype`."""
        if uses_triton(self.weight, "embedding"):
            return embedding(
                input, self.weight, self.padding_idx, dtype=dtype,
                into_grad=self.into_grad and torch.is_grad_enabled() and self.weight.requires_grad,
            )  # fmt: skip
        y = super().forward(input)
        return y if dtype is None else y.to(dtype)


class LayerNorm(AddedNorm, nn.LayerNorm):
    """`torch.nn.LayerNorm` by `layer_norm`; `add` is `add_layer_norm`."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise the last axes of `input`."""
        return layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)

    def _fused(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return add_layer_norm(x, residual, self.weight, self.bias, self.eps)


class SwiGLU(nn.Module):
    """`swiglu` of a packed projection, as `torch.nn.GLU`, with the gate in the first half."""

    def forward(self, x: Tensor) -> Tensor:
        """Return silu(gate) · up, `[..., F]`, of `[..., 2F]`."""
        return swiglu(x)


class GEGLU(nn.Module):
    """`geglu` of a packed projection; `approximate` as in `torch.nn.GELU`."""

    def __init__(self, approximate: str = "none"):
        super().__init__()
        self.approximate = approximate

    def forward(self, x: Tensor) -> Tensor:
        """Return gelu(gate) · up, `[..., F]`, of `[..., 2F]`."""
        return geglu(x, approximate=self.approximate)


class ReLUSquared(nn.Module):
    """`relu_squared`, element by element."""

    def forward(self, x: Tensor) -> Tensor:
        """Return max(x, 0)²."""
        return relu_squared(x)


class LinearCrossEntropyLoss(nn.Module):
    """An output layer, `linear`, and the cross-entropy of its logits, which are never stored whole.

    As `torch.nn.LinearCrossEntropyLoss`, of torch 2.13.

    Args:
        in_features: D, width of the hidden states.
        num_classes: V.
        out_features: (), as each token has one class; PyTorch has others too.
        bias: whether the output layer has a bias.
        device: of the output layer.
        dtype: of the output layer.
        weight: `[V]`, the weight of each class, or None for ones.
        options: others of `linear_cross_entropy`: `label_smoothing`, `z_loss`, `softcap`, ...

    Raises:
        ValueError: `out_features` "must be ()", or an option is none that `linear_cross_entropy`
            takes.
        TypeError: it has no option of that name.
    """

    weight: Tensor | None

    def __init__(
        self, in_features: int, num_classes: int, *, out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
        weight: Tensor | None = None, **options,
    ):  # fmt: skip
        super().__init__()
        if out_features != ():
            raise ValueError(
                f"LinearCrossEntropyLoss: out_features must be (), got {out_features!r}; "
                "take torch.nn.LinearCrossEntropyLoss for several classes of each token"
            )
        _check_options(**options)
        self.linear = nn.Linear(in_features, num_classes, bias, device, dtype)
        self.register_buffer("weight", weight)
        self.options = options

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the loss of `input`, `[..., D]`, against `target`, in nats."""
        return linear_cross_entropy(
            input, self.linear.weight, target, linear_bias=self.linear.bias, weight=self.weight,
            **self.options,
        )  # fmt: skip


def _check_options(
    group: object = None, linear_weight_grad: Tensor | None = None, **options: Any
) -> None:
    """Raise what `linear_cross_entropy` would raise for the options at the first call."""
    x = torch.empty(1, 1, device="meta")
    linear_cross_entropy(x, x, torch.empty(1, dtype=torch.long, device="meta"), **options)
