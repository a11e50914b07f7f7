"""Hand-written CPU gradients equal those of the references, to the second derivative."""

from functools import partial

import pytest
import torch

from tritium.kernels import add_rms_norm, qk_norm_rope, rms_norm, rope, swiglu
from tritium.kernels._cpu_backward import needs_no_graph, uses_cpu_backward
from tritium.kernels.rms_norm import add_rms_norm_reference, rms_norm_reference
from tritium.kernels.rope import rope_reference
from tritium.kernels.runtime import references
from tritium.kernels.swiglu import swiglu_reference

B, L, H, K = 2, 5, 3, 8
COS, SIN = (f(torch.randn(9, K // 2)) for f in (torch.cos, torch.sin))


def of(op, definition, *shapes, **options):
    """An operation, its reference, and the shapes of what both take."""
    return partial(op, **options), partial(definition, **options), shapes


def over_rows(f):
    """Wrap `f` to the last axis alone, with one eps in every dtype."""
    return lambda x, weight, eps=1e-6, **options: f(x, x.shape[-1:], weight, eps, **options)


norm, norm_reference = over_rows(rms_norm), over_rows(rms_norm_reference)


def turning(**options):
    def by(turn):
        def turned(x):
            wide = torch.promote_types(x.dtype, torch.float32)
            return turn(x, COS.to(wide), SIN.to(wide), **options)

        return turned

    return by(rope), by(rope_reference), [(B, L, H, K)]


CASES = {
    "rms_norm": of(norm, norm_reference, (B, L, K), (K,)),
    "rms_norm, offset": of(norm, norm_reference, (4, K), (K,), eps=0.1, offset=1.0),
    "rms_norm, one row": of(norm, norm_reference, (K,), (K,)),
    "add_rms_norm": of(add_rms_norm, add_rms_norm_reference, (B, L, K), (B, L, K), (K,)),
    "swiglu": of(swiglu, swiglu_reference, (B, L, K), (B, L, K)),
    "rope": turning(offset=2),
    "rope, interleaved": turning(interleaved=True),
    "rope, two offsets": turning(offset=torch.tensor([0, 3])),
}  # fmt: skip


@pytest.fixture(autouse=True)
def on_a_cpu():
    with references("rms_norm", "add_rms_norm", "swiglu", "rope", "qk_norm_rope"):
        yield


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request):
    return request.param


def draw(shapes, dtype):
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def results(op, inputs, dys=None):
    outputs = op(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    dys = [torch.randn_like(y) for y in outputs] if dys is None else dys
    return outputs, torch.autograd.grad(outputs, inputs, dys), dys


def test_derivatives_are_exact(case):
    op, _, shapes = case
    inputs = draw(shapes, torch.float64)
    assert torch.autograd.gradcheck(op, inputs)
    assert torch.autograd.gradgradcheck(op, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_equal_those_of_the_reference(case, dtype):
    op, definition, shapes = case
    inputs = draw(shapes, dtype)
    outputs, grads, dys = results(op, inputs)
    expected, expected_grads, _ = results(definition, inputs, dys)
    assert any("CpuBackward" in str(node_of(y)) for y in outputs)
    assert not any("CpuBackward" in str(node_of(y)) for y in expected)
    assert all(map(torch.equal, outputs, expected))
    for g, e in zip(grads, expected_grads, strict=True):
        assert g.dtype == e.dtype
        torch.testing.assert_close(g, e)


def node_of(y):
    """Return the names of all nodes of the graph of `y`."""
    found, todo = [], [y.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and len(found) < 50:
            found.append(type(node).__name__)
            todo += [parent for parent, _ in node.next_functions]
    return found


def test_inputs_of_two_dtypes():
    x, w = draw([(4, K)], torch.bfloat16)[0], draw([(K,)], torch.float32)[0]
    residual = draw([(4, K)], torch.float32)[0]
    for op, definition, inputs in (
        (norm, norm_reference, (x, w)),
        (norm, norm_reference, (residual, w.detach().bfloat16().requires_grad_())),
        (add_rms_norm, add_rms_norm_reference, (x, residual, w)),
        (add_rms_norm, add_rms_norm_reference, (residual, x, w)),
    ):
        outputs, grads, dys = results(op, inputs)
        expected, expected_grads, _ = results(definition, inputs, dys)
        assert all(map(torch.equal, outputs, expected))
        for g, e in zip(grads, expected_grads, strict=True):
            assert g.dtype == e.dtype
            torch.testing.assert_close(g, e)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("name", ["rms_norm", "add_rms_norm", "swiglu"])
def test_only_wanted_gradients_are_computed(name, first):
    op, definition, shapes = CASES[name]
    inputs = draw(shapes, torch.float32)
    for i, x in enumerate(inputs):
        x.requires_grad_((i == 0) == first)
    wanted = [x for x in inputs if x.requires_grad]
    results = []
    for f in (op, definition):
        y = f(*inputs)
        y = sum(x.square().sum() for x in (y if isinstance(y, tuple) else (y,)))
        results.append(torch.autograd.grad(y, wanted))
    torch.testing.assert_close(*results)


def test_views_are_taken_as_they_are(case):
    op, definition, shapes = case
    wide = draw([(*shape[:-1], 2 * shape[-1] + 1) for shape in shapes], torch.float32)
    parts = [x[..., 1 : 1 + shape[-1]] for x, shape in zip(wide, shapes, strict=True)]
    _, grads, dys = results(op, parts)
    torch.testing.assert_close(grads, results(definition, parts, dys)[1])


def test_gradients_that_come_in_are_left_as_they_are(case):
    op, _, shapes = case
    inputs = draw(shapes, torch.float32)
    *_, dys = results(op, inputs)
    before = [dy.clone() for dy in dys]
    results(op, inputs, dys)
    assert all(map(torch.equal, dys, before))


def test_saves_less_than_the_reference():
    def kept(op, inputs):
        found = {}

        def pack(x):
            found[x.data_ptr()] = x.nbytes
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            op(*inputs)
        return sum(found.values())

    x, w, up = draw([(64, 64), (64,), (64, 64)], torch.float32)
    assert kept(norm, (x, w)) < kept(norm_reference, (x, w))
    assert kept(swiglu, (x, up)) == 2 * x.nbytes < kept(swiglu_reference, (x, up))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # by torch.func.jvp
def test_torch_func_differentiates_the_reference():
    x, w = torch.randn(4, K), torch.randn(K)
    expected = torch.autograd.functional.jacobian(lambda w: norm(x, w).sum(), w)
    found = torch.func.grad(lambda w: norm(x, w).sum())(w)
    torch.testing.assert_close(found, expected)
    _, tangent = torch.func.jvp(lambda w: norm(x, w).sum(), (w,), (w,))
    torch.testing.assert_close(tangent, expected @ w)


def test_applies_only_where_a_gradient_is_wanted():
    x = torch.randn(3, requires_grad=True)
    assert uses_cpu_backward(x)
    assert not uses_cpu_backward(x.detach())
    assert not uses_cpu_backward(torch.empty(0, requires_grad=True))
    assert not uses_cpu_backward(torch.empty(3, device="meta", requires_grad=True))
    assert not needs_no_graph(x)
    assert needs_no_graph(x.detach())
    with torch.no_grad():
        assert not uses_cpu_backward(x)
        assert needs_no_graph(x)
        assert not needs_no_graph(torch.empty(3, device="meta"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_without_a_graph_results_are_the_same_bits(dtype):
    """A step of generation computes what training computed of the same inputs."""
    x, w = torch.randn(B, L, 4, K).to(dtype), torch.randn(K).to(dtype)
    eps = 0.1
    calls = [
        lambda x, w: norm(x, w), lambda x, w: norm(x, w, offset=1.0),
        lambda x, w: norm(x, w.float()), lambda x, w: add_rms_norm(x, x.float(), w, eps),
        lambda x, w: qk_norm_rope(x, COS, SIN, w, 2 * w, eps, kv_heads=1, offset=3),
        lambda x, w: qk_norm_rope(x, COS[:, :2], SIN[:, :2], kv_heads=1, interleaved=True),
    ]  # fmt: skip
    for call in calls:
        with torch.no_grad():
            found = call(x, w)
        expected = call(x.clone().requires_grad_(), w.clone().requires_grad_())
        if isinstance(found, torch.Tensor):
            found, expected = (found,), (expected,)
        for y, z in zip(found, expected, strict=True):
            assert y.dtype == z.dtype
            assert torch.equal(y, z)
