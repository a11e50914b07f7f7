"""Prove that swiglu computes its reference and gradient, in place in a packed projection too."""

import pytest
import torch
from check import check, refuses_a_second_derivative
from halves import GRADIENTS, LAYOUTS, SHAPES, check_halves
from hypothesis import given
from hypothesis import strategies as st

from tritium.kernels._activation import _backward, _forward
from tritium.kernels.swiglu import swiglu, swiglu_reference


@given(
    **SHAPES,
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
    check_halves(swiglu, swiglu_reference, packed.to(dtype), layout, gradient)


@pytest.mark.parametrize("F", [4096, 5003])
@pytest.mark.parametrize("layout", ["separate", "packed"])
def test_rows_wider_than_a_tile(layout, F, device):
    packed = torch.randn(3, 2 * F, device=device)
    check_halves(swiglu, swiglu_reference, packed, layout, "contiguous")


@pytest.mark.parametrize("shape", [(7,), ()], ids=str)
def test_one_axis_or_none(shape, device):
    check(swiglu, swiglu_reference, *torch.randn(2, *shape, device=device))


def test_saturates_without_nan(device):
    gate = torch.tensor([-1e30, -200.0, -0.0, 200.0, 1e30], device=device)
    check(swiglu, swiglu_reference, gate, torch.ones(5, device=device))


def test_nan_and_infinity_stay_where_they_are(device):
    gate = torch.tensor([0.5, float("nan"), float("inf"), 1.0, 2.0], device=device)
    up = torch.tensor([1.0, 1.0, 1.0, float("nan"), 1.0], device=device)
    h = swiglu(gate, up)
    torch.testing.assert_close(h, swiglu_reference(gate, up), equal_nan=True)
    assert h[[0, 4]].isfinite().all()


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


def test_backward_twice_over_one_graph(device):
    gate, up = torch.randn(2, 4, 6, device=device).requires_grad_()
    h = swiglu(gate, up)
    first, second = (torch.autograd.grad(h.sum(), (gate, up), retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_an_input_changed_in_between_is_noticed(device):
    gate = torch.randn(4, 6, device=device, requires_grad=True)
    up = torch.randn(4, 6, device=device)
    h = swiglu(gate, up)
    up.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        h.sum().backward()


def test_offsets_beyond_two_to_the_31(device, monkeypatch):
    # The stride fits an int32, the last row's offset does not; the memory between is never touched.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    memory = torch.empty((1 << 31) + 80, device=device, dtype=torch.bfloat16)
    packed = memory.as_strided((3, 80), (1 << 30, 1)).copy_(torch.randn(3, 80))
    near = packed.contiguous()
    dh = packed[:, :40]
    forward = [_forward(*x.chunk(2, -1), "silu") for x in (packed, near)]
    backward = [_backward(dh, *x.chunk(2, -1), "silu") for x in (packed, near)]
    assert torch.equal(*forward)
    assert all(map(torch.equal, *backward))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_is_a_well_formed_operator(dtype, device):
    # The raw operators have no gradient: the autograd.Function around them has.
    dh, gate, up = torch.randn(3, 5, 33, device=device, dtype=dtype)
    torch.library.opcheck(_forward.overload, (gate, up, "silu"))
    torch.library.opcheck(_backward.overload, (dh, gate, up, "silu"))


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
    refuses_a_second_derivative(swiglu, gate, gate.detach().clone().requires_grad_())
    refuses_a_second_derivative(lambda x: swiglu(*x.chunk(2, -1)), gate)
