"""Prove that embedding looks rows up and sums their gradients, however tokens repeat, bitwise."""

import importlib
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from check import check, refuses_a_second_derivative
from hypothesis import given
from hypothesis import strategies as st
from strict_interpreter import program_order
from strides import GRADIENTS, STRIDES

from tritium.kernels.embedding import _backward, _forward, embedding, embedding_reference

MODULE = importlib.import_module("tritium.kernels.embedding")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOKENS = {  # of T tokens in [0, V)
    "uniform": lambda T, V: torch.randint(V, (T,)),
    "frequent": lambda T, V: (torch.rand(T) ** 6 * V).long(),
    "one": lambda T, V: torch.full((T,), V - 1),
    "ascending": lambda T, V: torch.arange(T) % V,
    "blocks": lambda T, V: torch.arange(T) // 8 % V,
}


def small(S=4, blocks=2, D=64):
    """Blocks as small as a test can afford."""
    return mock.patch.multiple(MODULE, S=S, BLOCK_B=blocks, BLOCK_D=D)


@given(
    batch=st.lists(st.integers(1, 2), max_size=1),
    T=st.integers(0, 30),
    D=st.integers(1, 100),
    V=st.integers(1, 20),
    kind=st.sampled_from(list(TOKENS)),
    token_dtype=st.sampled_from([torch.int64, torch.int32]),
    dtype=st.sampled_from(DTYPES),
    padding=st.none() | st.floats(-1, 0.99),
    strides=st.sampled_from(list(STRIDES)),
    token_strides=st.sampled_from(list(STRIDES)),
    gradient=st.sampled_from(list(GRADIENTS)),
    order=st.sampled_from(["forward", "reverse", "shuffled"]),
    seed=st.integers(0, 1 << 30),
)
def test_every_combination_of_options(
    batch, T, D, V, kind, token_dtype, dtype, padding, strides, token_strides, gradient, order, seed
):
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens = torch.stack([TOKENS[kind](T, V) for _ in range(batch[0] if batch else 1)])
    tokens = STRIDES[token_strides](tokens.to(device, token_dtype))
    weight = torch.randn(V, D, device=device).to(dtype)
    padding_idx = None if padding is None else int(padding * V // 1)

    def of(f):
        def g(weight):
            y = f(tokens if batch else tokens[0], STRIDES[strides](weight), padding_idx=padding_idx)
            y = y.clone()
            if y.requires_grad:
                y.register_hook(GRADIENTS[gradient])
            return y

        return g

    with small(), program_order(order):
        check(of(embedding), of(embedding_reference), weight)


def test_block_sizes_as_they_are(device):
    tokens = torch.randint(20, (3, 50), device=device)
    tokens[1] = 7
    weight = torch.randn(20, 300, device=device)
    functions = (lambda w, f=f: f(tokens, w) for f in (embedding, embedding_reference))
    check(*functions, weight)


@pytest.mark.parametrize("count", [1, 3, 4, 5, 8, 29])
def test_runs_across_borders(count, device):
    # Runs that begin and end before, on and after the border of a block.
    for before in (0, 1, 3, 4, 5):
        tokens = torch.tensor([0] * before + [1] * count + [2] * 3, device=device)
        functions = (lambda w, t=tokens, f=f: f(t, w) for f in (embedding, embedding_reference))
        with small():
            check(*functions, torch.randn(4, 5, device=device))


def test_a_token_that_occurs_a_thousand_times(device):
    tokens = torch.full((1100,), 3, device=device)
    tokens[::97] = 1
    weight = torch.zeros(5, 8, device=device, requires_grad=True)
    dy = torch.randn(1100, 8, device=device)
    with small(S=8, blocks=32):
        (dw,) = torch.autograd.grad(embedding(tokens, weight), weight, dy)
    exact = torch.zeros(5, 8, dtype=torch.float64, device=device)
    exact.index_add_(0, tokens, dy.double())
    assert (dw - exact).abs().max() < 1e-5 * dy.norm()


def test_rounds_once_in_bfloat16(device):
    # PyTorch adds up in bfloat16 on a CPU, and rounds partial sums on a GPU.
    # Drawn on the CPU, so that every device sums the same numbers.
    tokens = (torch.rand(400) ** 3 * 5).long().to(device)
    weight = torch.zeros(5, 16, device=device, dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(400, 16).bfloat16().to(device)
    exact = torch.zeros(5, 16, dtype=torch.float64, device=device)
    exact.index_add_(0, tokens, dy.double())
    actual, torch_result = (
        torch.autograd.grad(f(tokens, weight), weight, dy)[0] for f in (embedding, F.embedding)
    )
    assert torch.equal(actual, exact.bfloat16())
    assert (torch_result - exact).abs().max() > (actual - exact).abs().max()


def test_bitwise_the_same_in_every_order_of_programs(device):
    tokens = (torch.rand(90, device=device) ** 3 * 9).long()
    dy = torch.randn(90, 40, device=device)
    results = []
    for order in ("forward", "reverse", "shuffled"):
        with small(), program_order(order):
            results.append(_backward(dy, tokens, 9, -1, torch.float32))
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("reference", [False, True])
def test_reference_agrees_with_pytorch(reference, device, monkeypatch):
    monkeypatch.setattr("tritium.kernels.runtime.REFERENCE", reference)
    tokens, weight = torch.randint(9, (2, 7), device=device), torch.randn(9, 5, device=device)
    expected = F.embedding(tokens, weight)
    assert torch.equal(embedding_reference(tokens, weight), expected)
    assert torch.equal(embedding(tokens, weight), expected)


@pytest.mark.parametrize("padding_idx", [0, 3, -1, -9])
def test_padding_gets_no_gradient(padding_idx, device):
    tokens = torch.arange(9, device=device).repeat(7)
    weight = torch.randn(9, 5, device=device, requires_grad=True)
    y = embedding(tokens, weight, padding_idx=padding_idx)
    assert torch.equal(y, weight[tokens])
    dy = torch.ones_like(y)
    dy[tokens == padding_idx % 9] = float("nan")  # and is not even read
    (dw,) = torch.autograd.grad(y, weight, dy)
    expected = torch.full_like(dw, 7)
    expected[padding_idx] = 0
    assert torch.equal(dw, expected)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_tokens_outside_the_table(dtype, device):
    # V and -1, and what an int32 would take for 1 and 3.
    tokens = [0, 5, -1, 4, (1 << 31) - 1, -(1 << 31)]
    tokens += [(1 << 32) + 1, -(1 << 32) + 3, (1 << 63) - 1] if dtype == torch.int64 else []
    tokens = torch.tensor(tokens, dtype=dtype, device=device)
    weight = torch.randn(5, 6, device=device, requires_grad=True)
    known = (tokens >= 0) & (tokens < 5)
    y = embedding(tokens, weight)
    assert torch.equal(y[known], weight[tokens[known].long()])
    assert y[~known].isnan().all()
    (dw,) = torch.autograd.grad(y, weight, torch.ones_like(y))
    assert torch.equal(dw[:, 0], torch.tensor([1.0, 0, 0, 0, 1], device=device))


def test_reference_refuses_tokens_outside_the_table(monkeypatch):
    monkeypatch.setattr("tritium.kernels.runtime.REFERENCE", True)
    with pytest.raises(IndexError):
        embedding(torch.tensor([5]), torch.ones(5, 2))


def test_not_finite(device):
    # A gradient that is not finite stays with its token, wherever blocks begin.
    tokens = torch.arange(5, device=device).repeat_interleave(10)
    weight = torch.randn(5, 3, device=device, requires_grad=True)
    dy = torch.ones(50, 3, device=device)
    dy[13, 0], dy[35, 1] = float("nan"), float("inf")
    with small():
        (dw,) = torch.autograd.grad(embedding(tokens, weight), weight, dy)
    expected = torch.full_like(dw, 10)
    expected[1, 0], expected[3, 1] = float("nan"), float("inf")
    torch.testing.assert_close(dw, expected, equal_nan=True)
    broken = weight.detach().clone()
    broken[1] = float("nan")
    torch.testing.assert_close(embedding(tokens, broken), broken[tokens], equal_nan=True)


def test_gradient_in_float64(device):
    tokens = torch.tensor([0, 2, 2, 1, 2, 0, 2, 2, 2, 2, 2], device=device)
    weight = torch.randn(4, 3, device=device, dtype=torch.float64, requires_grad=True)
    with small():
        torch.autograd.gradcheck(lambda w: embedding(tokens, w), weight)
        functions = (lambda w, f=f: f(tokens, w) for f in (embedding, embedding_reference))
        check(*functions, weight.detach())


@pytest.mark.parametrize("shape", [(0,), (), (2, 0, 3), (1,)], ids=str)
@pytest.mark.parametrize(("V", "D"), [(3, 4), (1, 1), (3, 0)])
def test_few_tokens(shape, V, D, device):
    def reference(tokens, w):
        # On the CPU: with D = 0, where no kernel here is launched, PyTorch 2.11 was seen to access
        # illegal memory on a GPU, which every later call in the process then reports.
        return embedding_reference(tokens.cpu(), w.cpu()).to(w.device)

    tokens = torch.zeros(shape, dtype=torch.long, device=device)
    functions = (lambda w, f=f: f(tokens, w) for f in (embedding, reference))
    check(*functions, torch.randn(V, D, device=device))


def test_offsets_beyond_two_to_the_31(device, monkeypatch):
    # The strides fit an int32, the last row's offset does not; the memory between is never touched.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    memory = torch.empty((1 << 31) + 80, device=device, dtype=torch.bfloat16)
    far = memory.as_strided((3, 80), (1 << 30, 1)).copy_(torch.randn(3, 80))
    near = far.contiguous()
    tokens = torch.tensor([2, 0, 2], device=device, dtype=torch.int32)
    assert torch.equal(_forward(tokens, far, far.dtype), near[tokens])
    sums = (_backward(x, tokens, 3, -1, x.dtype) for x in (far, near))
    assert torch.equal(*sums)


def test_gradient_offsets_beyond_two_to_the_31(device, monkeypatch):
    # Neither zeros nor NaN are written, so only the pages of two rows exist.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    monkeypatch.setattr(torch.Tensor, "new_zeros", torch.Tensor.new_empty)
    V, D = (1 << 26) + 3, 32
    tokens = torch.tensor([V - 1] * 5 + [V - 2] * 2, device=device)
    dy = torch.ones(7, D, device=device, dtype=torch.bfloat16)
    with small():
        dw = _backward(dy, tokens, V, -1, dy.dtype)
    assert (dw[-1] == 5).all()  # across a border
    assert (dw[-2] == 2).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_float64_is_rounded_as_pytorch_rounds_it(dtype, device):
    tokens, weight = torch.arange(99, device=device), torch.randn(99, 8, device=device).double()
    weight[0] = 1 + 2**-8 + 2**-40  # float32 makes it a tie, which bfloat16 rounds to even
    assert torch.equal(embedding(tokens, weight, dtype=dtype), weight.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_is_a_well_formed_operator(dtype, device):
    # The raw operators have no gradient: the autograd.Function around them has.
    tokens = torch.tensor([1, 2, 2, 0], device=device)
    dy, weight = torch.randn(2, 4, 33, device=device, dtype=dtype)
    torch.library.opcheck(_forward.overload, (tokens, weight[:3], torch.bfloat16))
    torch.library.opcheck(_backward.overload, (dy, tokens, 3, -1, torch.float32))


# Dynamo's own warning.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_without_graph_breaks(device):
    tokens = torch.tensor([[1, 2, 2], [0, 1, 1]], device=device)

    def of(f):
        return lambda weight: f(tokens, weight, padding_idx=0)

    compiled = torch.compile(of(embedding), fullgraph=True, backend="aot_eager")
    check(compiled, of(embedding_reference), torch.randn(3, 16, device=device))


def test_autocast_leaves_dtypes_alone(device):
    with torch.autocast(device, torch.bfloat16):
        y = embedding(torch.zeros(3, dtype=torch.long, device=device), torch.ones(2, 4).to(device))
    assert y.dtype == torch.float32


def test_refuses_tokens_that_changed_before_backward(device):
    tokens = torch.zeros(3, dtype=torch.long, device=device)
    y = embedding(tokens, torch.ones(2, 4, device=device, requires_grad=True))
    tokens += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_the_table_may_change_before_backward(device):
    weight = torch.ones(2, 4, device=device, requires_grad=True)
    y = embedding(torch.tensor([1], device=device), weight)
    with torch.no_grad():
        weight.zero_()
    (dw,) = torch.autograd.grad(y.sum(), weight)
    assert torch.equal(dw[:, 0], torch.tensor([0.0, 1.0], device=device))


TOKEN, WEIGHT = torch.zeros(2, dtype=torch.long), torch.ones(3, 4)


@pytest.mark.parametrize(
    ("tokens", "weight", "padding_idx", "message"),
    [
        (TOKEN, WEIGHT[0], None, r"weight must be floating point \[V, D\] .*, got .* \[4\]"),
        (TOKEN, WEIGHT.int(), None, "weight must be floating point .*, got torch.int32"),
        (TOKEN, torch.empty(1 << 31, 1, device="meta"), None, r"V below 2\*\*31, got"),
        (TOKEN.byte(), WEIGHT, None, "input must be int64 or int32, got torch.uint8"),
        (TOKEN.float(), WEIGHT, None, "input must be int64 or int32, got torch.float32"),
        (TOKEN, WEIGHT.to("meta"), None, "input is on cpu; move it to meta"),
        (TOKEN, WEIGHT, 3, r"padding_idx must be in \[-3, 3\), got 3"),
        (TOKEN, WEIGHT, -4, r"padding_idx must be in \[-3, 3\), got -4"),
    ],
    ids=str,
)
def test_refuses(tokens, weight, padding_idx, message):
    with pytest.raises(ValueError, match=f"^embedding: .*{message}"):
        embedding(tokens, weight, padding_idx=padding_idx)


def test_refuses_a_second_derivative(device):
    weight = torch.randn(2, 8, device=device, requires_grad=True)
    tokens = torch.tensor([1, 1], device=device)
    refuses_a_second_derivative(lambda w: embedding(tokens, w), weight, linear=True)


@given(
    T=st.integers(0, 40), D=st.integers(1, 70), V=st.integers(1, 20),
    kind=st.sampled_from(list(TOKENS)), dtype=st.sampled_from([None, *DTYPES]),
    padding=st.none() | st.floats(-1, 0.99), begun=st.booleans(), seed=st.integers(0, 1 << 30),
)  # fmt: skip
def test_adds_to_the_weight_s_own_gradient(T, D, V, kind, dtype, padding, begun, seed):
    """Sums over two passes are those of float64, of gradients in `dtype`, in place."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(seed)
    weight = torch.randn(V, D, device=device, requires_grad=True)
    padding_idx = None if padding is None else int(padding * V // 1)
    exact = torch.randn(V, D, device=device) if begun else torch.zeros(V, D, device=device)
    weight.grad = exact.clone() if begun else None
    exact, sizes = exact.double(), exact.abs().double()
    held = weight.grad
    for _ in range(2):
        tokens = TOKENS[kind](T, V).to(device)
        with small():
            y = embedding(tokens, weight, padding_idx, dtype=dtype, into_grad=True)
            assert torch.equal(y, weight[tokens].to(dtype or weight.dtype))
            dy = torch.randn_like(y)
            y.backward(dy)
        counts = torch.ones(T, 1) if padding is None else (tokens != padding_idx % V)[:, None]
        counted = dy.double() * counts.to(device)
        exact.index_add_(0, tokens, counted)
        sizes.index_add_(0, tokens, counted.abs())
        assert begun <= (weight.grad is held)
        held = weight.grad
    assert ((weight.grad - exact).abs() <= 1e-6 * sizes).all()


def test_adds_into_a_gradient_as_autograd_adds(device):
    """The gradients of a table that is an output layer too come together."""
    tokens = torch.randint(9, (30,), device=device)
    found = []
    for into_grad in (False, True):
        torch.manual_seed(0)
        weight = torch.randn(9, 8, device=device, requires_grad=True)
        for _ in range(2):
            y = embedding(tokens, weight, into_grad=into_grad)
            (y.square() @ weight.T).square().sum().backward()
        found.append(weight.grad)
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(
    "weight",
    [torch.ones(3, 4), torch.ones(3, 4, requires_grad=True) * 1, "strided gradient"],
    ids=["frozen", "no leaf", "strided gradient"],
)
def test_refuses_a_gradient_that_it_cannot_add_to(weight):
    if isinstance(weight, str):
        weight = torch.ones(3, 4, requires_grad=True)
        weight.grad = torch.ones(4, 3).T
    with pytest.raises(ValueError, match="into_grad adds to"):
        embedding(torch.tensor([0]), weight, into_grad=True)
    for dtype in (torch.int32, "bfloat16"):
        with pytest.raises(
            ValueError, match=f"dtype must be a floating-point torch.dtype, got .*{dtype}"
        ):
            embedding(torch.tensor([0]), weight, dtype=dtype)
