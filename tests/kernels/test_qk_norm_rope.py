"""Prove that qk_norm_rope is rms_norm, then rope, of each head of a packed projection."""

import importlib
from contextlib import nullcontext
from functools import partial
from unittest import mock

import pytest
import torch
from check import check
from hypothesis import given
from hypothesis import strategies as st
from recorded import record_launches
from torch._dynamo.testing import CompileCounterWithBackend

from tritium.kernels import rms_norm, rope
from tritium.kernels.qk_norm_rope import _backward, _forward, qk_norm_rope, qk_norm_rope_reference
from tritium.kernels.runtime import references

MODULE = importlib.import_module("tritium.kernels.qk_norm_rope")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# The shape of a leaf, and the view [..., L, N, K] of it that is the projection.
LAYOUTS = {
    "contiguous": lambda L, N, K: ((L, N, K), lambda x: x),
    "part of a row": lambda L, N, K: (
        (L, N * K + 8),
        lambda x: x[..., 3 : 3 + N * K].unflatten(-1, (N, K)),
    ),
    "heads first": lambda L, N, K: ((N, L, K), lambda x: x.transpose(-3, -2)),
    "every other feature": lambda L, N, K: ((L, N, 2 * K), lambda x: x[..., ::2]),
    "expanded heads": lambda L, N, K: (
        (L, 1, K),
        lambda x: x.expand(*x.shape[:-2], N, K),
    ),
}
GRADIENTS = {
    "contiguous": lambda dy: dy,
    "heads first": lambda dy: dy.transpose(-3, -2).contiguous().transpose(-3, -2),
    "features first": lambda dy: dy.mT.contiguous().mT,
    "expanded along K": lambda dy: dy[..., :1].expand_as(dy),
    "expanded along L": lambda dy: dy[..., :1, :, :].expand_as(dy),
}
PATHS = {"kernel": nullcontext, "hand-written": partial(references, "qk_norm_rope")}


@pytest.fixture(params=PATHS)
def each_path(request):
    with PATHS[request.param]():
        yield request.param


def tables(S, J, device, dtype=torch.float32):
    """Cosines and sines as a model makes them."""
    frequency_J = 10000.0 ** (-torch.arange(J, device=device, dtype=dtype) / J)
    angle_SJ = torch.arange(S, device=device)[:, None] * frequency_J
    return angle_SJ.cos(), angle_SJ.sin()


def drawn(device, L=5, H=4, G=2, K=8, J=4, norm=True, batch=(2,), dtype=torch.float32):
    """A projection, its tables and its weights."""
    qkv = torch.randn(*batch, L, H + 2 * G, K, device=device, dtype=dtype)
    weights = [torch.randn(K, device=device, dtype=dtype) for _ in range(2 * norm)]
    wide = torch.promote_types(dtype, torch.float32)
    return qkv, *tables(L, J, device, wide), *weights


def laid_out(ys, gradients):
    """`ys`, whose gradients arrive in the strides of `gradients`."""
    for y, gradient in zip(ys, gradients, strict=True):
        if y.requires_grad:
            y.register_hook(GRADIENTS[gradient])
    return ys


@given(
    batch=st.lists(st.integers(0, 2), max_size=2),
    L=st.integers(0, 12),
    H=st.integers(1, 6),
    G=st.integers(1, 5),
    J=st.integers(1, 20),
    rest=st.sampled_from([0, 0, 1, 6, 20]),
    dtype=st.sampled_from(DTYPES),
    weight_dtype=st.sampled_from([None, *DTYPES]),
    size=st.sampled_from([1e-2, 1.0, 50.0]),
    eps=st.sampled_from([1e-6, 1e-2]),
    layout=st.sampled_from(list(LAYOUTS)),
    gradients=st.tuples(*[st.sampled_from(list(GRADIENTS))] * 3),
    offset=st.sampled_from([0, 7, torch.int64, torch.int32, torch.uint8]),
    interleaved=st.booleans(),
    path=st.sampled_from(["kernel", "kernel", "hand-written"]),
    programs=st.sampled_from([1, 5, 2048]),
    heads=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 1 << 30),
)
def test_every_combination_of_options(
    batch, L, H, G, J, rest, dtype, weight_dtype, size, eps, layout, gradients, offset, interleaved,
    path, programs, heads, seed,
):  # fmt: skip
    """With weights unless `weight_dtype` is None, `heads` and at most `programs` at a time."""
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    K = 2 * J + rest
    shape, view = LAYOUTS[layout](L, H + 2 * G, K)
    leaf = (torch.randn(*batch, *shape, device=device) * size).to(dtype)
    norm = weight_dtype is not None
    weights = [torch.randn(K, device=device).to(weight_dtype) for _ in range(2 * norm)]
    cos, sin = tables(L + 10, J, device)
    if not isinstance(offset, int):
        offset = torch.randint(0, 10, batch, device=device, dtype=offset)
    options = {"kv_heads": G, "offset": offset, "interleaved": interleaved, "eps": eps}

    def of(f):  # a view of a leaf, so that no copy hides a stride
        return lambda x, *w: laid_out(f(view(x), cos, sin, *w, **options), gradients)

    # Of few heads or features, gradients are small differences of numbers of this size.
    unit = 4.0 * max(1.0, 1 / size) if norm else 0.0
    small = {"P_MAX": programs, "BLOCK_N": heads, "FORWARD_TILE": 512, "BACKWARD_TILE": 256}
    with PATHS[path](), mock.patch.multiple(MODULE, **small):
        check(of(qk_norm_rope), of(qk_norm_rope_reference), leaf, *weights, unit=unit)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("norm", [False, True])
def test_is_rms_norm_then_rope(interleaved, norm, device, each_path):
    qkv, cos, sin, *w = drawn(device, J=3, norm=norm, dtype=torch.float64)
    options = {"offset": torch.tensor([2, 0], device=device), "interleaved": interleaved}
    cos, sin = tables(9, 3, device, torch.float64)
    eps = 0.1  # which float32 does not hold
    q, k, v = qk_norm_rope(qkv.requires_grad_(), cos, sin, *w, eps=eps, kv_heads=2, **options)
    for y, x, weight in ((q, qkv[:, :, :4], w[:1]), (k, qkv[:, :, 4:6], w[1:])):
        z = rms_norm(x, weight[0].shape, *weight, eps) if norm else x
        turned = rope(z[..., :6], cos, sin, **options)
        torch.testing.assert_close(y, torch.cat([turned, z[..., 6:]], -1), rtol=1e-14, atol=1e-14)
    assert torch.equal(v, qkv[:, :, 6:])


@pytest.mark.parametrize("shape", [(130, 12, 4, 64, 32), (3, 3, 1, 192, 16)], ids=str)
def test_more_than_a_tile(shape, device):
    L, H, G, K, J = shape
    qkv, cos, sin, *weights = drawn(device, L, H, G, K, J)

    def of(f):
        return lambda qkv, *weights: f(qkv, cos, sin, *weights, kv_heads=G)

    check(of(qk_norm_rope), of(qk_norm_rope_reference), qkv, *weights)
    with mock.patch.object(MODULE, "P_MAX", 8):  # programs walk over several blocks of positions
        check(of(qk_norm_rope), of(qk_norm_rope_reference), qkv, *weights)


def test_a_third_of_the_heads_are_queries(device, each_path):
    inputs = drawn(device, H=2, G=2)
    for y, expected in zip(
        qk_norm_rope(*inputs), qk_norm_rope(*inputs, kv_heads=2), strict=True
    ):  # fmt: skip
        assert y.shape == (2, 5, 2, 8)
        assert torch.equal(y, expected)


def test_packed_projection_and_gradients_are_read_where_they_are(device, monkeypatch):
    read = []
    for name in ("_forward", "_backward"):
        launch = getattr(MODULE, name)
        noting = lambda *args, launch=launch: read.append(args) or launch(*args)  # noqa: E731
        monkeypatch.setattr(MODULE, name, noting)
    _, *others = drawn(device)
    row = torch.randn(2, 5, 8 * 8 + 16, device=device, requires_grad=True)
    packed = row[..., 16:].unflatten(-1, (8, 8))
    q, k, v = qk_norm_rope(packed, *others, kv_heads=2)
    assert v.data_ptr() == packed[:, :, 6:].data_ptr()
    assert v.stride() == packed.stride()
    # As attention gives them: heads before positions.
    dys = [torch.randn_like(y.transpose(1, 2)).transpose(1, 2) for y in (q, k, v)]
    torch.autograd.grad((q, k, v), row, dys)
    (forward, backward), addresses = read, [x.data_ptr() for x in dys]
    assert forward[0].data_ptr() == backward[3].data_ptr() == packed.data_ptr()
    assert [x.data_ptr() for x in backward[:3]] == addresses


@pytest.mark.parametrize("norm", [False, True])
def test_gradient_of_the_projection_comes_from_one_node(norm, device, monkeypatch, each_path):
    grids = record_launches(monkeypatch, MODULE)
    qkv, *others = drawn(device, norm=norm)
    outputs = qk_norm_rope(qkv.requires_grad_(), *others, kv_heads=2)
    assert len(grids) == (each_path == "kernel")
    assert len({y.grad_fn for y in outputs}) == 1
    (dqkv,) = torch.autograd.grad(outputs, qkv, [torch.randn_like(y) for y in outputs])
    assert dqkv.is_contiguous()
    assert len(grids) == (each_path == "kernel") * (2 + norm)


@pytest.mark.parametrize("used", [[0], [1], [2], [0, 2], [1, 2]], ids=str)
@pytest.mark.parametrize("wanted", [[0], [1], [2], [0, 2]], ids=str)
def test_any_output_gives_gradients_to_any_input(used, wanted, device, each_path):
    qkv, cos, sin, *weights = drawn(device)

    def some(f):
        def g(qkv, *weights):
            # Without `+ 0` an output that no wanted input leads to would have no gradient.
            nothing = 0 * sum(x.sum() for x in (qkv, *weights))
            ys = f(qkv, cos, sin, *weights, kv_heads=2)
            return tuple(ys[i] + nothing for i in used)

        return g

    inputs = qkv, *weights
    check(some(qk_norm_rope), some(qk_norm_rope_reference), *inputs, needs_grad=wanted)


@pytest.mark.parametrize("norm", [False, True])
def test_features_behind_the_pairs_are_not_turned(norm, device, each_path):
    qkv, cos, sin, *weights = drawn(device, J=1, norm=norm)
    q, k, _ = qk_norm_rope(qkv, cos, sin, *weights, kv_heads=2)
    for y, x, w in ((q, qkv[:, :, :4], weights[:1]), (k, qkv[:, :, 4:6], weights[1:])):
        expected = rms_norm(x, w[0].shape, *w, 1e-6) if norm else x
        torch.testing.assert_close(y[..., 2:], expected[..., 2:])
        assert norm or torch.equal(y[..., 2:], x[..., 2:])


def test_positions_outside_the_tables_give_nan(device, each_path):
    *_, q_weight, k_weight = drawn(device, K=2)
    qkv = torch.ones(4, 3, 3, 2, device=device, requires_grad=True)
    outside = torch.tensor([-1, 0, 4, (1 << 63) - 2], device=device)
    q, k, v = qk_norm_rope(qkv, *tables(5, 1, device), q_weight, k_weight, offset=outside)
    (q.sum() + k.sum() + v.sum()).backward()
    expected = [[True, False, False], [False] * 3, [False, True, True], [True] * 3]
    for result in (q, k, qkv.grad[:, :, :1], qkv.grad[:, :, 1:2]):
        assert result.isnan().all(-1).squeeze(-1).tolist() == expected
        assert result.isnan().any(-1).squeeze(-1).tolist() == expected
    assert (qkv.grad[:, :, 2:] == 1).all()


def test_a_bad_value_spoils_its_own_head_alone(device, each_path):
    inputs = drawn(device)
    expected = qk_norm_rope(*inputs, kv_heads=2)
    inputs[0][1, 2, 3, 7] = float("nan")
    q, k, v = qk_norm_rope(*inputs, kv_heads=2)
    assert q.isnan().nonzero().tolist() == [[1, 2, 3, i] for i in range(8)]
    assert torch.equal(q.nan_to_num(0), expected[0].where(~q.isnan(), 0))
    assert torch.equal(k, expected[1])
    assert torch.equal(v, expected[2])


def test_without_eps_what_pads_a_tile_adds_nothing(device):
    # Five positions, and three heads of queries, in tiles of four: 1 / 0 where there is nothing.
    qkv, cos, sin, *weights = drawn(device, H=3, G=1)

    def of(f):
        return lambda qkv, *weights: f(qkv, cos, sin, *weights, 0.0, kv_heads=1)

    check(of(qk_norm_rope), of(qk_norm_rope_reference), qkv, *weights)


def test_sums_over_more_programs_than_a_block(device):
    # Of 540 programs a third each have queries, keys and values: two blocks of partial sums.
    qkv, cos, sin, *weights = drawn(device, L=180, H=1, G=1, K=18, J=8, batch=(1,))

    def of(f):
        return lambda qkv, *weights: f(qkv, cos, sin, *weights)

    with mock.patch.multiple(MODULE, BACKWARD_TILE=32, BLOCK_N=1):
        check(of(qk_norm_rope), of(qk_norm_rope_reference), qkv, *weights)


def test_repeats_bit_by_bit(device, each_path):
    qkv, cos, sin, *weights = drawn(device, L=40, K=16, J=8)
    leaves = [x.requires_grad_() for x in (qkv, *weights)]
    outputs = qk_norm_rope(qkv, cos, sin, *weights, kv_heads=2)
    dys = [torch.randn_like(y) for y in outputs]
    before = [dy.clone() for dy in dys]
    first, second = (torch.autograd.grad(outputs, leaves, dys, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))
    assert all(map(torch.equal, dys, before))


@pytest.mark.parametrize(("norm", "interleaved"), [(False, True), (True, False)])
def test_gradient_in_float64(norm, interleaved, device, each_path):
    qkv, cos, sin, *weights = drawn(device, 2, 1, 1, 3, 1, norm, (), torch.float64)
    inputs = [x.requires_grad_() for x in (qkv, *weights)]

    def f(qkv, *weights):
        return qk_norm_rope(qkv, cos, sin, *weights, eps=0.1, interleaved=interleaved)

    assert torch.autograd.gradcheck(f, inputs)
    if each_path == "hand-written":
        assert torch.autograd.gradgradcheck(f, inputs)


@pytest.mark.skipif(torch.cuda.is_available(), reason="gradients are hand-written for CPUs")
def test_on_a_cpu_the_gradient_is_hand_written():
    qkv, *others = drawn("cpu")
    with references("qk_norm_rope"):
        q, _, _ = qk_norm_rope(qkv.requires_grad_(), *others, kv_heads=2)
        assert "HandWritten" in type(q.grad_fn).__name__


def test_keeps_the_projection_alone(device, each_path):
    kept = {}

    def pack(x):
        kept[x.data_ptr()] = x.nbytes
        return x

    qkv, *others = drawn(device, L=16, K=64, J=32)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        qk_norm_rope(qkv.requires_grad_(), *others, kv_heads=2)
    assert kept.pop(qkv.data_ptr()) == qkv.nbytes
    assert sum(kept.values()) < qkv.nbytes / 4  # tables, weights, and a number for each head


def test_notices_a_projection_that_was_overwritten(device, each_path):
    qkv, *others = drawn(device)
    packed = qkv.requires_grad_() * 1
    q, _, _ = qk_norm_rope(packed, *others, kv_heads=2)
    packed.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        q.sum().backward()


def test_tables_and_weights_need_not_be_contiguous(device):
    qkv, cos, sin, *weights = drawn(device)
    packed, both = torch.cat([cos, sin], -1), torch.stack(weights, -1)
    strided = packed[:, :4], packed[:, 4:], both[:, 0], both[:, 1]
    found = qk_norm_rope(qkv, *strided, kv_heads=2)
    assert all(map(torch.equal, found, qk_norm_rope(qkv, cos, sin, *weights, kv_heads=2)))
    starts = torch.tensor([[1, 3], [0, 3]], device=device)[:, 0]
    cos, sin = tables(6, 4, device)
    found = qk_norm_rope(qkv, cos, sin, *weights, kv_heads=2, offset=starts)
    for b, n in enumerate((1, 0)):
        alone = qk_norm_rope(qkv[b], cos, sin, *weights, kv_heads=2, offset=n)
        assert all(torch.equal(x[b], y) for x, y in zip(found, alone, strict=True))


def test_offsets_beyond_two_to_the_31(device, monkeypatch):
    # The stride fits an int32, the last row's offset does not; the memory between is never touched.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    memory = torch.empty((1 << 31) + 16, device=device, dtype=torch.bfloat16)
    weights = [torch.randn(16, device=device) for _ in range(2)]
    cos, sin = tables(3, 8, device)
    for shape in [(3, 1, 3, 16), (1, 3, 3, 16)]:
        strides = (1 << 30, 1 << 30, 0, 1)
        far = memory.as_strided(shape, strides)
        memory.as_strided((3, 16), (1 << 30, 1)).copy_(torch.randn(3, 16))
        angles, near = (cos[: shape[1]], sin[: shape[1]], None), far.contiguous()
        for x in (far, near):
            ys = _forward(x, *angles, *weights, 1e-6, 1, False)
            dy = x[:, :, :1]
            found = (*ys, *_backward(dy, dy, dy, x, *angles, *weights, 1e-6, False))
            if x is far:
                expected = found
        assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_is_a_well_formed_operator(dtype, device):
    # The raw operators have no gradient: the autograd.Function around them has.
    qkv, _, _, q_weight, k_weight = drawn(device, dtype=dtype)
    angles = tables(9, 4, device)
    offset = torch.tensor([0, 3], device=device)
    for how in ((None, q_weight, k_weight), (offset, None, None)):
        arguments = (*angles, *how, 1e-6)
        torch.library.opcheck(_forward.overload, (qkv, *arguments, 2, False))
        dys = qkv[:, :, :4], qkv[:, :, :2], qkv[:, :, 2:4]
        torch.library.opcheck(_backward.overload, (*dys, qkv, *arguments, False))


@pytest.mark.parametrize("norm", [False, True])
def test_compiles_once_for_all_lengths(norm, device):
    qkv, _, _, *weights = drawn(device, norm=norm)
    cos, sin = tables(20, 4, device)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(qk_norm_rope, fullgraph=True, backend=counter, dynamic=True)

    def of(f, offset):
        return lambda qkv, *w: f(qkv, cos, sin, *w, kv_heads=2, offset=offset)

    start = torch.tensor([4, 0], device=device)
    for offset in (0, start):
        compilations = set()
        for L in (5, 9, 12):
            qkv = torch.randn(2, L, 8, 8, device=device)
            check(of(compiled, offset), of(qk_norm_rope_reference, offset), qkv, *weights)
            compilations.add(counter.frame_count)
        assert len(compilations) == 1
    torch._dynamo.reset()


def test_autocast_leaves_the_arithmetic_alone(device, each_path):
    qkv, *others = drawn(device)
    leaves = [x.requires_grad_() for x in (qkv, *others[2:])]

    def results():
        ys = qk_norm_rope(qkv, *others, kv_heads=2)
        return *ys, *torch.autograd.grad(ys, leaves, [y.detach() for y in ys])

    expected = results()
    with torch.autocast(device, torch.bfloat16):
        assert all(map(torch.equal, results(), expected))


@pytest.mark.parametrize("shape", [(0, 3, 6, 8), (2, 0, 6, 8)], ids=str)
def test_empty(shape, device, each_path):
    _, cos, sin, *weights = drawn(device)

    def of(f):
        return lambda qkv, *weights: f(qkv, cos, sin, *weights)

    qkv = torch.ones(shape, device=device)
    check(of(qk_norm_rope), of(qk_norm_rope_reference), qkv, *weights)


QKV, TABLE, W = torch.ones(2, 3, 4), torch.ones(2, 2), torch.ones(4)


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        ((QKV[0], TABLE, TABLE), {}, r"floating point \[..., L, H \+ 2G, K\], .* \[3, 4\]"),
        ((QKV.int(), TABLE, TABLE), {}, "qkv must be floating point .*, got torch.int32"),
        ((QKV[:, :2], TABLE, TABLE), {}, "a third of the heads are queries, got 2 heads; pass kv"),
        ((QKV[:, :0], TABLE, TABLE), {}, "a third of the heads are queries, got 0 heads"),
        ((QKV, TABLE, TABLE), {"kv_heads": 0}, r"must be in \[1, 1\], as qkv has 3 heads .* 0"),
        ((QKV, TABLE, TABLE), {"kv_heads": 2}, r"must be in \[1, 1\], as qkv has 3 heads .* 2"),
        ((QKV, TABLE, TABLE, W), {}, "must both be given, or both be None"),
        ((QKV, TABLE, TABLE, None, W), {}, "must both be given, or both be None"),
        ((QKV, TABLE, TABLE, W, W[:3]), {}, r"k_weight must have shape \[4\], got \[3\]"),
        ((QKV, TABLE, TABLE, W.to("meta"), W), {}, "q_weight must be on cpu, got meta; move it"),
        ((QKV, TABLE, TABLE, W.int(), W), {}, "q_weight must be floating point, got torch.int32"),
        ((QKV, TABLE, TABLE, W, W.half()), {}, "one dtype, got torch.float32 and torch.float16"),
        ((QKV, TABLE[:1], TABLE), {}, r"cos must be \[2 or more, 1 to 2\], got \[1, 2\]"),
        ((QKV, TABLE, torch.ones(2, 3)), {}, r"sin must be \[2 or more, 1 to 2\], got \[2, 3\]"),
        ((QKV, TABLE[:, :0], TABLE), {}, r"cos must be \[2 or more, 1 to 2\], got \[2, 0\]"),
        ((QKV, TABLE[:, :1], TABLE), {}, r"one shape, got \[2, 1\] and \[2, 2\]"),
        ((QKV, TABLE, TABLE.bfloat16()), {}, "sin must be float32, got torch.bfloat16; keep"),
        ((QKV, TABLE.to("meta"), TABLE), {}, "cos must be on cpu, got meta"),
        ((QKV, TABLE, TABLE.clone().requires_grad_()), {}, "sin has no gradient, .* detach it"),
        ((QKV, TABLE, TABLE), {"offset": 1}, r"cos must be \[3 or more, 1 to 2\], got \[2, 2\]"),
        ((QKV, TABLE, TABLE), {"offset": -1}, "offset must be at least 0, got -1"),
        ((QKV, TABLE, TABLE), {"offset": W.long()}, r"must be integers \[\] on cpu, .* \[4\]"),
    ],
    ids=[
        "two axes", "integer", "no third", "no heads", "no keys", "no queries", "one weight",
        "the other weight", "weight's shape", "weight elsewhere", "integer weight", "two dtypes",
        "short", "wide", "no pairs", "unequal", "bfloat16", "device", "gradient", "beyond",
        "negative", "offset's axes",
    ],
)  # fmt: skip
def test_refuses(inputs, options, message):
    with pytest.raises(ValueError, match=f"^qk_norm_rope: .*{message}"):
        qk_norm_rope(*inputs, **options)


def test_refuses_a_second_derivative(device):
    qkv, *others = drawn(device)
    q, _, _ = qk_norm_rope(qkv.requires_grad_(), *others, kv_heads=2)
    (dqkv,) = torch.autograd.grad(q.sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivative only"):
        dqkv.sum().backward()
