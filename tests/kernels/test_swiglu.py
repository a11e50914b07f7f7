"""Prove that swiglu computes its definition and gradient, in place in a packed projection too."""

import pytest
import torch
from check import check
from hypothesis import given
from hypothesis import strategies as st

from kernels.swiglu import _backward, _forward, swiglu, swiglu_reference

LAYOUTS = {
    "separate": lambda packed: [half.contiguous() for half in packed.chunk(2, -1)],
    "packed": lambda packed: packed.chunk(2, -1),
    "interleaved": lambda packed: (packed[..., ::2], packed[..., 1::2]),
    "transposed": lambda packed: [half.mT for half in packed.chunk(2, -1)],
    "mixed": lambda packed: (packed.chunk(2, -1)[0], packed.chunk(2, -1)[1].contiguous()),
}
GRADIENTS = {
    "contiguous": lambda dy: dy,
    "transposed": lambda dy: dy.mT.contiguous().mT,
    "expanded along F": lambda dy: dy[..., :1].expand_as(dy),
    "expanded along T": lambda dy: dy[..., :1, :].expand_as(dy),
}


def laid_out(y, gradient):
    """`y`, whose gradient arrives in the strides of `gradient`."""
    if y.requires_grad:
        y.register_hook(GRADIENTS[gradient])
    return y


def check_layout(packed, layout, gradient):
    """Hold kernel and definition together on views of one leaf, so that no copy hides a stride."""

    def of(f):
        return lambda packed: laid_out(f(*LAYOUTS[layout](packed)), gradient)

    check(of(swiglu), of(swiglu_reference), packed)


@given(
    batch=st.lists(st.integers(0, 3), max_size=2),
    T=st.integers(0, 9),
    F=st.integers(0, 300),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    size=st.sampled_from([0.1, 3.0, 20.0]),
    layout=st.sampled_from(list(LAYOUTS)),
    gradient=st.sampled_from(list(GRADIENTS)),
    seed=st.integers(0, 1 << 30),
)
def test_every_layout(batch, T, F, dtype, size, layout, gradient, seed):
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    packed = torch.randn(*batch, T, 2 * F, device=device) * size
    check_layout(packed.to(dtype), layout, gradient)


@pytest.mark.parametrize("layout", ["separate", "packed"])
def test_rows_wider_than_a_tile(layout, device):
    check_layout(torch.randn(3, 2 * 5003, device=device), layout, "contiguous")


def test_one_axis(device):
    check(swiglu, swiglu_reference, *torch.randn(2, 7, device=device))


def test_saturates_without_nan(device):
    gate = torch.tensor([-1e30, -200.0, -0.0, 200.0, 1e30], device=device)
    check(swiglu, swiglu_reference, gate, torch.ones(5, device=device))


def test_rounds_once(device):
    # Rounding silu before the product would change one value in four.
    gate, up = torch.randn(2, 4000, device=device).bfloat16()
    same = swiglu(gate, up) == swiglu_reference(gate, up)
    assert same.float().mean() > 0.99


def test_gradient_in_float64(device):
    gate, up = torch.randn(2, 3, 5, device=device, dtype=torch.float64).requires_grad_()
    torch.autograd.gradcheck(swiglu, (gate, up))


@pytest.mark.parametrize("wanted", [0, 1])
def test_one_input_alone_takes_a_gradient(wanted, device):
    inputs = torch.randn(2, 4, 6, device=device)
    check(swiglu, swiglu_reference, *inputs, needs_grad=[wanted])


def test_offsets_beyond_two_to_the_31(device, monkeypatch):
    # The stride fits an int32, the last row's offset does not; the memory between is never touched.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    memory = torch.empty((1 << 31) + 80, device=device, dtype=torch.bfloat16)
    packed = memory.as_strided((3, 80), (1 << 30, 1)).copy_(torch.randn(3, 80))
    near = packed.contiguous()
    dh = packed[:, :40]
    assert torch.equal(_forward(*packed.chunk(2, -1)), _forward(*near.chunk(2, -1)))
    gradients = _backward(dh, *packed.chunk(2, -1)), _backward(dh, *near.chunk(2, -1))
    assert all(torch.equal(far, near) for far, near in zip(*gradients, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_is_a_well_formed_operator(dtype, device):
    # The raw operators have no gradient of their own: the autograd.Function around them has.
    dh, gate, up = torch.randn(3, 5, 33, device=device, dtype=dtype)
    torch.library.opcheck(_forward, (gate, up))
    torch.library.opcheck(_backward, (dh, gate, up))


def test_compiles_without_graph_breaks(device):
    compiled = torch.compile(swiglu, fullgraph=True, backend="aot_eager")
    check(compiled, swiglu_reference, *torch.randn(2, 4, 16, device=device))


def test_autocast_leaves_dtypes_alone(device):
    gate, up = torch.randn(2, 4, 8, device=device)
    with torch.autocast(device, torch.bfloat16):
        assert swiglu(gate, up).dtype == swiglu_reference(gate, up).dtype == torch.float32


@pytest.mark.parametrize(
    ("gate", "up", "message"),
    [
        (torch.ones(2, 4), torch.ones(2, 1), r"one shape, got .*\[2, 4\].* and .*\[2, 1\]"),
        (torch.ones(4), torch.ones(4).bfloat16(), "one dtype, got torch.float32 and"),
        (torch.ones(4), torch.ones(4, device="meta"), "one device, got cpu and meta"),
        (torch.ones(4).int(), torch.ones(4).int(), "floating point, got torch.int32"),
    ],
    ids=["shape", "dtype", "device", "integer"],
)
def test_refuses(gate, up, message):
    with pytest.raises(ValueError, match=f"swiglu: .*{message}"):
        swiglu(gate, up)


def test_refuses_a_second_derivative(device):
    gate = torch.randn(2, 8, device=device, requires_grad=True)
    (dgate,) = torch.autograd.grad(swiglu(gate, gate).sum(), gate, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivative only"):
        dgate.sum().backward()
