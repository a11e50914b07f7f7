"""Prove qk_norm_rope's calls: launches, memory kept, operators, compilation, refusals."""

import importlib
from unittest import mock

import pytest
import torch
from check import check, refuses_a_second_derivative
from packed import PATHS, drawn, tables
from recorded import record_launches
from torch._dynamo.testing import CompileCounterWithBackend

from tritium.kernels.qk_norm_rope import _backward, _forward, qk_norm_rope, qk_norm_rope_reference
from tritium.kernels.runtime import references

MODULE = importlib.import_module("tritium.kernels.qk_norm_rope")


@pytest.fixture(params=PATHS)
def each_path(request):
    with PATHS[request.param]():
        yield request.param


def test_packed_projection_and_gradients_are_read_where_they_are(device, monkeypatch):
    read = []
    for name in ("_forward", "_backward"):
        noting = mock.Mock(wraps=getattr(MODULE, name))
        monkeypatch.setattr(MODULE, name, noting)
        read.append(noting)
    _, *others = drawn(device)
    row = torch.randn(2, 5, 8 * 8 + 16, device=device, requires_grad=True)
    packed = row[..., 16:].unflatten(-1, (8, 8))
    q, k, v = qk_norm_rope(packed, *others, kv_heads=2)
    assert v.data_ptr() == packed[:, :, 6:].data_ptr()
    assert v.stride() == packed.stride()
    # As attention gives them: heads before positions.
    dys = [torch.randn_like(y.transpose(1, 2)).transpose(1, 2) for y in (q, k, v)]
    torch.autograd.grad((q, k, v), row, dys)
    forward, backward = (noting.call_args.args for noting in read)
    addresses = [x.data_ptr() for x in dys]
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="gradients are hand-written for CPUs")
def test_on_a_cpu_the_gradient_is_hand_written():
    qkv, *others = drawn("cpu")
    with references("qk_norm_rope"):
        q, _, _ = qk_norm_rope(qkv.requires_grad_(), *others, kv_heads=2)
        assert "HandWritten" in type(q.grad_fn).__name__


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
    refuses_a_second_derivative(
        lambda x: torch.cat(qk_norm_rope(x, *others, kv_heads=2), -2), qkv.requires_grad_()
    )
