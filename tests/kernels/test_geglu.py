"""Prove that geglu computes its reference and gradient, with and without the approximation."""

from functools import partial

import pytest
import torch
from check import check, refuses_a_second_derivative
from halves import GRADIENTS, LAYOUTS, SHAPES, check_halves
from hypothesis import given
from hypothesis import strategies as st

from tritium.kernels import _activation
from tritium.kernels._activation import _backward, _forward
from tritium.kernels.geglu import ACTIVATIONS, geglu, geglu_reference

BOTH = pytest.mark.parametrize("approximate", ACTIVATIONS)


def pair(approximate):
    """The operation and its reference."""
    return (partial(f, approximate=approximate) for f in (geglu, geglu_reference))


@given(
    **SHAPES,
    approximate=st.sampled_from(list(ACTIVATIONS)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    size=st.sampled_from([0.1, 1.0, 3.0, 20.0]),
    layout=st.sampled_from(list(LAYOUTS)),
    gradient=st.sampled_from(list(GRADIENTS)),
    seed=st.integers(0, 1 << 30),
)
def test_every_layout(batch, T, F, approximate, dtype, size, layout, gradient, seed):
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    packed = torch.randn(*batch, T, 2 * F, device=device) * size
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_activation, "TILE", 512)  # the interpreter takes its time over erf
        check_halves(*pair(approximate), packed.to(dtype), layout, gradient)


@BOTH
def test_rows_wider_than_a_tile(approximate, device):
    packed = torch.randn(3, 2 * 5003, device=device)
    check_halves(*pair(approximate), packed, "packed", "contiguous")


@BOTH
def test_is_exact_in_float64(approximate, device):
    # The two references differ by up to 5e-4, and a constant of float32 precision by 1e-8.
    gate = torch.linspace(-9, 9, 4001, device=device, dtype=torch.float64, requires_grad=True)
    up = torch.full_like(gate, 1.5)
    h, expected = (f(gate, up) for f in pair(approximate))
    torch.testing.assert_close(h, expected, rtol=0, atol=1e-14)
    grads = (torch.autograd.grad(y.sum(), gate)[0] for y in (h, expected))
    torch.testing.assert_close(*grads, rtol=0, atol=1e-14)


@BOTH
def test_saturates_without_nan(approximate, device):
    # PyTorch's own gradient of the approximation is NaN at 1e30.
    gate = torch.tensor([-1e30, -200.0, 0.0, 200.0, 1e30], device=device, requires_grad=True)
    h = geglu(gate, torch.ones_like(gate), approximate=approximate)
    h.sum().backward()
    expected = torch.tensor([0.0, 0.0, 0.0, 200.0, 1e30], device=device)
    torch.testing.assert_close(h, expected, rtol=0, atol=1e-30)
    slopes = torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0], device=device)
    torch.testing.assert_close(gate.grad, slopes, rtol=0, atol=1e-30)


@BOTH
def test_nan_and_infinity_stay_where_they_are(approximate, device):
    gate = torch.tensor([0.5, float("nan"), float("inf"), 1.0, 2.0], device=device)
    up = torch.tensor([1.0, 1.0, 1.0, float("nan"), 1.0], device=device)
    h = geglu(gate, up, approximate=approximate)
    # In float32 PyTorch's own GELU of infinity is NaN or infinity, as the length of the row has it.
    expected = geglu_reference(gate.double(), up.double(), approximate=approximate)
    torch.testing.assert_close(h, expected.float(), equal_nan=True)
    gate.requires_grad_()
    geglu(gate, up, approximate=approximate).sum().backward()
    assert gate.grad[[0, 4]].isfinite().all()
    assert gate.grad[[1, 3]].isnan().all()


def test_rounds_once(device):
    gate, up = torch.randn(2, 4000, device=device).bfloat16()
    same = geglu(gate, up) == geglu_reference(gate, up)
    assert same.float().mean() > 0.99


@BOTH
def test_gradient_in_float64(approximate, device):
    gate, up = torch.randn(2, 3, 5, device=device, dtype=torch.float64).requires_grad_()
    torch.autograd.gradcheck(partial(geglu, approximate=approximate), (gate, up))


@BOTH
def test_is_a_well_formed_operator(approximate, device):
    dh, gate, up = torch.randn(3, 5, 33, device=device)
    torch.library.opcheck(_forward.overload, (gate, up, ACTIVATIONS[approximate]))
    torch.library.opcheck(_backward.overload, (dh, gate, up, ACTIVATIONS[approximate]))


@BOTH
def test_compiles_without_graph_breaks(approximate, device):
    function, reference = pair(approximate)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    check(compiled, reference, *torch.randn(2, 4, 16, device=device))


def test_autocast_leaves_dtypes_alone(device):
    gate, up = torch.randn(2, 4, 8, device=device)
    with torch.autocast(device, torch.bfloat16):
        assert geglu(gate, up).dtype == geglu_reference(gate, up).dtype == torch.float32


@pytest.mark.parametrize(
    ("gate", "up", "approximate", "message"),
    [
        (torch.ones(2, 4), torch.ones(4), "none", r"one shape, got .*\[2, 4\].* and .*\[4\]"),
        (torch.ones(4), torch.ones(4).bfloat16(), "none", "one dtype, got torch.float32 and"),
        (torch.ones(4).int(), torch.ones(4).int(), "none", "floating point, got torch.int32"),
        (torch.ones(4), torch.ones(4), "erf", '"none" or "tanh", got \'erf\''),
        (torch.ones(4), torch.ones(4), True, '"none" or "tanh", got True'),
    ],
    ids=["shape", "dtype", "integer", "approximate", "a flag"],
)
def test_refuses(gate, up, approximate, message):
    with pytest.raises(ValueError, match=f"geglu: .*{message}"):
        geglu(gate, up, approximate=approximate)


def test_refuses_a_second_derivative(device):
    gate = torch.randn(2, 8, device=device, requires_grad=True)
    refuses_a_second_derivative(geglu, gate, gate.detach().clone().requires_grad_())
    refuses_a_second_derivative(lambda x: geglu(*x.chunk(2, -1)), gate)
