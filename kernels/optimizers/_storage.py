"""Loads and stores of gradients, parameters and states in every storage format.

A format says how one parameter, its gradient and its state are stored. Kernels are specialized on
its code, an integer, and compute in float32 whatever the format.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from tritium.kernels.optimizers import _rounding
from tritium.kernels.optimizers._pointer_table import load, store
from tritium.kernels.optimizers._rounding import (
    ABSENT,
    BFLOAT16,
    FLOAT32,
    MASTER,
    SPLIT,
    STOCHASTIC,
    decode,
    encode,
    join,
    random_bits,
    split,
    to_bfloat16,
)

Q = tl.constexpr(_rounding.Q)


class Format(NamedTuple):
    """Storage of the tensors of one parameter: a specialization of the update."""

    bf16_grad: bool
    param: int
    """FLOAT32, MASTER, SPLIT or STOCHASTIC."""
    ema: bool
    states: tuple[int, ...]
    """FLOAT32, ABSENT, BFLOAT16, SIGNED or UNSIGNED, in the order of the rule's states."""

    def __int__(self) -> int:
        """Return the code: bit 0 the gradient, 1-2 the parameter, 3 the EMA; 3 bits per state."""
        code = self.bf16_grad | self.param << 1 | self.ema << 3
        return code | sum(kind << 4 + 3 * i for i, kind in enumerate(self.states))

    @property
    def is_16_bit(self) -> bool:
        """True if everything has 16 bits: then 8 elements are one access of 128 bits."""
        bf16 = self.param == STOCHASTIC.value and self.bf16_grad and not self.ema
        return bf16 and {*self.states} <= {ABSENT.value, BFLOAT16.value}


@triton.constexpr_function
def state_kind(FORMAT, i):
    """Return how a format stores state `i`."""
    return FORMAT >> (4 + 3 * i) & 7


@triton.constexpr_function
def has_state(FORMAT, i):
    """Return whether the tensors of a format have state `i`."""
    return FORMAT >> (4 + 3 * i) & 7 != ABSENT.value


@triton.constexpr_function
def has_ema(FORMAT):
    """Return whether a format has a moving average of the parameter."""
    return FORMAT >> 3 & 1 != 0


@triton.constexpr_function
def param_kind(FORMAT):
    """Return how a format stores the parameter."""
    return FORMAT >> 1 & 3


@triton.jit
def load_grad(address, offs, end, FORMAT: tl.constexpr, FULL: tl.constexpr):
    """Load a block of the gradient, as float32."""
    if FORMAT & 1:
        g = load(address, offs, end, tl.bfloat16, FULL).to(tl.float32)
    else:
        g = load(address, offs, end, tl.float32, FULL)
    return g


@triton.jit
def store_grad(address, offs, g, end, FORMAT: tl.constexpr, FULL: tl.constexpr):
    """Store a block of the gradient."""
    if FORMAT & 1:
        store(address, offs, g, end, tl.bfloat16, FULL)
    else:
        store(address, offs, g, end, tl.float32, FULL)


@triton.jit
def load_param(address, extra, offs, end, FORMAT: tl.constexpr, FULL: tl.constexpr):
    """Load a block of the parameter, most precisely; `extra` is its master or its other bits."""
    KIND: tl.constexpr = param_kind(FORMAT)
    if KIND == FLOAT32:
        p = load(address, offs, end, tl.float32, FULL)
    elif KIND == MASTER:
        p = load(extra, offs, end, tl.float32, FULL)
    elif KIND == SPLIT:
        low = load(extra, offs, end, tl.int16, FULL)
        p = join(load(address, offs, end, tl.bfloat16, FULL), low)
    else:
        p = load(address, offs, end, tl.bfloat16, FULL).to(tl.float32)
    return p


@triton.jit
def store_param(address, extra, offs, p, bits, end, FORMAT: tl.constexpr, FULL: tl.constexpr):
    """Store a block of the parameter as `load_param` loads it."""
    KIND: tl.constexpr = param_kind(FORMAT)
    if KIND == FLOAT32:
        store(address, offs, p, end, tl.float32, FULL)
    elif KIND == MASTER:
        store(extra, offs, p, end, tl.float32, FULL)
        store(address, offs, p, end, tl.bfloat16, FULL)
    elif KIND == SPLIT:
        high, low = split(p)
        store(address, offs, high, end, tl.bfloat16, FULL)
        store(extra, offs, low, end, tl.int16, FULL)
    else:
        store(address, offs, to_bfloat16(p, random_bits(bits, 0)), end, tl.bfloat16, FULL)


@triton.jit
def load_state(
    address, scales, first, offs, end, KIND: tl.constexpr, N: tl.constexpr, FULL: tl.constexpr
):
    """Load a block of a state, as float32; 0 if there is none."""
    if KIND == ABSENT:
        x = 0.0
    elif KIND == FLOAT32:
        x = load(address, offs, end, tl.float32, FULL)
    elif KIND == BFLOAT16:
        x = load(address, offs, end, tl.bfloat16, FULL).to(tl.float32)
    else:
        code = tl.reshape(load(address, offs, end, tl.uint8, FULL), (N // Q, Q))
        offs_B = first // Q + tl.arange(0, N // Q)
        scale_ptr_B = scales.to(tl.pointer_type(tl.float32)) + offs_B
        scale_B = tl.load(scale_ptr_B, mask=offs_B * Q < end, other=0.0)
        x = tl.reshape(decode(code, scale_B[:, None], KIND), (N,))
    return x


@triton.jit
def store_state(
    address, scales, first, offs, x, bits, end, KIND: tl.constexpr, STREAM: tl.constexpr,
    N: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Store a block of a state as `load_state` loads it."""
    if KIND == FLOAT32:
        store(address, offs, x, end, tl.float32, FULL)
    elif KIND == BFLOAT16:
        store(address, offs, to_bfloat16(x, random_bits(bits, STREAM)), end, tl.bfloat16, FULL)
    elif KIND != ABSENT:
        if not FULL:
            x = tl.where(offs < end, x, 0.0)
        random = tl.reshape(random_bits(bits, STREAM), (N // Q, Q))
        code, scale_B = encode(tl.reshape(x, (N // Q, Q)), random, KIND)
        store(address, offs, tl.reshape(code, (N,)), end, tl.uint8, FULL)
        offs_B = first // Q + tl.arange(0, N // Q)
        scale_ptr_B = scales.to(tl.pointer_type(tl.float32)) + offs_B
        tl.store(scale_ptr_B, scale_B, mask=offs_B * Q < end)
