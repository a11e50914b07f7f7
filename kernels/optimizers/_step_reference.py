"""Reference of `_step_kernels.py` in plain PyTorch: one parameter, a slice at a time.

Elements are taken in the order of memory, as in the kernel; the tensors of a slice stay in a CPU's
cache from the first of its operations to the last.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tritium.kernels.optimizers._pointer_table import SLICE, flat
from tritium.kernels.optimizers._rounding import (
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
from tritium.kernels.optimizers._state import Item


class Move(NamedTuple):
    """Distance that a parameter moves down: factor · numerator, / denominator if there is one."""

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


class Terms(NamedTuple):
    """Terms of a step outside the rule, the same for all parameters of a group."""

    scale: float
    """Factor of gradients: the clip coefficient, negative to maximise."""
    l2: float
    l1: float
    decay: float
    """Fraction by which a parameter shrinks."""
    ema_weight: float
    cautious: bool = False
    """Whether only elements that the rule does not push away from 0 shrink."""


def update_reference(
    item: Item, g: Tensor, step: Step, terms: Terms, key: int, squares: Tensor | None
) -> None:
    """Update one parameter and its state.

    `squares` [3], if given, receives the sums over the squares of its gradient, update and weight.
    """
    n = g.numel()
    scale, l2, l1, decay, ema_weight, cautious = terms
    for first in range(0, n, SLICE):
        part = slice(first, min(first + SLICE, n)) if n > SLICE or item.draws else None
        raw = g_part = _cut(g, part).float()
        bits = _bits(key, part, g.device) if item.draws and part else raw
        p = _load_param(item, part)
        states = [_load_state(item, i, part) for i in range(len(item.kinds))]
        if scale != 1.0:
            g_part = g_part * scale
        if l2:
            g_part = g_part.add(p, alpha=l2)
        if l1:
            g_part = g_part.add(p.sign(), alpha=l1)
        move = step(g_part, states)
        before = p if squares is None else p.clone()
        if decay and cautious:
            p.sub_(p * (move.numerator.sign() * p.sign() >= 0), alpha=decay)
        elif decay:
            p.mul_(1 - decay)
        move.subtract_from(p)
        if squares is not None:
            squares += torch.stack([x.square().sum() for x in (raw, before - p, p)])
        _store_param(item, part, p, bits)
        if item.ema is not None:
            _cut(item.ema, part).lerp_(p, ema_weight)
        for i, x in enumerate(states):
            _store_state(item, i, part, x, bits)


def momentum_reference(
    item: Item, g: Tensor, scale: float, key: int, momentum: float, nesterov: bool
) -> Tensor:
    """Average gradients `g`, times `scale`, into state 0; return what Muon orthogonalizes.

    The result is float32 in the shape of the parameter, which must be contiguous.
    """
    n, ahead = g.numel(), torch.empty_like(g, dtype=torch.float32)
    for first in range(0, n, SLICE):
        part = slice(first, min(first + SLICE, n)) if n > SLICE or item.draws else None
        g_part = _cut(g, part).float() * scale
        m = _load_state(item, 0, part)
        assert m is not None
        m.lerp_(g_part, 1 - momentum)
        _cut(ahead, part).copy_(g_part.lerp(m, momentum) if nesterov else m)
        bits = _bits(key, part, g.device) if item.draws and part else g_part
        _store_state(item, 0, part, m, bits)
    return ahead


def key_reference(seed: int, t: int) -> int:
    """Return the key of the random bits of a parameter in step `t`."""
    return hash_bits_reference(hash_bits_reference(t % (1 << 32)) ^ seed)


def _cut(x: Tensor, part: slice | None) -> Tensor:
    """Return a part of the elements in the order of memory; without one all of them as they are."""
    return x if part is None else flat(x)[part]


def _bits(key: int, part: slice, device: torch.device) -> Tensor:
    return element_bits_reference(torch.arange(part.start, part.stop, device=device), key)


def _load_param(item: Item, part: slice | None) -> Tensor:
    p = _cut(item.p, part)
    if item.param == FLOAT32.value:
        return p
    if item.param == MASTER.value:
        return _cut(item.extra, part)
    if item.param == SPLIT.value:
        return join_reference(p, _cut(item.extra, part))
    return p.float()


def _store_param(item: Item, part: slice | None, p: Tensor, bits: Tensor) -> None:
    if item.param == FLOAT32.value:
        return
    kept = _cut(item.p, part)
    if item.param == MASTER.value:
        kept.copy_(p)
    elif item.param == SPLIT.value:
        high, low = split_reference(p)
        kept.copy_(high)
        _cut(item.extra, part).copy_(low)
    else:
        kept.copy_(to_bfloat16_reference(p, random_bits_reference(bits, 0)))


def _load_state(item: Item, i: int, part: slice | None) -> Tensor | None:
    kind = item.kinds[i]
    if kind == ABSENT.value:
        return None
    x = _cut(item.states[i], part)
    if part is None or kind in (FLOAT32.value, BFLOAT16.value):
        return x.float()
    return decode_reference(x, item.scales[i][part.start // Q : -(-part.stop // Q)], kind)


def _store_state(item: Item, i: int, part: slice | None, x: Tensor | None, bits: Tensor) -> None:
    kind = item.kinds[i]
    if part is None or x is None or kind == FLOAT32.value:
        return
    kept = _cut(item.states[i], part)
    bits = random_bits_reference(bits, i + 1)
    if kind == BFLOAT16.value:
        kept.copy_(to_bfloat16_reference(x, bits))
        return
    code, scale_B = encode_reference(x, bits, kind)
    kept.copy_(code)
    first = part.start // Q
    item.scales[i][first : first + len(scale_B)] = scale_B
