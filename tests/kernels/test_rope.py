"""Prove that rope rotates as Llama does, from any strides, and that its gradient rotates back."""

from functools import partial

import pytest
import torch
from check import check, refuses_a_second_derivative
from hypothesis import given
from hypothesis import strategies as st

from tritium.kernels.rope import _backward, _forward, _inplace, rope, rope_reference

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
    """Return `y`; its gradient arrives in the strides of `gradient`."""
    if y.requires_grad:
        y.register_hook(GRADIENTS[gradient])
    return y


def tables(L, K, device):
    """Cosines and sines as a model makes them."""
    frequency_J = 10000.0 ** (-torch.arange(0, K, 2, device=device) / K)
    angle_LJ = torch.arange(L, device=device)[:, None] * frequency_J
    return angle_LJ.cos(), angle_LJ.sin()


def offsets(kind, batch, device):
    """A number, or a tensor of the dtype `kind` for sequences of the axes `batch`; below 10."""
    if isinstance(kind, int):
        return kind
    return torch.randint(0, 10, batch, device=device, dtype=kind)


@given(
    batch=st.lists(st.integers(0, 2), max_size=2),
    L=st.integers(0, 20),
    H=st.integers(1, 6),
    J=st.integers(1, 40),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    layout=st.sampled_from(list(LAYOUTS)),
    gradient=st.sampled_from(list(GRADIENTS)),
    offset=st.sampled_from([0, 7, torch.int64, torch.int32, torch.uint8]),
    interleaved=st.booleans(),
    inplace=st.booleans(),
    seed=st.integers(0, 1 << 30),
)
def test_every_layout(batch, L, H, J, dtype, layout, gradient, offset, interleaved, inplace, seed):
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape, view = LAYOUTS[layout](L, H, 2 * J)
    leaf = torch.randn(*batch, *shape, device=device, dtype=dtype)
    cos, sin = tables(L + 10, 2 * J, device)
    options = {"offset": offsets(offset, batch, device), "interleaved": interleaved}
    inplace = inplace and layout != "expanded heads"

    def reference(x):  # a view of a leaf, so that no copy hides a stride
        return laid_out(rope_reference(view(x), cos, sin, **options), gradient)

    def kernel(x):
        x = view(x.clone() if inplace else x)
        return laid_out(rope(x, cos, sin, inplace=inplace, **options), gradient)

    check(kernel, reference, leaf)


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


def test_interleaved_is_the_rotation_of_the_paper(device):
    x = torch.randn(5, 2, 8, device=device, dtype=torch.float64)
    cos, sin = tables(5, 8, device)
    turned = torch.view_as_complex(x.unflatten(-1, (4, 2))) * torch.complex(cos, sin)[:, None]
    for f in (rope, rope_reference):
        result = f(x, cos, sin, interleaved=True)
        torch.testing.assert_close(result, torch.view_as_real(turned).flatten(-2))


def test_offset_is_a_slice_of_the_tables(device):
    x = torch.randn(1, 6, 2, 8, device=device)
    cos, sin = tables(6, 8, device)
    later = rope(x, cos, sin)[:, 4:]
    assert torch.equal(later, rope(x[:, 4:], cos[4:], sin[4:]))
    assert torch.equal(later, rope(x[:, 4:], cos, sin, offset=4))
    assert torch.equal(later, rope(x[:, 4:], cos, sin, offset=torch.tensor([4], device=device)))


def test_sequences_begin_at_their_own_positions(device):
    x = torch.randn(3, 4, 2, 8, device=device)
    cos, sin = tables(20, 8, device)
    starts = torch.tensor([[0, 1], [16, 1], [5, 1]], device=device)[:, 0]
    together = rope(x, cos, sin, offset=starts)
    alone = [rope(x[b], cos, sin, offset=n) for b, n in enumerate((0, 16, 5))]
    assert torch.equal(together, torch.stack(alone))


@pytest.mark.parametrize("function", [rope, rope_reference])
def test_positions_outside_the_tables_give_nan(function, device):
    x = torch.ones(4, 3, 1, 2, device=device, requires_grad=True)
    outside = torch.tensor([-1, 0, 4, (1 << 63) - 2], device=device)
    y = function(x, *tables(5, 2, device), offset=outside)
    y.sum().backward()
    expected = [[True, False, False], [False] * 3, [False, True, True], [True] * 3]
    for result in (y, x.grad):
        assert result.isnan().all(-1).squeeze(-1).tolist() == expected
        assert result.isnan().any(-1).squeeze(-1).tolist() == expected


def test_nan_stays_in_its_pair(device):
    x = torch.ones(3, 2, 8, device=device)
    x[1, 0, 2] = float("nan")
    for interleaved, pair in ((False, [2, 6]), (True, [2, 3])):
        y = rope(x, *tables(3, 8, device), interleaved=interleaved)
        assert y.isnan().nonzero().tolist() == [[1, 0, k] for k in pair]


def packed_projection(device, **options):
    """`[B, L, H + 2G, K]` of two queries and one key, which are to be rotated, and a value."""
    return torch.randn(2, 5, 4, 8, device=device, **options)


@pytest.mark.parametrize("interleaved", [False, True])
def test_inplace_leaves_the_value_alone(interleaved, device):
    qkv, angles = packed_projection(device), tables(5, 8, device)
    before, version = qkv.clone(), qkv._version
    qk = qkv[:, :, :3]
    result = rope(qk, *angles, inplace=True, interleaved=interleaved)
    assert result is qk
    assert qkv._version > version
    assert torch.equal(qk, rope(before[:, :, :3], *angles, interleaved=interleaved))
    assert torch.equal(qkv[:, :, 3:], before[:, :, 3:])


def test_inplace_gradient_reaches_all_of_the_projection(device):
    leaf, angles = packed_projection(device)[:, :2].double(), tables(2, 8, device)

    def inplace(leaf):
        qkv = 2 * leaf
        rope(qkv[:, :, :-1], *angles, inplace=True)
        return qkv

    def reference(leaf):
        qkv = 2 * leaf
        return torch.cat([rope_reference(qkv[:, :, :-1], *angles), qkv[:, :, -1:]], dim=2)

    check(inplace, reference, leaf)
    torch.autograd.gradcheck(inplace, leaf[:1, :, 1:].clone().requires_grad_())


def test_inplace_is_noticed_where_the_old_value_is_needed(device):
    qkv = packed_projection(device, requires_grad=True) * 1
    loss = qkv.square().sum()
    rope(qkv[:, :, :3], *tables(5, 8, device), inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inplace_gradient_is_not_written_into(device):
    x = packed_projection(device, requires_grad=True)
    y = rope(x * 1, *tables(5, 8, device), inplace=True)
    dy = torch.randn_like(y)
    before = dy.clone()
    first, second = (torch.autograd.grad(y, x, dy, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(dy, before)
    assert torch.equal(first, second)


def test_result_may_be_changed(device):
    x = packed_projection(device, requires_grad=True)
    rope(x, *tables(5, 8, device)).mul_(2).sum().backward()


def test_tables_need_not_be_contiguous(device):
    x = torch.randn(4, 2, 8, device=device)
    cos, sin = tables(4, 8, device)
    packed = torch.cat([cos, sin], dim=-1)
    assert torch.equal(rope(x, packed[:, :4], packed[:, 4:]), rope(x, cos, sin))


def test_gradient_in_float64(device):
    x = torch.randn(3, 2, 4, device=device, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(rope, (x, *tables(3, 4, device)))
    interleaved = partial(rope, interleaved=True, offset=2)
    torch.autograd.gradcheck(interleaved, (x, *tables(5, 4, device)))


def test_offsets_beyond_two_to_the_31(device, monkeypatch):
    # The stride fits an int32, the last row's offset does not; the memory between is never touched.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    memory = torch.empty((1 << 31) + 16, device=device, dtype=torch.bfloat16)
    cos, sin = tables(3, 16, device)
    for shape in [(3, 1, 1, 16), (1, 3, 1, 16)]:
        far = memory.as_strided(shape, (1 << 30, 1 << 30, 1 << 30, 1)).copy_(torch.randn(shape))
        angles = cos[: shape[1]], sin[: shape[1]], None, False
        for f in (_forward, _backward):
            assert torch.equal(f(far, *angles), f(far.contiguous(), *angles))
        expected = _forward(far.contiguous(), *angles)
        _inplace(far, *angles)
        assert torch.equal(far, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_is_a_well_formed_operator(dtype, device):
    # The raw operators have no gradient: the autograd.Function around them has.
    x = torch.randn(2, 5, 3, 12, device=device, dtype=dtype)
    cos, sin = tables(9, 12, device)
    offset = torch.tensor([4, 0], device=device)
    for arguments in ((cos, sin, None, False), (cos, sin, offset, True)):
        for f in (_forward, _backward, _inplace):
            torch.library.opcheck(f.overload, (x, *arguments))


def test_compiles_without_graph_breaks(device):
    compiled = torch.compile(rope, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 5, 3, 8, device=device)
    check(compiled, rope_reference, x, *tables(5, 8, device), needs_grad=[0])


@pytest.mark.parametrize("offset", [1, torch.tensor([1, 3])], ids=["number", "tensor"])
def test_compiles_with_its_options(offset, device):
    offset = offset.to(device) if isinstance(offset, torch.Tensor) else offset
    angles, options = tables(8, 8, device), {"offset": offset, "interleaved": True}

    def inplace(x):
        x = x * 1
        rope(x[:, :, :2], *angles, inplace=True, **options)
        return x

    def reference(x):
        return torch.cat([rope_reference(x[:, :, :2], *angles, **options), x[:, :, 2:]], dim=2)

    compiled = torch.compile(inplace, fullgraph=True, backend="aot_eager")
    check(compiled, reference, torch.randn(2, 5, 3, 8, device=device))


def test_autocast_leaves_dtypes_alone(device):
    x, (cos, sin) = torch.randn(2, 1, 8, device=device), tables(2, 8, device)
    with torch.autocast(device, torch.bfloat16):
        assert rope(x, cos, sin).dtype == rope_reference(x, cos, sin).dtype == torch.float32


X, TABLE = torch.ones(2, 3, 4), torch.ones(2, 2)
NUMBER = r"offset must be integers \[\] on cpu, got"


@pytest.mark.parametrize(
    ("x", "cos", "sin", "options", "message"),
    [
        (X[..., :3], TABLE, TABLE, {}, r"K even, got torch.float32 \[2, 3, 3\]"),
        (X[0], TABLE, TABLE, {}, r"\[..., L, H, K\] with K even, got torch.float32 \[3, 4\]"),
        (X.int(), TABLE, TABLE, {}, "must be floating point .*, got torch.int32"),
        (X, TABLE[:1], TABLE, {}, r"cos must be \[2 or more, 2\], got \[1, 2\]"),
        (X, TABLE, torch.ones(2, 4), {}, r"sin must be \[2 or more, 2\], got \[2, 4\]"),
        (X, TABLE, torch.ones(3, 2), {}, r"one shape, got \[2, 2\] and \[3, 2\]"),
        (X, TABLE, TABLE.bfloat16(), {}, "sin must be float32, got torch.bfloat16; keep"),
        (X, TABLE.to("meta"), TABLE, {}, "cos must be on cpu, got meta"),
        (X, TABLE, TABLE.clone().requires_grad_(), {}, "sin has no gradient, .* detach it"),
        (X, TABLE, TABLE, {"offset": 1}, r"cos must be \[3 or more, 2\], got \[2, 2\]"),
        (X, TABLE, TABLE, {"offset": -1}, "offset must be at least 0, got -1"),
        (X, TABLE, TABLE, {"offset": torch.ones(1).long()}, rf"{NUMBER} torch.int64 \[1\]"),
        (X, TABLE, TABLE, {"offset": torch.tensor(1.0)}, rf"{NUMBER} torch.float32 \[\]"),
        (X, TABLE, TABLE, {"offset": torch.tensor(True)}, rf"{NUMBER} torch.bool \[\]"),
        (X, TABLE, TABLE, {"offset": torch.ones(1).int()[0].to("meta")}, rf"{NUMBER} .* on meta"),
    ],
    ids=[
        "odd", "two axes", "integer", "short", "wide", "unequal", "bfloat16", "device", "gradient",
        "beyond", "negative", "axes", "fraction", "truth", "offset elsewhere",
    ],
)  # fmt: skip
def test_refuses(x, cos, sin, options, message):
    with pytest.raises(ValueError, match=f"rope: .*{message}"):
        rope(x, cos, sin, **options)


def test_refuses_to_overwrite_a_parameter_or_an_expanded_tensor(device):
    leaf = torch.ones(2, 3, 4, device=device, requires_grad=True)
    angles = [TABLE.to(device)] * 2
    for x in (leaf, leaf[:, :2]):
        with pytest.raises(ValueError, match="rope: inplace=True must not overwrite a leaf"):
            rope(x, *angles, inplace=True)
    assert (leaf == 1).all()
    with torch.no_grad():
        rope(leaf, *angles, inplace=True)
    with pytest.raises(ValueError, match="rope: an expanded x cannot be overwritten"):
        rope(leaf.detach()[:, :1].expand(2, 3, 4), *angles, inplace=True)
    for shape in ((3, 0, 1, 4), (0, 2, 1, 4), (2, 2, 0, 4)):
        empty = torch.zeros(shape, device=device) * 1  # PyTorch strides some of them by 0
        assert rope(empty, *angles, inplace=True) is empty


def test_refuses_a_second_derivative(device):
    x = torch.randn(2, 1, 8, device=device, requires_grad=True)
    angles = tables(2, 8, device)
    refuses_a_second_derivative(lambda x: rope(x, *angles), x, linear=True)
    # Of a turn itself it is 0: nothing has to be refused.
    (dx,) = torch.autograd.grad(rope(x, *angles).sum(), x, create_graph=True)
    assert not dx.requires_grad
