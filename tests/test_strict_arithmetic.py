"""Interpreted kernels compute what a GPU would: every fix of the arithmetic has its probe."""

import warnings

import pytest
import torch
import triton
import triton.language as tl
from probe import probe

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is interpreted")


@triton.jit
def _copy(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs))


@triton.jit
def _binary(x_ptr, y_ptr, out_ptr, OP: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x, y = tl.load(x_ptr + offs), tl.load(y_ptr + offs)
    if OP == "add":
        z = x + y
    elif OP == "mul":
        z = x * y
    elif OP == "less":
        z = x < y
    elif OP == "fma":
        z = tl.fma(x, y, x)
    elif OP == "maximum":
        z = tl.maximum(x, y)
    else:
        z = tl.minimum(x, y)
    tl.store(out_ptr + offs, z)


def binary(op: str, x, y, dtype=None):
    out = torch.empty(x.shape, dtype=dtype or x.dtype)
    _binary[1,](x, y, out, OP=op, BLOCK=x.numel())
    return out


def copied(x, dtype):
    y = torch.empty(x.shape, dtype=dtype)
    _copy[1,](x, y, BLOCK=x.numel())
    return y


@probe("cast_impl")
def test_float32_rounds_to_bfloat16():
    nan = torch.tensor([-1], dtype=torch.int32).view(torch.float32)
    x = torch.cat([torch.randn(60), torch.tensor([float("inf"), -0.0, 1 + 2**-8]), nan])
    y = copied(x, torch.bfloat16)
    torch.testing.assert_close(y, x.bfloat16(), rtol=0, atol=0, equal_nan=True)


@probe("cast_impl")
def test_every_bfloat16_widens_exactly():  # without the mend, subnormal ones do not
    x = torch.arange(1 << 14, dtype=torch.int16).view(torch.bfloat16)
    assert copied(x, torch.float64).equal(x.double())


@probe("cast_impl")
def test_integers_become_bfloat16():
    x = torch.randint(-1000, 1000, (64,), dtype=torch.int32)
    assert copied(x, torch.bfloat16).equal(x.bfloat16())


@probe("binary_op")
def test_bfloat16_adds_multiplies_compares_as_in_torch():
    x, y = torch.randn(2, 256).bfloat16()
    assert binary("add", x, y).equal(x + y)
    assert binary("mul", x, y).equal(x * y)
    assert binary("less", x, y, torch.bool).equal(x < y)


@probe("create_fma")
def test_bfloat16_fma_rounds_once():
    x, y = torch.randn(2, 64).bfloat16()
    assert binary("fma", x, y).equal((x.float() * y.float() + x.float()).bfloat16())


@triton.jit
def _constant(y_ptr, dtype: tl.constexpr):
    tl.store(y_ptr + tl.arange(0, 4), tl.full((4,), 1.3, dtype))


@probe("get_bf16")
def test_bfloat16_constants_exist():
    y = torch.empty(4, dtype=torch.bfloat16)
    _constant[1,](y, tl.bfloat16)
    assert y.equal(torch.full((4,), 1.3, dtype=torch.bfloat16))


@triton.jit
def _dot(x_ptr, y_ptr, out_ptr):
    offs = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)
    tl.store(out_ptr + offs, tl.dot(tl.load(x_ptr + offs), tl.load(y_ptr + offs)))


@probe("create_dot")
def test_bfloat16_dot_accumulates_in_float32():
    x, y = torch.randint(-9, 9, (2, 16, 16)).bfloat16()
    out = torch.empty(16, 16)
    _dot[1,](x, y, out)
    assert out.equal(x.float() @ y.float())


@triton.jit
def _reduce(x_ptr, y_ptr, OP: tl.constexpr, AXIS: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, 8)[:, None] * 8 + tl.arange(0, 8))
    y = tl.sum(x, AXIS, keep_dims=True) if OP == "sum" else tl.max(x, AXIS, keep_dims=True)
    tl.store(y_ptr + tl.arange(0, y.shape[0])[:, None] + tl.arange(0, y.shape[1]), y)


@probe("sum")
def test_bfloat16_sums_round_every_partial_sum():
    x = torch.randn(8, 8).bfloat16()
    for axis in (0, 1):
        y = torch.empty(8, dtype=torch.bfloat16)
        _reduce[1,](x, y, OP="sum", AXIS=axis)
        half = sum(x.split(4, axis))
        quarter = sum(half.split(2, axis))
        assert y.equal(sum(quarter.split(1, axis)).flatten())


@probe("min_max")
def test_a_row_of_nan_has_a_quiet_maximum():
    y = torch.empty(8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _reduce[1,](torch.full((8, 8), float("nan")), y, OP="max", AXIS=1)
    assert y.isnan().all()


@probe("create_maxnumf")
def test_the_maximum_with_nan_is_the_number():
    x, nan = torch.randn(8), torch.full((8,), float("nan"))
    assert binary("maximum", x, nan).equal(x)


@probe("create_minnumf")
def test_the_minimum_with_nan_is_the_number():
    x, nan = torch.randn(8), torch.full((8,), float("nan"))
    assert binary("minimum", x, nan).equal(x)


@triton.jit
def _scale(x_ptr, scale, negate):
    tl.store(x_ptr, tl.load(x_ptr) * tl.where(negate, -scale, scale))


@probe("_implicit_cvt")
def test_float_arguments_are_float32_and_bools_are_taken():
    x = torch.ones(1, dtype=torch.float64)
    _scale[1,](x, 0.1, True)
    assert x.equal(-torch.tensor([0.1]).double())


@triton.jit
def _far(y_ptr, start, D, TL: tl.constexpr):
    start = start.to(tl.int64)
    if TL:
        for t in tl.range(start, start + 1, step=2, num_stages=2):
            tl.store(y_ptr, t * D)
    else:
        for t in range(start, start + 1):
            tl.store(y_ptr, t * D)


def far(**options):
    y = torch.zeros(1, dtype=torch.int64)
    _far[1,](y, 1 << 20, 1 << 12, **options)
    assert y.item() == 1 << 32


@probe("visit_Name")
def test_a_loop_over_int64_is_int64():
    far(TL=False)


@probe("_patch_lang_core")
def test_a_tl_range_over_int64_is_int64():
    far(TL=True)


@probe("__call__")
def test_an_overflowing_float_is_inf_and_no_warning():
    x = torch.full((1,), 1e30)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _scale[1,](x, 1e30, False)
    assert x.isposinf()
