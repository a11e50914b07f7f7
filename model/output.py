"""Logits and loss of an output layer, whatever layer it is.

The loss of a plain linear layer is computed from its weight, and the logits are never stored whole.
Of any other, such as one with an adapter, a hook, a scale or several layers, the logits are what it
returns, and the loss is of these.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from tritium.kernels import cross_entropy, linear_cross_entropy
from tritium.model.cpu_linear import Linear, OutputLinear
from tritium.model.modules import is_hooked

PLAIN = nn.Linear, OutputLinear, Linear


def logits(head: nn.Module, h_BLD: Tensor, softcap: float | None) -> Tensor:
    """Return the logits `[..., V]` of hidden states `[..., D]`, bounded by `softcap` if given."""
    x_BLV = head(h_BLD)
    return x_BLV if softcap is None else softcap * torch.tanh(x_BLV / softcap)


def loss(
    head: nn.Module, h_BLD: Tensor, targets_BL: Tensor, softcap: float | None, **options: Any
) -> Tensor:
    """Return the mean cross-entropy of the logits, with options of `cross_entropy`."""
    if is_plain(head):
        return linear_cross_entropy(
            h_BLD, head.weight, targets_BL, linear_bias=head.bias, softcap=softcap, **options
        )
    x_BLV = logits(head, h_BLD, softcap)
    return cross_entropy(x_BLV.flatten(0, -2), targets_BL.flatten(), **options)


def is_plain(head: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether the output of a layer is the product with its weight, its bias added, and no more.

    The hooks of `fully_shard` gather a distributed weight, which the loss does itself.
    """
    return type(head) in PLAIN and (not is_hooked(head) or hasattr(head.weight, "placements"))
