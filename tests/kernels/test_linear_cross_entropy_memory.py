"""Prove that linear_cross_entropy makes no product, pass or buffer that nobody asked for.

Every case runs twice: with the kernels, and with their PyTorch stand-in that serves a CPU.
"""

import pytest
import torch

from tritium.kernels import _linear_cross_entropy as module
from tritium.kernels import runtime
from tritium.kernels.linear_cross_entropy import linear_cross_entropy
from tritium.model.activation_checkpointing import Ledger


@pytest.fixture(params=["kernel", "reference"], autouse=True)
def rows(request, monkeypatch):
    if request.param == "reference":
        monkeypatch.setattr(runtime, "_fallen", frozenset({"cross_entropy"}))


def layer(T, D, V, device, dtype=torch.float32):
    hidden = torch.randn(T, D, device=device).to(dtype)
    weight = (torch.randn(V, D, device=device) / D**0.5).to(dtype)
    return hidden, weight, torch.randint(V, (T,), device=device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_result_depends_on_the_number_of_chunks(dtype, reduction, device):
    """Loss, statistics and gradients are equal bit for bit where the products are exact.

    The inputs are such that no sum of a product rounds, whatever its order: one token has a number
    in a feature, and one class. What a library of products does with the order of its sums, and
    float32 with that over chunks, is not the chunks' doing.
    """
    T, D, V = 24, 40, 56
    hidden = torch.zeros(T, D, device=device, dtype=dtype)
    hidden[torch.arange(D) % T, torch.arange(D)] = torch.randint(-4, 5, (D,), device=device).to(
        dtype
    )
    weight = torch.zeros(V, D, device=device, dtype=dtype)
    weight[torch.randperm(V)[:D], torch.arange(D)] = 0.5
    target = torch.randint(V, (T,), device=device)
    target[5] = -100
    dloss = torch.rand(T, device=device) if reduction == "none" else torch.tensor(1.0)
    results = []
    for chunk in (T, 23, 12, 7, 1):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        loss, stats = linear_cross_entropy(
            *leaves, target, chunk_bytes=chunk * V * dtype.itemsize, reduction=reduction,
            z_loss=0.1, return_stats=True,
        )  # fmt: skip
        loss.backward(dloss.to(loss))
        results.append([loss.detach(), *stats, *(x.grad for x in leaves)])
    assert results[0][-1].count_nonzero() > D
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@pytest.mark.parametrize("frozen", ["hidden", "weight", "neither"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_frozen_input_costs_no_product(frozen, reduction, device, monkeypatch):
    """A head without gradient has no dweight, a hidden state without gradient no dhidden."""
    hidden, weight, target = layer(12, 4, 9, device)
    hidden.requires_grad_(frozen != "hidden")
    weight.requires_grad_(frozen != "weight")
    shapes = []
    product = module._product
    monkeypatch.setattr(
        module,
        "_product",
        lambda a, b, out, **k: shapes.append(out.shape) or product(a, b, out, **k),
    )
    chunks = dict(chunk_bytes=4 * 9 * 4)  # three
    linear_cross_entropy(hidden, weight, target, reduction=reduction, **chunks).sum().backward()
    assert len(shapes) == (6 if frozen == "neither" else 3)
    assert shapes.count((4, 4)) == (0 if frozen == "hidden" else 3)
    assert shapes.count((9, 4)) == (0 if frozen == "weight" else 3)


def test_a_frozen_bfloat16_head_is_chunked_by_the_budget(device, monkeypatch):
    """Without a gradient of the weight no sum of it is saved by keeping all logits."""
    monkeypatch.setattr(module, "CHUNK_BYTES_CPU", 4 * 64 * 2)
    monkeypatch.setattr(module, "CHUNK_BYTES_CUDA", 4 * 64 * 2)
    sizes = []
    real = module.loss_rows
    monkeypatch.setattr(module, "loss_rows", lambda x, *a: sizes.append(len(x)) or real(x, *a))
    hidden, weight, target = layer(16, 16, 64, device, torch.bfloat16)
    hidden.requires_grad_()
    linear_cross_entropy(hidden, weight, target)
    assert sizes == [4] * 4
    linear_cross_entropy(hidden, weight.requires_grad_(), target)
    assert sizes == [4] * 4 + [16]


@pytest.mark.parametrize(
    ("dtype", "chunk", "extra"),
    [(torch.float32, 4, 0), (torch.bfloat16, 4, 2), (torch.bfloat16, 16, 0)],
)
def test_backward_makes_at_most_one_buffer(dtype, chunk, extra, device):
    """The float32 sum is handed over as it is, or rounded in one pass: no float32 copy of it."""
    V, D = 512, 64
    hidden, weight, target = layer(16, D, V, device, dtype)
    inputs = [x.requires_grad_() for x in (hidden, weight)]
    loss = linear_cross_entropy(*inputs, target, chunk_bytes=chunk * V * dtype.itemsize)
    kept = [x.detach() for x in loss.grad_fn.saved_tensors[:2]]
    with Ledger([loss, *inputs, *kept]) as ledger:
        (loss / 2).backward()
    room = 64  # numbers
    assert extra * V * D <= ledger.peak <= extra * V * D + room
    if not extra:
        assert weight.grad.data_ptr() == kept[1].data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_kept_graph_keeps_its_gradients(dtype, device):
    """Gradients are scaled in place only in the last backward pass of a graph."""
    hidden, weight, target = layer(16, 8, 32, device, dtype)
    inputs = [x.requires_grad_() for x in (hidden, weight)]
    for chunk in (4, 16):
        loss = linear_cross_entropy(*inputs, target, chunk_bytes=chunk * 32 * dtype.itemsize)
        first, second, last = (
            torch.autograd.grad(loss, inputs, loss.new_tensor(factor), retain_graph=keep)
            for factor, keep in ((2.0, True), (-4.0, True), (8.0, False))
        )
        for a, b, c in zip(first, second, last, strict=True):
            assert torch.equal(b, -2 * a)  # powers of two: exact
            assert torch.equal(c, 4 * a)
