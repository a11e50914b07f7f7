"""Prove that a layer which leaves the product to oneDNN is the linear layer that it stands for."""

import pytest
import torch
from torch import nn

from tritium.model import cpu_linear
from tritium.model.cpu_linear import Linear, OutputLinear


@pytest.fixture(autouse=True)
def onednn(monkeypatch):
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this PyTorch has no oneDNN")
    monkeypatch.setattr(cpu_linear, "_mkl_is_slow", lambda: True)
    monkeypatch.setattr(cpu_linear, "ROWS", 1)


@pytest.mark.parametrize("shape", [(7, 24), (2, 5, 24), (1, 24), (1, 1, 24), (2, 0, 24), (24,)])
@pytest.mark.parametrize("contiguous", [True, False])
def test_is_a_linear_layer(shape, contiguous):
    layer, plain = Linear(24, 10), nn.Linear(24, 10, bias=False)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(shape if contiguous else (*shape[:-1], 48))[..., :24].requires_grad_()
    y, expected = layer(x), plain(x)
    torch.testing.assert_close(y, expected)
    dy = torch.randn(expected.shape)
    actual = torch.autograd.grad(y, (x, layer.weight), dy)
    for got, wanted in zip(
        actual, torch.autograd.grad(expected, (x, plain.weight), dy), strict=True
    ):
        torch.testing.assert_close(got, wanted)


def test_errs_no_more_than_float32_does():
    layer, x = Linear(512, 64), torch.randn(300, 512, requires_grad=True)
    dy = torch.randn(300, 64)
    y = layer(x)
    assert "_Product" in type(y.grad_fn.next_functions[0][0]).__name__
    dx, dw = torch.autograd.grad(y, (x, layer.weight), dy)
    w, x, dy = layer.weight.detach().double(), x.detach().double(), dy.double()
    for got, exact in ((y, x @ w.T), (dx, dy @ w), (dw, dy.T @ x)):
        error = (got.double() - exact).norm() / exact.norm()
        assert error < 1e-6


def test_leaves_a_few_rows_to_pytorch(monkeypatch):
    monkeypatch.setattr(cpu_linear, "ROWS", 4)
    layer, x = Linear(8, 8), torch.randn(2, 2, 8)
    assert "_Product" in type(layer(x).grad_fn.next_functions[0][0]).__name__
    assert "_Product" not in type(layer(x[:1]).grad_fn.next_functions[0][0]).__name__


def test_few_rows_of_a_large_weight_go_another_way(monkeypatch):
    monkeypatch.setattr(cpu_linear, "ROWS", 64)
    taken = []
    for name in ("_behind", "_product"):
        way = getattr(cpu_linear, name)
        monkeypatch.setattr(cpu_linear, name, lambda *x, n=name, w=way: taken.append(n) or w(*x))
    for out, wide, rows, expected in (
        (6144, 256, 1, "_behind"), (6144, 256, 4, "_behind"), (6144, 256, 5, "_product"),
        (2048, 256, 1, None), (2048, 256, 2, "_product"), (1024, 256, 2, None),
        (6208, 255, 1, None), (6208, 255, 3, "_product"), (1536, 1025, 1, None),
    ):  # fmt: skip
        layer, x = OutputLinear(wide, out, bias=rows == 4), torch.randn(1, rows, wide)
        with torch.no_grad():
            y = layer(x)
        assert y.is_contiguous()
        assert taken == [expected] * (expected is not None), (out, wide, rows)
        exact = nn.functional.linear(x.double(), layer.weight.double())
        exact = exact if layer.bias is None else exact + layer.bias
        assert (y - exact).norm() < 1e-6 * exact.norm()
        taken.clear()
        if expected == "_behind":  # a gradient is made of the usual products
            layer(x).sum().backward()
            assert layer.weight.grad is not None
            assert "_behind" not in taken
            taken.clear()


def test_is_differentiable_twice():
    layer, x = Linear(6, 4), torch.randn(3, 6, requires_grad=True)
    dx = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)[0]
    second = torch.autograd.grad(dx.square().sum(), x)[0]
    w = layer.weight.detach()
    gram = w.T @ w
    torch.testing.assert_close(second, 8 * x.detach() @ gram @ gram)


def test_leaves_other_dtypes_to_pytorch():
    x = torch.randn(3, 8)
    layer = Linear(8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert "_Product" not in repr(layer.double()(x.double()).grad_fn)
    half = Linear(8, 8).bfloat16()
    assert half(x.bfloat16()).dtype == torch.bfloat16


def test_compiles():
    layer, x = Linear(8, 8), torch.randn(3, 8)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), layer(x))
