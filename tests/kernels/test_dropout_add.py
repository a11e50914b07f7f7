"""Prove that dropout_add drops what its reference drops, at the rate asked for, repeatably."""

import sys
from math import sqrt

import pytest
import torch
import triton
import triton.language as tl
from check import check, refuses_a_second_derivative
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint
from triton.runtime.interpreter import InterpreterBuilder

from tritium.kernels.dropout_add import (
    ROUNDS,
    S,
    _backward,
    _forward,
    _philox,
    dropout_add,
    dropout_add_reference,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
STRIDES = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.mT.contiguous().mT,
    "every other": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "offset": lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape),
}
GRADIENTS = STRIDES | {"expanded": lambda dy: dy[..., :1].expand_as(dy)}
SEEDS = st.integers(-(1 << 63), (1 << 63) - 1)


@pytest.fixture(params=[False, True], ids=["kernel", "reference"])
def either_path(request, monkeypatch):
    monkeypatch.setattr("tritium.kernels.runtime.REFERENCE", request.param)


def mask(shape, p, seed, device):
    """The elements that are kept, as 0 and 1."""
    ones, zeros = torch.ones(shape, device=device), torch.zeros(shape, device=device)
    return (dropout_add(ones, zeros, p, seed=seed) != 0).double()


@given(
    batch=st.lists(st.integers(0, 3), max_size=2),
    T=st.integers(1, 20),
    D=st.integers(1, 300),
    dtype=st.sampled_from(DTYPES),
    stream=st.sampled_from([None, torch.float32]),
    p=st.floats(0, 1) | st.sampled_from([0.1, 0.5, 2.0**-32, 1 - 2.0**-32]),
    training=st.sampled_from([True, True, True, False]),
    seed=SEEDS,
    strides=st.tuples(*[st.sampled_from(list(STRIDES))] * 2),
    gradient=st.sampled_from(list(GRADIENTS)),
)
def test_every_combination_of_options(
    batch, T, D, dtype, stream, p, training, seed, strides, gradient
):
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.randn(*batch, T, D, device=device).to(dtype)
    residual = torch.randn(*batch, T, D, device=device).to(stream or dtype)
    # Of a kept element, 1/(1-p) may leave the range of the dtype: in both functions alike.
    x = x * max(1 - p, 1e-4)

    def of(f):
        def g(x, residual):
            x, residual = STRIDES[strides[0]](x), STRIDES[strides[1]](residual)
            y = f(x, residual, p, training=training, seed=seed).clone()
            if y.requires_grad:
                y.register_hook(lambda dy: GRADIENTS[gradient](dy * max(1 - p, 1e-4)))
            return y

        return g

    check(of(dropout_add), of(dropout_add_reference), x.to(dtype), residual)


@pytest.mark.parametrize("N", [1, 4095, 4096, 4097, 3 * 4096 + 1025])
def test_kernel_and_reference_draw_one_mask(N, device):
    x, residual = torch.ones(N, device=device), torch.zeros(N, device=device)
    expected = dropout_add_reference(x, residual, 0.5, seed=N)
    assert torch.equal(dropout_add(x, residual, 0.5, seed=N), expected)


@triton.jit
def _words_kernel(counter_ptr, seed_ptr, words_ptr, N: tl.constexpr, ROUNDS: tl.constexpr):
    offs = tl.arange(0, N)
    words = tl.randint4x(tl.load(seed_ptr), tl.load(counter_ptr + offs), ROUNDS)
    for k in tl.static_range(4):
        tl.store(words_ptr + k * N + offs, words[k].to(tl.int64))


@pytest.mark.parametrize("seed", [0, 1, -1, 1 << 31, 1 << 32, -(1 << 63), (1 << 63) - 1])
def test_reference_words_are_triton_s(seed, device):
    seed = torch.tensor(seed, device=device)
    counter = torch.arange(256, device=device) * ((1 << 55) + 12345)
    words = torch.empty(4, 256, dtype=torch.int64, device=device)
    _words_kernel[(1,)](counter, seed, words, 256, ROUNDS.value)
    assert torch.equal(_philox(counter, seed), words)


def test_reference_words_are_the_published_ones():
    # Random123's kat_vectors, "philox4x32 7" for a counter and a key of zeros.
    words = _philox(torch.tensor(0), torch.tensor(0))
    assert words.tolist() == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]


def test_counters_beyond_two_to_the_31(device, monkeypatch):
    # Only the last slab of each tensor is touched, so only its pages exist.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    slabs = (1 << 19) + 2
    N = slabs * 4 * S.value - 5
    x = torch.empty(N, dtype=torch.bfloat16, device=device)
    last = slice((slabs - 1) * 4 * S.value, N)
    x[last] = 1
    seed = torch.tensor(6, device=device)
    if device == "cpu":
        get_program_id = InterpreterBuilder.create_get_program_id

        def last_program(builder, axis):
            handle = get_program_id(builder, axis)
            handle.data = handle.data + (slabs - 1)
            return handle

        monkeypatch.setattr(InterpreterBuilder, "create_get_program_id", last_program)
        monkeypatch.setattr(sys.modules[dropout_add.__module__], "cdiv", lambda *_: 1)
    y = _backward(x, seed, 1 << 31, torch.bfloat16)[last]
    counter = torch.arange((slabs - 1) * S.value, slabs * S.value, device=device)
    assert torch.equal(y != 0, _philox(counter, seed).flatten()[:-5] >= 1 << 31)


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_keeps_the_expected_share(p, device):
    N = 1 << 18
    kept = mask((N,), p, 7, device).mean().item()
    assert abs(kept - (1 - p)) < 4 * sqrt(p * (1 - p) / N)


# Neighbours, the next word of one counter, the next slab, a row of a power of two.
@pytest.mark.parametrize("lag", [1, 2, 4, 8, 1024, 2048, 3072, 4096])
def test_neighbours_are_independent(lag, device):
    N, p = 1 << 17, 0.3
    z = (mask((N,), p, 3, device) - (1 - p)) / sqrt(p * (1 - p))
    assert abs((z[lag:] * z[:-lag]).sum().item()) < 4 * sqrt(N)


@pytest.mark.parametrize("other", [2, -1, 1 + (1 << 32), 1 + (1 << 62)], ids=hex)
def test_seeds_are_independent(other, device):
    N, p = 1 << 17, 0.5
    a, b = (2 * mask((N,), p, seed, device) - 1 for seed in (1, other))
    assert abs((a * b).sum().item()) < 4 * sqrt(N)


def test_expectation_is_the_input(device):
    x = torch.full((1 << 18,), 3.0, device=device)
    mean = dropout_add(x, torch.zeros_like(x), 0.25, seed=5).double().mean().item()
    assert abs(mean - 3) < 4 * 3 * sqrt(0.25 / 0.75 / len(x))


@pytest.mark.parametrize("strides", STRIDES)
def test_the_mask_does_not_depend_on_strides(strides, device):
    x, zeros = torch.ones(33, 70, device=device), torch.zeros(33, 70, device=device)
    y = dropout_add(STRIDES[strides](x), STRIDES[strides](zeros), 0.5, seed=1)
    assert torch.equal(y != 0, dropout_add(x.view(-1), zeros.view(-1), 0.5, seed=1).view_as(y) != 0)


def test_the_mask_is_the_same_in_every_dtype(device):
    masks = [
        dropout_add(torch.ones(5000, device=device).to(dtype), torch.zeros(5000, device=device),
                    0.4, seed=9) != 0
        for dtype in DTYPES
    ]  # fmt: skip
    assert all(torch.equal(masks[0], other) for other in masks[1:])


def test_seed_may_be_an_int_or_a_tensor(device, either_path):
    x = torch.randn(3, 50, device=device)
    y = dropout_add(x, x, 0.5, seed=-3)
    assert torch.equal(y, dropout_add(x, x, 0.5, seed=torch.tensor(-3, device=device)))


def test_without_a_seed_the_generator_gives_one(device, either_path):
    x = torch.randn(3, 50, device=device)
    torch.manual_seed(1)
    first, second = dropout_add(x, x, 0.5), dropout_add(x, x, 0.5)
    torch.manual_seed(1)
    assert torch.equal(first, dropout_add(x, x, 0.5))
    assert not torch.equal(first, second)


def test_backward_drops_what_forward_dropped(device, either_path):
    x = torch.ones(5, 1001, device=device, requires_grad=True)
    y = dropout_add(x, torch.zeros_like(x), 0.5)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(dx, y)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_replays_the_mask(use_reentrant, device, either_path):
    x = torch.ones(5, 1001, device=device, requires_grad=True)

    def f(x):
        return dropout_add(x * 1, torch.zeros_like(x), 0.5).square()

    y = checkpoint(f, x, use_reentrant=use_reentrant, preserve_rng_state=True)
    torch.rand(3, device=device)  # moves the generator on before the mask is recomputed
    (dx,) = torch.autograd.grad(y.sum(), x) if not use_reentrant else _reentrant_grad(y, x)
    assert torch.equal(dx, 2 * y)


def _reentrant_grad(y, x):
    y.sum().backward()
    return (x.grad,)


def test_gradient_of_the_residual_is_not_copied(device):
    residual = torch.randn(4, 6, device=device, requires_grad=True)
    y, dy = dropout_add(torch.randn(4, 6, device=device), residual), torch.randn(4, 6)
    (dresidual,) = torch.autograd.grad(y, residual, dy.to(device))
    assert torch.equal(dresidual, dy.to(device))
    dy = dy.to(device)
    (dresidual,) = torch.autograd.grad(dropout_add(dy, residual), residual, dy)
    assert dresidual.data_ptr() == dy.data_ptr()


@pytest.mark.parametrize("wanted", [0, 1])
def test_one_input_alone_takes_a_gradient(wanted, device):
    inputs = torch.randn(2, 4, 6, device=device)
    kernel, reference = (
        lambda x, residual, f=f: f(x, residual, 0.5, seed=2)
        for f in (dropout_add, dropout_add_reference)
    )
    check(kernel, reference, *inputs, needs_grad=[wanted])


def test_nothing_or_everything_is_dropped(device, either_path):
    x = torch.randn(2, 50, device=device, requires_grad=True)
    residual = torch.randn(2, 50, device=device)
    for options in ({"p": 0.0}, {"p": 0.9, "training": False}, {"p": 1.0, "training": False}):
        assert torch.equal(dropout_add(x, residual, **options), residual + x)
    y = dropout_add(torch.full_like(x, float("nan")) + x, residual, 1.0)
    assert torch.equal(y, residual)
    (dx,) = torch.autograd.grad(y.sum() + dropout_add(x, residual, 1.0).sum(), x)
    assert (dx == 0).all()


def test_not_finite(device, either_path):
    # What is kept passes on; what is dropped counts as 0, whatever it holds.
    nan, inf = float("nan"), float("inf")
    x = torch.tensor([nan, inf, -inf, 1.0], device=device).repeat(64).requires_grad_()
    y = dropout_add(x, torch.zeros_like(x), 0.5, seed=3)
    kept = mask((256,), 0.5, 3, device).bool()
    torch.testing.assert_close(y, torch.where(kept, 2 * x, 0), equal_nan=True)
    (dx,) = torch.autograd.grad(y, x, torch.full_like(y, nan))
    assert torch.equal(dx.isnan(), kept)
    assert (dx[~kept] == 0).all()


@pytest.mark.parametrize("shape", [(0,), (3, 0), ()], ids=str)
def test_empty_and_scalar(shape, device):
    x, residual = torch.randn(2, *shape, device=device)
    kernel, reference = (
        lambda x, residual, f=f: f(x, residual, 0.5, seed=2)
        for f in (dropout_add, dropout_add_reference)
    )
    check(kernel, reference, x, residual)


def test_rounds_once(device):
    # Rounding the branch before the sum would change one value in four.
    x, residual = torch.randn(2, 4000, device=device).bfloat16()
    y = dropout_add(x, residual, 0.3, seed=1)
    same = y == dropout_add_reference(x, residual, 0.3, seed=1)
    assert same.float().mean() > 0.99


def test_gradient_in_float64(device):
    x, residual = torch.randn(2, 3, 5, device=device, dtype=torch.float64).requires_grad_()
    torch.autograd.gradcheck(lambda x, r: dropout_add(x, r, 0.3, seed=4), (x, residual))
    exact = dropout_add_reference(x, residual, 0.3, seed=4)
    torch.testing.assert_close(dropout_add(x, residual, 0.3, seed=4), exact, rtol=1e-15, atol=0)


def test_refuses_a_seed_that_changed_before_backward(device):
    seed = torch.tensor(1, device=device)
    x, residual = torch.ones(2, 5, device=device).requires_grad_()
    y = dropout_add(x, residual, seed=seed)
    seed += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_inputs_may_change_before_backward(device):
    x, residual = torch.ones(2, 64, device=device), torch.zeros(64, device=device)
    leaf = x[0].clone().requires_grad_()
    x = leaf * 1
    y = dropout_add(x, residual, 0.5, seed=1)
    x.zero_()
    residual.fill_(7)
    (dx,) = torch.autograd.grad(y.sum(), leaf)
    assert torch.equal(dx, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_is_a_well_formed_operator(dtype, device):
    # The raw operators have no gradient: the autograd.Function around them has.
    x, residual = torch.randn(3, 33, device=device, dtype=dtype), torch.randn(3, 33, device=device)
    seed = torch.tensor(5, device=device)
    torch.library.opcheck(_forward.overload, (x, residual, seed, 1 << 30))
    torch.library.opcheck(_backward.overload, (residual, seed, 1 << 30, dtype))


# Dynamo's own warning.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_without_graph_breaks(device):
    x, residual = torch.randn(2, 4, 16, device=device)

    def seeded(f):
        return lambda x, residual: f(x, residual, 0.5, seed=11)

    compiled = torch.compile(seeded(dropout_add), fullgraph=True, backend="aot_eager")
    check(compiled, seeded(dropout_add_reference), x.bfloat16(), residual)
    drawn = torch.compile(lambda x: dropout_add(x, x, 0.5), fullgraph=True, backend="aot_eager")
    first, second = drawn(x), drawn(x)
    assert not torch.equal(first, second)


def test_autocast_leaves_dtypes_alone(device):
    x, residual = torch.randn(2, 4, 8, device=device)
    with torch.autocast(device, torch.bfloat16):
        assert dropout_add(x, residual).dtype == torch.float32
        assert dropout_add(x.bfloat16(), residual.bfloat16()).dtype == torch.bfloat16


X = torch.ones(2, 4)


@pytest.mark.parametrize(
    ("x", "residual", "options", "message"),
    [
        (X, X[0], {}, r"one shape, got .*\[2, 4\].* and .*\[4\]"),
        (X, X.to("meta"), {}, "one device, got cpu and meta"),
        (X, X.bfloat16(), {}, "must be torch.float32 as x, or more precise, got torch.bfloat16"),
        (X.half(), X.bfloat16(), {}, "residual must be torch.float16 as x, or more precise"),
        (X.int(), X, {}, "floating point, got torch.int32"),
        (X, X, {"p": 1.5}, r"p must be in \[0, 1\], got 1.5"),
        (X, X, {"p": float("nan")}, r"p must be in \[0, 1\], got nan"),
        (X, X, {"seed": 1 << 63}, "seed must fit 64 bits with a sign, got 9223372036854775808"),
        (X, X, {"seed": torch.tensor([1])}, r"seed must be int64 of no axes .*, got .* \[1\]"),
        (X, X, {"seed": torch.tensor(1.0)}, "seed must be int64 .*, got torch.float32"),
        (X, X, {"seed": torch.tensor(1, device="meta")}, "on cpu, got .* on meta"),
    ],
    ids=str,
)
def test_refuses(x, residual, options, message):
    with pytest.raises(ValueError, match=f"^dropout_add: .*{message}"):
        dropout_add(x, residual, **options)


def test_refuses_a_second_derivative(device):
    x = torch.randn(2, 8, device=device, requires_grad=True)
    refuses_a_second_derivative(lambda x: dropout_add(x, x, 0.5), x, linear=True)
