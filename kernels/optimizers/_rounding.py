"""Storage of parameters and states in float32, bfloat16 or 8 bits, and stochastic rounding.

A parameter in bfloat16 changes by less than its last bit in most steps. Three ways out:

    master      a float32 copy of it in the state
    split       16 more bits of it in the state: with its own 16 they are a float32
    stochastic  nothing in the state; round up as often as the remainder says, so that the mean of
                many roundings is exact

State in bfloat16 or 8 bits rounds stochastically too: a mean of squares that decays by a
thousandth per step would otherwise never change. In 8 bits, blocks of Q = 128 elements share a
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

import torch
import triton
import triton.language as tl
from torch import Tensor

Q = 128  # elements that share a scale: one warp, four per thread

# Storage of a parameter.
FLOAT32 = tl.constexpr(0)
MASTER = tl.constexpr(1)
SPLIT = tl.constexpr(2)
STOCHASTIC = tl.constexpr(3)

# Storage of a state, FLOAT32 or:
ABSENT = tl.constexpr(1)
BFLOAT16 = tl.constexpr(2)
SIGNED = tl.constexpr(3)
UNSIGNED = tl.constexpr(4)

SMALLEST = tl.constexpr(1e-37)  # scale; below it, the inverse would be infinite


@triton.jit
def hash_bits(x):
    """Mix 32 bits, uint32, so that every bit of the result depends on every bit of `x`."""
    x = tl.mul(x ^ (x >> 16), 0x7FEB352D, sanitize_overflow=False)
    x = tl.mul(x ^ (x >> 15), 0x846CA68B, sanitize_overflow=False)
    return x ^ (x >> 16)


@triton.jit
def element_bits(offs, key):
    """Return the random bits, uint32, of elements `offs` of a tensor with a mixed `key`."""
    x = tl.mul(offs.to(tl.uint32) ^ key, 0x7FEB352D, sanitize_overflow=False)
    x = tl.mul(x ^ (x >> 15), 0x846CA68B, sanitize_overflow=False)
    return x ^ (x >> 16)


@triton.jit
def random_bits(bits, STREAM: tl.constexpr):
    """Return 16 random bits of an element: four streams, two of them complements of the others."""
    if STREAM >= 2:
        bits ^= 0xFFFFFFFF
    return bits >> 16 if STREAM % 2 else bits & 0xFFFF


@triton.jit
def to_bfloat16(x, bits):
    """Round float32 down or up to bfloat16, as 16 random `bits` decide."""
    # The smaller of two: else the carry of a NaN could run into its sign.
    raw = tl.minimum(x.to(tl.int32, bitcast=True), 0x7FFF0000).to(tl.uint32, bitcast=True)
    high = tl.add(raw, bits, sanitize_overflow=False) & 0xFFFF0000
    return high.to(tl.float32, bitcast=True).to(tl.bfloat16)


@triton.jit
def split(x):
    """Split float32 into bfloat16, rounded to nearest, and the int16 that `join` adds to it.

    A tie goes away from zero: to even, the remainder would take one value more than 16 bits have.
    """
    raw = tl.minimum(x.to(tl.int32, bitcast=True), 0x7FFF0000).to(tl.uint32, bitcast=True)
    high = tl.add(raw, 0x8000, sanitize_overflow=False) & 0xFFFF0000
    low = raw.to(tl.uint16).to(tl.int16, bitcast=True)
    return high.to(tl.float32, bitcast=True).to(tl.bfloat16), low


@triton.jit
def join(high, low):
    """Return the float32 from the parts that `split` returns."""
    raw = high.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
    low = low.to(tl.int32).to(tl.uint32, bitcast=True)
    return tl.add(raw, low, sanitize_overflow=False).to(tl.float32, bitcast=True)


@triton.jit
def decode(code, scale, KIND: tl.constexpr):
    """Return the float32 values [B, Q] of codes [B, Q] in units of scales [B, 1]."""
    c = code.to(tl.float32)
    if KIND == SIGNED:
        c -= 128
        return scale * (c * tl.abs(c))
    c *= c
    return scale * (c * c)


@triton.jit
def encode(x, bits, KIND: tl.constexpr):
    """Return codes [B, Q] and scales [B] of float32 values [B, Q]; `bits` decide rounding."""
    size = tl.abs(x)
    # As integers, which are in the same order: a maximum of floats would pass over a NaN.
    largest = tl.max(size.to(tl.int32, bitcast=True), axis=1).to(tl.float32, bitcast=True)
    scale = largest * (1 / 127**2 if KIND == SIGNED else 1 / 255**4)
    inverse = tl.where(scale >= SMALLEST, 1 / scale, 0.0)
    y = size * inverse[:, None]
    root = tl.sqrt(y) if KIND == SIGNED else tl.sqrt(tl.sqrt(y))
    c = tl.floor(root)
    # Up with a probability of (y - low) / (high - low): on the mean, the value is exact.
    if KIND == SIGNED:
        low, width = c * c, 2 * c + 1
    else:
        low, width = c * c * (c * c), ((4 * c + 6) * c + 4) * c + 1
    u = ((bits << 7) | 0x3F800000).to(tl.float32, bitcast=True)  # in [1, 2)
    c = tl.where(u * width < y - low + width, c + 1, c)
    if KIND == SIGNED:
        c = tl.minimum(c, 127.0)
        c = tl.where(x < 0, 128 - c, 128 + c)
    else:
        c = tl.minimum(tl.maximum(c, tl.where(size > 0, 1.0, 0.0)), 255.0)
    return c.to(tl.int32).to(tl.uint8), scale


def hash_bits_reference(x: int) -> int:
    """Compute `hash_bits` on int64."""
    x = (x ^ (x >> 16)) * 0x7FEB352D & 0xFFFFFFFF
    x = (x ^ (x >> 15)) * 0x846CA68B & 0xFFFFFFFF
    return x ^ (x >> 16)


def element_bits_reference(offs: Tensor, key: int) -> Tensor:
    """Compute `element_bits`, on int64."""
    x = (offs & 0xFFFFFFFF ^ key) * 0x7FEB352D & 0xFFFFFFFF
    x = (x ^ (x >> 15)) * 0x846CA68B & 0xFFFFFFFF
    return x ^ (x >> 16)


def random_bits_reference(bits: Tensor, stream: int) -> Tensor:
    """Compute `random_bits` on int64."""
    bits = bits ^ 0xFFFFFFFF if stream >= 2 else bits
    return bits >> stream % 2 * 16 & 0xFFFF


def to_bfloat16_reference(x: Tensor, bits: Tensor) -> Tensor:
    """Compute `to_bfloat16` in plain PyTorch."""
    return (_raw(x) + bits.int() & ~0xFFFF).view(torch.float32).bfloat16()


def split_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `split` in plain PyTorch: bfloat16 and int16."""
    raw = _raw(x)
    return (raw + 0x8000 & ~0xFFFF).view(torch.float32).bfloat16(), raw.to(torch.int16)


def _raw(x: Tensor) -> Tensor:
    # A GPU's own NaN is positive; a CPU passes on that of a gradient, which may be all ones.
    return torch.where(x.isnan(), 0x7FFF0000, x.view(torch.int32))


def join_reference(high: Tensor, low: Tensor) -> Tensor:
    """Compute `join` in plain PyTorch."""
    return (high.float().view(torch.int32) + low.int()).view(torch.float32)


def decode_reference(code: Tensor, scale_B: Tensor, kind: int) -> Tensor:
    """Compute `decode`, of codes `[n]` and one scale for every Q of them."""
    c = code.float()
    value = (c - 128) * (c - 128).abs() if kind == SIGNED.value else c.square().square()
    return value * scale_B.repeat_interleave(Q)[: len(code)]


def encode_reference(x: Tensor, bits: Tensor, kind: int) -> tuple[Tensor, Tensor]:
    """Compute `encode`: uint8 codes `[n]` of `x`, and a scale for every Q of them."""
    size = x.abs()
    blocks = torch.nn.functional.pad(size, (0, -len(x) % Q)).view(-1, Q)
    signed = kind == SIGNED.value
    scale_B = blocks.amax(dim=1) * (1 / 127**2 if signed else 1 / 255**4)
    inverse_B = torch.where(scale_B >= SMALLEST.value, 1 / scale_B, 0.0)
    y = size * inverse_B.repeat_interleave(Q)[: len(x)]
    c = (y.sqrt() if signed else y.sqrt().sqrt()).floor()
    if signed:
        low, width = c * c, 2 * c + 1
    else:
        low, width = c.square().square(), ((4 * c + 6) * c + 4) * c + 1
    c += (1 + bits.float() / 65536) * width < y - low + width
    if signed:
        code = 128 + c.fmin(c.new_tensor(127.0)) * torch.where(x < 0, -1, 1)
    else:
        code = c.fmax((size > 0).float()).clamp(max=255)
    return code.to(torch.uint8), scale_B
