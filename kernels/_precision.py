"""How an optimizer keeps its numbers: in float32, in bfloat16, or in 8 bits; and how it rounds.

A parameter in bfloat16 changes by less than its last bit in most steps. Three ways out:

    master      a float32 copy of it in the state
    split       16 more bits of it in the state: with its own 16 they are a float32
    stochastic  nothing in the state; round up as often as the remainder says, so that the mean of
                many roundings is exact

State in bfloat16 or 8 bits rounds stochastically too: a mean of squares that decays by a
thousandth per step would otherwise stay where it is. In 8 bits, blocks of Q = 128 elements share a
float32 scale s, and a step of the code is smaller where values are smaller:

    signed      s · c · |c|,  |c| <= 127     moments and momentum
    unsigned    s · c⁴,       c <= 255       means and sums of squares; c = 0 for zero alone

The random bits are a hash of seed, parameter, step and element: the same on every device.

Gupta et al., "Deep Learning with Limited Numerical Precision", 2015.
https://arxiv.org/abs/1502.02551
Dettmers et al., "8-bit Optimizers via Block-wise Quantization", 2021.
https://arxiv.org/abs/2110.02861
Wellons, "Prospecting for Hash Functions", 2018. https://nullprogram.com/blog/2018/07/31/
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

Q = 128  # elements that share a scale: one warp, four per thread

# How a parameter is kept.
FLOAT32 = tl.constexpr(0)
MASTER = tl.constexpr(1)
SPLIT = tl.constexpr(2)
STOCHASTIC = tl.constexpr(3)

# How a state is kept, but for FLOAT32.
ABSENT = tl.constexpr(1)
BFLOAT16 = tl.constexpr(2)
SIGNED = tl.constexpr(3)
UNSIGNED = tl.constexpr(4)

SMALLEST = tl.constexpr(1e-37)  # scale; below it, the inverse would be infinite


class Format(NamedTuple):
    """How the tensors of one parameter are stored: a specialization of the update."""

    bf16_grad: bool
    param: int
    """FLOAT32, MASTER, SPLIT or STOCHASTIC."""
    ema: bool
    states: tuple[int, ...]
    """In the order of the rule's states, FLOAT32, ABSENT, BFLOAT16, SIGNED or UNSIGNED."""

    def __int__(self) -> int:
        """The format in bits: 0 the gradient, 1 and 2 the parameter, 3 the mean; 3 per state."""
        code = self.bf16_grad | self.param << 1 | self.ema << 3
        return code | sum(kind << 4 + 3 * i for i, kind in enumerate(self.states))

    @property
    def is_stochastic(self) -> bool:
        """Whether a step draws random bits."""
        return self.param == STOCHASTIC.value or any(kind > ABSENT.value for kind in self.states)


@triton.jit
def hash_bits(x):
    """Mix 32 bits, uint32, so that every bit of the result depends on every bit of `x`."""
    x = tl.mul(x ^ (x >> 16), 0x7FEB352D, sanitize_overflow=False)
    x = tl.mul(x ^ (x >> 15), 0x846CA68B, sanitize_overflow=False)
    return x ^ (x >> 16)


@triton.jit
def random_bits(hashed, i: tl.constexpr):
    """The 16 bits of stream `i` of four, as uint32, from the hash of an element."""
    if i >= 2:
        hashed = hash_bits(hashed ^ 0x9E3779B9)
    return hashed >> 16 if i % 2 else hashed & 0xFFFF


@triton.jit
def to_bfloat16(x, bits):
    """Round float32 down or up to bfloat16, as 16 random `bits` decide."""
    raw = x.to(tl.uint32, bitcast=True)
    # The carry of a NaN could run into its sign.
    high = tl.where(x == x, tl.add(raw, bits, sanitize_overflow=False) >> 16, 0x7FC0)
    return high.to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def split(x):
    """Split float32 into bfloat16, rounded to nearest, and the 16 bits that make up for that."""
    raw = x.to(tl.uint32, bitcast=True)
    high = tl.where(x == x, tl.add(raw, 0x8000, sanitize_overflow=False) >> 16, 0x7FC0)
    low = (raw & 0xFFFF).to(tl.uint16)
    return high.to(tl.uint16).to(tl.bfloat16, bitcast=True), low.to(tl.int16, bitcast=True)


@triton.jit
def join(high, low):
    """The float32 that `split` split."""
    raw = high.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
    low = low.to(tl.int32).to(tl.uint32, bitcast=True)
    return tl.add(raw, low, sanitize_overflow=False).to(tl.float32, bitcast=True)


@triton.jit
def decode(code, scale, KIND: tl.constexpr):
    """The float32 values [B, Q] of codes [B, Q] in units of scales [B, 1]."""
    c = code.to(tl.float32)
    if KIND == SIGNED:
        c -= 128
        return scale * (c * tl.abs(c))
    c *= c
    return scale * (c * c)


@triton.jit
def encode(x, bits, KIND: tl.constexpr):
    """The codes [B, Q] of float32 values [B, Q], and their scales [B]; `bits` decide rounding."""
    size = tl.abs(x)
    scale = tl.max(size, axis=1) * (1 / 127**2 if KIND == SIGNED else 1 / 255**4)
    inverse = tl.where(scale >= SMALLEST, 1 / scale, 0.0)
    y = size * inverse[:, None]
    root = tl.sqrt(y) if KIND == SIGNED else tl.sqrt(tl.sqrt(y))
    c = tl.floor(root)
    low, high = c * c, (c + 1) * (c + 1)
    if KIND == UNSIGNED:
        low, high = low * low, high * high
    u = (bits.to(tl.float32) + 0.5) * (1 / 65536)
    c = tl.where(u * (high - low) < y - low, c + 1, c)
    if KIND == SIGNED:
        c = tl.minimum(c, 127.0)
        c = tl.where(x < 0, 128 - c, 128 + c)
    else:
        c = tl.minimum(tl.maximum(c, tl.where(size > 0, 1.0, 0.0)), 255.0)
    return c.to(tl.int32).to(tl.uint8), scale


def hash_bits_reference(x: Tensor) -> Tensor:
    """The definition of `hash_bits`, on int64 in [0, 2^32)."""
    x = (x ^ (x >> 16)) * 0x7FEB352D & 0xFFFFFFFF
    x = (x ^ (x >> 15)) * 0x846CA68B & 0xFFFFFFFF
    return x ^ (x >> 16)


def random_bits_reference(hashed: Tensor, i: int) -> Tensor:
    """The definition of `random_bits`."""
    if i >= 2:
        hashed = hash_bits_reference(hashed ^ 0x9E3779B9)
    return hashed >> 16 if i % 2 else hashed & 0xFFFF


def to_bfloat16_reference(x: Tensor, bits: Tensor) -> Tensor:
    """The definition of `to_bfloat16`."""
    rounded = (x.view(torch.int32) + bits.int() & ~0xFFFF).view(torch.float32)
    return torch.where(x.isnan(), x, rounded).bfloat16()


def split_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """The definition of `split`: bfloat16 and int16."""
    low = x.view(torch.int16)[..., 0::2]  # little-endian, as every machine that PyTorch runs on
    rounded = (x.view(torch.int32) + 0x8000 & ~0xFFFF).view(torch.float32)
    return torch.where(x.isnan(), x, rounded).bfloat16(), low


def join_reference(high: Tensor, low: Tensor) -> Tensor:
    """The definition of `join`."""
    return (high.float().view(torch.int32) + low.int()).view(torch.float32)


def decode_reference(code: Tensor, scale_B: Tensor, kind: int) -> Tensor:
    """The definition of `decode`, of codes `[n]` and one scale for every Q of them."""
    c = code.float()
    value = (c - 128) * (c - 128).abs() if kind == SIGNED.value else c.square().square()
    return value * scale_B.repeat_interleave(Q)[: len(code)]


def encode_reference(x: Tensor, bits: Tensor, kind: int) -> tuple[Tensor, Tensor]:
    """The definition of `encode`: uint8 codes `[n]` of `x`, and a scale for every Q of them."""
    size = x.abs()
    blocks = torch.nn.functional.pad(size, (0, -len(x) % Q)).view(-1, Q)
    signed = kind == SIGNED.value
    scale_B = blocks.amax(dim=1) * (1 / 127**2 if signed else 1 / 255**4)
    inverse_B = torch.where(scale_B >= SMALLEST.value, 1 / scale_B, 0.0)
    y = size * inverse_B.repeat_interleave(Q)[: len(x)]
    c = (y.sqrt() if signed else y.sqrt().sqrt()).floor()
    power = 2 if signed else 4
    low, high = c**power, (c + 1) ** power
    c += (bits.float() + 0.5) / 65536 * (high - low) < y - low
    if signed:
        code = 128 + c.clamp(max=127) * torch.where(x < 0, -1, 1)
    else:
        code = c.clamp(max=255).maximum((size > 0).float())
    return code.to(torch.uint8), scale_B
