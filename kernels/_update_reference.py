"""The definition of `_update.py` in plain PyTorch: one parameter, a slice at a time.

Elements are taken in the order of memory, as the kernel takes them; what a slice reads and writes
stays in a CPU's cache from the first of its operations to the last.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ._precision import (
    ABSENT,
    BFLOAT16,
    FLOAT32,
    MASTER,
    SPLIT,
    Q,
    decode_reference,
    element_bits_reference,
    encode_reference,
    hash_bits_reference,
    join_reference,
    random_bits_reference,
    split_reference,
    to_bfloat16_reference,
)
from ._states import Item, flat

SLICE = 1 << 18  # elements, a multiple of Q; of float32, 1 MB


class Move(NamedTuple):
    """How far a parameter moves down: factor · numerator / denominator, or without the latter."""

    factor: float
    numerator: Tensor
    denominator: Tensor | None = None

    def subtract_from(self, p: Tensor) -> None:
        """Move `p`, in place."""
        if self.denominator is None:
            p.sub_(self.numerator, alpha=self.factor)
        else:
            p.addcdiv_(self.numerator, self.denominator, value=-self.factor)


Step = Callable[[Tensor, list[Tensor | None]], Move]
"""From a gradient and the states, which it changes in place, the move of the parameter."""


def update_reference(
    item: Item,
    g: Tensor,
    step: Step,
    *,
    scale: float,
    l2: float,
    l1: float,
    decay: float,
    ema_weight: float,
    key: int,
    squares: Tensor | None,
) -> None:
    """Update one parameter and its state.

    `squares` [3], if given, receives the sums over the squares of its gradient, update and weight.
    """
    stochastic = item.format(g).is_stochastic
    flat_g = flat(g)
    for first in range(0, len(flat_g), SLICE):
        part = slice(first, first + SLICE)
        g_part = flat_g[part].float()
        n = len(g_part)
        hashed = _hashed(key, first, n, g.device) if stochastic else g_part
        p = _load_param(item, part)
        states = [_load_state(item, i, part) for i in range(len(item.kinds))]
        raw = g_part
        if scale != 1.0:
            g_part = g_part * scale
        if l2:
            g_part = g_part.add(p, alpha=l2)
        if l1:
            g_part = g_part.add(p.sign(), alpha=l1)
        move = step(g_part, states)
        before = p if squares is None else p.clone()
        if decay:
            p.mul_(1 - decay)
        move.subtract_from(p)
        if squares is not None:
            squares += torch.stack([x.square().sum() for x in (raw, before - p, p)])
        _store_param(item, part, p, hashed)
        if item.ema is not None:
            flat(item.ema)[part].lerp_(p, ema_weight)
        for i, x in enumerate(states):
            _store_state(item, i, part, x, hashed)


def key_reference(seed: int, t: int) -> int:
    """What the random bits of step `t` of a parameter are hashed with."""
    return hash_bits_reference(hash_bits_reference(t % (1 << 32)) ^ seed)


def _hashed(key: int, first: int, n: int, device: torch.device) -> Tensor:
    return element_bits_reference(torch.arange(first, first + n, device=device), key)


def _load_param(item: Item, part: slice) -> Tensor:
    p = flat(item.p)[part]
    if item.param == MASTER.value:
        return flat(item.extra)[part]
    if item.param == SPLIT.value:
        return join_reference(p, flat(item.extra)[part])
    return p.float()


def _store_param(item: Item, part: slice, p: Tensor, hashed: Tensor) -> None:
    kept = flat(item.p)[part]
    if item.param == MASTER.value:
        kept.copy_(p)
    elif item.param == SPLIT.value:
        high, low = split_reference(p)
        kept.copy_(high)
        flat(item.extra)[part] = low
    elif item.param != FLOAT32.value:
        kept.copy_(to_bfloat16_reference(p, random_bits_reference(hashed, 0)))


def _load_state(item: Item, i: int, part: slice) -> Tensor | None:
    kind = item.kinds[i]
    if kind == ABSENT.value:
        return None
    x = flat(item.states[i])[part]
    if kind in (FLOAT32.value, BFLOAT16.value):
        return x.float()
    scale_B = item.scales[i][part.start // Q : -(-part.stop // Q)]
    return decode_reference(x, scale_B, kind)


def _store_state(item: Item, i: int, part: slice, x: Tensor | None, hashed: Tensor) -> None:
    kind = item.kinds[i]
    if kind in (FLOAT32.value, ABSENT.value):
        return
    kept = flat(item.states[i])[part]
    bits = random_bits_reference(hashed, i + 1)
    if kind == BFLOAT16.value:
        kept.copy_(to_bfloat16_reference(x, bits))
        return
    code, scale_B = encode_reference(x, bits, kind)
    kept.copy_(code)
    first = part.start // Q
    item.scales[i][first : first + len(scale_B)] = scale_B
