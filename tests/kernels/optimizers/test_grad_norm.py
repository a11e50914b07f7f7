"""clip_grad_norm_ is torch's with norm 2, summed in float32 for gradients of any dtype.

clip_grad_norms_ is that of one layer after another.
"""

import pytest
import torch
from recorded import record_launches
from small_training import programs_in
from torch import nn

from tritium.kernels.optimizers import clip_grad_norm, grad_norm
from tritium.kernels.optimizers.clip_grad_norm import clip_grad_norm_, clip_grad_norms_

SIZES = [(0,), (1,), (3,), (127,), (4097,), (8, 16), (16385,)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


pytestmark = pytest.mark.usefixtures("pointer_tables")


def parameters(dtypes, device, scale=1.0):
    """One parameter of every size, dtypes in turn; the last gradient is not aligned to 16 bytes."""
    shapes = [*SIZES, (2302,)]
    ps = []
    for i, shape in enumerate(shapes):
        g = scale * torch.randn(shape, device=device).to(dtypes[i % len(dtypes)])
        ps.append(with_gradient(g))
    ps[-1].grad = torch.cat([ps[-1].grad, ps[-1].grad[:1]])[1:]
    return ps


def with_gradient(g):
    p = nn.Parameter(torch.empty_like(g))
    p.grad = g
    return p


def clip_layer(parameters, max_norm):
    return clip_grad_norms_([parameters], max_norm)


def exact_norm(ps):
    return torch.cat([p.grad.double().flatten() for p in ps]).norm()


def assert_scaled(ps, before, coef):
    """Every gradient is `coef` times what it was, rounded once."""
    for p, g in zip(ps, before, strict=True):
        expected = g.double() * coef
        half_ulp = torch.finfo(g.dtype).eps * expected.abs() / 2 + torch.finfo(g.dtype).tiny
        assert ((p.grad - expected).abs() <= 1.01 * half_ulp + 3e-7 * expected.abs()).all()


def split_into_layers(ps):
    """A parameter alone, lists and a generator; layers without a parameter, without a gradient."""
    frozen = nn.Parameter(torch.ones(2, device=ps[0].device))
    return [[], ps[:2], [frozen], ps[2], [ps[3], frozen, ps[4]], (p for p in ps[5:]), []]


LAYERS = [[], [0, 1], [], [2], [3, 4], [5, 6, 7], []]  # indices of the parameters in each


@pytest.mark.parametrize("dtypes", [*([d] for d in DTYPES), DTYPES], ids=str)
@pytest.mark.parametrize("max_norm", [1e-3, 20.0])
def test_scales_to_the_norm(max_norm, dtypes, path, device):
    ps = parameters(dtypes, device)
    norm, before = exact_norm(ps), [p.grad.clone() for p in ps]
    returned = clip_grad_norm_(ps, max_norm)
    assert (returned.dtype, returned.shape) == (torch.float32, ())
    assert returned.item() == pytest.approx(norm.item(), rel=1e-6)
    assert_scaled(ps, before, max_norm / (norm + 1e-6))


@pytest.mark.parametrize("dtypes", [[torch.float32], DTYPES], ids=str)
@pytest.mark.parametrize("max_norm", [1e-3, 20.0])
def test_scales_each_layer_to_its_own_norm(max_norm, dtypes, path, device):
    ps = parameters(dtypes, device)
    before = [p.grad.clone() for p in ps]
    norms = [exact_norm([ps[i] for i in layer]).item() if layer else 0.0 for layer in LAYERS]
    returned = clip_grad_norms_(split_into_layers(ps), max_norm)
    assert (returned.dtype, returned.shape) == (torch.float32, (len(LAYERS),))
    assert returned.tolist() == pytest.approx(norms, rel=1e-6)
    assert max_norm < 1 or min(norms[3:6]) < max_norm < max(norms)
    for layer, norm in zip(LAYERS, norms, strict=True):
        members, own = [ps[i] for i in layer], [before[i] for i in layer]
        if norm <= max_norm:
            assert all(torch.equal(p.grad, g) for p, g in zip(members, own, strict=True))
        else:
            assert_scaled(members, own, max_norm / (norm + 1e-6))


def test_one_layer_is_clipped_as_by_clip_grad_norm(path, device):
    ps = parameters(DTYPES, device)
    qs = [with_gradient(p.grad.clone()) for p in ps]
    norm, norms = clip_grad_norm_(ps, 2.0), clip_grad_norms_([qs], 2.0)
    assert norms.tolist() == pytest.approx([norm.item()], rel=1e-6)
    for p, q in zip(ps, qs, strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_layer_that_is_not_finite_leaves_the_others_alone(bad, path, device):
    ps, qs = parameters([torch.float32], device), []
    for p in ps:
        qs.append(with_gradient(p.grad.clone()))
    for rs in (ps, qs):
        rs[3].grad[5] = bad
    returned = clip_grad_norms_(split_into_layers(ps), 1.0)
    assert returned.isfinite().tolist() == [True] * 4 + [False, True, True]
    for layer in filter(None, LAYERS):
        nn.utils.clip_grad_norm_([qs[i] for i in layer], 1.0)
        for i in layer:
            torch.testing.assert_close(ps[i].grad, qs[i].grad, equal_nan=True)


def test_clips_as_torch_does(path, device):
    ps = parameters([torch.float32], device)
    qs = [with_gradient(p.grad.clone()) for p in ps]
    assert torch.allclose(clip_grad_norm_(ps, 2.0), nn.utils.clip_grad_norm_(qs, 2.0), rtol=1e-6)
    for p, q in zip(ps, qs, strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("max_norm", [1e6, float("inf")])
def test_leaves_small_gradients_alone(max_norm, dtype, path, device):
    ps = parameters([dtype], device)
    before = [p.grad.clone() for p in ps]
    clip_grad_norm_(ps, max_norm)
    for p, g in zip(ps, before, strict=True):
        assert torch.equal(p.grad, g)


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_treats_nonfinite_gradients_as_torch_does(bad, path, device):
    ps = parameters([torch.float32], device)
    ps[3].grad[5] = bad
    qs = [with_gradient(p.grad.clone()) for p in ps]
    actual, torch_result = clip_grad_norm_(ps, 1.0), nn.utils.clip_grad_norm_(qs, 1.0)
    torch.testing.assert_close(actual, torch_result, equal_nan=True)
    for p, q in zip(ps, qs, strict=True):
        torch.testing.assert_close(p.grad, q.grad, equal_nan=True)


def test_sums_low_precision_in_float32(path, device):
    # 2^15 ones: their sum stops at 256 in bfloat16, and their norm is 181.02, which it cannot hold.
    p = with_gradient(torch.ones(1 << 15, device=device, dtype=torch.bfloat16))
    assert clip_grad_norm_(p, 1e9).item() == pytest.approx(2**7.5, rel=1e-6)


def test_is_bitwise_repeatable(path, device):
    results = []
    for order in ("forward", "reverse", "shuffled"):
        torch.manual_seed(0)
        ps = parameters(DTYPES, device)
        with programs_in(order):
            norms = [clip_grad_norm_(ps, 1.0), clip_grad_norms_(split_into_layers(ps), 0.1)]
        results.append([*norms, *(p.grad for p in ps)])
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


@pytest.fixture
def grids(monkeypatch):
    return record_launches(monkeypatch, grad_norm, clip_grad_norm)


def test_takes_two_launches_of_a_fixed_grid(grids, device):
    clip_grad_norm_(parameters(DTYPES, device), 1.0)
    assert grids == [(grad_norm.P,), (grad_norm.P,)]


@pytest.mark.parametrize("count", [1, 4, 40])
def test_takes_three_launches_for_any_number_of_layers(count, grids, device):
    clip_grad_norms_([with_gradient(torch.ones(5, device=device)) for _ in range(count)], 1.0)
    programs = min(grad_norm.P, count)
    assert grids == [(programs,), (count,), (programs,)]


def test_never_reads_back(monkeypatch, device):
    ps = parameters(DTYPES, device)
    for name in ("item", "tolist", "cpu", "__bool__", "__float__", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, None)
    clip_grad_norm_(ps, 1.0)
    clip_grad_norms_([ps[:3], ps[3:]], 0.1)


@pytest.mark.parametrize("clip", [clip_grad_norm_, clip_layer])
def test_counts_as_a_change_in_place(clip, path, device):
    p = with_gradient(torch.ones(4, device=device))
    version = p.grad._version
    clip(p, 0.1)
    assert p.grad._version > version


def test_takes_what_torch_takes(path, device):
    ps = parameters([torch.float32], device)
    norm = exact_norm(ps).item()
    ps.insert(2, nn.Parameter(torch.ones(2, device=device)))
    assert clip_grad_norm_((p for p in ps), 1e9).item() == pytest.approx(norm)
    assert clip_grad_norm_(ps[0], 1.0).item() == 0
    assert clip_grad_norm_([], 1.0).item() == 0
    assert clip_grad_norm_(ps[2], 1.0).item() == 0
    assert clip_grad_norms_([], 1.0).shape == (0,)
    assert clip_grad_norms_(ps[2:3], 1.0).tolist() == [0]
    wanted = exact_norm([ps[4]]).item()
    assert clip_grad_norms_((p for p in ps), 1e9)[4].item() == pytest.approx(wanted)


def test_memory_may_be_in_any_order(path, device):
    p = with_gradient(torch.randn(16, 8, device=device).T)
    expected = p.grad / p.grad.norm()
    clip_grad_norm_(p, 1.0)
    assert torch.allclose(p.grad, expected, rtol=1e-5)


def grads_on_two_devices():
    return [with_gradient(torch.ones(2)), with_gradient(torch.ones(2, device="meta"))]


ERRORS = [
    (lambda: with_gradient(torch.ones(2).double()), TypeError, "must be float32, float16 or bf"),
    (grads_on_two_devices, ValueError, "must be on one device, got cpu and meta"),
    (lambda: with_gradient(torch.ones(8)[::2]), ValueError, "must be dense"),
    (
        lambda: with_gradient(torch.ones(2).to_sparse()),
        ValueError,
        r"must be dense in memory, got a torch\.sparse_coo",
    ),
    (lambda: with_gradient(torch.ones(2, device="meta")), ValueError, "hold their own memory"),
]


@pytest.mark.parametrize(("make", "error", "message"), ERRORS, ids=[e[2] for e in ERRORS])
@pytest.mark.parametrize("clip", [clip_grad_norm_, clip_layer])
def test_rejects(clip, make, error, message, path):
    with pytest.raises(error, match=message):
        clip(make(), 1.0)


def test_rejects_shared_memory(path, device):
    p = with_gradient(torch.ones(2, device=device))
    q = nn.Parameter(torch.ones(2, device=device))
    q.grad = p.grad
    with pytest.raises(ValueError, match=r"^clip_grad_norm_: tensors must not share an address"):
        clip_grad_norm_([p, q], 1.0)
    with pytest.raises(ValueError, match=r"^clip_grad_norms_: tensors must not share an address"):
        clip_grad_norms_([p, q], 1.0)
    for empty in (p, q):  # of no elements, which share nothing
        empty.grad = None
        empty.data = torch.ones(0, device=device)
        empty.grad = empty.data.view(0)
    assert clip_grad_norm_([p, q], 1.0) == 0
