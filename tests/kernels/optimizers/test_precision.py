"""Codecs are their references bit for bit, exact on the mean, and their bits are random."""

from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl

from tritium.kernels.optimizers import _rounding
from tritium.kernels.optimizers._rounding import SIGNED, UNSIGNED, Q
from tritium.kernels.optimizers._state import Storage
from tritium.kernels.optimizers._step_inputs import Tensors
from tritium.kernels.optimizers._step_reference import key_reference

BF16, U8 = torch.bfloat16, torch.uint8
STORAGE = Storage((), (), None, torch.float32, ema=False)
GIANT = 3.4e38

# What the tests below call by name, in a kernel of their own.
hash_bits, element_bits, random_bits = (
    _rounding.hash_bits, _rounding.element_bits, _rounding.random_bits
)  # fmt: skip
to_bfloat16, split, join = _rounding.to_bfloat16, _rounding.split, _rounding.join
encode, decode = _rounding.encode, _rounding.decode


@triton.jit
def _hash_kernel(x_ptr, key_ptr, out_ptr, STREAM: tl.constexpr, N: tl.constexpr):
    offs = tl.arange(0, N)
    x = tl.load(x_ptr + offs)
    key = tl.load(key_ptr).to(tl.uint32)
    tl.store(out_ptr + offs, hash_bits(x.to(tl.uint32)).to(tl.int64))
    hashed = element_bits(x, key)
    tl.store(out_ptr + N + offs, hashed.to(tl.int64))
    tl.store(out_ptr + 2 * N + offs, random_bits(hashed, STREAM).to(tl.int64))


@triton.jit
def _round_kernel(x_ptr, bits_ptr, rounded_ptr, high_ptr, low_ptr, joined_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    x = tl.load(x_ptr + offs)
    bits = tl.load(bits_ptr + offs).to(tl.uint32)
    tl.store(rounded_ptr + offs, to_bfloat16(x, bits))
    high, low = split(x)
    tl.store(high_ptr + offs, high)
    tl.store(low_ptr + offs, low)
    tl.store(joined_ptr + offs, join(high, low))


@triton.jit
def _code_kernel(
    x_ptr, bits_ptr, code_ptr, scale_ptr, decoded_ptr, KIND: tl.constexpr, B: tl.constexpr,
    Q: tl.constexpr,
):  # fmt: skip
    offs_B = tl.arange(0, B)
    offs = offs_B[:, None] * Q + tl.arange(0, Q)[None, :]
    code, scale_B = encode(tl.load(x_ptr + offs), tl.load(bits_ptr + offs).to(tl.uint32), KIND)
    tl.store(code_ptr + offs, code)
    tl.store(scale_ptr + offs_B, scale_B)
    tl.store(decoded_ptr + offs, decode(code, scale_B[:, None], KIND))


def assert_same_bits(x, y):
    """Any NaN for any NaN; all else, zeros' signs too, bit for bit."""
    assert (x.dtype, x.shape) == (y.dtype, y.shape)
    if x.is_floating_point():
        assert torch.equal(x.isnan(), y.isnan())
        view = torch.int16 if x.dtype == BF16 else torch.int32
        x, y = (torch.where(z.isnan(), 0, z.view(view)) for z in (x, y))
    assert torch.equal(x, y)


SPECIAL = [
    0x00000000, 0x80000000, 0x00000001, 0x80000001, 0x007FFFFF, 0x00008000, 0x00018000, 0x3F800000,
    0x3F808000, 0x3F818000, 0xBF808000, 0x3F807FFF, 0x3F808001, 0x7F7FFFFF, 0xFF7FFFFF, 0x7F7F8000,
    0x7F800000, 0xFF800000, 0x7FFFFFFF, 0xFFC00000, 0x7FC00000,
]  # fmt: skip


def anything(n, device):
    """Float32 of random bits, the special ones among them; a NaN as arithmetic makes it."""
    raw = torch.randint(-(1 << 31), 1 << 31, (n,), dtype=torch.int64).int()
    raw[: len(SPECIAL)] = torch.tensor(SPECIAL, dtype=torch.int64).int()
    x = raw.view(torch.float32)
    x[len(SPECIAL) :][x[len(SPECIAL) :].isnan()] = float("nan")
    return x.to(device)


def random_16(n, device):
    return torch.randint(1 << 16, (n,), device=device)


@pytest.mark.parametrize("stream", [0, 1, 2, 3])
def test_bits_equal_the_reference(stream, device):
    x = torch.randint(1 << 40, (4096,), device=device)
    x[:3] = torch.tensor([0, (1 << 32) - 1, 1 << 32])
    key = torch.randint(1 << 32, (1,), device=device)
    out = torch.empty(3, 4096, dtype=torch.int64, device=device)
    _hash_kernel[(1,)](x, key, out, STREAM=stream, N=4096)
    hashed = _rounding.element_bits_reference(x, key.item())
    assert torch.equal(out[0], _rounding.hash_bits_reference(x & 0xFFFFFFFF))
    assert torch.equal(out[1], hashed)
    assert torch.equal(out[2], _rounding.random_bits_reference(hashed, stream))


def test_rounding_and_splitting_equal_the_reference(device):
    n = 1 << 14
    x, random = anything(n, device), random_16(n, device)
    random[: len(SPECIAL)] = 0xFFFF
    rounded, high = (torch.empty(n, dtype=BF16, device=device) for _ in range(2))
    low, joined = torch.empty(n, dtype=torch.int16, device=device), torch.empty_like(x)
    _round_kernel[(1,)](x, random, rounded, high, low, joined, N=n)
    assert_same_bits(rounded, _rounding.to_bfloat16_reference(x, random))
    high_reference, low_reference = _rounding.split_reference(x)
    assert_same_bits(high, high_reference)
    number = ~x.isnan()
    assert torch.equal(low[number], low_reference[number])
    assert_same_bits(joined, x)
    assert_same_bits(_rounding.join_reference(high_reference, low_reference), x)


def test_split_rounds_to_nearest_and_ties_away_from_zero(device):
    x = anything(1 << 20, device)
    high, low = _rounding.split_reference(x)
    tie = (x.view(torch.int32) & 0xFFFF == 0x8000) & ~x.isnan()
    assert tie.sum() >= 6
    assert_same_bits(high[~tie], x.bfloat16()[~tie])
    assert (high[tie].float().abs() > x[tie].abs()).all()
    # Nothing beside a bfloat16 is that bfloat16: how a remainder begins.
    assert_same_bits(_rounding.join_reference(high, torch.zeros_like(low)), high.float())


def test_any_nan_stays_a_nan(device):
    raw = torch.tensor([-1, -0x7FFF, 0x7FFFFFFF, 0x7F80FFFF, 0x7FC00001], device=device)
    x = raw.int().view(torch.float32)
    assert x.isnan().all()
    for y in (
        _rounding.to_bfloat16_reference(x, raw & 0xFFFF),
        *_rounding.split_reference(x)[:1],
    ):
        assert y.isnan().all()


def test_rounds_up_as_often_as_the_remainder_says(device):
    # All 2^16 draws there are.
    draws = torch.arange(1 << 16, device=device)
    for raw in anything(64, device).view(torch.int32):
        x = raw.view(torch.float32)
        if not x.isfinite():
            continue
        got = _rounding.to_bfloat16_reference(x.expand(1 << 16).contiguous(), draws)
        up = got.view(torch.int16) != (raw >> 16).to(torch.int16)
        assert up.sum().item() == raw.item() & 0xFFFF


def blocks(kind, device):
    """Values of which each Q share a scale, one row for each thing that may happen to them."""
    x_BQ = torch.randn(16, Q, device=device) * 10.0 ** torch.arange(-8, 8, device=device)[:, None]
    x_BQ[0] = 0.0
    x_BQ[1, 1:] = 0.0
    x_BQ[2, 5] = 1e12
    x_BQ[3] *= 1e-30
    x_BQ[4] *= 1e-36
    x_BQ[5, ::2] = GIANT
    x_BQ[6, 3] = float("inf")
    x_BQ[7, 9] = float("nan")
    x_BQ[8] = float("nan")
    x_BQ[9, :64] = 0.0
    x_BQ[10, ::3] = -0.0
    x_BQ[11] = x_BQ[11, 0]
    return x_BQ.flatten() if kind == SIGNED else x_BQ.flatten().abs()


@pytest.mark.parametrize("kind", [SIGNED, UNSIGNED], ids=["signed", "unsigned"])
def test_codes_equal_the_reference(kind, device):
    x = blocks(kind, device).repeat(4)
    random = random_16(len(x), device)
    random[: len(x) // 2] = torch.tensor([0, 0xFFFF]).repeat_interleave(len(x) // 4)
    code, scale_B = torch.empty_like(x, dtype=U8), x.new_empty(len(x) // Q)
    decoded = torch.empty_like(x)
    _code_kernel[(1,)](x, random, code, scale_B, decoded, KIND=kind, B=len(x) // Q, Q=Q)
    code_reference, scale_reference_B = _rounding.encode_reference(x, random, kind.value)
    assert_same_bits(scale_B, scale_reference_B)
    # A GPU divides and takes roots to within two units of the last place.
    apart = (code.int() - code_reference.int()).abs()
    assert apart.max() <= x.is_cuda
    assert apart.float().mean() <= 1e-3
    assert_same_bits(decoded, _rounding.decode_reference(code, scale_B, kind.value))
    finite = x.view(-1, Q).isfinite().all(dim=1)
    assert torch.equal(decoded.view(-1, Q).isfinite().all(dim=1), finite)


@pytest.mark.parametrize("kind", [SIGNED, UNSIGNED], ids=["signed", "unsigned"])
def test_mean_of_codes_is_exact(kind, device):
    # Evenly spaced draws of each value: small ones, large ones, and the largest of its block.
    x_Q = torch.randn(Q, device=device) * torch.logspace(-3, 0, Q, device=device)
    x_Q = x_Q if kind == SIGNED else x_Q.square()
    power, codes = (2, 127) if kind == SIGNED else (4, 255)
    unit = x_Q.abs().max() / codes**power
    below = (x_Q.abs() / unit) ** (1 / power) + 1e-3
    width_Q = unit * ((below.floor() + 1) ** power - below.floor() ** power)
    draws = torch.arange(4, 1 << 16, 8, device=device)
    n = len(draws)
    code, scale_B = _rounding.encode_reference(
        x_Q.repeat(n), draws.repeat_interleave(Q), kind.value
    )
    got = _rounding.decode_reference(code, scale_B, kind.value).view(n, Q).double()
    assert (got.amax(dim=0) - got.amin(dim=0) <= width_Q * 1.001).all()
    # Where a mean of squares is less than the smallest code, it is that code.
    exact_Q = x_Q if kind == SIGNED else x_Q.clamp(min=scale_B[0])
    error_Q = (got.mean(dim=0) - exact_Q).abs()
    assert (error_Q <= width_Q / n + 1e-6 * x_Q.abs().max()).all()


@pytest.mark.parametrize("kind", [SIGNED, UNSIGNED], ids=["signed", "unsigned"])
def test_100000_codes_of_one_value_have_its_mean(kind, device):
    value, n = 0.2345, 100_000
    blocks = torch.full((n // (Q - 1) + 1, Q), value, device=device)
    blocks[:, 0] = 1.0  # the largest of each, which has the same code always
    hashed = _rounding.element_bits_reference(torch.arange(blocks.numel(), device=device), 12345)
    random = _rounding.random_bits_reference(hashed, 1)
    code, scale_B = _rounding.encode_reference(blocks.flatten(), random, kind.value)
    got = _rounding.decode_reference(code, scale_B, kind.value).view(-1, Q)[:, 1:].double()
    assert len(got.unique()) == 2
    standard_error = got.std() / got.numel() ** 0.5
    print(f"mean error {got.mean() - value:.2e}, standard error {standard_error:.2e}")
    assert abs(got.mean() - value) < 4 * standard_error


def test_a_mean_of_squares_in_8_bits_is_zero_for_zero_alone(device):
    v = torch.rand(1 << 16, device=device) ** 16
    v[::7] = 0.0
    for draw in (0, 0xFFFF):
        draws = torch.full(v.shape, draw, device=device)
        code, scale_B = _rounding.encode_reference(v, draws, UNSIGNED.value)
        got = _rounding.decode_reference(code, scale_B, UNSIGNED.value)
        assert torch.equal(got == 0, v == 0)


def correlation(a, b):
    """Pearson's, in units of its standard error for independent samples."""
    a, b = (x.double() - x.double().mean() for x in (a, b))
    return (a * b).mean() / (a.std() * b.std()) * len(a) ** 0.5


def test_random_bits_are_uniform_and_unrelated(device):
    n = 1 << 18
    offs = torch.arange(n, device=device)

    def drawn(seed, number, step, stream=0):
        parameter = SimpleNamespace(number=number, shard=0)
        key = key_reference(Tensors("test", STORAGE, seed).key(parameter), step)
        hashed = _rounding.element_bits_reference(offs, key)
        return _rounding.random_bits_reference(hashed, stream)

    base = drawn(0, 0, 1)
    for stream in (0, 1):
        x = drawn(3, 1, 7, stream)
        for bit in range(16):
            z = ((x >> bit & 1).double().mean() - 0.5) * 2 * n**0.5
            assert abs(z) < 4.5
        z = (x.double().mean() - 32767.5) / (65536 / 12**0.5) * n**0.5
        assert abs(z) < 4.5
    others = [drawn(0, 0, 2), drawn(0, 1, 1), drawn(1, 0, 1), drawn(0, 0, 1, stream=1)]
    others += [base.roll(lag) for lag in (1, 2, 3, 4, 32, 128, 1024)]
    for other in others:
        assert abs(correlation(base, other)) < 4.5
        for bit in (15, 14, 8, 0):
            assert abs(correlation(base >> bit & 1, other >> bit & 1)) < 4.5
