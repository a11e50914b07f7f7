"""Prove that mse_loss computes its reference, its sum in a fixed order, and both gradients."""

import importlib
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from check import check, refuses_a_second_derivative
from hypothesis import given
from hypothesis import strategies as st
from strict_interpreter import program_order
from triton.runtime.interpreter import InterpreterBuilder

from tritium.kernels.mse_loss import _backward, _elements, _forward, mse_loss, mse_loss_reference

MODULE = importlib.import_module("tritium.kernels.mse_loss")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
REDUCTIONS = ["mean", "sum", "none"]
STRIDES = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.mT.contiguous().mT,
    "every other": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "offset": lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape),
    "expanded": lambda x: x[..., :1].expand_as(x),
}


def reduced(f, reduction):
    return lambda input, target: f(input, target, reduction=reduction)


def small(programs=3, tile=64):
    """More tiles than programs, for as few elements as a test can afford."""
    return mock.patch.multiple(MODULE, P_MAX=programs, TILE=tile)


@given(
    batch=st.lists(st.integers(0, 3), max_size=2),
    T=st.integers(1, 9),
    D=st.integers(1, 200),
    dtypes=st.tuples(*[st.sampled_from(DTYPES)] * 2),
    size=st.sampled_from([1e-3, 1.0, 10.0]),
    strides=st.tuples(*[st.sampled_from(list(STRIDES))] * 2),
    gradient=st.sampled_from(list(STRIDES)),
    reduction=st.sampled_from(REDUCTIONS),
    wanted=st.sampled_from([[0], [1], [0, 1]]),
    programs=st.sampled_from([2, 3, 64]),
    order=st.sampled_from(["forward", "reverse", "shuffled"]),
    seed=st.integers(0, 1 << 30),
)
def test_every_combination_of_options(
    batch, T, D, dtypes, size, strides, gradient, reduction, wanted, programs, order, seed
):
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    input, target = (
        (torch.randn(*batch, T, D, device=device) * size).to(dtype) for dtype in dtypes
    )
    if reduction == "mean" and input.numel() == 0:
        reduction = "sum"

    def of(f):
        def g(*inputs):
            views = (STRIDES[name](x) for name, x in zip(strides, inputs, strict=True))
            loss = f(*views, reduction=reduction)
            loss = loss.view_as(loss)
            if reduction == "none" and loss.requires_grad:
                loss.register_hook(STRIDES[gradient])
            return loss

        return g

    # A gradient is a difference of numbers of this size, times 2 and what comes in.
    unit = 8.0 * size
    with small(programs), program_order(order):
        check(of(mse_loss), of(mse_loss_reference), input, target, needs_grad=wanted, unit=unit)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("N", [1, 2047, 2048, 2049, 50_001])
def test_tiles_as_large_as_they_are(reduction, N, device):
    functions = (reduced(f, reduction) for f in (mse_loss, mse_loss_reference))
    check(*functions, *torch.randn(2, N, device=device))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("reference", [False, True])
def test_reference_agrees_with_pytorch(reduction, reference, device, monkeypatch):
    monkeypatch.setattr("tritium.kernels.runtime.REFERENCE", reference)
    input, target = torch.randn(2, 5, 300, device=device)
    expected = F.mse_loss(input, target, reduction=reduction)
    torch.testing.assert_close(mse_loss_reference(input, target, reduction=reduction), expected)
    torch.testing.assert_close(mse_loss(input, target, reduction=reduction), expected)


def test_the_loss_of_bfloat16_is_not_rounded(device):
    input, target = torch.randn(2, 700, device=device).bfloat16()
    loss = mse_loss(input, target)
    assert loss.dtype == torch.float32
    exact = (input.double() - target.double()).square().mean()
    assert abs(loss - exact) < 1e-6 * exact


def test_the_loss_is_bitwise_the_same_in_every_order_of_programs(device):
    input, target = torch.randn(2, 3000, device=device)
    losses = []
    for order in ("forward", "reverse", "shuffled"):
        with small(7), program_order(order):
            losses.append(mse_loss(input, target))
    assert losses[0] == losses[1] == losses[2]


def test_large_sums_keep_their_digits(device):
    # One by one, in float32, a sum of so many ones and a bit would stay behind by 1e-4.
    N = 200_000
    loss = mse_loss(torch.full((N,), 1.1, device=device), torch.zeros(N, device=device))
    exact = torch.tensor(1.1).double().square()
    assert abs(loss.double().cpu() - exact) < 2e-6 * exact


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_incoming_gradient_scales(reduction, device):
    input, target = torch.randn(2, 6, device=device).requires_grad_()
    loss = mse_loss(input, target, reduction=reduction)
    dloss = torch.randn_like(loss)
    dinput, dtarget = torch.autograd.grad(loss, (input, target), dloss)
    divisor = 6 if reduction == "mean" else 1
    torch.testing.assert_close(dinput, 2 * dloss * (input - target).detach() / divisor)
    assert torch.equal(dtarget, -dinput)


@pytest.mark.parametrize("shape", [(0,), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("reference", [False, True])
def test_of_empty_tensors(shape, reference, device, monkeypatch):
    monkeypatch.setattr("tritium.kernels.runtime.REFERENCE", reference)
    input = torch.ones(shape, device=device, requires_grad=True)
    assert mse_loss(input, input).isnan()
    assert mse_loss(input, input, reduction="sum") == 0
    assert mse_loss(input, input, reduction="none").shape == shape
    for reduction in REDUCTIONS:
        loss = mse_loss(input, input, reduction=reduction)
        (dinput,) = torch.autograd.grad(loss, input, torch.ones_like(loss))
        assert dinput.shape == shape


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_scalar(reduction, device):
    functions = (reduced(f, reduction) for f in (mse_loss, mse_loss_reference))
    check(*functions, *torch.randn(2, device=device))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_not_finite(value, reduction, device):
    # Alone, in the tail and in a full tile.
    for N, i in ((5, 2), (200, 3), (200, 199)):
        results = []
        for f in (mse_loss, mse_loss_reference):
            input = torch.ones(N, device=device)
            input[i] = value
            input.requires_grad_()
            with small():
                loss = f(input, torch.zeros(N, device=device), reduction=reduction)
                results.append((loss, *torch.autograd.grad(loss.sum(), input)))
        torch.testing.assert_close(*results, equal_nan=True)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradient_in_float64(reduction, device):
    inputs = torch.randn(2, 3, 7, device=device, dtype=torch.float64)
    leaves = [x.clone().requires_grad_() for x in inputs]
    torch.autograd.gradcheck(reduced(mse_loss, reduction), leaves)
    functions = (reduced(f, reduction) for f in (mse_loss, mse_loss_reference))
    check(*functions, *inputs)


def test_offsets_beyond_two_to_the_31(device, monkeypatch):
    # Only the last tile of each tensor is touched, so only its pages exist.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    tiles = (1 << 20) + 2
    N = tiles * MODULE.TILE - 5
    input, target = (torch.empty(N, device=device, dtype=torch.bfloat16) for _ in range(2))
    last = slice((tiles - 1) * MODULE.TILE, N)
    input[last], target[last] = torch.randn(2, MODULE.TILE - 5).to(input)
    dloss = torch.tensor(2.0, device=device)
    if device == "cpu":
        get_program_id = InterpreterBuilder.create_get_program_id

        def last_program(builder, axis):
            handle = get_program_id(builder, axis)
            handle.data = handle.data + (tiles - 1)
            return handle

        monkeypatch.setattr(InterpreterBuilder, "create_get_program_id", last_program)
        monkeypatch.setattr(MODULE, "cdiv", lambda *_: 1)
    d = input[last].float() - target[last].float()
    assert torch.equal(_elements(input, target)[last], d * d)
    dinput, dtarget = _backward(dloss, input, target, 1, True, True)
    assert torch.equal(dinput[last], (4 * d).bfloat16())
    assert torch.equal(dtarget[last], (-4 * d).bfloat16())


def test_the_sum_reaches_beyond_two_to_the_31(device, monkeypatch):
    # All but the tail is hidden from the sum, by a number of programs that only the first has.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    N = (1 << 31) + 5
    input, target = (torch.empty(N, device=device, dtype=torch.bfloat16) for _ in range(2))
    if device == "cuda":
        input.zero_(), target.zero_()
    else:
        kept = InterpreterBuilder.create_get_num_programs

        def many(builder, axis):
            handle = kept(builder, axis)
            handle.data = handle.data + (1 << 30)
            return handle

        monkeypatch.setattr(InterpreterBuilder, "create_get_num_programs", many)
        monkeypatch.setattr(MODULE, "P_MAX", 1)
        input[: MODULE.TILE], target[: MODULE.TILE] = 0, 0
    input[-5:], target[-5:] = 3, 1
    assert _forward(input, target, 1) == 20


@pytest.mark.parametrize("needs", [(True, False), (False, True), (True, True)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_is_a_well_formed_operator(needs, dtype, device):
    # The raw operators have no gradient: the autograd.Function around them has.
    input, target = torch.randn(33, device=device, dtype=dtype), torch.randn(33, device=device)
    torch.library.opcheck(_elements.overload, (input, target))
    torch.library.opcheck(_forward.overload, (input, target, 33))
    for dloss in (torch.randn(33, device=device), torch.randn((), device=device)):
        torch.library.opcheck(_backward.overload, (dloss, input, target, 33, *needs))


# Dynamo's own warning.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_without_graph_breaks(reduction, device):
    compiled = torch.compile(reduced(mse_loss, reduction), fullgraph=True, backend="aot_eager")
    reference = reduced(mse_loss_reference, reduction)
    check(compiled, reference, *torch.randn(2, 4, 16, device=device))


def test_autocast_leaves_dtypes_alone(device):
    input, target = torch.randn(2, 4, 8, device=device).bfloat16()
    with torch.autocast(device, torch.bfloat16):
        assert mse_loss(input, target).dtype == torch.float32


def test_refuses_an_input_that_changed_before_backward(device):
    leaf, target = torch.ones(5, device=device, requires_grad=True), torch.zeros(5, device=device)
    loss = mse_loss(leaf, target)
    target += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


X = torch.ones(2, 4)


@pytest.mark.parametrize(
    ("input", "target", "reduction", "message"),
    [
        (X, X[:, :1], "mean", r"one shape, .* got \[2, 4\] and \[2, 1\]; expand"),
        (X, X[0], "none", r"one shape, .* got \[2, 4\] and \[4\]"),
        (X, X.to("meta"), "mean", "one device, got cpu and meta"),
        (X, X.int(), "mean", "floating point, got torch.float32 and torch.int32"),
        (X, X, "batchmean", 'reduction must be "none", "mean" or "sum", got \'batchmean\''),
    ],
    ids=["broadcast", "axes", "device", "integer", "reduction"],
)
def test_refuses(input, target, reduction, message):
    with pytest.raises(ValueError, match=f"^mse_loss: .*{message}"):
        mse_loss(input, target, reduction=reduction)


def test_refuses_a_second_derivative(device):
    x = torch.randn(2, 8, device=device, requires_grad=True)
    refuses_a_second_derivative(lambda x: mse_loss(x, torch.zeros_like(x)), x)
