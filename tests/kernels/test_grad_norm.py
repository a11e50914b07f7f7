"""clip_grad_norm_ is torch's with norm 2, summed in float32 whatever the gradients are kept in."""

import pytest
import torch
from torch import nn
from training import programs_in

from kernels import grad_norm
from kernels.grad_norm import clip_grad_norm_

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


def exact_norm(ps):
    return torch.cat([p.grad.double().flatten() for p in ps]).norm()


@pytest.mark.parametrize("dtypes", [*([d] for d in DTYPES), DTYPES], ids=str)
@pytest.mark.parametrize("max_norm", [1e-3, 20.0])
def test_scales_to_the_norm(max_norm, dtypes, path, device):
    ps = parameters(dtypes, device)
    norm, before = exact_norm(ps), [p.grad.clone() for p in ps]
    returned = clip_grad_norm_(ps, max_norm)
    assert (returned.dtype, returned.shape) == (torch.float32, ())
    assert returned.item() == pytest.approx(norm.item(), rel=1e-6)
    for p, g in zip(ps, before, strict=True):
        expected = g.double() * (max_norm / (norm + 1e-6))
        half_ulp = torch.finfo(g.dtype).eps * expected.abs() / 2 + torch.finfo(g.dtype).tiny
        assert ((p.grad - expected).abs() <= 1.01 * half_ulp + 3e-7 * expected.abs()).all()


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
def test_treats_what_is_not_finite_as_torch_does(bad, path, device):
    ps = parameters([torch.float32], device)
    ps[3].grad[5] = bad
    qs = [with_gradient(p.grad.clone()) for p in ps]
    ours, theirs = clip_grad_norm_(ps, 1.0), nn.utils.clip_grad_norm_(qs, 1.0)
    torch.testing.assert_close(ours, theirs, equal_nan=True)
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
            results.append([clip_grad_norm_(ps, 1.0), *(p.grad for p in ps)])
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


def test_takes_two_launches_of_a_fixed_grid(monkeypatch, device):
    grids = []

    class Recorder:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            grids.append(grid)
            return self.kernel[grid]

    for name in ("_grad_norm_partials_kernel", "_grad_norm_clip_kernel"):
        monkeypatch.setattr(grad_norm, name, Recorder(getattr(grad_norm, name)))
    clip_grad_norm_(parameters(DTYPES, device), 1.0)
    assert grids == [(grad_norm.P,), (grad_norm.P,)]


def test_never_reads_back(monkeypatch, device):
    ps = parameters(DTYPES, device)
    for name in ("item", "tolist", "cpu", "__bool__", "__float__", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, None)
    clip_grad_norm_(ps, 1.0)


def test_counts_as_a_change_in_place(path, device):
    p = with_gradient(torch.ones(4, device=device))
    version = p.grad._version
    clip_grad_norm_(p, 0.1)
    assert p.grad._version > version


def test_takes_what_torch_takes(path, device):
    ps = parameters([torch.float32], device)
    norm = exact_norm(ps).item()
    ps.insert(2, nn.Parameter(torch.ones(2, device=device)))
    assert clip_grad_norm_((p for p in ps), 1e9).item() == pytest.approx(norm)
    assert clip_grad_norm_(ps[0], 1.0).item() == 0
    assert clip_grad_norm_([], 1.0).item() == 0
    assert clip_grad_norm_(ps[2], 1.0).item() == 0


def test_memory_may_be_in_any_order(path, device):
    p = with_gradient(torch.randn(16, 8, device=device).T)
    expected = p.grad / p.grad.norm()
    clip_grad_norm_(p, 1.0)
    assert torch.allclose(p.grad, expected, rtol=1e-5)


def grads_on_two_devices():
    return [with_gradient(torch.ones(2)), with_gradient(torch.ones(2, device="meta"))]


ERRORS = [
    (lambda: with_gradient(torch.ones(2).double()), TypeError, "must be float32, float16 or bf"),
    (grads_on_two_devices, ValueError, "must lie on one device, got cpu and meta"),
    (lambda: with_gradient(torch.ones(8)[::2]), ValueError, "must be dense"),
    (
        lambda: with_gradient(torch.ones(2).to_sparse()),
        ValueError,
        r"must be dense in memory, got a torch\.sparse_coo",
    ),
    (lambda: with_gradient(torch.ones(2, device="meta")), ValueError, "hold their own memory"),
]


@pytest.mark.parametrize(("make", "error", "message"), ERRORS, ids=[e[2] for e in ERRORS])
def test_rejects(make, error, message, path):
    with pytest.raises(error, match=message):
        clip_grad_norm_(make(), 1.0)


def test_rejects_shared_memory(device):
    p = with_gradient(torch.ones(2, device=device))
    q = nn.Parameter(torch.ones(2, device=device))
    q.grad = p.grad
    with pytest.raises(ValueError, match="must lie apart"):
        clip_grad_norm_([p, q], 1.0)
