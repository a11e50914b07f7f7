"""Operations work inside torch.compile with unknown sizes, torch.export and torch.func.

One compilation serves all lengths, and every transform gives what it gives of the reference.
"""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad

from tritium.kernels import (
    add_layer_norm,
    add_rms_norm,
    dropout_add,
    embedding,
    geglu,
    layer_norm,
    relu_squared,
    rms_norm,
    rope,
    swiglu,
)
from tritium.kernels.runtime import OPERATIONS as WITH_KERNELS
from tritium.kernels.runtime import references

H, K = 3, 8
W = torch.randn(K)
ANGLES = torch.randn(64, K // 2)
COS, SIN = ANGLES.cos(), ANGLES.sin()

# An operation of rows [B, L, H, K] and of a vector [K].
OPERATIONS = {
    "rms_norm": lambda x, w: rms_norm(x, (K,), w, 1e-6, offset=1.0),
    "rms_norm, two axes": lambda x, w: rms_norm(x, x.shape[2:]) * w,
    "add_rms_norm": lambda x, w: sum(add_rms_norm(x, x.tanh(), w)),
    "layer_norm": lambda x, w: layer_norm(x, (K,), w, w.cos()),
    "add_layer_norm": lambda x, w: sum(add_layer_norm(x, x.tanh(), w, w.cos())),
    "rope": lambda x, w: rope(x * w, COS.to(x.device), SIN.to(x.device), offset=1),
    "rope, tables cut": lambda x, w: rope(
        x * w, COS.to(x.device)[: x.shape[1]], SIN.to(x.device)[: x.shape[1]], interleaved=True
    ),
    "rope, offset by the length": lambda x, w: rope(
        x * w, COS.to(x.device), SIN.to(x.device), offset=x.shape[1]
    ),
    "rope, offsets": lambda x, w: rope(
        x * w, COS.to(x.device), SIN.to(x.device), offset=torch.arange(x.shape[0], device=x.device)
    ),
    "swiglu": lambda x, w: swiglu(x, x * w),
    "swiglu, packed": lambda x, w: swiglu(*(x * w).chunk(2, -1)),
    "geglu": lambda x, w: geglu(x, x * w, approximate="tanh"),
    "relu_squared": lambda x, w: relu_squared(x * w),
    "dropout_add": lambda x, w: dropout_add(x * w, x, 0.3, seed=5),
    "embedding": lambda x, w: embedding(
        torch.arange(x.shape[1], device=x.device) % 4, w.expand(4, K) * x.mean()
    ),
}  # fmt: skip


@pytest.fixture(params=OPERATIONS.values(), ids=OPERATIONS)
def op(request):
    return request.param


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


def draw(B, L, device):
    return torch.randn(B, L, H, K, device=device, requires_grad=True)


@pytest.mark.usefixtures("path")
def test_one_compilation_for_all_sizes(op, device):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(op, fullgraph=True, dynamic=True, backend=counter)
    w = W.to(device).requires_grad_()
    compiled(draw(6, 5, device), w)  # sizes that nothing else has
    first = counter.frame_count  # 2 where PyTorch itself finds out that K is no free size
    for B, L in ((6, 5), (3, 7), (4, 31)):
        x = draw(B, L, device)
        y, expected = compiled(x, w), op(x, w)
        torch.testing.assert_close(y, expected)
        dy = torch.randn_like(y)
        found = torch.autograd.grad(y, (x, w), dy)
        torch.testing.assert_close(found, torch.autograd.grad(expected, (x, w), dy))
    assert counter.frame_count == first <= 2


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # by torch.func.jvp
@pytest.mark.usefixtures("path")
def test_functions_of_torch_func(op, device):
    x, w = draw(2, 5, device).detach().double(), W.to(device).double()

    def loss(x, w):
        return op(x, w).sin().sum()

    def gradients(x, w):
        leaves = x.detach().requires_grad_(), w.detach().requires_grad_()
        with references(*WITH_KERNELS):
            return torch.autograd.grad(loss(*leaves), leaves)

    expected = gradients(x, w)
    torch.testing.assert_close(torch.func.grad(loss, (0, 1))(x, w), expected)
    _, tangent = torch.func.jvp(loss, (x, w), (x.cos(), w.cos()))
    along = sum((g * t.cos()).sum() for g, t in zip(expected, (x, w), strict=True))
    torch.testing.assert_close(tangent, along)
    with forward_ad.dual_level():
        dual = loss(forward_ad.make_dual(x, x.cos()), forward_ad.make_dual(w, w.cos()))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, along)
    several = torch.stack([w, 2 * w])
    each = torch.func.vmap(torch.func.grad(loss, 1), (None, 0))(x, several)
    torch.testing.assert_close(each, torch.stack([gradients(x, v)[1] for v in several]))
    second = torch.func.grad(lambda w: torch.func.grad(loss, 1)(x, w).square().sum())(w)
    leaf = w.detach().requires_grad_()
    with references(*WITH_KERNELS):
        (first,) = torch.autograd.grad(loss(x, leaf), leaf, create_graph=True)
        torch.testing.assert_close(second, torch.autograd.grad(first.square().sum(), leaf)[0])


class Module(torch.nn.Module):
    def __init__(self, op, device):
        super().__init__()
        self.op, self.weight = op, torch.nn.Parameter(W.to(device))

    def forward(self, x):
        return self.op(x, self.weight)


@pytest.mark.usefixtures("path")
def test_exports_with_unknown_sizes(op, device):
    module = Module(op, device)
    sizes = {0: torch.export.Dim("B", min=2, max=50), 1: torch.export.Dim("L", min=2, max=30)}
    x = draw(6, 5, device).detach()
    exported = torch.export.export(module, (x,), dynamic_shapes=(sizes,)).module()
    for B, L in ((2, 9), (7, 30)):
        x = draw(B, L, device).detach()
        torch.testing.assert_close(exported(x), module(x))
