"""Weights that were saved before queries, keys and values, and gate and up, were one projection."""

from __future__ import annotations

import torch
from torch import Tensor

PACKED = {
    "attention.query_key_value": ("attention.query", "attention.key", "attention.value"),
    "feed_forward.gate_up": ("feed_forward.gate", "feed_forward.up"),
}
"""Projections that one product makes, by the names they had when each had its own."""


def pack_projections(_model, state: dict[str, Tensor], *_) -> None:
    """Join such weights in place: a hook through which `load_state_dict` takes both."""
    for packed, parts in PACKED.items():
        ending = f".{parts[0]}.weight"
        for block in [name.removesuffix(ending) for name in state if name.endswith(ending)]:
            names = [f"{block}.{part}.weight" for part in parts]
            if all(name in state for name in names):
                state[f"{block}.{packed}.weight"] = torch.cat([state.pop(n) for n in names])
