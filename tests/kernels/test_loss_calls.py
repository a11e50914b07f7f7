"""Prove that losses and softmax take PyTorch's calls, and agree with it through every transform."""

import inspect
from importlib import import_module

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch.func import grad, vmap
from torch.utils._pytree import tree_map_only

from tritium import kernels
from tritium.kernels import runtime

NAMES = ["cross_entropy", "linear_cross_entropy", "mse_loss", "softmax", "log_softmax"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
X, W = torch.randn(6, 8, device=DEVICE), torch.randn(11, 8, device=DEVICE)
CLASSES = torch.tensor([3, 0, -100, 7, 2, 5], device=DEVICE)
P = torch.rand(6, 8, device=DEVICE).softmax(-1)
LOSSES = {
    "cross_entropy": lambda x, t: kernels.cross_entropy(x, t),
    "cross_entropy, options": lambda x, t: kernels.cross_entropy(
        x, t, label_smoothing=0.1, z_loss=0.1, softcap=4.0, logit_scale=0.5
    ),
    "linear_cross_entropy": lambda x, t: kernels.linear_cross_entropy(x, W, t),
    "linear_cross_entropy, statistics": lambda x, t: kernels.linear_cross_entropy(
        x, W, t, return_stats=True
    )[0],
    "info_nce": lambda x, t: kernels.info_nce(x, x.roll(1, -1)),
    "mse_loss": lambda x, t: kernels.mse_loss(x, torch.zeros_like(x)),
    "softmax": lambda x, t: kernels.softmax(x, -1).square().sum(),
    "log_softmax": lambda x, t: kernels.log_softmax(x, -1).square().sum(),
}


def linear_cross_entropy(x, w, target, linear_bias=None, **options):
    """PyTorch's loss where it has it, from 2.13 on, else the same from its parts."""
    if hasattr(F, "linear_cross_entropy"):
        return F.linear_cross_entropy(x, w, target, linear_bias=linear_bias, **options)
    return F.cross_entropy(F.linear(x, w, linear_bias), target, **options)


@pytest.fixture(params=["kernel", "default"])
def path(request, monkeypatch):
    """Run a test as with kernels, and as a CPU runs it."""
    monkeypatch.setattr(runtime, "CPU_KERNELS", request.param == "kernel")


@pytest.mark.parametrize("name", [name for name in NAMES if hasattr(F, name)])
def test_signature_starts_with_pytorch_s(name):
    actual = list(inspect.signature(getattr(kernels, name)).parameters.values())
    torch_result = list(inspect.signature(getattr(F, name)).parameters.values())
    for own, other in zip(actual, torch_result, strict=False):
        assert (own.name, own.kind, own.default) == (other.name, other.kind, other.default)
    assert len(actual) >= len(torch_result)
    assert all(own.kind == own.KEYWORD_ONLY for own in actual[len(torch_result) :])


@pytest.mark.parametrize(
    ("name", "args", "options"),
    [
        ("cross_entropy", (X, CLASSES, torch.rand(8)), {}),
        ("cross_entropy", (X, CLASSES.abs() % 8, None, None, 3, None, "sum", 0.1), {}),
        ("cross_entropy", (), dict(input=X, target=P, reduction="none")),
        ("linear_cross_entropy", (X, W, CLASSES), dict(weight=torch.rand(11))),
        ("linear_cross_entropy", (X, W, CLASSES), dict(linear_bias=torch.rand(11))),
        ("linear_cross_entropy", (X, W, CLASSES.abs() % 8), dict(ignore_index=3)),
        ("linear_cross_entropy", (X[0], W, CLASSES[0]), {}),
        ("mse_loss", (X, P, None, None, "sum"), {}),
        ("mse_loss", (X, P), dict(weight=P)),
        ("mse_loss", (X, P), dict(weight=P, reduction="none")),
        ("softmax", (X,), dict(dim=-1, dtype=torch.float64)),
        ("softmax", (CLASSES, 0, 3, torch.float32), {}),
        ("softmax", (torch.tensor(2.0), 0), {}),
        ("log_softmax", (), dict(input=X, dim=0)),
    ],
)
def test_agrees_with_pytorch(name, args, options, path):
    args, options = tree_map_only(torch.Tensor, lambda x: x.to(DEVICE), (args, options))
    if name == "linear_cross_entropy":
        torch_result = linear_cross_entropy(*args, **options)
    else:
        torch_result = getattr(F, name)(*args, **options)
    torch.testing.assert_close(getattr(kernels, name)(*args, **options), torch_result)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kernels.cross_entropy(X, CLASSES, None, False), 'pass reduction="sum"'),
        (lambda: kernels.mse_loss(X, P, reduce=False), 'pass reduction="none"'),
        (lambda: kernels.cross_entropy(X, P, ignore_index=0), "ignore_index is for class indices"),
        (lambda: kernels.linear_cross_entropy(X, W, P @ W.T, ignore_index=-1), "for class indices"),
        (lambda: kernels.cross_entropy(X, CLASSES, logit_scale=X[0, 0]), "must be a number, got a"),
        (lambda: kernels.softmax(X, scale=X[0, 0]), "scale must be a number, got a tensor"),
        (lambda: kernels.softmax(X[None]), "dim must be given"),
        (lambda: kernels.softmax(CLASSES, 0), "input must be floating point, .*; pass dtype"),
        (lambda: kernels.mse_loss(X, P, weight=P[0]), r"weight must be \[6, 8\]"),
    ],
)
def test_refuses_in_a_sentence(call, message, path):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("name", LOSSES)
def test_transforms_of_torch_func(name, path):
    loss = LOSSES[name]
    x = X.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(x, CLASSES), x)
    torch.testing.assert_close(grad(loss)(X, CLASSES), expected, rtol=1e-4, atol=1e-6)
    xs, targets = torch.stack([X, X * 2]), torch.stack([CLASSES, CLASSES.roll(1)])
    each = torch.stack([grad(loss)(a, b) for a, b in zip(xs, targets, strict=True)])
    torch.testing.assert_close(vmap(grad(loss))(xs, targets), each, rtol=1e-4, atol=1e-6)


# Dynamo's own warning.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("name", LOSSES)
def test_one_compilation_serves_all_lengths(name, path):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(LOSSES[name], backend=counter, fullgraph=True, dynamic=True)
    frames = []
    for n in (4, 5, 6):
        x, t = X[:n].clone(), CLASSES[:n].clone()
        torch.testing.assert_close(compiled(x, t), LOSSES[name](x, t))
        frames.append(counter.frame_count)
    assert frames[0] == frames[-1]


@pytest.mark.parametrize("name", LOSSES)
def test_exports_with_any_length_and_a_gradient(name, path):
    class Loss(torch.nn.Module):
        def forward(self, x, t):
            return LOSSES[name](x, t)

    rows = torch.export.Dim("rows", min=3, max=64)
    exported = torch.export.export(
        Loss(), (X, CLASSES), dynamic_shapes=({0: rows}, {0: rows})
    ).module()
    x = X[:4].clone().requires_grad_()
    loss = exported(x, CLASSES[:4])
    torch.testing.assert_close(loss, LOSSES[name](x, CLASSES[:4]))
    assert torch.autograd.grad(loss, x)[0].isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
def test_a_second_derivative_where_the_message_promises_one(name, monkeypatch):
    monkeypatch.setattr(runtime, "REFERENCE", True)
    x = X.double().requires_grad_()
    monkeypatch.setitem(globals(), "W", W.double())
    assert torch.autograd.gradgradcheck(lambda x: LOSSES[name](x, CLASSES), x)


@pytest.mark.parametrize("name", LOSSES)
def test_many_gradients_at_once_are_refused_in_a_sentence_or_right(name, path):
    x = X.clone().requires_grad_()
    y, scales = LOSSES[name](x, CLASSES), torch.tensor([1.0, -2.0], device=DEVICE)
    (once,) = torch.autograd.grad(y, x, retain_graph=True)
    try:
        (found,) = torch.autograd.grad(y, x, scales, is_grads_batched=True)
    except RuntimeError as error:
        assert "one incoming gradient at a time; leave out is_grads_batched" in str(error)  # noqa: PT017 (or right)
    else:
        torch.testing.assert_close(found, scales[:, None, None] * once)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("target", [[1, 1, 1], [1, 5, -100], [-100] * 3], ids=str)
def test_targets_without_weight(target, label_smoothing, path):
    options = dict(weight=torch.ones(8, device=DEVICE), label_smoothing=label_smoothing)
    options["weight"][[1, 5]] = 0.0
    target = torch.tensor(target, device=DEVICE)
    found = []
    for loss in (F.cross_entropy, kernels.cross_entropy):
        x = X[:3].clone().requires_grad_()
        value = loss(x, target, **options)
        found.append((value.detach(), *torch.autograd.grad(value, x)))
    torch.testing.assert_close(found[1], found[0], equal_nan=True)
    found = []
    for loss in (linear_cross_entropy, kernels.linear_cross_entropy):
        x, w = X[:3].clone().requires_grad_(), torch.eye(8, device=DEVICE).requires_grad_()
        value = loss(x, w, target, **options)
        found.append((value.detach(), *torch.autograd.grad(value, (x, w))))
    torch.testing.assert_close(found[1], found[0], equal_nan=True)


SCALE = 65536.0  # what torch.amp.GradScaler begins with
SMALL = torch.tensor([[0.0, -16.0, -17.5]], device=DEVICE).repeat(4, 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", ["plain", "inplace", "linear", "info_nce"])
def test_small_gradients_survive_until_the_loss_scale_comes(way, dtype):
    calls = {
        "plain": lambda x: kernels.cross_entropy(x * 1, x.new_zeros(4).long()),
        "inplace": lambda x: kernels.cross_entropy(x * 1, x.new_zeros(4).long(), inplace=True),
        "linear": lambda x: kernels.linear_cross_entropy(
            x, torch.eye(3).to(x), x.new_zeros(4).long()
        ),
        "info_nce": lambda x: kernels.info_nce(
            x, torch.eye(4, 3).to(x), temperature=1.0, normalize=False
        ),
    }
    reference = {
        "plain": lambda x: F.cross_entropy(x, x.new_zeros(4).long()),
        "info_nce": lambda x: F.cross_entropy(
            x @ torch.eye(4, 3).to(x).T, torch.arange(4, device=DEVICE)
        ),
    }
    small = SMALL.to(dtype)
    x, exact = small.clone().requires_grad_(), small.double().requires_grad_()
    (SCALE * calls[way](x)).backward()
    reference.get(way, reference["plain"])(exact).backward()
    error = (x.grad.double() / SCALE - exact.grad)[:, 1:].norm() / exact.grad[:, 1:].norm()
    assert error < 0.01
    assert (x.grad != 0).sum() >= (exact.grad.abs() > 1e-9).sum() - 4  # of the target itself


@pytest.mark.parametrize("option", ["label_smoothing", "z_loss", "softcap", "logit_scale"])
@pytest.mark.parametrize("value", [0.1, 0.7])
def test_a_float64_kernel_gets_its_options_in_float64(option, value):
    module = import_module("tritium.kernels.cross_entropy")
    x, target = X.double(), CLASSES
    actual = kernels.cross_entropy(x, target, **{option: value})
    exact = module.cross_entropy_reference(x, target, **{option: value})
    torch.testing.assert_close(actual, exact, rtol=1e-14, atol=0)


@pytest.mark.parametrize("N", [8, 20_000, 40_000])
def test_a_float64_softmax_gets_its_scale_in_float64(N):
    x = torch.randn(2, N, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(2, N, dtype=torch.float64)
    for actual, torch_result in (
        (kernels.softmax, F.softmax),
        (kernels.log_softmax, F.log_softmax),
    ):
        found, exact = actual(x, -1, scale=0.3), torch_result(x * 0.3, -1)
        torch.testing.assert_close(found, exact, rtol=1e-13, atol=1e-15)
        (dx,), (exact,) = (torch.autograd.grad(y, x, dy) for y in (found, exact))
        torch.testing.assert_close(dx, exact, rtol=1e-11, atol=1e-15)
