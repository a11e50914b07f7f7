"""Prove that a gradient is scaled in one pass, in place, and not at all by 1."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tritium.kernels import _scale_gradient, runtime
from tritium.kernels._scale_gradient import scale_gradient, scale_gradient_

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@given(
    N=st.one_of(st.integers(0, 70), st.integers(4090, 13_000)),
    dtype=st.sampled_from(DTYPES),
    out=st.sampled_from(DTYPES),
    factor=st.sampled_from([1.0, 0.3, -3.0, 0.0]),
    programs=st.sampled_from([1, 2, 1024]),
    reference=st.booleans(),
    offset=st.integers(0, 1),
    seed=st.integers(0, 1 << 30),
)
def test_is_the_product_rounded_once(N, dtype, out, factor, programs, reference, offset, seed):
    """Either way equals the product in float32 (float64), for any size, tail and alignment."""
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.randn(N + offset, device=device).to(dtype)[offset:]
    wide = torch.promote_types(dtype, torch.float32)
    if dtype == torch.float64:  # PyTorch rounds from there to 16 bits by way of float32
        out = torch.promote_types(out, torch.float32)
    factor = torch.tensor(factor, device=device, dtype=wide)
    expected = x.to(wide) * factor
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_scale_gradient, "P_MAX", programs)
        patch.setattr(runtime, "_fallen", frozenset({"cross_entropy"} if reference else ()))
        copy = scale_gradient(x, factor, out)
        scale_gradient_(x, factor)
    assert torch.equal(copy, expected.to(out))
    assert torch.equal(x, expected.to(dtype))


def test_a_factor_of_1_writes_nothing(device):
    """A signalling nan would become quiet if it were multiplied by 1."""
    bits = torch.full((5000,), 0x7F800001, dtype=torch.int32, device=device)
    x = bits.view(torch.float32)
    scale_gradient_(x, torch.ones((), device=device))
    assert (x.view(torch.int32) == 0x7F800001).all()
    scale_gradient_(x, torch.full((), torch.nan, device=device))
    assert x.isnan().all()


def test_is_a_well_formed_operator(device):
    """Both tell what they overwrite and what they return."""
    x, factor = torch.randn(3, 5, device=device), torch.rand((), device=device)
    torch.library.opcheck(scale_gradient_.overload, (x, factor))
    torch.library.opcheck(scale_gradient.overload, (x, factor, torch.bfloat16))
