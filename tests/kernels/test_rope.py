"""Prove that rope rotates as Llama does, from any strides, and that its gradient rotates back."""

import pytest
import torch
from check import check
from hypothesis import given
from hypothesis import strategies as st

from kernels.rope import _backward, _forward, rope, rope_reference

# The shape of a leaf, and the view [..., L, H, K] of it that is rotated.
LAYOUTS = {
    "contiguous": lambda L, H, K: ((L, H, K), lambda x: x),
    "packed": lambda L, H, K: (
        (L, H * K + 8),
        lambda x: x[..., 3 : 3 + H * K].unflatten(-1, (H, K)),
    ),
    "heads first": lambda L, H, K: ((H, L, K), lambda x: x.transpose(-3, -2)),
    "every other feature": lambda L, H, K: ((L, H, 2 * K), lambda x: x[..., ::2]),
    "expanded heads": lambda L, H, K: (
        (L, 1, K),
        lambda x: x.expand(*x.shape[:-2], H, K),
    ),
}
GRADIENTS = {
    "contiguous": lambda dy: dy,
    "heads first": lambda dy: dy.transpose(-3, -2).contiguous().transpose(-3, -2),
    "expanded along K": lambda dy: dy[..., :1].expand_as(dy),
    "expanded along L": lambda dy: dy[..., :1, :, :].expand_as(dy),
}


def laid_out(y, gradient):
    """`y`, whose gradient arrives in the strides of `gradient`."""
    if y.requires_grad:
        y.register_hook(GRADIENTS[gradient])
    return y


def tables(L, K, device):
    """Cosines and sines as a model makes them."""
    frequency_J = 10000.0 ** (-torch.arange(0, K, 2, device=device) / K)
    angle_LJ = torch.arange(L, device=device)[:, None] * frequency_J
    return angle_LJ.cos(), angle_LJ.sin()


@given(
    batch=st.lists(st.integers(0, 2), max_size=2),
    L=st.integers(0, 20),
    H=st.integers(1, 6),
    J=st.integers(1, 40),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    layout=st.sampled_from(list(LAYOUTS)),
    gradient=st.sampled_from(list(GRADIENTS)),
    seed=st.integers(0, 1 << 30),
)
def test_every_layout(batch, L, H, J, dtype, layout, gradient, seed):
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape, view = LAYOUTS[layout](L, H, 2 * J)
    leaf = torch.randn(*batch, *shape, device=device, dtype=dtype)
    cos, sin = tables(L, 2 * J, device)

    def of(f):  # a view of a leaf, so that no copy hides a stride
        return lambda x: laid_out(f(view(x), cos, sin), gradient)

    check(of(rope), of(rope_reference), leaf)


@pytest.mark.parametrize("shape", [(2, 700, 3, 64), (2, 5, 40, 256)], ids=str)
def test_more_than_a_tile(shape, device):
    cos, sin = tables(shape[-3], shape[-1], device)
    check(rope, rope_reference, torch.randn(shape, device=device), cos, sin, needs_grad=[0])


def test_is_the_rotation_of_llama(device):
    # One pair (k, k + K/2) as a complex number, turned by multiplication.
    x = torch.randn(5, 2, 8, device=device, dtype=torch.float64)
    cos, sin = tables(5, 8, device)
    turned = torch.complex(x[..., :4], x[..., 4:]) * torch.complex(cos, sin)[:, None]
    expected = torch.cat([turned.real, turned.imag], dim=-1)
    for f in (rope, rope_reference):
        torch.testing.assert_close(f(x, cos, sin), expected)


def test_slices_of_one_table_serve_later_positions(device):
    x = torch.randn(1, 6, 2, 8, device=device)
    cos, sin = tables(6, 8, device)
    assert torch.equal(rope(x, cos, sin)[:, 4:], rope(x[:, 4:], cos[4:], sin[4:]))


def test_tables_need_not_be_contiguous(device):
    x = torch.randn(4, 2, 8, device=device)
    cos, sin = tables(4, 8, device)
    packed = torch.cat([cos, sin], dim=-1)
    assert torch.equal(rope(x, packed[:, :4], packed[:, 4:]), rope(x, cos, sin))


def test_gradient_in_float64(device):
    x = torch.randn(3, 2, 4, device=device, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(rope, (x, *tables(3, 4, device)))


def test_offsets_beyond_two_to_the_31(device, monkeypatch):
    # The stride fits an int32, the last row's offset does not; the memory between is never touched.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    memory = torch.empty((1 << 31) + 16, device=device, dtype=torch.bfloat16)
    cos, sin = tables(3, 16, device)
    for shape in [(3, 1, 1, 16), (1, 3, 1, 16)]:
        far = memory.as_strided(shape, (1 << 30, 1 << 30, 1 << 30, 1)).copy_(torch.randn(shape))
        cos_LJ, sin_LJ = cos[: shape[1]], sin[: shape[1]]
        for f in (_forward, _backward):
            assert torch.equal(f(far, cos_LJ, sin_LJ), f(far.contiguous(), cos_LJ, sin_LJ))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_is_a_well_formed_operator(dtype, device):
    # The raw operators have no gradient of their own: the autograd.Function around them has.
    x = torch.randn(2, 5, 3, 12, device=device, dtype=dtype)
    torch.library.opcheck(_forward, (x, *tables(5, 12, device)))
    torch.library.opcheck(_backward, (x, *tables(5, 12, device)))


def test_compiles_without_graph_breaks(device):
    compiled = torch.compile(rope, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 5, 3, 8, device=device)
    check(compiled, rope_reference, x, *tables(5, 8, device), needs_grad=[0])


def test_autocast_leaves_dtypes_alone(device):
    x, (cos, sin) = torch.randn(2, 1, 8, device=device), tables(2, 8, device)
    with torch.autocast(device, torch.bfloat16):
        assert rope(x, cos, sin).dtype == rope_reference(x, cos, sin).dtype == torch.float32


X, TABLE = torch.ones(2, 3, 4), torch.ones(2, 2)


@pytest.mark.parametrize(
    ("x", "cos", "sin", "message"),
    [
        (X[..., :3], TABLE, TABLE, r"K even, got torch.float32 \[2, 3, 3\]"),
        (X[0], TABLE, TABLE, r"\[..., L, H, K\] with K even, got torch.float32 \[3, 4\]"),
        (X.int(), TABLE, TABLE, "must be floating point .*, got torch.int32"),
        (X, TABLE[:1], TABLE, r"cos must be \[2, 2\], got \[1, 2\]"),
        (X, TABLE, torch.ones(2, 4), r"sin must be \[2, 2\], got \[2, 4\]"),
        (X, TABLE, TABLE.bfloat16(), "sin must be float32, got torch.bfloat16; keep"),
        (X, TABLE.to("meta"), TABLE, "cos must be on cpu, got meta"),
        (X, TABLE, TABLE.clone().requires_grad_(), "sin has no gradient, .* detach it"),
    ],
    ids=["odd", "two axes", "integer", "short", "wide", "bfloat16", "device", "gradient"],
)
def test_refuses(x, cos, sin, message):
    with pytest.raises(ValueError, match=f"rope: .*{message}"):
        rope(x, cos, sin)


def test_refuses_a_second_derivative(device):
    x = torch.randn(2, 1, 8, device=device, requires_grad=True)
    (dx,) = torch.autograd.grad(rope(x, *tables(2, 8, device)).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivative only"):
        dx.sum().backward()
