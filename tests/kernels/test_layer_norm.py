"""Prove that layer_norm and add_layer_norm compute their references and every gradient alone."""

from unittest import mock

import pytest
import torch
from check import check, refuses_a_second_derivative
from hypothesis import given
from hypothesis import strategies as st
from strides import GRADIENTS, STRIDES

from tritium.kernels import _norm_launch
from tritium.kernels.layer_norm import (
    add_layer_norm,
    add_layer_norm_reference,
    layer_norm,
    layer_norm_reference,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHORT_AND_LONG = pytest.mark.parametrize("longest", [64, 8192], ids=["loop", "tile"])


def over_rows(f):
    """Wrap `f` to the last axis alone."""
    return lambda x, weight, *args, **options: f(x, x.shape[-1:], weight, *args, **options)


norm, reference = over_rows(layer_norm), over_rows(layer_norm_reference)


def laid_out(y, gradient):
    """Return `y`; its gradient arrives in the strides of `gradient`."""
    y = y.view_as(y)  # which nothing else depends on
    if y.requires_grad:
        y.register_hook(GRADIENTS[gradient])
    return y


@given(
    batch=st.lists(st.integers(0, 2), max_size=2),
    T=st.integers(1, 9),
    D=st.integers(2, 300),
    dtype=st.sampled_from(DTYPES),
    parameter_dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from([None, *DTYPES])),
    stream_dtype=st.sampled_from([None, *DTYPES]),
    size=st.sampled_from([1e-2, 1.0, 50.0]),
    mean=st.sampled_from([0.0, 1.0, -3.0]),
    eps=st.sampled_from([1e-5, 1e-2]),
    longest=st.sampled_from([64, 8192]),
    strides=st.tuples(*[st.sampled_from(list(STRIDES))] * 2),
    gradients=st.tuples(*[st.sampled_from(list(GRADIENTS))] * 2),
    programs=st.sampled_from([1, 2, 512]),
    seed=st.integers(0, 1 << 30),
)
def test_every_combination_of_options(
    batch, T, D, dtype, parameter_dtypes, stream_dtype, size, mean, eps, longest, strides,
    gradients, programs, seed,
):  # fmt: skip
    """With a residual stream unless `stream_dtype` is None, and loops over more than `longest`."""
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # Neighbours are kept apart: float32 does not know the variance of a row of nearly equal ones.
    apart = 8 * (torch.arange(D, device=device) % 2)
    x = ((torch.randn(*batch, T, D, device=device) + mean + apart) * size).to(dtype)
    parameters = [torch.randn(D, device=device).to(d) for d in parameter_dtypes if d]
    # A stream in the dtype of its branch: rounding to a less precise one is not measured in x's.
    residual = torch.randn(*batch, T, D, device=device) * size
    residual = residual.to(torch.promote_types(dtype, stream_dtype or dtype))

    def alone(f):
        return lambda x, weight, bias=None: laid_out(
            f(STRIDES[strides[0]](x), weight, bias, eps), gradients[0]
        )

    def behind_a_stream(f):
        def g(x, residual, weight, bias=None):
            x, residual = STRIDES[strides[0]](x), STRIDES[strides[1]](residual)
            y, s = f(x, residual, weight, bias, eps)
            return laid_out(y, gradients[0]), laid_out(s, gradients[1])

        return g

    # Of few rows or features, gradients are small differences of numbers of this size.
    unit = 4.0 / min(1.0, size) * (1.0 if D > 8 else 30.0)
    few = {"P_MAX": programs, "P_LOOP_MAX": programs, "MAX_TILE": longest, "LOOP_BLOCK": 64}
    with mock.patch.multiple(_norm_launch, **few):
        if stream_dtype is None:
            functions = map(alone, (norm, reference))
            check(*functions, x, *parameters, unit=unit)
        else:
            functions = map(behind_a_stream, (add_layer_norm, add_layer_norm_reference))
            check(*functions, x, residual, *parameters, unit=unit)


@SHORT_AND_LONG
def test_a_large_mean_does_not_cancel(longest, device, monkeypatch):
    # In float32, mean(s²) - mean(s)² of these rows is noise.
    monkeypatch.setattr(_norm_launch, "MAX_TILE", longest)
    monkeypatch.setattr(_norm_launch, "LOOP_BLOCK", 64)
    x = torch.randn(4, 160, device=device) + 4096
    y = norm(x, None)
    expected = reference(x.double(), None)
    torch.testing.assert_close(y.double(), expected, atol=2e-3, rtol=0)


@pytest.mark.parametrize("D", [1025, 4097, 8192, 12320])
def test_wide_rows(D, device):
    x, residual = torch.randn(2, 1, D, device=device)
    weight, bias = torch.randn(2, D, device=device)
    check(add_layer_norm, add_layer_norm_reference, x, residual, weight, bias)


def test_more_rows_than_programs(device):
    x, (weight, bias) = torch.randn(90, 80, device=device), torch.randn(2, 80, device=device)
    for longest in (64, 8192):
        with mock.patch.multiple(_norm_launch, MAX_TILE=longest, P_MAX=7, P_LOOP_MAX=9):
            check(norm, reference, x, weight, bias)


def test_reference_is_the_formula(device):
    x, weight, bias = torch.randn(3, 7, 48, device=device)
    z = x - x.mean(-1, keepdim=True)
    r = (z.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    expected = z * r * weight[0] + bias[0]
    torch.testing.assert_close(reference(x, weight[0], bias[0]), expected)
    torch.testing.assert_close(norm(x, weight[0], bias[0]), expected)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("sizes", [6, (6,), [5, 6], torch.Size((4, 5, 6))], ids=str)
def test_takes_the_arguments_of_pytorch_s(sizes, dtype, device):
    tall = (sizes,) if isinstance(sizes, int) else tuple(sizes)
    x = (torch.randn(2, 4, 5, 6, device=device) * 1e-2).to(dtype)
    weight, bias = torch.randn(2, *tall, device=device).to(dtype)
    for f in (layer_norm, layer_norm_reference):
        for args in ((), (weight,), (weight, bias), (None, bias), (weight, bias, 1e-3)):
            expected = torch.nn.functional.layer_norm(x, tall, *args)
            torch.testing.assert_close(f(x, sizes, *args), expected)
        named = {"weight": weight, "bias": bias, "eps": 0.1}
        expected = torch.nn.functional.layer_norm(x, tall, **named)
        torch.testing.assert_close(f(input=x, normalized_shape=sizes, **named), expected)
    of = [lambda *xs, f=f: f(xs[0], sizes, *xs[1:]) for f in (layer_norm, layer_norm_reference)]
    check(*of, x, weight, bias, unit=1e3)  # of gradients in float64, nothing is wider
    assert torch.equal(layer_norm(x, weight, bias=bias), layer_norm(x, sizes, weight, bias))


@pytest.mark.parametrize("sizes", [5, (), (4, 3), (1, 2, 4), None, "4", 4.0], ids=repr)
def test_refuses_sizes_that_are_not_those_of_the_last_axes(sizes):
    with pytest.raises(ValueError, match=r"^layer_norm: normalized_shape must be the sizes of the"):
        layer_norm(X, sizes)


def test_refuses_a_bias_in_the_place_of_the_weight():
    with pytest.raises(ValueError, match=r"call layer_norm\(input, weight.shape, weight\)"):
        layer_norm(X, WEIGHT, WEIGHT)


@SHORT_AND_LONG
@pytest.mark.parametrize("wanted", [[0], [2], [3], [1, 3], [2, 3]], ids=str)
@pytest.mark.parametrize("outputs", [[0], [0, 1]], ids=str)
def test_any_output_gives_gradients_to_any_input(outputs, wanted, longest, device, monkeypatch):
    monkeypatch.setattr(_norm_launch, "MAX_TILE", longest)
    monkeypatch.setattr(_norm_launch, "LOOP_BLOCK", 64)
    x, residual = torch.randn(2, 3, 80, device=device)
    wanted = wanted if outputs == [0] else sorted({0, *wanted})  # s depends on x alone

    def some(f):
        return lambda *inputs: tuple(f(*inputs)[i] for i in outputs)

    functions = map(some, (add_layer_norm, add_layer_norm_reference))
    check(*functions, x, residual, *torch.randn(2, 80, device=device), needs_grad=wanted)


@SHORT_AND_LONG
@pytest.mark.parametrize("present", ["neither", "weight", "bias"])
def test_without_weight_or_bias(present, longest, device, monkeypatch):
    monkeypatch.setattr(_norm_launch, "MAX_TILE", longest)
    monkeypatch.setattr(_norm_launch, "LOOP_BLOCK", 64)
    x, residual = torch.randn(2, 5, 80, device=device)
    parameters = [] if present == "neither" else [torch.randn(80, device=device)]

    def given(f):
        return lambda *inputs: f(
            *inputs[: len(inputs) - len(parameters)],
            weight=inputs[-1] if present == "weight" else None,
            bias=inputs[-1] if present == "bias" else None,
        )

    check(given(norm), given(reference), x, *parameters)
    functions = map(given, (add_layer_norm, add_layer_norm_reference))
    check(*functions, x, residual, *parameters)


def test_stream_alone_passes_its_gradient_on(device):
    x = torch.randn(3, 6, device=device, dtype=torch.bfloat16, requires_grad=True)
    residual, ds = torch.randn(3, 6, device=device, requires_grad=True), torch.randn(3, 6)
    weight, bias = torch.randn(2, 6, device=device, requires_grad=True)
    _, s = add_layer_norm(x, residual, weight, bias)
    inputs = x, residual, weight, bias
    dx, dresidual, *others = torch.autograd.grad(s, inputs, ds.to(device), allow_unused=True)
    assert torch.equal(dx, ds.to(dx))
    assert torch.equal(dresidual, ds.to(device))
    assert all(other is None or (other == 0).all() for other in others)


def test_the_norm_is_that_of_the_rounded_sum(device):
    x, residual = torch.randn(2, 4, 64, device=device)
    y, s = add_layer_norm(x, residual.bfloat16(), None)
    assert torch.equal(s, (x + residual.bfloat16()).bfloat16())
    assert torch.equal(y, norm(s.float(), None))


@SHORT_AND_LONG
def test_gradient_in_float64(longest, device, monkeypatch):
    monkeypatch.setattr(_norm_launch, "MAX_TILE", 4 if longest == 64 else longest)
    x, residual, weight, bias = (
        torch.randn(shape, device=device, dtype=torch.float64, requires_grad=True)
        for shape in [(2, 5), (2, 5), (5,), (5,)]
    )
    torch.autograd.gradcheck(norm, (x, weight, bias))
    torch.autograd.gradcheck(add_layer_norm, (x, residual, weight, bias))
    expected = reference(x, weight, bias)
    torch.testing.assert_close(norm(x, weight, bias), expected, atol=1e-13, rtol=0)


@pytest.mark.parametrize("shape", [(0, 5), (0,), (2, 0, 3), (5, 0), (3, 1)], ids=str)
def test_empty_or_alone(shape, device):
    x, (weight, bias) = torch.ones(shape, device=device), torch.ones(2, shape[-1], device=device)
    check(norm, reference, x, weight, bias)
    check(add_layer_norm, add_layer_norm_reference, x, x, weight, bias)


@SHORT_AND_LONG
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_value_spoils_its_own_row_alone(value, longest, device, monkeypatch):
    monkeypatch.setattr(_norm_launch, "MAX_TILE", longest)
    monkeypatch.setattr(_norm_launch, "LOOP_BLOCK", 64)
    x, (weight, bias) = torch.randn(3, 80, device=device), torch.randn(2, 80, device=device)
    expected = norm(x, weight, bias)
    x[1, 70] = value
    y = norm(x, weight, bias)
    assert torch.equal(y[::2], expected[::2])
    assert y[1].isnan().all()


@SHORT_AND_LONG
def test_gradients_are_bitwise_repeatable_and_leave_inputs_alone(longest, device, monkeypatch):
    monkeypatch.setattr(_norm_launch, "MAX_TILE", longest)
    monkeypatch.setattr(_norm_launch, "LOOP_BLOCK", 64)
    x, residual, dy, ds = torch.randn(4, 9, 80, device=device)
    weight, bias = torch.randn(2, 80, device=device)
    tensors = x, residual, weight, bias, dy, ds
    before = [t.clone() for t in tensors]
    leaves = [t.requires_grad_() for t in tensors[:4]]
    runs = [torch.autograd.grad(add_layer_norm(*leaves), leaves, (dy, ds)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


def test_compiles_without_graph_breaks(device):
    x, residual = torch.randn(2, 2, 4, 16, device=device)
    weight, bias = torch.randn(2, 16, device=device)
    compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
    check(compiled, reference, x, weight, bias)
    check(compiled, reference, x, weight)
    compiled = torch.compile(add_layer_norm, fullgraph=True, backend="aot_eager")
    check(compiled, add_layer_norm_reference, x.bfloat16(), residual, weight, bias)


def test_autocast_leaves_dtypes_alone(device):
    x, weight = torch.randn(4, 8, device=device), torch.randn(8, device=device)
    with torch.autocast(device, torch.bfloat16):
        y, expected = (f(x, weight) for f in (norm, reference))
    assert y.dtype == expected.dtype == torch.float32


X, WEIGHT = torch.ones(2, 4), torch.ones(4)


@pytest.mark.parametrize(
    ("x", "weight", "bias", "message"),
    [
        (X, torch.ones(5), None, r"weight must have shape \[4\], got \[5\]"),
        (X, WEIGHT, torch.ones(1), r"bias must have shape \[4\], got \[1\]"),
        (X, WEIGHT.to("meta"), None, "weight must be on cpu, got meta"),
        (X, None, WEIGHT.to("meta"), "bias must be on cpu, got meta"),
        (X.int(), WEIGHT, None, "(input|x) must be floating point, got torch.int32"),
        (X, WEIGHT, WEIGHT.long(), "bias must be floating point, got torch.int64"),
    ],
    ids=["weight", "bias", "device", "bias elsewhere", "integer", "integer bias"],
)
def test_refuses(x, weight, bias, message):
    with pytest.raises(ValueError, match=f"^layer_norm: {message}"):
        norm(x, weight, bias)
    with pytest.raises(ValueError, match=f"^add_layer_norm: {message}"):
        add_layer_norm(x, x, weight, bias)


def test_refuses_a_residual_of_another_shape():
    with pytest.raises(ValueError, match=r"residual must have shape \[2, 4\], got \[4\]"):
        add_layer_norm(X, WEIGHT, WEIGHT)


def test_refuses_a_second_derivative(device):
    x = torch.randn(2, 8, device=device, requires_grad=True)
    refuses_a_second_derivative(lambda x: norm(x, None), x)
    weight = torch.randn(8, device=device, requires_grad=True)
    refuses_a_second_derivative(
        lambda x, w: torch.cat(add_layer_norm(x, x.detach(), w)), x, weight
    )  # fmt: skip
