"""Prove that softmax and log_softmax compute their references and gradients for any row."""

import importlib
import math
from contextlib import ExitStack
from functools import partial
from unittest import mock

import pytest
import torch
from check import check, refuses_a_second_derivative
from hypothesis import given
from hypothesis import strategies as st

from tritium.kernels import _softmax_long_rows as rows
from tritium.kernels.softmax import (
    _backward,
    _forward,
    log_softmax,
    log_softmax_reference,
    softmax,
    softmax_reference,
)

SOFTMAX = importlib.import_module("tritium.kernels.softmax")
PAIRS = {
    "softmax": (softmax, softmax_reference),
    "log_softmax": (log_softmax, log_softmax_reference),
}
each_op = pytest.mark.parametrize("op", PAIRS)
with_lse = tuple(partial(f, return_lse=True) for f in PAIRS["softmax"])
# The same rows through the loops of long rows too, in blocks small enough to run many of them: by
# one program, and by two, which have up to four blocks each.
PATHS = {
    "tile": {},
    "loop": {"BLOCK": 64},
    "shared": {"BLOCK": 64, "LONG_ROW": 0, "SHARES": 2},
}
each_path = pytest.mark.parametrize("path", PATHS)


def through(path, **blocks):
    """Send rows of any length through `path`."""
    stack = ExitStack()
    if path != "tile":
        stack.enter_context(mock.patch.object(SOFTMAX, "MAX_TILE", 0))
        stack.enter_context(mock.patch.multiple(rows, **(PATHS[path] | blocks)))
    return stack


VIEWS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.mT.contiguous().mT,
    "sliced": lambda x: x[..., 1:],
    "every other": lambda x: x[..., ::2],
    "expanded rows": lambda x: x[..., :1, :].expand_as(x),
}
GRADIENTS = {
    "contiguous": lambda dy: dy,
    "transposed": lambda dy: dy.mT.contiguous().mT,
    "expanded along N": lambda dy: dy[..., :1].expand_as(dy),
    "expanded along M": lambda dy: dy[..., :1, :].expand_as(dy),
}


def laid_out(ys, gradient):
    """Return `ys`; their gradients arrive in the strides of `gradient`."""
    y, *lse = ys if isinstance(ys, tuple) else (ys,)
    if y.requires_grad:
        y.register_hook(GRADIENTS[gradient])
    if lse and y.requires_grad and gradient != "contiguous":
        lse[0].register_hook(lambda dlse: dlse.sum().expand_as(dlse))
    return ys


def finite(y):
    """`y` with the -inf of hidden keys and empty rows replaced: they have no error to measure."""
    if isinstance(y, tuple):  # lse in the dtype of y, whose rounding is then the measure of both
        return y[0], finite(y[1]).to(y[0].dtype)
    return y.where(y > -math.inf, 0)


def unit(op, dtype, size):
    """The size of the terms that a small result is the difference of, for `check`."""
    if op == "log_softmax":  # exp(y) has the error of a rounded y
        return 4.0 * max(1.0, size)
    # softmax divides numbers good to float32's rounding: so many units of the dtype's own.
    return 4.0 * max(1.0, size) * torch.finfo(torch.float32).eps / torch.finfo(dtype).eps


@given(
    op=st.sampled_from([*PAIRS, "with lse"]),
    batch=st.lists(st.integers(0, 2), max_size=2),
    M=st.integers(1, 5),
    N=st.integers(1, 300),
    dim=st.sampled_from([-1, -1, -2, 0]),
    causal=st.booleans(),
    scale=st.sampled_from([1.0, 0.125, -2.0, 0.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    size=st.sampled_from([0.1, 3.0, 80.0]),
    path=st.sampled_from(list(PATHS)),
    view=st.sampled_from(list(VIEWS)),
    gradient=st.sampled_from(list(GRADIENTS)),
    seed=st.integers(0, 1 << 30),
)
def test_every_combination_of_options(
    op, batch, M, N, dim, causal, scale, dtype, size, path, view, gradient, seed
):
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = (torch.randn(*batch, M, N, device=device) * size).to(dtype)
    Lq, Lk = VIEWS[view](x).shape[-2:]
    causal = causal and dim == -1 and Lq <= Lk
    path = path if dim == -1 else "tile"  # other axes make many rows, slow in the interpreter

    def of(f):  # a view of a leaf, so that no copy hides a stride
        return lambda x: finite(
            laid_out(f(VIEWS[view](x), dim, scale=scale, causal=causal), gradient)
        )

    with through(path):
        pair = with_lse if op == "with lse" else PAIRS[op]
        check(*map(of, pair), x, unit=unit(op, dtype, size * abs(scale)))


@each_op
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("N", [1025, 16384, 16400, 20000])
def test_long_rows(op, N, causal, device):
    x = torch.randn(2, N, device=device) * 5

    def of(f):
        return lambda x: finite(f(x, causal=causal))

    check(*map(of, PAIRS[op]), x, unit=20.0)


@each_op
@each_path
def test_gradient_in_float64(op, path, device):
    x = torch.randn(1, 3, 140, device=device, dtype=torch.float64, requires_grad=True)
    with through(path):
        for options in [dict(dim=-1, scale=0.5), dict(causal=True)]:

            def f(x, options=options):
                return finite(PAIRS[op][0](x, **options))

            torch.autograd.gradcheck(f, x, fast_mode=True)


@each_op
@each_path
@pytest.mark.parametrize(
    "row",
    [
        [-math.inf] * 300,
        [math.inf] + [0.0] * 299,
        [0.0] * 299 + [math.inf],
        [0.0] * 299 + [math.nan],
        [-math.inf] * 299 + [1.0],
        [-math.inf] * 140 + [1.0, 2.0] + [-math.inf] * 158,
        [torch.finfo(torch.float32).min] * 300,
        [3e38, -3e38] * 150,
        [math.nan],
        [7.0],
    ],
    ids=lambda row: f"{row[0]}...{row[-1]}",
)
def test_extreme_rows_are_as_in_pytorch(op, path, row, device):
    x = torch.tensor([row, [1.0] * len(row)], device=device)
    with through(path):
        torch.testing.assert_close(PAIRS[op][0](x), getattr(torch, op)(x, -1), equal_nan=True)


@each_path
@pytest.mark.parametrize("at", [0, 140, 299])
def test_lse_of_extreme_rows(path, at, device):
    x = torch.zeros(5, 300, device=device)
    x[:4, at] = torch.tensor([math.inf, math.nan, 3e38, -math.inf])
    x[4] = -math.inf
    with through(path):
        _, lse = softmax(x, return_lse=True)
    torch.testing.assert_close(lse, torch.logsumexp(x, -1), equal_nan=True)


@each_op
@each_path
@pytest.mark.parametrize("Lq", [3, 20])
def test_complete_blocks_of_hidden_keys(op, path, Lq, device):
    def of(f):
        return lambda x: finite(f(x, causal=True))

    with through(path, BLOCK=16):
        check(*map(of, PAIRS[op]), torch.randn(Lq, 20, device=device), unit=4.0)


@each_op
@each_path
@pytest.mark.parametrize("Lq", [3, 20])
def test_hidden_keys_are_exact_and_never_read(op, path, Lq, device):
    Lk = 20
    hidden = torch.ones(Lq, Lk, dtype=torch.bool, device=device).triu(Lk - Lq + 1)
    x = torch.randn(2, Lq, Lk, device=device).masked_fill(hidden, math.nan).requires_grad_()
    with through(path, BLOCK=16):
        y = PAIRS[op][0](x, causal=True)
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y).masked_fill(hidden, math.nan))
    nothing = 0.0 if op == "softmax" else -math.inf
    assert torch.equal(y > nothing, ~hidden.expand_as(y))
    assert (y[hidden.expand_as(y)] == nothing).all()
    assert (dx[hidden.expand_as(y)] == 0).all()
    assert dx.isfinite().all()


@each_path
def test_hidden_keys_are_exact_beside_a_nan(path, device):
    x = torch.zeros(4, 4, device=device).fill_diagonal_(math.nan)
    with through(path):
        y = softmax(x, causal=True)
    assert torch.equal(y.isnan(), torch.ones_like(x, dtype=torch.bool).tril())
    assert (y.triu(1).nan_to_num(nan=0) == 0).all()


def test_the_last_query_sees_every_key(device):
    y = softmax(torch.zeros(2, 3, device=device), causal=True)
    expected = torch.tensor([[1 / 2, 1 / 2, 0], [1 / 3, 1 / 3, 1 / 3]], device=device)
    torch.testing.assert_close(y, expected)


@each_path
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_lse_is_that_of_pytorch(path, dim, device):
    x = torch.randn(3, 4, 70, device=device, dtype=torch.bfloat16) * 5
    with through(path):
        y, lse = softmax(x, dim, scale=0.5, return_lse=True)
        assert torch.equal(y, softmax(x, dim, scale=0.5))
    torch.testing.assert_close(lse, torch.logsumexp(x.float() * 0.5, dim))


@each_path
def test_lse_alone_takes_a_gradient(path, device):
    def of(f):
        return lambda x: f(x, scale=0.5)[1]

    with through(path):
        check(*map(of, with_lse), torch.randn(3, 70, device=device))
        check(*map(of, with_lse), torch.randn(3, 70, device=device).bfloat16())


@each_path
def test_y_alone_takes_a_gradient(path, device):
    def of(f):
        return lambda x: f(x)[0]

    with through(path):
        check(*map(of, with_lse), torch.randn(3, 70, device=device))


@pytest.mark.parametrize("path", ["loop", "shared"])
@pytest.mark.parametrize("N", [1, 15, 16, 17, 33, 80, 81])
def test_odd_rows(path, N, device):
    # Each row begins at another place between two multiples of 16.
    with through(path, BLOCK=16, SHARES=4):
        check(*with_lse, torch.randn(4, N, device=device), unit=4.0)


@pytest.mark.parametrize("N", [128, 208])
def test_shares_are_the_same_whatever_the_other_rows(N, device):
    x, dy = torch.randn(2, 3, N, device=device)
    with through("shared", SHARES=4):
        y, lse = _forward(x, 0, 1.0, False, True)
        dx = _backward(dy, y, lse, 0, 1.0, False)
        for m in range(3):
            one = slice(m, m + 1)
            alone = _forward(x[one].clone(), 0, 1.0, False, True)
            assert all(map(torch.equal, alone, (y[one], lse[one])))
            assert torch.equal(_backward(dy[one], y[one], lse[one], 0, 1.0, False), dx[one])


@pytest.mark.parametrize(
    ("M", "N", "grids"),
    [
        (263, 32768, [(263, 8)] * 2),
        (264, 32768, [(264, 1)]),
        (1, 32767, [(1, 1)]),
        (1, 50257, [(1, 13)] * 2),
        (1, 262144, [(1, 64)] * 2),
        (1, 262145, [(1, 33)] * 2),
    ],
    ids=str,
)
def test_few_long_rows_are_shared_out(M, N, grids):
    launched = []

    def launch(grid, *_, **options):
        launched.append(grid)

    rows._launch(launch, (), torch.empty(1, N).expand(M, N), (), (False, False), ())
    assert launched == grids


@each_path
def test_bfloat16_gradient_of_a_nearly_certain_row(path, device):
    x = torch.zeros(1, 64, device=device, dtype=torch.bfloat16)
    x[0, 3] = 11.0  # y = 0.999, stored as 1
    with through(path):
        check(softmax, softmax_reference, x)


@each_op
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0,), (2, 0, 3)], ids=str)
def test_empty(op, shape, device):
    operation, reference = PAIRS[op]
    check(lambda x: operation(x, -1), lambda x: reference(x, -1), torch.ones(shape, device=device))


@each_path
def test_offsets_beyond_two_to_the_31(path, device, monkeypatch):
    # The stride fits an int32, the last row's offset does not; the memory between is never touched.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    memory = torch.empty((1 << 31) + 80, device=device, dtype=torch.bfloat16)
    far = memory.as_strided((3, 80), (1 << 30, 1)).copy_(torch.randn(3, 80))
    near = far.contiguous()
    with through(path):
        y, lse = _forward(near, 0, 1.0, False, True)
        assert all(map(torch.equal, _forward(far, 0, 1.0, False, True), (y, lse)))
        far_dx, dx = (_backward(dy, y, None, 0, 1.0, False) for dy in (far, near))
        assert torch.equal(far_dx, dx)


@each_path
@pytest.mark.parametrize("log", [False, True])
def test_is_a_well_formed_operator(path, log, device):
    # The raw operators have no gradient: the autograd.Function around them has.
    x = torch.randn(3, 33, device=device, dtype=torch.bfloat16)
    with through(path):
        for return_lse in (False, True):
            torch.library.opcheck(_forward.overload, (x, 3, 0.5, log, return_lse))
        for dlse in (None, torch.randn(3, device=device)):
            torch.library.opcheck(_backward.overload, (x, x, dlse, 3, 0.5, log))


@each_op
def test_compiles_without_graph_breaks(op, device):
    kernel, reference = (partial(f, causal=True) for f in PAIRS[op])
    compiled = torch.compile(kernel, fullgraph=True, backend="aot_eager", dynamic=True)
    for Lq in (4, 5):
        x = torch.randn(2, Lq, 16, device=device)
        check(lambda x: finite(compiled(x)), lambda x: finite(reference(x)), x, unit=4.0)


def test_lse_compiles_without_graph_breaks(device):
    compiled = torch.compile(with_lse[0], fullgraph=True, backend="aot_eager")
    check(compiled, with_lse[1], torch.randn(3, 16, device=device), unit=4.0)


@each_op
def test_autocast_leaves_dtypes_alone(op, device):
    x = torch.randn(4, 8, device=device, dtype=torch.bfloat16)
    with torch.autocast(device, torch.bfloat16):
        assert {f(x).dtype for f in PAIRS[op]} == {torch.bfloat16}


@each_op
@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (torch.ones(2, 3).int(), {}, "floating point, got torch.int32; pass dtype"),
        (torch.ones(2, 3, 4), {}, r"dim must be given .*got \[2, 3, 4\]; pass dim=-1"),
        (torch.ones(3), dict(causal=True), r"needs input \[..., Lq, Lk\] and dim=-1, got \[3\]"),
        (torch.ones(2, 3), dict(causal=True, dim=0), "dim=-1, got .* and dim=0"),
        (torch.ones(3, 2), dict(causal=True), r"no more queries than keys, got .* = \[3, 2\]"),
    ],
    ids=["integer", "dim left open", "one axis", "dim", "too many queries"],
)
def test_refuses(op, x, options, message):
    with pytest.raises(ValueError, match=f"^{op}: .*{message}"):
        PAIRS[op][0](x, **options)


@each_op
def test_refuses_an_axis_that_is_not_there(op):
    with pytest.raises(IndexError, match=r"dim must be an axis of the input \[2, 3\], got 2"):
        PAIRS[op][0](torch.ones(2, 3), dim=2)


@each_op
def test_refuses_a_second_derivative(op, device):
    x = torch.randn(2, 8, device=device, requires_grad=True)
    refuses_a_second_derivative(PAIRS[op][0], x)
