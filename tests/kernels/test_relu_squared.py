"""Prove that relu_squared computes its reference and gradient, from any strides."""

import pytest
import torch
from check import check, refuses_a_second_derivative
from halves import GRADIENTS, SHAPES, laid_out
from hypothesis import given
from hypothesis import strategies as st

from tritium.kernels._activation import _backward, _forward
from tritium.kernels.relu_squared import relu_squared, relu_squared_reference

VIEWS = {
    "contiguous": lambda x: x,
    "half of a row": lambda x: x[..., : x.shape[-1] // 2],
    "every other feature": lambda x: x[..., 1::2],
    "transposed": lambda x: x.mT,
    "expanded": lambda x: x[..., :1, :].expand_as(x),
}


@given(
    **SHAPES,
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    size=st.sampled_from([0.1, 3.0, 100.0]),
    view=st.sampled_from(list(VIEWS)),
    gradient=st.sampled_from(list(GRADIENTS)),
    seed=st.integers(0, 1 << 30),
)
def test_every_layout(batch, T, F, dtype, size, view, gradient, seed):
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = (torch.randn(*batch, T, F, device=device) * size).clamp(-200, 200).to(dtype)

    def of(f):  # a view of a leaf, so that no copy hides a stride
        return lambda x: laid_out(f(VIEWS[view](x)), gradient)

    check(of(relu_squared), of(relu_squared_reference), x)


@pytest.mark.parametrize("shape", [(3, 5003), (7,), ()], ids=str)
def test_more_than_a_tile_or_less_than_a_row(shape, device):
    check(relu_squared, relu_squared_reference, torch.randn(shape, device=device))


def test_zero_has_no_slope(device):
    x = torch.tensor([-1e30, -1.0, -0.0, 0.0, 1e15], device=device)
    check(relu_squared, relu_squared_reference, x)


def test_nan_and_infinity_stay_where_they_are(device):
    x = torch.tensor([float("nan"), -float("inf"), float("inf"), 1e30, 3.0], device=device)
    x.requires_grad_()
    h, expected = relu_squared(x), relu_squared_reference(x)
    torch.testing.assert_close(h, expected, equal_nan=True)
    grads = (torch.autograd.grad(y.sum(), x)[0] for y in (h, expected))
    torch.testing.assert_close(*grads, equal_nan=True)


def test_rounds_once(device):
    x = torch.randn(4000, device=device).bfloat16()
    assert torch.equal(relu_squared(x), relu_squared_reference(x))


def test_gradient_in_float64(device):
    x = torch.randn(3, 5, device=device, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(relu_squared, (x,))


def test_offsets_beyond_two_to_the_31(device, monkeypatch):
    # The stride fits an int32, the last row's offset does not; the memory between is never touched.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    memory = torch.empty((1 << 31) + 40, device=device, dtype=torch.bfloat16)
    far = memory.as_strided((3, 40), (1 << 30, 1)).copy_(torch.randn(3, 40))
    near = far.contiguous()
    assert torch.equal(*(_forward(x, None, "relu_squared") for x in (far, near)))
    assert torch.equal(*(_backward(x, x, None, "relu_squared")[0] for x in (far, near)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_is_a_well_formed_operator(dtype, device):
    dh, x = torch.randn(2, 5, 33, device=device, dtype=dtype)
    torch.library.opcheck(_forward.overload, (x, None, "relu_squared"))
    torch.library.opcheck(_backward.overload, (dh, x, None, "relu_squared"))


def test_compiles_without_graph_breaks(device):
    compiled = torch.compile(relu_squared, fullgraph=True, backend="aot_eager")
    check(compiled, relu_squared_reference, torch.randn(4, 16, device=device))


def test_autocast_leaves_dtypes_alone(device):
    x = torch.randn(4, 8, device=device)
    with torch.autocast(device, torch.bfloat16):
        assert relu_squared(x).dtype == relu_squared_reference(x).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64], ids=str)
def test_refuses(dtype):
    with pytest.raises(ValueError, match=f"relu_squared: x must be floating point, got {dtype}"):
        relu_squared(torch.ones(4, dtype=dtype))


def test_refuses_a_second_derivative(device):
    x = torch.randn(2, 8, device=device, requires_grad=True)
    refuses_a_second_derivative(relu_squared, x)
